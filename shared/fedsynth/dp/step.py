"""The private step: Opacus clips and noises the patients' part; the public part is added after, untouched.

Derivation. Let g_p be the gradient of the loss on patient p's drawn slices. The update

    ( sum_p clip(g_p, C) + N(0, (sigma C)^2 I) ) / B   +   gradient of the public loss

changes by at most C / B in its first term when a patient is added or removed. B is the *expected* batch size, a public
constant. The public loss (a GAN's fake batch) depends on earlier noisy states and fresh noise only, so it is neither
clipped nor noised. Opacus' `DPOptimizer.add_noise` *sets* ``p.grad``: whatever was there before is lost, which is why
the public gradient comes after `pre_step` and before the inner optimiser's step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _mark_as_processed
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fedsynth.dp.randomness import Randomness

# Torch's remark on Opacus' hooks at the first layer, whose input needs no gradient: meant, and repeated at every step.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class PatientDPOptimizer(DPOptimizer):
    """Opacus' optimiser, with the noise drawn from a `Randomness`."""

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

    def add_noise(self) -> None:
        """Set ``p.grad`` to the clipped sum plus noise of standard deviation ``noise_multiplier * max_grad_norm``."""
        std = float(self.noise_multiplier) * float(self.max_grad_norm)
        for parameter in self.params:
            noise = self._randomness.normal(parameter.shape, std).to(parameter.device)
            parameter.grad = parameter.summed_grad + noise
            _mark_as_processed(parameter.summed_grad)


@dataclass(frozen=True)
class PrivateModel:
    """A model with per-sample gradient hooks and the optimiser that clips and noises them."""

    module: GradSampleModule
    optimizer: PatientDPOptimizer

    @property
    def model(self) -> nn.Module:
        """The wrapped model, whose state is what is stored and sent."""
        return self.module._module


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch: int,
    randomness: Randomness,
) -> PrivateModel:
    """Attach per-sample gradients to `model` and privacy to `optimizer`.

    Args:
        model: no layer of it may mix samples (no BatchNorm, no statistics over the batch).
        optimizer: an optimiser over `model`'s parameters.
        noise_multiplier: noise standard deviation over `max_grad_norm`.
        max_grad_norm: clipping norm C of a patient's gradient.
        expected_batch: the public divisor B.
        randomness: source of the noise.

    Raises:
        opacus.validators.errors.UnsupportedModuleError: a layer mixes samples or has no per-sample gradient rule.
    """
    ModuleValidator.validate(model, strict=True)
    return PrivateModel(
        GradSampleModule(model, loss_reduction="mean", strict=True),
        PatientDPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch,
            randomness=randomness,
        ),
    )


def private_step(
    private: PrivateModel,
    patients: int,
    private_losses: Callable[[nn.Module], Tensor],
    public_loss: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """One noisy step on a drawn batch of patients.

    Args:
        private: the model and its optimiser.
        patients: number of patients drawn; 0 is allowed: the step is then noise alone.
        private_losses: maps the module to losses (patients * k,), the k items of a patient being neighbours. A patient's
            gradient is the mean over its k items and is clipped as one; values that are not finite count as 0.
        public_loss: maps the model to a scalar that depends on no private data given the model; its gradient is added
            unclipped and without noise.
    """
    private.optimizer.zero_grad(set_to_none=True)
    if patients:
        losses = private_losses(private.module)
        items, remainder = divmod(len(losses), patients)
        if remainder or not items:
            raise ValueError(f"{len(losses)} losses cannot be split evenly over {patients} patients")
        losses.mean().backward()
        for parameter in private.optimizer.params:
            per_item = parameter.grad_sample
            per_patient = per_item.reshape(patients, items, *per_item.shape[1:]).mean(1) if items > 1 else per_item
            # Clipping bounds finite gradients only. With weights made for it, one patient's gradient overflows, and
            # without this it would turn the sum into NaN and so tell that the patient was drawn.
            parameter.grad_sample = per_patient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    else:
        for parameter in private.optimizer.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape), device=parameter.device)
    if not private.optimizer.pre_step():
        raise RuntimeError("the optimiser skipped a step that was charged")
    if public_loss is not None:
        for parameter, gradient in zip(private.optimizer.params, _public_gradient(private, public_loss), strict=True):
            parameter.grad += gradient
    private.optimizer.original_optimizer.step()


def _public_gradient(private: PrivateModel, loss: Callable[[nn.Module], Tensor]) -> tuple[Tensor, ...]:
    private.module.disable_hooks()
    try:
        return torch.autograd.grad(loss(private.model), private.optimizer.params)
    finally:
        private.module.enable_hooks()
