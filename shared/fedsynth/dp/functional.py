"""Clipped sums of gradients that are computed for each patient alone, by `torch.func`.

Book-keeping reads a patient's gradient off one pass through each layer. Where a loss differentiates twice (a gradient
penalty), uses a network more than once (a cycle) or joins several networks, it refuses, and this way takes over: the
gradient of one patient's loss is taken for every patient of a chunk at once (``vmap`` of ``grad``), so a gradient is what
autograd gives for that patient alone, whatever the loss does.

Samples of different patients cannot mix: the loss is a function of one patient's tensors, and ``vmap`` refuses a function
that would carry anything from one patient to the next. What it cannot see is a closure: tensors that the loss takes from
elsewhere must not depend on patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

from fedsynth.dp.bookkeeping import UnsupportedLayerError

# The model and one patient's tensors (k, ...) -> losses (k,), whose mean is the patient's, or the patient's loss ().
PatientLosses = Callable[..., Tensor]

# Added to a norm before the clip is divided by it, as Opacus does.
_STABILITY = 1e-6
# Patients at once, and the values that their gradients may have together. Measured on a processor (docs/private-step.md):
# more patients at once are slower there, since the kernels for a weight's gradient by patient are.
_MOST, _VALUES = 16, 4_000_000
_MOST_ELSEWHERE, _VALUES_ELSEWHERE = 64, 64_000_000


def default_chunk(parameters: Sequence[Tensor]) -> int:
    """How many patients' gradients by `parameters` are held at once when nothing else is said."""
    on_processor = all(parameter.device.type == "cpu" for parameter in parameters)
    most, values = (_MOST, _VALUES) if on_processor else (_MOST_ELSEWHERE, _VALUES_ELSEWHERE)
    return max(1, min(most, values // max(sum(parameter.numel() for parameter in parameters), 1)))


def clipped_sums_of(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    tensors: Sequence[Tensor],
    losses: PatientLosses,
    clip: float,
) -> list[Tensor]:
    """Sums over patients of the clipped gradients, one for each of `parameters`, in its shape.

    A patient's gradient is one vector over all `parameters`; it is multiplied by ``min(1, clip / (norm + 1e-6))``. One that
    is not finite counts as 0. Everything else in the model is a constant. Random layers (dropout) draw anew for each
    patient.

    Args:
        model: what `losses` calls, in whatever way; `fixed_parametrisations` is open.
        parameters: of `model`, in which order they are given back.
        tensors: (P, k, ...) each, P at least 1.
        losses: called with the model and each tensor's part of one patient, (k, ...).
        clip: bound of a patient's Euclidean norm over all parameters.

    Raises:
        UnsupportedLayerError: a parameter is not the model's, or a pass changed a buffer.
        ValueError: the losses are neither k nor one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if any(id(parameter) not in names for parameter in parameters):
        raise UnsupportedLayerError("the optimiser has parameters that the model has not")
    bound = _Bound(model, losses)
    trained = {f"model.{names[id(parameter)]}": parameter.detach() for parameter in parameters}
    held = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    # Copies: a layer that counts or averages what it sees would carry it from one patient, or chunk, to the next.
    buffers = {f"model.{name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
    versions = {name: buffer._version for name, buffer in buffers.items()}

    def loss(values: dict[str, Tensor], *patient: Tensor) -> Tensor:
        found = functional_call(bound, {**buffers, **held, **values}, patient)
        if found.shape not in ((), (len(patient[0]),)):
            raise ValueError(f"losses of shape {tuple(found.shape)} for a patient of {len(patient[0])} items")
        return found.mean()

    if len(tensors[0]) == 1:  # without `vmap`, whose kernels for convolutions are slow where a weight is large
        gradients = [gradient[None] for gradient in _of_one(loss, trained, [tensor.detach()[0] for tensor in tensors])]
    else:
        of_patients = vmap(grad(loss), in_dims=(None, *(0 for _ in tensors)), randomness="different")
        gradients = list(of_patients(trained, *(tensor.detach() for tensor in tensors)).values())
    changed = sorted(name for name, buffer in buffers.items() if buffer._version != versions[name])
    if changed:
        raise UnsupportedLayerError(f"a pass changes the buffers {changed}, which would carry patients on")
    return _clipped(gradients, clip)


def _of_one(loss: Callable[..., Tensor], trained: dict[str, Tensor], patient: list[Tensor]) -> list[Tensor]:
    """Gradients of one patient's loss by `trained`."""
    values = {name: value.clone().requires_grad_() for name, value in trained.items()}
    with torch.enable_grad():
        found = loss(values, *patient)
    return list(torch.autograd.grad(found, list(values.values()), allow_unused=True, materialize_grads=True))


def _clipped(gradients: list[Tensor], clip: float) -> list[Tensor]:
    """Sums (...) of `gradients` (P, ...), of which one patient's make up one vector."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    finite = norms.isfinite()
    factors = torch.where(finite, clip / (norms + _STABILITY), 0.0).clamp(max=1.0)
    sums = []
    for gradient in gradients:
        one_a_patient = (-1, *(1 for _ in gradient.shape[1:]))
        # 0 times infinity is NaN, so what is not finite is replaced, not weighted. A plain product and sum: a matrix
        # product may round more coarsely on some devices, and what is added would be longer than what was measured.
        kept = gradient.masked_fill(~finite.reshape(one_a_patient), 0.0)
        sums.append((kept * factors.reshape(one_a_patient)).sum(0))
    return sums


class _Bound(nn.Module):
    """The losses with their model, so that whatever they call of it is called with the values that are differentiated."""

    def __init__(self, model: nn.Module, losses: PatientLosses) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, *patient: Tensor) -> Tensor:
        """The losses of one patient."""
        return self._losses(self.model, *patient)


def held(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `call` makes of `module` with all its parameters taken as constants; gradients pass through to its inputs.

    So a part of a joint loss uses a network without moving it: a generator's feature matching, the discriminator.
    """
    constants = {f"model.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    found: Tensor = functional_call(_Bound(module, call), constants, ())
    return found


def input_gradients(scores: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Gradients of each item's score by its own input, in the shape of `inputs` (n, ...), to be differentiated again.

    Inside a patient's losses ``torch.autograd.grad`` would not see `torch.func`'s derivatives; this works there and in
    plain training.

    Args:
        scores: (n, ...) -> (n,), each item's from that item alone.
        inputs: where.
    """
    gradients: Tensor = grad(lambda values: scores(values).sum())(inputs)
    return gradients


def gradient_penalties(scores: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Each item's squared distance (n,) of the gradient's norm from 1 (WGAN-GP, Gulrajani et al. 2017).

    Args:
        scores: (n, ...) -> (n,), each item's from that item alone.
        inputs: (n, ...) points at which the critic's slope is wanted; where they depend on a patient, so does the
            penalty, which then belongs into that patient's losses.
    """
    squares = input_gradients(scores, inputs).flatten(1).square().sum(1)
    # The root has no derivative at 0, where a critic that is flat would make the gradient NaN.
    return ((squares + 1e-12).sqrt() - 1).square()


@contextmanager
def fixed_parametrisations(model: nn.Module) -> Iterator[None]:
    """Parametrised weights keep their state for as long as the context is open, after one use at its start.

    As `weights_of_one_step`: the vectors of spectral normalisation advance once a step, whatever is drawn. But the
    weights are not kept: they are computed again from the raw ones at each use, so that a gradient passes through.
    """
    with torch.no_grad():
        for module in model.modules():
            if parametrize.is_parametrized(module):
                for name in module.parametrizations:  # type: ignore[union-attr]
                    getattr(module, name)
    chains = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    before = [(module, module.training) for chain in chains for module in chain.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
