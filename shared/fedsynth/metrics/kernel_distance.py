"""Kernel distance: unbiased squared MMD with a cubic kernel (Bińkowski et al., 2018, "KID"), by torchmetrics."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.metrics.frechet import Precomputed
from fedsynth.metrics.measurable import require_finite, require_rows

MIN_SAMPLES = 10


def kernel_distance(
    real: NDArray[np.floating],
    fake: NDArray[np.floating],
    rng: np.random.Generator,
    subsets: int = 20,
    subset_size: int = 500,
) -> float:
    """Mean over random subsets of the squared MMD with the kernel (x.y / D + 1)^3; 0 in expectation for equal laws.

    Unbiased, so it may come out negative, the more so the fewer the samples and the heavier the features' tails.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        rng: source of the subsets.
        subsets: number of subsets.
        subset_size: samples in each, at most min(N, M) are used.

    Raises:
        NotMeasurable: fewer than `MIN_SAMPLES` samples, or features that are not finite.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    for what, values in (("real samples", real), ("compared samples", fake)):
        require_rows(what, values, MIN_SAMPLES)
        require_finite(what, values)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        torch.manual_seed(int(rng.integers(2**62)))  # torchmetrics draws its subsets from torch's global generator
        distance = KernelInceptionDistance(
            feature=Precomputed(real.shape[1]), subsets=subsets, subset_size=min(subset_size, len(real), len(fake))
        )
        distance.update(torch.from_numpy(real).double(), real=True)
        distance.update(torch.from_numpy(fake).double(), real=False)
        mean, _ = distance.compute()
    return float(mean)
