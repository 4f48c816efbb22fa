"""The private step: the patients' part is clipped by patient and noised; the public part is added after, untouched.

Derivation. Let g_p be the gradient of the loss on patient p's drawn slices. The update

    ( sum_p clip(g_p, C) + N(0, (sigma C)^2 I) ) / B   +   gradient of the public loss

changes by at most C / B in its first term when a patient is added or removed. B is the *expected* batch size, a public
constant. The public loss (a GAN's fake batch) depends on earlier noisy states and fresh noise only, so it is neither
clipped nor noised. Opacus' `DPOptimizer.add_noise` *sets* ``p.grad``: whatever was there before is lost, which is why
the public gradient comes after the noise and before the inner optimiser's step.

Several networks may be one model: their gradients are then one vector a patient, clipped as one. Clipped each for itself,
m networks would move the sum by up to sqrt(m) C.

Clipped sums come from one of three backends: ``"bookkeeping"`` (`fedsynth.dp.bookkeeping`, fast and small), ``"hooks"``
(Opacus' per-sample gradients) or ``"functional"`` (`fedsynth.dp.functional`: each patient's own gradient, for losses that
differentiate twice, use a network more than once or join several). All add up chunks of patients, so memory does not grow
with the draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _mark_as_processed
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsynth.dp.bookkeeping import Bookkeeper, UnsupportedLayerError, weights_of_one_step
from fedsynth.dp.bookkeeping.mixing import check_forward, watched
from fedsynth.dp.functional import PatientLosses, clipped_sums_of, default_chunk, fixed_parametrisations
from fedsynth.dp.randomness import Randomness

# Torch's remark on Opacus' hooks at the first layer, whose input needs no gradient: meant, and repeated at every step.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

Backend = Literal["bookkeeping", "hooks", "functional"]
# The module and positions (int64) in the draw -> losses (len(positions) * k,), the k items of a patient being neighbours.
PrivateLosses = Callable[[nn.Module, Tensor], Tensor]
# Positions (int64) in the draw -> tensors (len(positions), k, ...) of those patients.
PatientTensors = Callable[[Tensor], Sequence[Tensor]]
PublicLoss = Callable[[nn.Module], Tensor]
# A loss of each part, with the parameters that it moves: any others that it uses are constants to it.
PublicParts = Sequence[tuple[PublicLoss, Sequence[nn.Parameter]]]

# Patients at once. Measured (docs/private-step.md): with fewer the kernels' fixed costs show, more are not faster.
CHUNK = 64


class PatientDPOptimizer(DPOptimizer):
    """Opacus' optimiser, with the noise drawn from a `Randomness` and sums that may come clipped already."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
        randomness: Randomness,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._randomness = randomness

    @property
    def accumulated_iterations(self) -> int:
        """1: chunks of one draw share the one divisor, the expected batch."""
        return 1

    def accumulate(self, clipped_sums: Sequence[Tensor]) -> None:
        """Add sums over patients of clipped gradients, one for each parameter, to what is released next."""
        for parameter, clipped in zip(self.params, clipped_sums, strict=True):
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad.add_(clipped)

    def release(self) -> None:
        """Noise and scale what was accumulated, once, into ``p.grad``; without any patient, the noise alone."""
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)

    def add_noise(self) -> None:
        """Set ``p.grad`` to the clipped sum plus noise of standard deviation ``noise_multiplier * max_grad_norm``."""
        std = float(self.noise_multiplier) * float(self.max_grad_norm)
        for parameter in self.params:
            noise = self._randomness.normal(parameter.shape, std).to(parameter.device)
            parameter.grad = parameter.summed_grad + noise
            _mark_as_processed(parameter.summed_grad)


@dataclass
class PrivateModel:
    """A model, the way in which its clipped sums are computed, and the optimiser that noises them.

    Attributes:
        model: the model, whose state is what is stored and sent.
        module: what computes private losses: the model, or Opacus' wrapper around it.
        optimizer: noises, scales and steps.
        backend: how clipped sums are computed.
        bookkeeper: computes clipped sums; None with another backend.
        autocast: lower precision of forward and backward passes, or None.
        tested_for_mixing: whether a step has shown that samples do not see each other.
    """

    model: nn.Module
    module: nn.Module
    optimizer: PatientDPOptimizer
    backend: Backend
    bookkeeper: Bookkeeper | None
    autocast: torch.dtype | None
    tested_for_mixing: bool = False

    @contextmanager
    def public(self) -> Iterator[nn.Module]:
        """The model for passes over public data: no hook of the backend runs while the context is open."""
        if not isinstance(self.module, GradSampleModule):
            yield self.model
            return
        self.module.disable_hooks()
        try:
            yield self.model
        finally:
            self.module.enable_hooks()


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch: int,
    randomness: Randomness,
    backend: Backend | None = None,
    autocast: torch.dtype | None = None,
) -> PrivateModel:
    """Attach clipping by patient to `model` and privacy to `optimizer`.

    Args:
        model: no layer of it may mix samples (no BatchNorm, no statistics over the batch).
        optimizer: an optimiser over `model`'s parameters, or some of them: what it has not is a constant, neither
            counted in a patient's norm nor noised. Its groups may have learning rates of their own.
        noise_multiplier: noise standard deviation over `max_grad_norm`.
        max_grad_norm: clipping norm C of a patient's gradient.
        expected_batch: the public divisor B.
        randomness: source of the noise.
        backend: by default ``"bookkeeping"`` where every layer has an exact rule, else ``"hooks"``; ``"functional"``
            is stepped by `private_step_of` alone.
        autocast: run forward and backward passes in this precision (torch.bfloat16), norms, clipping and sums in
            float32: the step is then that of slightly different gradients, clipped exactly. Bookkeeping only.

    Raises:
        opacus.validators.errors.UnsupportedModuleError: a layer mixes samples.
        UnsupportedLayerError: a layer has no per-patient gradient rule.
        ValueError: `autocast` with another backend than book-keeping.
    """
    ModuleValidator.validate(model, strict=True)
    private_optimizer = PatientDPOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch,
        randomness=randomness,
    )
    if backend is None or backend == "bookkeeping":
        try:
            bookkeeper = Bookkeeper(model, private_optimizer.params)
            return PrivateModel(model, model, private_optimizer, "bookkeeping", bookkeeper, autocast)
        except UnsupportedLayerError:
            if backend == "bookkeeping":
                raise
    if autocast is not None:
        raise ValueError("autocast needs the backend bookkeeping, whose norms are computed in float32")
    if backend == "functional":
        return PrivateModel(model, model, private_optimizer, "functional", None, None)
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UnsupportedLayerError("Opacus' hooks have no rule for parametrised weights")
    module = GradSampleModule(model, loss_reduction="mean", strict=True)
    return PrivateModel(model, module, private_optimizer, "hooks", None, None)


def private_step(
    private: PrivateModel,
    patients: int,
    private_losses: PrivateLosses,
    public_loss: PublicLoss | PublicParts | None = None,
    *,
    items_per_patient: int = 1,
    chunk: int = CHUNK,
) -> None:
    """One noisy step on a drawn batch of patients.

    Args:
        private: the model and its optimiser.
        patients: number of patients drawn; 0 is allowed: the step is then noise alone.
        private_losses: maps the module and positions in the draw (int64, in 0 ... patients - 1) to losses
            (len(positions) * k,), the k items of a patient being neighbours. A patient's gradient is the mean over its k
            items and is clipped as one; one that is not finite counts as 0 (with hooks: its values that are not finite).
        public_loss: maps the model to a scalar that depends on no private data given the model; its gradient is added
            unclipped and without noise. A plain backward pass. Or several such losses, each with the parameters that it
            moves.
        items_per_patient: k. Stated, since losses of other patients than those asked for could pass as further items.
        chunk: patients whose clipped gradients are computed at once. The result does not depend on it.

    Raises:
        ValueError: the losses are not k a patient, `chunk` is not positive, or the backend is functional.
        MixedSamplesError: at the first step with several items: a sample's output or loss depends on another sample.
        UnsupportedLayerError: the losses use the model in a way whose per-patient gradient is not known.
    """
    _check_chunk(chunk)
    if private.backend == "functional":
        raise ValueError("the functional backend takes the losses of one patient: use private_step_of")
    private.optimizer.zero_grad(set_to_none=True)
    accumulate = _accumulate_with_hooks if private.bookkeeper is None else _accumulate
    with weights_of_one_step(private.model):
        for positions in torch.arange(patients).split(chunk) if patients else ():
            with watched(private.model) if not private.tested_for_mixing else nullcontext() as seen:
                items = accumulate(private, positions, private_losses)
            if items != len(positions) * items_per_patient:
                raise ValueError(
                    f"{items} losses cannot be split evenly over {len(positions)} patients of {items_per_patient} items"
                )
            if seen is not None:
                check_forward(private.model, seen, items)
                private.tested_for_mixing = items > 1
    _release(private, public_loss)


def private_step_of(
    private: PrivateModel,
    patients: int,
    tensors: PatientTensors,
    losses: PatientLosses,
    public_loss: PublicLoss | PublicParts | None = None,
    *,
    chunk: int | None = None,
) -> None:
    """One noisy step, as `private_step`, whose losses are a function of patients' tensors; for every backend.

    With the functional backend a patient's gradient is that of ``losses`` on its tensors alone; nothing of another patient
    can reach it by way of them. With the others all patients of a chunk are one call.

    Args:
        private: the model and its optimiser.
        patients: number of patients drawn; 0 is allowed: the step is then noise alone.
        tensors: maps positions in the draw (int64, in 0 ... patients - 1) to tensors (len(positions), k, ...) each.
        losses: called with the module and tensors (n, ...) of items; gives losses (n,). With the functional backend n is
            k, the items are one patient's, and one loss () of them all is allowed too. It may differentiate twice, with
            `fedsynth.dp.functional.input_gradients`, and use the module in any way.
        public_loss: as in `private_step`.
        chunk: patients whose clipped gradients are computed at once; by default what suits the backend and the model.

    Raises:
        ValueError: losses or tensors of another shape, or `chunk` is not positive.
        MixedSamplesError, UnsupportedLayerError: as in `private_step`.
    """
    if private.backend == "functional":
        _functional_step(private, patients, tensors, losses, public_loss, chunk)
        return
    items = len(_checked(tensors(torch.arange(1)), 1)[0][0]) if patients else 1

    def of_items(module: nn.Module, positions: Tensor) -> Tensor:
        return losses(module, *(tensor.flatten(0, 1) for tensor in _checked(tensors(positions), len(positions))))

    at_once = max(CHUNK // items, 1) if chunk is None else chunk
    private_step(private, patients, of_items, public_loss, items_per_patient=items, chunk=at_once)


def _functional_step(
    private: PrivateModel,
    patients: int,
    tensors: PatientTensors,
    losses: PatientLosses,
    public_loss: PublicLoss | PublicParts | None,
    chunk: int | None,
) -> None:
    parameters, clip = private.optimizer.params, float(private.optimizer.max_grad_norm)
    at_once = default_chunk(parameters) if chunk is None else chunk
    _check_chunk(at_once)
    private.optimizer.zero_grad(set_to_none=True)
    with fixed_parametrisations(private.model):
        for positions in torch.arange(patients).split(at_once) if patients else ():
            of_chunk = _checked(tensors(positions), len(positions))
            private.optimizer.accumulate(clipped_sums_of(private.model, parameters, of_chunk, losses, clip))
    _release(private, public_loss)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")


def _checked(tensors: Sequence[Tensor], patients: int) -> Sequence[Tensor]:
    """`tensors`, if all are (patients, k, ...) with one k of at least 1."""
    shapes = {tuple(tensor.shape[:2]) for tensor in tensors}
    if len(shapes) != 1 or (shape := shapes.pop())[0] != patients or len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"tensors of {patients} patients must all have shape ({patients}, k, ...)")
    return tensors


def _release(private: PrivateModel, public_loss: PublicLoss | PublicParts | None) -> None:
    """Noise what was accumulated, add the public gradient and step."""
    private.optimizer.release()
    if public_loss is not None:
        for parameter, gradient in zip(private.optimizer.params, _public_gradient(private, public_loss), strict=True):
            parameter.grad += gradient
    private.optimizer.original_optimizer.step()


def _accumulate(private: PrivateModel, positions: Tensor, private_losses: PrivateLosses) -> int:
    """Add the clipped gradients of the patients at `positions`; returns the number of losses."""
    assert private.bookkeeper is not None

    def losses() -> Tensor:
        with _autocast(private):
            return private_losses(private.model, positions)

    sums, items = private.bookkeeper.clipped_sums(
        losses, len(positions), float(private.optimizer.max_grad_norm), check_mixing=not private.tested_for_mixing
    )
    private.optimizer.accumulate(sums)
    return items


def _accumulate_with_hooks(private: PrivateModel, positions: Tensor, private_losses: PrivateLosses) -> int:
    for parameter in private.optimizer.params:
        parameter.grad_sample = None
    losses = private_losses(private.module, positions)
    items, remainder = divmod(len(losses), len(positions))
    if remainder or not items:
        raise ValueError(f"{len(losses)} losses cannot be split evenly over {len(positions)} patients")
    losses.mean().backward()
    for parameter in private.optimizer.params:
        per_item = parameter.grad_sample
        per_patient = per_item.reshape(len(positions), items, *per_item.shape[1:]).mean(1) if items > 1 else per_item
        # Clipping bounds finite gradients only. With weights made for it, one patient's gradient overflows, and
        # without this it would turn the sum into NaN and so tell that the patient was drawn.
        parameter.grad_sample = per_patient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    private.optimizer.clip_and_accumulate()
    return len(losses)


def _autocast(private: PrivateModel) -> torch.autocast:
    device = next(private.model.parameters()).device.type
    return torch.autocast(device, dtype=private.autocast, enabled=private.autocast is not None)


def _public_gradient(private: PrivateModel, loss: PublicLoss | PublicParts) -> list[Tensor]:
    with private.public() as model, _autocast(private):
        return public_gradients(model, private.optimizer.params, loss)


def public_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: PublicLoss | PublicParts
) -> list[Tensor]:
    """Gradients of `loss` by `parameters`, in their shapes; 0 where it does not reach one.

    Args:
        model: what the losses are called with.
        parameters: what trains.
        loss: one loss of all `parameters`, or several, each with the parameters that it moves.

    Raises:
        ValueError: a part moves what does not train.
    """
    parts = [(loss, parameters)] if callable(loss) else loss
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    found = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    for of_part, moved in parts:
        if any(id(parameter) not in places for parameter in moved):
            raise ValueError("a public loss moves parameters that the optimiser has not")
        gradients = torch.autograd.grad(of_part(model), list(moved), allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(moved, gradients, strict=True):
            found[places[id(parameter)]] += gradient
    return found


def clamp_weights(parameters: Iterable[nn.Parameter], bound: float) -> None:
    """Limit every weight to [-bound, bound], in place (WGAN, Arjovsky et al. 2017): of a noised state, post-processing."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.clamp_(-bound, bound)
