"""Pre-training of generator and discriminator on a public simulated cohort: the warm start of a private study.

No private data takes part, so any loss is allowed: a variational autoencoder with an adversarial term (VAE-GAN, Larsen
et al. 2016). The encoder looks at a patient's whole volume and the generator draws single slices from its z, so one z
stands for one patient at every slice position. The encoder is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.dcgan import initialise
from fedsynth.models.gene_autoencoder import autoencoder_losses, make_autoencoder
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.interfaces import ImageDiscriminator
from fedsynth.morphology import normalise
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth.records import State

_BETAS = (0.5, 0.99)
_EMA = 0.998
_TUMOUR_WEIGHT, _MASK_WEIGHT = 4.0, 2.0


@dataclass(frozen=True)
class PublicPatients:
    """A public cohort on the plan's grid.

    Attributes:
        volumes: (N, C + 1, S, H, W) float16 in [-1, 1]: image channels and whole-tumour mask channel.
        morphology: (N, F) in [0, 1].
        labels: (N,) class codes.
    """

    volumes: Tensor
    morphology: Tensor
    labels: Tensor


def public_patients(
    plan: StudyPlan,
    images: NDArray[np.float16],
    masks: NDArray[np.uint8],
    morphology: NDArray[np.floating],
    labels: NDArray[np.int64],
) -> PublicPatients:
    """Tensors of a public cohort: images (N, C, S, H, W) in [0, 1], masks, morphology in physical units, labels."""
    volumes = torch.cat([torch.from_numpy(images), torch.from_numpy(masks > 0).to(torch.float16)[:, None]], dim=1)
    unit = normalise(morphology, plan.morphology.features)
    return PublicPatients(volumes * 2 - 1, torch.from_numpy(unit), torch.from_numpy(labels))


class VolumeEncoder(nn.Module):
    """(B, (C + 1) * S, H, W): a volume's slices as channels -> mean and log variance of z, each (B, latent_dim)."""

    def __init__(self, *, channels: int, size: int, latent_dim: int, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = channels
        while size > 4:
            layers += [nn.Conv2d(last, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
            last, size = width, size // 2
            width = min(2 * width, 192)
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(last * size**2, 2 * latent_dim)

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes (B, (C + 1) * S, H, W) -> mean, log variance."""
        mean, log_variance = self.head(self.trunk(volumes)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)


def pretrain(
    plan: StudyPlan,
    patients: PublicPatients,
    steps: int,
    generator: torch.Generator,
    *,
    batch: int = 16,
    slices: int = 2,
    learning_rate: float = 1.5e-3,
    reconstruction_weight: float = 15.0,
    adversarial_weight: float = 0.12,
    kl_weight: float = 0.01,
) -> tuple[State, State]:
    """Train on public patients; returns the generator's (averaged over steps) and the discriminator's weights.

    Args:
        plan: fixes both architectures and the grid.
        patients: the public cohort.
        steps: number of training steps.
        generator: of all draws.
        batch: patients a step.
        slices: slices a patient and step.
        learning_rate: of generator and encoder at the start; it falls to a tenth (cosine). The discriminator's is a fifth.
        reconstruction_weight: of the L1 term.
        adversarial_weight: of the adversarial terms in the second half; it rises to this over the first.
        kl_weight: of the KL term per latent dimension.
    """
    classes, positions = len(plan.label.classes), slice_positions(plan.image.slices)
    model, critic = make_generator(plan), make_discriminator(plan)
    channels = patients.volumes.shape[1] * patients.volumes.shape[2]
    encoder = VolumeEncoder(channels=channels, size=plan.image.size, latent_dim=plan.gan.latent_dim)
    for network in (model, critic, encoder):
        initialise(network, generator)
    main = torch.optim.Adam([*model.parameters(), *encoder.parameters()], lr=learning_rate, betas=_BETAS)
    adversary = torch.optim.Adam(critic.parameters(), lr=learning_rate / 5, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(main, steps, learning_rate / 10)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for step in track(range(steps), "Pre-training on public patients", steps):
        rows = torch.randint(len(patients.labels), (batch,), generator=generator)
        places = torch.randint(plan.image.slices, (batch * slices,), generator=generator)
        many = rows.repeat_interleave(slices)
        volumes = patients.volumes[rows].float()
        real = volumes.repeat_interleave(slices, 0)[torch.arange(batch * slices), :, places]
        code = condition(patients.labels[many], patients.morphology[many], positions[places], classes)

        with _half():
            mean, log_variance = encoder(volumes.flatten(1, 2))
        mean, log_variance = mean.float(), log_variance.float()
        z = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
        with _half():
            rebuilt = model(z.repeat_interleave(slices, 0), code)
        other = condition(
            patients.labels[many.flip(0)], patients.morphology[many.flip(0)], positions[places.flip(0)], classes
        )
        with _half():
            drawn = model(torch.randn(len(other), plan.gan.latent_dim, generator=generator), other)
        rebuilt, drawn = rebuilt.float(), drawn.float()
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean()
        # The adversarial term comes in slowly and stays small: it draws checkerboards where it leads.
        ramp = adversarial_weight * min(1.0, 2 * step / steps)
        fooling = ramp * (_fooling(critic, rebuilt, code) + _fooling(critic, drawn, other))
        loss = reconstruction_weight * (_reconstruction(rebuilt, real) + kl_weight * kl) + fooling
        main.zero_grad()
        loss.backward()
        main.step()
        schedule.step()

        adversary.zero_grad()
        fakes = 0.5 * (softplus(critic(rebuilt.detach(), code)) + softplus(critic(drawn.detach(), other)))
        (softplus(-critic(real, code)) + fakes).mean().backward()
        adversary.step()
        # A short memory at first, so that the average forgets the random weights.
        decay = min(_EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
    return average, {name: tensor.detach().clone() for name, tensor in critic.state_dict().items()}


def pretrain_autoencoder(
    plan: StudyPlan, profiles: Tensor, generator: torch.Generator, *, steps: int = 1500, batch: int = 128
) -> State:
    """Train the plan's autoencoder on public profiles (N, G); returns its weights."""
    model = make_autoencoder(plan)
    initialise(model, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(profiles), (batch,), generator=generator)
        noise = torch.randn(batch, plan.autoencoder.latent_dim, generator=generator)
        loss = autoencoder_losses(model, profiles[rows], noise, plan.autoencoder.kl_weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _half() -> torch.autocast:
    # Halves the time of a step on a CPU; the weights and the losses stay in float32.
    return torch.autocast("cpu", torch.bfloat16)


def _reconstruction(rebuilt: Tensor, real: Tensor) -> Tensor:
    """Mean absolute error of slices (B, C + 1, H, W), the tumour and its mask weighted up: they are small."""
    tumour = (real[:, -1:] > 0).to(real.dtype)
    weight = (1 + _TUMOUR_WEIGHT * tumour).expand_as(real).clone()
    weight[:, -1] *= _MASK_WEIGHT
    return (weight * (rebuilt - real).abs()).mean()


def _fooling(critic: ImageDiscriminator, images: Tensor, code: Tensor) -> Tensor:
    return softplus(-critic(images, code)).mean()
