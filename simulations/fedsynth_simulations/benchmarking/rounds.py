"""The adversarial rounds of a study in one process: the client's own block at each site, the server's own average.

What is left out against a study: messages, ledger, checkpoints (tests show that the federation computes the same).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients, train_gan
from fedsynth_server.aggregation import averaging_decay, moving_average, weighted_average

# Round from 1, and what stands after it.
Observer = Callable[[int, "Standing"], None]


@dataclass(frozen=True)
class Standing:
    """Where training stands after a round.

    Attributes:
        average: the moving average of the generator over rounds: what a server releases.
        local: by site, what stays there (``model/...`` is its discriminator).
        progress: by site, what its block reported.
    """

    average: State
    local: dict[str, State]
    progress: dict[str, dict[str, float]]


def train_rounds(
    plan: StudyPlan,
    generator: State,
    companion: State,
    sites: Mapping[str, ImagePatients],
    mechanisms: Mapping[str, Mechanism],
    randomness: Mapping[str, Randomness],
    weights: Mapping[str, float],
    pool: SyntheticProfiles,
    observe: Observer = lambda number, standing: None,
) -> Standing:
    """All rounds of `plan`.

    Args:
        plan: its `gan` section says how many rounds, and what a block does.
        generator, companion: weights to start from: the shared generator, and what each site keeps beside it.
        sites: training patients.
        mechanisms: sampling, noise and steps of one round at each site.
        randomness: of each site's draws and noise.
        weights: of the sites in the average, adding up to 1.
        pool: synthetic conditions.
        observe: told after each round.
    """
    local = {name: {f"model/{key}": tensor for key, tensor in companion.items()} for name in sites}
    standing, shared = Standing(generator, local, {}), generator
    for number in range(plan.gan.rounds):
        replies: dict[str, State] = {}
        progress: dict[str, dict[str, float]] = {}
        for name, patients in sites.items():
            first = number * plan.gan.steps_per_round
            block = train_gan(
                plan, shared, local[name], pool, patients, mechanisms[name], randomness[name], first_step=first
            )
            replies[name], local[name], progress[name] = block.weights, block.local, block.progress
        shared = weighted_average(replies, weights)
        average = moving_average(standing.average, shared, averaging_decay(plan, number + 1))
        standing = Standing(average, dict(local), progress)
        observe(number + 1, standing)
    return standing
