"""How many discriminator steps a generator step waits for (Bie, Kamath, Zhang 2023, "Private GANs, Revisited").

A discriminator that learns through noise falls behind its generator. When its accuracy on fakes says so, it gets more
steps for each of the generator's. Only fakes, and a discriminator that is noisy already, are looked at: post-processing.
The number of private steps is fixed and charged in advance; the ladder only decides after which of them the generator moves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from fedsynth.records import State

LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Pace:
    """The rule of a plan.

    Attributes:
        threshold: the ladder is climbed when the average accuracy is at most this.
        memory: of the moving average; one rung is kept for at least ``2 / (1 - memory)`` generator steps, 200 in the paper.
        largest: discriminator steps a generator step are never more than this.
    """

    threshold: float
    memory: float
    largest: int

    @property
    def patience(self) -> float:
        """Generator steps between two climbs."""
        return 2 / (1 - self.memory)


@dataclass(frozen=True)
class Rung:
    """Where a site stands on the ladder.

    Attributes:
        discriminator_steps: for each generator step.
        accuracy: moving average of the share of fakes that the discriminator called fake; 1 before the first.
        steps: generator steps on this rung.
        waited: discriminator steps since the last generator step.
    """

    discriminator_steps: int = LADDER[0]
    accuracy: float = 1.0
    steps: int = 0
    waited: int = 0

    def to_state(self) -> State:
        """As tensors, for the site's local state."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in asdict(self).items()}


def rung_from(state: State) -> Rung:
    """The rung that `Rung.to_state` stored; the first one where nothing is stored."""
    if not state:
        return Rung()
    each, steps, waited = (int(state[name].item()) for name in ("discriminator_steps", "steps", "waited"))
    return Rung(each, float(state["accuracy"].item()), steps, waited)


def after_discriminator_step(rung: Rung) -> tuple[Rung, bool]:
    """Count a discriminator step; whether a generator step is due."""
    waited = rung.waited + 1
    due = waited >= rung.discriminator_steps
    return replace(rung, waited=0 if due else waited), due


def after_generator_step(rung: Rung, accuracy: float, pace: Pace) -> Rung:
    """Take in the discriminator's accuracy on the fakes of a generator step, and climb if it is time.

    Args:
        rung: before.
        accuracy: share of the fakes that it called fake.
        pace: the rule.
    """
    average = pace.memory * rung.accuracy + (1 - pace.memory) * accuracy
    after = replace(rung, accuracy=average, steps=rung.steps + 1)
    higher = next((each for each in LADDER if each > rung.discriminator_steps), None)
    if higher is None or higher > pace.largest or after.steps < pace.patience or average > pace.threshold:
        return after
    return replace(after, discriminator_steps=higher, steps=0)
