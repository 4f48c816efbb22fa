"""How networks of images move: the plan's optimiser and schedule, and private steps, or plain ones without privacy."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Parameters that train at one learning rate, by their names in their network.

    `moments` are those that `Optimised.moments` gave for these names; of a parameter that is not named there, none.
    """

    parameters: Parameters
    rate: float
    moments: State = field(default_factory=dict)


class Optimised:
    """Groups of parameters that the plan's optimiser moves.

    Only those that a stage uses are given to it. A parameter that growth adds starts without moments; one that rests keeps
    its own, and its values.
    """

    def __init__(self, training: TrainingPlan, *groups: Group) -> None:
        self._training = training
        self._groups = groups
        self._states: dict[Tensor, dict[str, Tensor]] = {}
        for group in groups:
            for name, parameter in group.parameters.items():
                if f"{self._moments[0]}/{name}" in group.moments:
                    self._states[parameter] = {m: group.moments[f"{m}/{name}"].clone() for m in self._moments}
        self._active = [group.parameters for group in groups]
        self.optimizer = self._made()

    def at(self, step: int, *active: Parameters) -> bool:
        """Set the learning rates of a step (from 0, over all rounds) and let those of each group that are `active` move.

        Returns:
            Whether `optimizer` is another one than before.
        """
        anew = [list(group) for group in active] != [list(group) for group in self._active]
        if anew:
            self._states.update(self.optimizer.state)
            self._active = list(active)
            self.optimizer = self._made()
            for group, moving in zip(self._groups, active, strict=True):
                for name, parameter in group.parameters.items():
                    parameter.requires_grad_(name in moving)
                    parameter.grad = None
        training = self._training
        factor = rate_factor(training.schedule, step / max(training.steps, 1), training.final_learning_rate)
        for settings in self.optimizer.param_groups:
            settings["lr"] = settings["initial_lr"] * factor
        return anew

    def moments(self, parameters: Parameters) -> State:
        """Moments (a copy) of those of `parameters` that have any, as "moment/name"."""
        states = {**self._states, **self.optimizer.state}
        return {
            f"{moment}/{name}": states[parameter][moment].detach().clone()
            for name, parameter in parameters.items()
            if parameter in states
            for moment in self._moments
            if states[parameter].get(moment) is not None
        }

    @property
    def _moments(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self._training.optimizer == "sgd" else ("exp_avg", "exp_avg_sq", "step")

    def _made(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(moving.values()), "lr": group.rate, "initial_lr": group.rate}
            for group, moving in zip(self._groups, self._active, strict=True)
        ]
        optimizer: torch.optim.Optimizer
        if self._training.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self._training.momentum)
        else:
            optimizer = torch.optim.Adam(groups, betas=BETAS)
        for moving in self._active:
            for parameter in moving.values():
                if parameter in self._states:
                    optimizer.state[parameter] = self._states[parameter]
        return optimizer


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

    def at(self, step: int, *active: Parameters) -> None:
        """What `Optimised.at` does, before a step. What does not move is neither noised nor counted in a norm."""
        if self._optimised.at(step, *active):
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
