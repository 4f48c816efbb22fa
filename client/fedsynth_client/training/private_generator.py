"""Training of a generator that is held against patients: its own gradient is private.

For a drawn patient the generator makes an image for that patient's own condition, which is held against the patient's
slice: by its pixels (L1, Isola et al. 2017) and by the features that the discriminator has of both (Wang et al. 2018).
Such a loss reaches the generator past the discriminator, so a patient's gradient is one vector over the parameters of both
networks: clipped as one, noised as one, one sampled Gaussian mechanism under the same charge as without these losses.

What touches no patient stays public and is added after the noise: the discriminator's loss on fakes, and the adversarial
part of the generator's. Both networks move at every private step, each away from where the other stood before it.

The way without a private gradient in each step is a noisy statistic that is charged once and fitted by the server: the
module ``embedding``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.functional import PatientLosses
from fedsynth.dp.randomness import Randomness
from fedsynth.dp.step import PatientTensors, PublicLoss, clamp_weights
from fedsynth.losses import generator_losses
from fedsynth.models.adapters import merged_state
from fedsynth.models.growth import Stage, stage_at
from fedsynth.models.interfaces import ImageDiscriminator, ImageGenerator
from fedsynth.plan import GanPlan, StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.block import BlockResult, update_norm
from fedsynth_client.training.critic import (
    Tally,
    critic_losses,
    critic_tensors,
    fake_loss,
    fakes_to_reject,
    scores_of_new_fakes,
)
from fedsynth_client.training.images import Drawn, ImagePatients, Showing, showing
from fedsynth_client.training.learner import Group, Learner, Optimised
from fedsynth_client.training.networks import active, kept, shared_generator, site_network


class Adversaries(nn.Module):
    """Discriminator and generator as one model, of which a patient has one gradient."""

    def __init__(self, discriminator: ImageDiscriminator, generator: ImageGenerator) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator


def train_private_generator(
    plan: StudyPlan,
    generator_weights: State,
    local: State,
    profiles: SyntheticProfiles,
    patients: ImagePatients,
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int,
) -> BlockResult:
    """One block of private steps of both networks; arguments and result as of `adversarial.train_gan`.

    The generator's moments start anew in each block, since it was averaged over sites; the discriminator's are kept.
    """
    gan = plan.gan
    show = showing(plan, profiles, patients, randomness)
    generator, to_move = shared_generator(plan, generator_weights, show.public)
    discriminator, trained = site_network(plan, local, show.public)
    assert isinstance(discriminator, ImageDiscriminator)
    both = Adversaries(discriminator, generator)
    optimised = Optimised(gan, Group(trained, gan.learning_rate, local), Group(to_move, gan.generator_learning_rate))
    learner = Learner(plan, both, optimised, mechanism, randomness, functional=True)
    tally = Tally()
    for step in range(first_step, first_step + mechanism.steps):
        stage = stage_at(plan, step)
        learning, led = active(discriminator, trained, stage), active(generator, to_move, stage)
        learner.at(step, learning, led)
        drawn = show.draw(mechanism.sample_rate, stage, randomness)
        on_fakes = fake_loss(gan, *fakes_to_reject(show, generator, stage), stage)

        def rejecting(_: nn.Module, loss: PublicLoss = on_fakes) -> Tensor:
            return loss(discriminator)

        def fooling(_: nn.Module, stage: Stage | None = stage) -> Tensor:
            scores = scores_of_new_fakes(show, generator, discriminator, stage)
            tally.count(gan, scores)
            return generator_losses(gan.loss, scores).mean()

        learner.step(
            len(drawn),
            joint_tensors(show, drawn, generator, stage),
            joint_losses(gan, _constant(discriminator, plan), stage),
            [(rejecting, [*learning.values()]), (fooling, [*led.values()])],
        )
        if gan.lipschitz == "weight_clip":
            clamp_weights(learning.values(), gan.weight_clip)
    after = merged_state(generator)
    return BlockResult(
        after,
        {"update_norm": update_norm(generator_weights, after), **tally.means()},
        {**kept(discriminator), **optimised.moments(trained)},
    )


def joint_tensors(show: Showing, drawn: Drawn, generator: ImageGenerator, stage: Stage | None) -> PatientTensors:
    """(p, k, ...) of drawn patients: slices, conditions and z for the generator's loss, then those of `critic_tensors`.

    The generator is held against slices as they are, the discriminator is shown changed ones.
    """
    z = show.noise(drawn, show.plan.gan.latent_dim)
    of_critic = critic_tensors(show, drawn, generator, stage)

    def tensors(positions: Tensor) -> Sequence[Tensor]:
        own = [tensor.unflatten(0, (len(positions), -1)) for tensor in show.slices(drawn, positions, stage)]
        return [*own, z[positions], *of_critic(positions)]

    return tensors


def joint_losses(gan: GanPlan, constant: ImageDiscriminator, stage: Stage | None) -> PatientLosses:
    """Losses (n,) of `Adversaries` on items of `joint_tensors`.

    The two terms of a loss reach disjoint parameters: the discriminator's own reaches the generator nowhere, and features
    are those of a copy that is a constant.

    Args:
        gan: the plan's section.
        constant: the discriminator's copy.
        stage: of growth.
    """
    of_critic = critic_losses(gan, stage)

    def of_items(model: nn.Module, real: Tensor, code: Tensor, z: Tensor, *shown: Tensor) -> Tensor:
        assert isinstance(model, Adversaries)
        found = of_critic(model.discriminator, *shown)
        made = model.generator(z, code, stage)
        if gan.l1_weight:
            found = found + gan.l1_weight * _distances(made, real)
        if gan.feature_matching_weight:
            with torch.no_grad():
                targets = constant.features(real, code, stage)
            pairs = zip(constant.features(made, code, stage), targets, strict=True)
            distances = torch.stack([_distances(ours, theirs) for ours, theirs in pairs])
            found = found + gan.feature_matching_weight * distances.mean(0)
        return found

    return of_items


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n,) mean absolute difference of each item."""
    return (a - b).abs().flatten(1).mean(1)


def _constant(discriminator: ImageDiscriminator, plan: StudyPlan) -> ImageDiscriminator:
    """A copy that nothing moves: no parameter, and in a private study no state of a normalisation either."""
    copied = copy.deepcopy(discriminator).requires_grad_(False)
    return copied.train(not plan.privacy.private)
