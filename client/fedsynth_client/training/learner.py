"""How networks of images move: the plan's optimiser and schedule, and private steps, or plain ones without privacy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.bookkeeping import UnsupportedLayerError
from fedsynth.dp.functional import PatientLosses
from fedsynth.dp.plain import make_plain, plain_step_of
from fedsynth.dp.randomness import Randomness
from fedsynth.dp.step import (
    Backend,
    PatientTensors,
    PrivateModel,
    PublicLoss,
    PublicParts,
    make_private,
    private_step_of,
)
from fedsynth.plan import StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth.schedules import rate_factor
from fedsynth_client.training.networks import Parameters

BETAS = (0.5, 0.999)  # of Adam, as in DCGAN


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that train at one learning rate."""

    parameters: Parameters
    rate: float


class Optimised:
    """Parameters that the plan's optimiser moves.

    Only those that a stage uses are given to it. A parameter that growth adds starts without moments; one that rests keeps
    its own, and its values.
    """

    def __init__(self, training: TrainingPlan, groups: Sequence[Group], moments: Mapping[str, Tensor] | None = None):
        """`moments`: as `moments` gave them back; of parameters that are not named, none."""
        self._training = training
        self._groups = groups
        self._names = {parameter: name for group in groups for name, parameter in group.parameters.items()}
        self._kept: dict[Tensor, dict[str, Tensor]] = {}
        for parameter, name in self._names.items():
            state = {
                moment: (moments or {})[f"{moment}/{name}"].clone()
                for moment in _MOMENTS[training.optimizer]
                if f"{moment}/{name}" in (moments or {})
            }
            if state:
                self._kept[parameter] = state
        self._active = list(self._names.values())
        self.optimizer = self._made(self._active)

    def at(self, step: int, active: list[str]) -> bool:
        """Set the learning rates of a step (from 0, over all rounds) and let the parameters called `active` move.

        Returns:
            Whether `optimizer` is another one than before.
        """
        anew = active != self._active
        if anew:
            self._kept.update(self.optimizer.state)
            self._active = active
            self.optimizer = self._made(active)
            for parameter, name in self._names.items():
                parameter.requires_grad_(name in active)
                parameter.grad = None
        training = self._training
        factor = rate_factor(training.schedule, step / max(training.steps, 1), training.final_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return anew

    @property
    def moving(self) -> list[nn.Parameter]:
        """What the optimiser moves now."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def moments(self) -> State:
        """Moments of all parameters that have any (a copy), as "moment/name"."""
        states: dict[Tensor, dict[str, Tensor]] = {**self._kept, **self.optimizer.state}
        return {
            f"{moment}/{name}": states[parameter][moment].detach().clone()
            for parameter, name in self._names.items()
            if parameter in states
            for moment in _MOMENTS[self._training.optimizer]
            if isinstance(states[parameter].get(moment), Tensor)
        }

    def _made(self, active: list[str]) -> torch.optim.Optimizer:
        groups = [
            {"params": own, "lr": group.rate, "initial_lr": group.rate}
            for group in self._groups
            if (own := [parameter for name, parameter in group.parameters.items() if name in active])
        ]
        optimizer: torch.optim.Optimizer
        if self._training.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self._training.momentum)
        else:
            optimizer = torch.optim.Adam(groups, betas=BETAS)
        for group in groups:
            for parameter in group["params"]:  # type: ignore[attr-defined]
                if parameter in self._kept:
                    optimizer.state[parameter] = self._kept[parameter]
        return optimizer


_MOMENTS = {"adam": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}


class Learner:
    """A model that learns from patients: by private steps, or in a study without privacy by plain ones."""

    def __init__(
        self,
        plan: StudyPlan,
        model: nn.Module,
        optimised: Optimised,
        mechanism: Mechanism,
        randomness: Randomness,
        *,
        functional: bool = False,
    ) -> None:
        """Prepare steps.

        Args:
            plan: the study plan.
            model: what the losses are called with.
            optimised: of its parameters.
            mechanism: what was charged.
            randomness: of the noise.
            functional: whether the losses differentiate twice or use a network more than once. Otherwise a private step
                keeps books, where every layer has an exact rule for it.

        Raises:
            ValueError: a private plan without noise, or noise in one without privacy.
        """
        if (mechanism.noise_multiplier > 0) is not plan.privacy.private:
            raise ValueError(
                f"a noise multiplier of {mechanism.noise_multiplier:g} in a study of epsilon {plan.privacy.epsilon:g}"
            )
        self._plan, self._model, self._optimised = plan, model, optimised
        self._mechanism, self._randomness, self._functional = mechanism, randomness, functional
        self._private: PrivateModel | None = None

    def at(self, step: int, active: list[str]) -> None:
        """What `Optimised.at` does, before a step. What does not move is neither noised nor counted in a norm."""
        if self._optimised.at(step, active):
            self._private = None

    def step(
        self,
        patients: int,
        tensors: PatientTensors,
        losses: PatientLosses,
        public: PublicLoss | PublicParts | None = None,
    ) -> None:
        """One step on `patients` drawn ones; arguments as of `fedsynth.dp.step.private_step_of`."""
        if not self._plan.privacy.private:
            plain = make_plain(self._model, self._optimised.optimizer, self._plan.privacy)
            plain_step_of(plain, patients, tensors, losses, public)
            return
        if self._private is None:
            self._private = self._made_private()
        private_step_of(self._private, patients, tensors, losses, public)

    def _made_private(self) -> PrivateModel:
        def made(backend: Backend) -> PrivateModel:
            return make_private(
                self._model,
                self._optimised.optimizer,
                noise_multiplier=self._mechanism.noise_multiplier,
                max_grad_norm=self._plan.gan.max_grad_norm,
                expected_batch=self._plan.gan.expected_batch,
                randomness=self._randomness,
                backend=backend,
            )

        if not self._functional:
            try:
                return made("bookkeeping")
            except UnsupportedLayerError:  # a slower way, as exact
                pass
        return made("functional")
