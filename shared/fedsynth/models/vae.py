"""A conditional variational autoencoder of slices (Kingma and Welling 2014; Sohn, Lee, Yan 2015).

The decoder is the DCGAN's generator and is what travels; the encoder stays at the site. Both see patients, so they have one
private gradient, as one model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsynth.models.condition import TumourMap
from fedsynth.models.dcgan import halvings
from fedsynth.models.interfaces import ImageGenerator

_START = 4  # pixels of the last feature map
_BOUND = 8.0  # of the log-variance, which is exponentiated


class Encoder(nn.Module):
    """(image and mask channels, condition) -> mean and log-variance of the posterior of z.

    It sees the condition's tumour map as one more channel.
    """

    def __init__(
        self, *, latent_dim: int, condition_dim: int, channels: int, size: int, width: int, tumour_map: TumourMap
    ) -> None:
        super().__init__()
        self.tumour_map = tumour_map
        widths = [width * 2**i for i in range(halvings(size))]
        layers: list[nn.Module] = []
        for a, b in zip([channels + 1, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GroupNorm(min(8, b), b), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.latent = nn.Linear(widths[-1] * _START**2 + condition_dim, 2 * latent_dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, channels, size, size) in [-1, 1], condition (B, c) -> mean, log-variance in [-8, 8], (B, latent_dim)."""
        features = self.trunk(torch.cat([x, self.tumour_map(condition)], dim=1))
        mean, log_variance = self.latent(torch.cat([features, condition], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-_BOUND, _BOUND)


class ImageVAE(nn.Module):
    """Encoder and decoder as one model, of which a patient has one gradient."""

    def __init__(self, encoder: Encoder, generator: ImageGenerator) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator

    def forward(self, x: Tensor, condition: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, s, s), condition (B, c), noise (B, latent_dim) standard normal -> reconstruction, and KL (B,) in nats."""
        mean, log_variance = self.encoder(x, condition)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
        return self.generator(mean + noise * (0.5 * log_variance).exp(), condition), kl


def vae_losses(model: nn.Module, x: Tensor, condition: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Losses (B,): the mean absolute error over pixels plus `kl_weight` times the divergence per latent dimension.

    Args:
        model: an `ImageVAE`.
        x: (B, C, s, s) in [-1, 1].
        condition: (B, c).
        noise: (B, latent_dim) standard normal, of the reparameterisation.
        kl_weight: 0 or more.
    """
    reconstruction, kl = model(x, condition, noise)
    return (reconstruction - x).abs().mean(dim=(1, 2, 3)) + kl_weight * kl / noise.shape[1]
