"""Private adversarial training: a discriminator that never leaves the site, a generator that is shared.

The discriminator's real-image gradient is clipped and noised by patient; its fake-image gradient and the generator's
whole training are post-processing. The generator is conditioned on the chain that will link a synthetic patient: genes,
morphology and label from the study's profile model.

The plan's options (`fedsynth.plan.GanPlan`) change the networks (`fedsynth.models.images`) and what of them trains
(`fedsynth.models.trainable`), the losses (`critic`), what is shown (`images`) and when the generator moves
(`adaptive_steps`); none changes what is charged. Where the generator's own gradient touches patients, training is
`private_generator` or `variational`.
"""

from __future__ import annotations

import torch

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.dp.step import clamp_weights
from fedsynth.losses import generator_losses, taken_for_real
from fedsynth.models.adapters import merged_state
from fedsynth.models.growth import stage_at
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adaptive_steps import (
    Pace,
    Rung,
    after_discriminator_step,
    after_generator_step,
    rung_from,
)
from fedsynth_client.training.block import BlockResult, update_norm
from fedsynth_client.training.critic import (
    Tally,
    critic_losses,
    critic_tensors,
    fake_loss,
    fakes_to_reject,
    penalised_at,
    scores_of_new_fakes,
)
from fedsynth_client.training.images import ImagePatients, showing
from fedsynth_client.training.learner import Group, Learner, Optimised
from fedsynth_client.training.networks import active, kept, named, prefixed, shared_generator, site_network
from fedsynth_client.training.private_generator import train_private_generator
from fedsynth_client.training.variational import train_vae

__all__ = ["ImagePatients", "train_gan"]


def train_gan(
    plan: StudyPlan,
    generator_weights: State,
    local: State,
    profiles: SyntheticProfiles,
    patients: ImagePatients,
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int = 0,
) -> BlockResult:
    """One block: `mechanism.steps` private discriminator steps, a generator step after every so many of them.

    Args:
        plan: the study plan.
        generator_weights: the shared generator.
        local: the site's discriminator ("model/...", its adapters "adapter/..."), the moments of its optimiser
            ("exp_avg/...", ...) and its place on the ladder of steps ("ladder/..."), as a former block returned them, or
            the discriminator alone.
        profiles: pool of synthetic conditions to draw from.
        patients: private data.
        mechanism: sampling, noise and number of steps.
        randomness: of draws and noise.
        first_step: number of the block's first step over all rounds, for the plan's schedule and growth.

    Raises:
        ValueError: `mechanism` has no noise in a private study, or noise in one without privacy.
    """
    gan = plan.gan
    if gan.architecture == "vae":
        return train_vae(plan, generator_weights, local, profiles, patients, mechanism, randomness, first_step)
    if gan.generator_is_private:
        return train_private_generator(
            plan, generator_weights, local, profiles, patients, mechanism, randomness, first_step
        )
    show = showing(plan, profiles, patients, randomness)
    generator, to_move = shared_generator(plan, generator_weights, show.public)
    discriminator, trained = site_network(plan, local, show.public)
    moving = Optimised(gan, Group(to_move, gan.generator_learning_rate))
    optimised = Optimised(gan, Group(trained, gan.learning_rate, local))
    interpolating = penalised_at(gan) == "interpolates"
    learner = Learner(plan, discriminator, optimised, mechanism, randomness, functional=interpolating)
    rung, pace = _ladder(plan, local)
    tally = Tally()
    for step in range(first_step, first_step + mechanism.steps):
        stage = stage_at(plan, step)
        learning = active(discriminator, trained, stage)
        learner.at(step, learning)
        drawn = show.draw(mechanism.sample_rate, stage, randomness)
        learner.step(
            len(drawn),
            critic_tensors(show, drawn, generator, stage),
            critic_losses(gan, stage),
            fake_loss(gan, *fakes_to_reject(show, generator, stage), stage),
        )
        if gan.lipschitz == "weight_clip":
            clamp_weights(learning.values(), gan.weight_clip)
        rung, due = after_discriminator_step(rung)
        if due:
            led = active(generator, to_move, stage)
            moving.at(step, led)
            scores = scores_of_new_fakes(show, generator, discriminator, stage)
            gradients = torch.autograd.grad(generator_losses(gan.loss, scores).mean(), list(led.values()))
            for parameter, gradient in zip(led.values(), gradients, strict=True):
                parameter.grad = gradient
            moving.optimizer.step()
            tally.count(gan, scores)
            if pace is not None:
                seen_through = ~taken_for_real(gan.loss, scores)
                rung = after_generator_step(rung, float(seen_through.float().mean()), pace)
    after = merged_state(generator)
    return BlockResult(
        after,
        {"update_norm": update_norm(generator_weights, after), **tally.means()},
        {
            **kept(discriminator),
            **optimised.moments(trained),
            **({} if pace is None else named("ladder/", rung.to_state())),
        },
    )


def _ladder(plan: StudyPlan, local: State) -> tuple[Rung, Pace | None]:
    """Where the block starts on the ladder, and the rule by which it climbs; None where the plan fixes the steps."""
    gan = plan.gan
    if gan.discriminator_steps != "adaptive":
        return Rung(discriminator_steps=gan.discriminator_steps), None
    pace = Pace(gan.adaptive_accuracy, gan.adaptive_memory, gan.steps_per_round)
    return rung_from(prefixed(local, "ladder/")), pace
