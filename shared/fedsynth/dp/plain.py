"""The step of a study without privacy: the plain mean gradient, nothing clipped, nothing noised.

For public data and reproductions alone (`fedsynth.plan.PrivacyPlan`, ``epsilon = inf``). What it steps is made from the
plan's section on privacy and refuses one that is private, so no private study can come here by mistake.

The functions take what those of `fedsynth.dp.step` take, so a module's losses are written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsynth.dp.functional import PatientLosses
from fedsynth.dp.step import PatientTensors, PrivateLosses, PublicLoss, PublicParts, public_gradients
from fedsynth.plan import PrivacyPlan


@dataclass(frozen=True)
class PlainModel:
    """A model and its optimiser in a study without privacy; made by `make_plain`.

    Attributes:
        model: the model; its layers may mix samples.
        optimizer: over some or all of its parameters.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        groups = self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


def make_plain(model: nn.Module, optimizer: torch.optim.Optimizer, privacy: PrivacyPlan) -> PlainModel:
    """A model for steps without privacy.

    Args:
        model: any model.
        optimizer: over its parameters.
        privacy: the plan's section on privacy.

    Raises:
        ValueError: the plan is private.
    """
    if privacy.private:
        raise ValueError(f"a step without clipping and noise in a study of epsilon {privacy.epsilon:g}")
    return PlainModel(model, optimizer)


def plain_step(
    plain: PlainModel,
    patients: int,
    losses: PrivateLosses,
    public_loss: PublicLoss | PublicParts | None = None,
) -> None:
    """One step on the mean loss of all items of the drawn patients, plus the public loss.

    All patients are one call, so a layer that mixes samples sees the whole draw. An empty draw moves on the public loss
    alone; where there is none, nothing moves.

    Args:
        plain: the model and its optimiser.
        patients: number of patients drawn.
        losses: maps the model and positions in the draw (int64) to losses (n,).
        public_loss: as in `fedsynth.dp.step.private_step`.
    """
    parameters = plain.parameters
    if not patients and public_loss is None:
        return
    gradients = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    if patients:
        mean = losses(plain.model, torch.arange(patients)).mean()
        gradients = list(torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True))
    if public_loss is not None:
        public = public_gradients(plain.model, parameters, public_loss)
        gradients = [own + added for own, added in zip(gradients, public, strict=True)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    plain.optimizer.step()


def plain_step_of(
    plain: PlainModel,
    patients: int,
    tensors: PatientTensors,
    losses: PatientLosses,
    public_loss: PublicLoss | PublicParts | None = None,
) -> None:
    """`plain_step` with the arguments of `fedsynth.dp.step.private_step_of`: losses are called once, on all items."""

    def of_items(model: nn.Module, positions: Tensor) -> Tensor:
        return losses(model, *(tensor.flatten(0, 1) for tensor in tensors(positions)))

    plain_step(plain, patients, of_items, public_loss)
