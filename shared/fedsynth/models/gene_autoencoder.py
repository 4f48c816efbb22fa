"""Gene-expression autoencoder, variational (Kingma and Welling 2014) so that it can generate."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fedsynth.plan import AutoencoderPlan, StudyPlan

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def _stack(widths: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class GeneAutoencoder(nn.Module):
    """G genes -> hidden layers -> latent -> hidden layers -> G genes.

    With the plan's default sizes that is five hidden layers. Without the variational term the innermost ends in a tanh
    whatever the other layers have, so that its values are bounded and `prior` has a range to draw from.
    """

    def __init__(self, genes: int, plan: AutoencoderPlan) -> None:
        super().__init__()
        self.variational = plan.variational
        self.latent_dim = plan.latent_dim
        self.encoder = _stack([genes, *plan.hidden], plan.activation)
        self.to_latent = nn.Linear(plan.hidden[-1], (2 if plan.variational else 1) * plan.latent_dim)
        self.decoder = nn.Sequential(
            *_stack([plan.latent_dim, *reversed(plan.hidden)], plan.activation), nn.Linear(plan.hidden[0], genes)
        )

    def forward(self, genes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """genes (B, G), noise (B, latent_dim) standard normal -> reconstruction (B, G), KL divergence (B,) in nats."""
        latent = self.to_latent(self.encoder(genes))
        if not self.variational:
            return self.decoder(torch.tanh(latent)), torch.zeros(len(genes))
        mean, log_variance = latent.chunk(2, dim=1)
        log_variance = log_variance.clamp(-8, 8)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), kl

    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw latents (count, latent_dim): standard normal, or uniform in (-1, 1) where the encoder ends in a tanh.

        The latter is a guess: without the variational term nothing makes real latents follow it.
        """
        if self.variational:
            return torch.randn(count, self.latent_dim, generator=generator)
        return 2 * torch.rand(count, self.latent_dim, generator=generator) - 1

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, latent_dim) from the prior -> expected expression (B, G)."""
        return self.decoder(latent)


def autoencoder_losses(model: nn.Module, genes: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Per-patient loss (B,): mean squared error over genes plus `kl_weight` times the KL divergence per gene."""
    reconstruction, kl = model(genes, noise)
    return ((reconstruction - genes) ** 2).mean(1) + kl_weight * kl / genes.shape[1]


def make_autoencoder(plan: StudyPlan) -> GeneAutoencoder:
    """The autoencoder that `plan` names, with fresh weights."""
    return GeneAutoencoder(len(plan.genes.panel), plan.autoencoder)


def generate_expression(model: GeneAutoencoder, count: int, generator: torch.Generator, clip: float) -> Tensor:
    """Draw `count` synthetic profiles (count, G) on the plan's normalised scale.

    A decoder alone loses most of each gene's variance. The plan's scale is centred and scaled by public references, so
    the variance a gene should have is 1; what the decoder's spread lacks is added as independent noise. This uses the
    decoder and public constants only: post-processing, without privacy cost.
    """
    with torch.no_grad():
        reference = model.decode(model.prior(2048, generator))
        lacking = (1.0 - reference.var(0)).clamp(min=0.0).sqrt()
        expected = model.decode(model.prior(count, generator))
        residual = torch.randn(expected.shape, generator=generator) * lacking
        return (expected + residual).clamp(-clip, clip)
