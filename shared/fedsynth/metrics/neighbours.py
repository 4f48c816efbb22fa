"""Distances between feature sets and the radius to the k-th nearest neighbour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fedsynth.metrics.measurable import require_finite, require_rows


def distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Euclidean distances (N, M) between the rows of `a` (N, D) and of `b` (M, D)."""
    return np.asarray(cdist(a, b), dtype=np.float64)


def neighbour_radii(what: str, samples: NDArray[np.floating], neighbours: int) -> NDArray[np.float64]:
    """(N,) distance of each sample (N, D) to its `neighbours`-th nearest other sample.

    Raises:
        NotMeasurable: not more samples than `neighbours`, or values that are not finite.
    """
    require_rows(what, samples, neighbours + 1)
    require_finite(what, samples)
    within = distances(samples, samples)
    # A sample's nearest is itself at distance 0, so its k-th neighbour has rank k.
    return np.partition(within, neighbours, axis=1)[:, neighbours]
