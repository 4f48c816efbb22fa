"""Engines and defaults of a plan for the sizes of its sites and its budget."""

from __future__ import annotations

from dataclasses import dataclass

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


def recommend(sizes: list[int], starts: PublicStarts) -> Recommendation:
    """Sections for a study whose sites declare `sizes` patients.

    One-shot statistics are preferred wherever the public weights are at hand that they need: at the sizes of hospitals
    they have far less noise to signal than hundreds of private steps (`docs/recipes.md`, `docs/genes.md`). Without such
    weights the networks are trained.
    """
    smallest = min(sizes)
    embedding = None
    if starts.embedding is not None and starts.gan is not None:
        embedding = EmbeddingPlan(budget_share=0.6, public=starts.embedding)
    moments = None
    if starts.moments is not None:
        moments = MomentsPlan(budget_share=0.4, public=starts.moments)
    return Recommendation(
        moments=moments,
        autoencoder=_autoencoder(smallest, starts.autoencoder, takes_part=moments is None),
        radiogenomics=_radiogenomics(smallest, takes_part=moments is None),
        embedding=embedding,
        gan=_gan(smallest, starts.gan, takes_part=embedding is None),
    )


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
        # The generator must be much slower than a discriminator that learns through noise: with equal rates it runs
        # away from the public weights to wherever the noise happens to leave the discriminator blind.
        learning_rate=4e-4,
        generator_learning_rate=2e-5 if start else 1e-4,
        budget_share=0.4,
        ema_decay=0.5,
        warm_start=start,
    )
