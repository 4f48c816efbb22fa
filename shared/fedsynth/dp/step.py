"""The private step: the patients' part is clipped by patient and noised; the public part is added after, untouched.

Derivation. Let g_p be the gradient of the loss on patient p's drawn slices. The update

    ( sum_p clip(g_p, C) + N(0, (sigma C)^2 I) ) / B   +   gradient of the public loss

changes by at most C / B in its first term when a patient is added or removed. B is the *expected* batch size, a public
constant. The public loss (a GAN's fake batch) depends on earlier noisy states and fresh noise only, so it is neither
clipped nor noised. Opacus' `DPOptimizer.add_noise` *sets* ``p.grad``: whatever was there before is lost, which is why
the public gradient comes after the noise and before the inner optimiser's step.

Clipped sums come from one of two backends: ``"bookkeeping"`` (`fedsynth.dp.bookkeeping`, fast and small) or ``"hooks"``
(Opacus' per-sample gradients). Both add up chunks of patients, so memory does not grow with the draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
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
from fedsynth.dp.randomness import Randomness

# Torch's remark on Opacus' hooks at the first layer, whose input needs no gradient: meant, and repeated at every step.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

Backend = Literal["bookkeeping", "hooks"]
# The module and positions (int64) in the draw -> losses (len(positions) * k,), the k items of a patient being neighbours.
PrivateLosses = Callable[[nn.Module, Tensor], Tensor]
PublicLoss = Callable[[nn.Module], Tensor]

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
        bookkeeper: computes clipped sums; None with Opacus' hooks.
        autocast: lower precision of forward and backward passes, or None.
        tested_for_mixing: whether a step has shown that samples do not see each other.
    """

    model: nn.Module
    module: nn.Module
    optimizer: PatientDPOptimizer
    bookkeeper: Bookkeeper | None
    autocast: torch.dtype | None
    tested_for_mixing: bool = False

    @property
    def backend(self) -> Backend:
        """How clipped sums are computed."""
        return "hooks" if self.bookkeeper is None else "bookkeeping"

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
        optimizer: an optimiser over `model`'s parameters.
        noise_multiplier: noise standard deviation over `max_grad_norm`.
        max_grad_norm: clipping norm C of a patient's gradient.
        expected_batch: the public divisor B.
        randomness: source of the noise.
        backend: by default ``"bookkeeping"`` where every layer has an exact rule, else ``"hooks"``.
        autocast: run forward and backward passes in this precision (torch.bfloat16), norms, clipping and sums in
            float32: the step is then that of slightly different gradients, clipped exactly. Bookkeeping only.

    Raises:
        opacus.validators.errors.UnsupportedModuleError: a layer mixes samples.
        UnsupportedLayerError: a layer has no per-patient gradient rule.
        ValueError: `autocast` with hooks.
    """
    ModuleValidator.validate(model, strict=True)
    private_optimizer = PatientDPOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch,
        randomness=randomness,
    )
    if backend != "hooks":
        try:
            bookkeeper = Bookkeeper(model, private_optimizer.params)
            return PrivateModel(model, model, private_optimizer, bookkeeper, autocast)
        except UnsupportedLayerError:
            if backend == "bookkeeping":
                raise
    if autocast is not None:
        raise ValueError("autocast needs the backend bookkeeping, whose norms are computed in float32")
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise UnsupportedLayerError("Opacus' hooks have no rule for parametrised weights")
    module = GradSampleModule(model, loss_reduction="mean", strict=True)
    return PrivateModel(model, module, private_optimizer, None, None)


def private_step(
    private: PrivateModel,
    patients: int,
    private_losses: PrivateLosses,
    public_loss: PublicLoss | None = None,
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
            unclipped and without noise. A plain backward pass.
        items_per_patient: k. Stated, since losses of other patients than those asked for could pass as further items.
        chunk: patients whose clipped gradients are computed at once. The result does not depend on it.

    Raises:
        ValueError: the losses are not k a patient, or `chunk` is not positive.
        MixedSamplesError: at the first step with several items: a sample's output or loss depends on another sample.
        UnsupportedLayerError: the losses use the model in a way whose per-patient gradient is not known.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
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


def _public_gradient(private: PrivateModel, loss: PublicLoss) -> tuple[Tensor, ...]:
    with private.public() as model:
        with _autocast(private):
            value = loss(model)
        return torch.autograd.grad(value, private.optimizer.params)
