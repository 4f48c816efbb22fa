"""Fréchet distance between Gaussian fits of two feature sets (Heusel et al., 2017, "FID"), by torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fedsynth.metrics.measurable import require_finite, require_rows


class Precomputed(nn.Module):
    """Stands in for the Inception network of torchmetrics where features were already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves, (N, D)."""
        return features


def frechet_distance(real: NDArray[np.floating], fake: NDArray[np.floating]) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between features of two sets.

    Biased upwards for few samples: compare only values computed from equal numbers of samples.

    Args:
        real: (N, D) features, N > D so that the covariance has full rank.
        fake: (M, D) features, M > D.

    Raises:
        NotMeasurable: too few samples, or features that are not finite.
    """
    for what, values in (("real samples", real), ("compared samples", fake)):
        require_rows(what, values, real.shape[1] + 1)
        require_finite(what, values)
    # Moments in float64 around a common centre: torchmetrics subtracts large sums otherwise.
    centre = real.mean(axis=0, dtype=np.float64)
    distance = FrechetInceptionDistance(feature=Precomputed(real.shape[1])).set_dtype(torch.float64)
    distance.update(torch.from_numpy(real - centre), real=True)
    distance.update(torch.from_numpy(fake - centre), real=False)
    return max(0.0, float(distance.compute()))
