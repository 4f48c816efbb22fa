"""Private adversarial training: a discriminator that never leaves the site, a generator that is shared.

The discriminator's real-image gradient is clipped and noised by patient; its fake-image gradient and the generator's
whole training are post-processing. The generator is conditioned on the chain that will link a synthetic patient: genes
from the autoencoder's prior, morphology and label from the radiogenomic DNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth.dp.step import PrivateModel, make_private, private_step
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.dcgan import make_discriminator, make_generator
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.block import BlockResult, detached, public_generator, update_norm

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
    """One block: `mechanism.steps` private discriminator steps, a generator step after every `discriminator_steps`.

    Args:
        plan: the study plan.
        generator_weights: the shared generator.
        local: the site's discriminator ("model/...") and the moments of its optimiser ("exp_avg/...", ...), as a former
            block returned them, or the discriminator alone.
        profiles: pool of synthetic conditions to draw from.
        patients: private data.
        mechanism: sampling, noise and number of steps.
        randomness: of draws and noise.
    """
    gan, classes = plan.gan, len(plan.label.classes)
    public = public_generator(randomness)
    # Slices of drawn patients come from a stream of their own: what it gives out depends on how many were drawn, and
    # the fakes, whose gradient is not noised, must not.
    of_patients = public_generator(randomness)
    generator, discriminator = make_generator(plan), make_discriminator(plan)
    generator.load_state_dict(generator_weights)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=gan.generator_learning_rate, betas=_BETAS)
    discriminator.load_state_dict(_prefixed(local, "model/"))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=gan.learning_rate, betas=_BETAS)
    _restore_moments(discriminator_optimizer, discriminator, local)
    private = make_private(
        discriminator,
        discriminator_optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=gan.max_grad_norm,
        expected_batch=gan.expected_batch,
        randomness=randomness,
    )
    positions = slice_positions(plan.image.slices)

    def synthetic_condition(count: int) -> Tensor:
        row = torch.randint(len(profiles.labels), (count,), generator=public)
        place = torch.randint(len(positions), (count,), generator=public)
        return condition(profiles.labels[row], profiles.morphology[row], positions[place], classes)

    def fakes(code: Tensor) -> Tensor:
        return generator(torch.randn(len(code), gan.latent_dim, generator=public), code)

    generator_loss = fake_score = 0.0
    generator_steps = 0
    for step in range(1, mechanism.steps + 1):
        drawn = poisson_draw(len(patients.labels), mechanism.sample_rate, randomness)
        drawn_places = torch.randint(plan.image.slices, (len(drawn), gan.slices_per_patient), generator=of_patients)

        def real_losses(
            module: nn.Module, chunk: Tensor, drawn: Tensor = drawn, drawn_places: Tensor = drawn_places
        ) -> Tensor:
            rows = drawn[chunk].repeat_interleave(gan.slices_per_patient)
            places = drawn_places[chunk].flatten()
            real = patients.slices[rows, :, places].float()
            code = condition(patients.labels[rows], patients.morphology[rows], positions[places], classes)
            return softplus(-module(real, code))

        fake_code = synthetic_condition(gan.expected_batch)
        with torch.no_grad():
            fake = fakes(fake_code)

        def fake_loss(model: nn.Module, fake: Tensor = fake, code: Tensor = fake_code) -> Tensor:
            return softplus(model(fake, code)).mean()

        private_step(private, len(drawn), real_losses, fake_loss)
        if step % gan.discriminator_steps == 0:
            code = synthetic_condition(gan.generator_batch)
            loss, score = _generator_step(generator, generator_optimizer, private, fakes(code), code)
            generator_loss, fake_score, generator_steps = generator_loss + loss, fake_score + score, generator_steps + 1
    after = detached(generator.state_dict())
    count = max(generator_steps, 1)
    return BlockResult(
        after,
        {
            "update_norm": update_norm(generator_weights, after),
            "generator_loss": generator_loss / count,
            "fake_score": fake_score / count,
        },
        {**_named("model/", detached(discriminator.state_dict())), **_moments(discriminator_optimizer, discriminator)},
    )


def _generator_step(
    generator: nn.Module,
    optimizer: torch.optim.Optimizer,
    private: PrivateModel,
    images: Tensor,
    code: Tensor,
) -> tuple[float, float]:
    """Non-saturating generator step; returns its loss and the discriminator's mean logit on the fakes."""
    with private.public() as discriminator:
        logits = discriminator(images, code)
        loss = softplus(-logits).mean()
        parameters = list(generator.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
    optimizer.step()
    return float(loss.detach()), float(logits.detach().mean())


def _named(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _prefixed(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> State:
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment].detach().clone()
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def _restore_moments(optimizer: torch.optim.Optimizer, model: nn.Module, local: State) -> None:
    for name, parameter in model.named_parameters():
        if f"step/{name}" in local:
            optimizer.state[parameter] = {moment: local[f"{moment}/{name}"].clone() for moment in _MOMENTS}
