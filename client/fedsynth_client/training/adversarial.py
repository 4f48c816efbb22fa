"""Private adversarial training: a discriminator that never leaves the site, a generator that is shared.

The discriminator's real-image gradient is clipped and noised by patient; its fake-image gradient and the generator's
whole training are post-processing. The generator is conditioned on the chain that will link a synthetic patient: genes,
morphology and label from the study's profile model.

The plan's options (`fedsynth.plan.GanPlan`) change what trains (`fedsynth.models.trainable`), what the discriminator is
shown (`fedsynth.models.augmentation`) and when the generator moves (`adaptive_steps`); none changes what is charged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth.dp.step import CHUNK, PrivateModel, make_private, private_step
from fedsynth.models.adapters import adapter_state, load_adapters, merged_state, plain_state
from fedsynth.models.augmentation import Changes, augmented, draw_changes
from fedsynth.models.condition import condition, slice_positions, tumour_map
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.interfaces import ImageDiscriminator
from fedsynth.models.trainable import make_trainable
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
from fedsynth_client.training.block import BlockResult, public_generator, update_norm

_BETAS = (0.5, 0.999)  # as in DCGAN


@dataclass(frozen=True)
class ImagePatients:
    """The training patients with images, one row a patient.

    Attributes:
        slices: (N, C + 1, S, H, W) float16 in [-1, 1]: image channels and mask channel.
        morphology: (N, F) in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
    """

    slices: Tensor
    morphology: Tensor
    labels: Tensor


def train_gan(
    plan: StudyPlan,
    generator_weights: State,
    local: State,
    profiles: SyntheticProfiles,
    patients: ImagePatients,
    mechanism: Mechanism,
    randomness: Randomness,
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
    """
    gan, classes, size = plan.gan, len(plan.label.classes), plan.image.size
    public = public_generator(randomness)
    # Slices and augmentations of drawn patients come from a stream of their own: what it gives out depends on how many
    # were drawn, and the fakes, whose gradient is not noised, must not.
    of_patients = public_generator(randomness)
    generator = make_generator(plan)
    generator.load_state_dict(generator_weights)
    moving = make_trainable(generator, gan.generator_trains, gan.adapter_rank, public)
    generator_optimizer = torch.optim.Adam(moving.values(), lr=gan.generator_learning_rate, betas=_BETAS)
    discriminator, trained = _discriminator(plan, local, public)
    discriminator_optimizer = torch.optim.Adam(trained.values(), lr=gan.learning_rate, betas=_BETAS)
    _restore_moments(discriminator_optimizer, trained, local)
    private = make_private(
        discriminator,
        discriminator_optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=gan.max_grad_norm,
        expected_batch=gan.expected_batch,
        randomness=randomness,
    )
    rung, pace = _ladder(plan, local)
    positions = slice_positions(plan.image.slices)
    tumours = tumour_map(plan)
    items = torch.arange(gan.slices_per_patient)

    def synthetic_condition(count: int) -> Tensor:
        row = torch.randint(len(profiles.labels), (count,), generator=public)
        place = torch.randint(len(positions), (count,), generator=public)
        return condition(profiles.labels[row], profiles.morphology[row], positions[place], classes)

    def fakes(code: Tensor) -> Tensor:
        return generator(torch.randn(len(code), gan.latent_dim, generator=public), code)

    def shown(images: Tensor, code: Tensor, changes: Changes) -> tuple[Tensor, Tensor]:
        return augmented(images, code, changes, tumours) if gan.augmentation else (images, code)

    generator_loss = fake_score = 0.0
    generator_steps = 0
    for _ in range(mechanism.steps):
        drawn = poisson_draw(len(patients.labels), mechanism.sample_rate, randomness)
        drawn_places = torch.randint(plan.image.slices, (len(drawn), len(items)), generator=of_patients)
        drawn_changes = draw_changes(gan.augmentation, len(drawn) * len(items), size, of_patients)

        def real_losses(
            module: nn.Module,
            chunk: Tensor,
            drawn: Tensor = drawn,
            drawn_places: Tensor = drawn_places,
            drawn_changes: Changes = drawn_changes,
        ) -> Tensor:
            rows = drawn[chunk].repeat_interleave(len(items))
            places = drawn_places[chunk].flatten()
            real = patients.slices[rows, :, places].float()
            code = condition(patients.labels[rows], patients.morphology[rows], positions[places], classes)
            changes = drawn_changes[(chunk[:, None] * len(items) + items).flatten()]
            return softplus(-module(*shown(real, code, changes)))

        fake_code = synthetic_condition(gan.expected_batch)
        with torch.no_grad():
            fake, fake_code = shown(
                fakes(fake_code), fake_code, draw_changes(gan.augmentation, gan.expected_batch, size, public)
            )

        def fake_loss(model: nn.Module, fake: Tensor = fake, code: Tensor = fake_code) -> Tensor:
            return softplus(model(fake, code)).mean()

        # As many slices at once whatever the draw: memory does not grow with the batch.
        chunk = max(CHUNK // len(items), 1)
        private_step(private, len(drawn), real_losses, fake_loss, items_per_patient=len(items), chunk=chunk)
        rung, due = after_discriminator_step(rung)
        if due:
            code = synthetic_condition(gan.generator_batch)
            changes = draw_changes(gan.augmentation, gan.generator_batch, size, public)
            logits = _generator_step(generator_optimizer, moving, private, *shown(fakes(code), code, changes))
            generator_loss += float(softplus(-logits).mean())
            fake_score += float(logits.mean())
            generator_steps += 1
            if pace is not None:
                rung = after_generator_step(rung, float((logits < 0).float().mean()), pace)
    after = merged_state(generator)
    count = max(generator_steps, 1)
    return BlockResult(
        after,
        {
            "update_norm": update_norm(generator_weights, after),
            "generator_loss": generator_loss / count,
            "fake_score": fake_score / count,
        },
        {
            **_named("model/", plain_state(discriminator)),
            **_named("adapter/", adapter_state(discriminator)),
            **_moments(discriminator_optimizer, trained),
            **({} if pace is None else _named("ladder/", rung.to_state())),
        },
    )


def _discriminator(
    plan: StudyPlan, local: State, generator: torch.Generator
) -> tuple[ImageDiscriminator, dict[str, nn.Parameter]]:
    """The site's discriminator, and the parameters of it that train."""
    model = make_discriminator(plan)
    model.load_state_dict(_prefixed(local, "model/"))
    trained = make_trainable(model, plan.gan.discriminator_trains, plan.gan.adapter_rank, generator)
    if adapters := _prefixed(local, "adapter/"):
        load_adapters(model, adapters)
    return model, trained


def _ladder(plan: StudyPlan, local: State) -> tuple[Rung, Pace | None]:
    """Where the block starts on the ladder, and the rule by which it climbs; None where the plan fixes the steps."""
    gan = plan.gan
    if gan.discriminator_steps != "adaptive":
        return Rung(discriminator_steps=gan.discriminator_steps), None
    pace = Pace(gan.adaptive_accuracy, gan.adaptive_memory, gan.steps_per_round)
    return rung_from(_prefixed(local, "ladder/")), pace


def _generator_step(
    optimizer: torch.optim.Optimizer,
    moving: dict[str, nn.Parameter],
    private: PrivateModel,
    images: Tensor,
    code: Tensor,
) -> Tensor:
    """Non-saturating generator step; returns the discriminator's logits on the fakes before it."""
    with private.public() as discriminator:
        logits = discriminator(images, code)
        gradients = torch.autograd.grad(softplus(-logits).mean(), list(moving.values()))
    for parameter, gradient in zip(moving.values(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return logits.detach()


def _named(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _prefixed(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> State:
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment].detach().clone()
        for name, parameter in trained.items()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def _restore_moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], local: State) -> None:
    for name, parameter in trained.items():
        if f"step/{name}" in local:
            optimizer.state[parameter] = {moment: local[f"{moment}/{name}"].clone() for moment in _MOMENTS}
