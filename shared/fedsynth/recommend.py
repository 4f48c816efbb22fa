"""Engines and defaults of a plan for the sizes of its sites and its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsynth.dp.accounting import noise_multiplier
from fedsynth.plan import (
    AutoencoderPlan,
    EmbeddingPlan,
    GanPlan,
    MomentsPlan,
    PublicWeights,
    RadiogenomicsPlan,
    WarmStart,
)

_LARGEST_IMAGE_BATCH = 64
# Patients over noise, N / (sigma sqrt(sites)), at which the link of genes and morphology is nearly as good as without
# noise (docs/genes.md); what is left of the budget serves the images better.
_MOMENTS_PATIENTS_TO_NOISE = 350.0
_IMAGES_SHARE = 0.4  # beside trained modules, and of the GAN
_LARGEST_MOMENTS_PART, _LEAST_MOMENTS_PART = 0.5, 0.1


@dataclass(frozen=True)
class PublicStarts:
    """The public weights that are at hand, as a plan names them; None where there are none.

    Attributes:
        gan: generator and discriminator.
        autoencoder: gene autoencoder.
        moments: directions and scales for the private moments.
        embedding: feature network for the private mean embedding.
    """

    gan: WarmStart | None = None
    autoencoder: PublicWeights | None = None
    moments: PublicWeights | None = None
    embedding: PublicWeights | None = None


@dataclass(frozen=True)
class Recommendation:
    """The sections of a plan that say what the sites compute."""

    moments: MomentsPlan | None
    autoencoder: AutoencoderPlan
    radiogenomics: RadiogenomicsPlan
    embedding: EmbeddingPlan | None
    gan: GanPlan


def recommend(sizes: list[int], starts: PublicStarts, epsilon: float, delta: float) -> Recommendation:
    """Sections for a study whose sites declare `sizes` patients, with a budget of `epsilon` at `delta`.

    One-shot statistics are preferred wherever the public weights are at hand that they need: at the sizes of hospitals
    they have far less noise to signal than hundreds of private steps (`docs/recipes.md`, `docs/genes.md`). Without such
    weights the networks are trained.
    """
    smallest = min(sizes)
    embedding = None
    if starts.embedding is not None and starts.gan is not None:
        share = _IMAGES_SHARE if starts.moments is None else 1 - _moments_share(sizes, epsilon, delta)
        embedding = EmbeddingPlan(budget_share=round(share, 2), public=starts.embedding)
    moments = None
    if starts.moments is not None:
        share = 1 - _IMAGES_SHARE if embedding is None else _moments_share(sizes, epsilon, delta)
        moments = MomentsPlan(budget_share=round(share, 2), public=starts.moments)
    return Recommendation(
        moments=moments,
        autoencoder=_autoencoder(smallest, starts.autoencoder, takes_part=moments is None),
        radiogenomics=_radiogenomics(smallest, takes_part=moments is None),
        embedding=embedding,
        gan=_gan(smallest, starts.gan, takes_part=embedding is None),
    )


def _moments_share(sizes: list[int], epsilon: float, delta: float) -> float:
    """The moments' share beside the embedding's, in (0, 1).

    Gaussian releases compose by the sum of 1 / sigma^2, of which the moments get the part that they can use. An epsilon
    goes roughly as 1 / sigma, so the shares are as the roots of the parts.
    """
    together = noise_multiplier(1.0, 1, epsilon, delta)
    enough = sum(sizes) / (_MOMENTS_PATIENTS_TO_NOISE * math.sqrt(len(sizes)))
    part = min(max((together / enough) ** 2, _LEAST_MOMENTS_PART), _LARGEST_MOMENTS_PART)
    return math.sqrt(part) / (math.sqrt(part) + math.sqrt(1 - part))


def _autoencoder(smallest: int, start: PublicWeights | None, *, takes_part: bool) -> AutoencoderPlan:
    return AutoencoderPlan(
        rounds=2 if takes_part else 0,
        # From public weights a few steps suffice; from random ones, more of them.
        steps_per_round=10 if start else 40,
        # Profiles are cheap to train on, so half of the patients are drawn in each step: at the same epsilon a large
        # batch has less noise to signal than a small one.
        expected_batch=max(smallest // 2, 1),
        max_grad_norm=0.05,
        learning_rate=1e-3 if start else 3e-3,
        budget_share=0.15,
        warm_start=start if takes_part else None,
    )


def _radiogenomics(smallest: int, *, takes_part: bool) -> RadiogenomicsPlan:
    return RadiogenomicsPlan(
        rounds=4 if takes_part else 0,
        steps_per_round=40,
        expected_batch=max(smallest // 2, 1),
        max_grad_norm=1.0,
        learning_rate=1e-2,
        budget_share=0.45,
    )


def _gan(smallest: int, start: WarmStart | None, *, takes_part: bool) -> GanPlan:
    return GanPlan(
        rounds=3 if takes_part else 0,
        steps_per_round=20,
        # Image batches are bounded by the time of a step on a CPU.
        expected_batch=max(min(smallest // 3, _LARGEST_IMAGE_BATCH), 1),
        max_grad_norm=1.0,
        # From public weights, few parameters with little noise did better than many with more (docs/adversarial.md).
        discriminator_trains="adapters" if start else "all",
        adapter_rank=2,
        learning_rate=2e-3 if start else 4e-4,
        # The generator must be much slower than a discriminator that learns through noise: with equal rates it runs
        # away from the public weights to wherever the noise happens to leave the discriminator blind.
        generator_learning_rate=2e-5 if start else 1e-4,
        budget_share=_IMAGES_SHARE,
        ema_decay=0.5,
        warm_start=start,
    )
