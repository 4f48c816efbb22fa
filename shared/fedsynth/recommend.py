"""Defaults of a plan for the sizes of its sites."""

from __future__ import annotations

from fedsynth.plan import AutoencoderPlan, GanPlan, PublicWeights, RadiogenomicsPlan, WarmStart

_LARGEST_IMAGE_BATCH = 64


def recommended_modules(
    smallest_site: int, warm_start: WarmStart | None, autoencoder_start: PublicWeights | None = None
) -> tuple[AutoencoderPlan, RadiogenomicsPlan, GanPlan]:
    """Training sections for a study whose smallest site declares `smallest_site` patients.

    Profiles are cheap to train on, so their modules draw half of the patients in each step: at the same epsilon a large
    batch has less noise to signal than a small one. Image batches are bounded by the time of a step on a CPU.
    """
    half = max(smallest_site // 2, 1)
    batch = max(min(smallest_site // 3, _LARGEST_IMAGE_BATCH), 1)
    return (
        AutoencoderPlan(
            rounds=2,
            # From public weights a few steps suffice; from random ones, more of them.
            steps_per_round=10 if autoencoder_start else 40,
            expected_batch=half,
            max_grad_norm=0.05,
            learning_rate=1e-3 if autoencoder_start else 3e-3,
            budget_share=0.15,
            warm_start=autoencoder_start,
        ),
        RadiogenomicsPlan(
            rounds=4,
            steps_per_round=40,
            expected_batch=half,
            max_grad_norm=1.0,
            learning_rate=1e-2,
            budget_share=0.45,
        ),
        GanPlan(
            rounds=3,
            steps_per_round=20,
            expected_batch=batch,
            max_grad_norm=1.0,
            # The generator must be much slower than a discriminator that learns through noise: with equal rates it runs
            # away from the public weights to wherever the noise happens to leave the discriminator blind.
            learning_rate=4e-4,
            generator_learning_rate=2e-5 if warm_start else 1e-4,
            budget_share=0.4,
            ema_decay=0.5,
            warm_start=warm_start,
        ),
    )
