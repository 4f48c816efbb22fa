"""Distances between feature sets and the radius to the k-th nearest neighbour, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from fedsynth.metrics.measurable import require_finite, require_rows

CHUNK = 512  # rows at a time: 40 MB against 10,000 samples


def distances(
    a: NDArray[np.floating], b: NDArray[np.floating], chunk: int = CHUNK
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Rows of `a` and their Euclidean distances (chunk, M) to the rows of `b` (M, D), chunk after chunk."""
    for start in range(0, len(a), chunk):
        rows = slice(start, min(start + chunk, len(a)))
        yield rows, np.asarray(cdist(a[rows], b), dtype=np.float64)


def neighbour_radii(what: str, samples: NDArray[np.floating], neighbours: int) -> NDArray[np.float64]:
    """(N,) distance of each sample (N, D) to its `neighbours`-th nearest other sample.

    Raises:
        NotMeasurable: not more samples than `neighbours`, or values that are not finite.
    """
    require_rows(what, samples, neighbours + 1)
    require_finite(what, samples)
    radii = np.empty(len(samples))
    for rows, within in distances(samples, samples):
        # A sample's nearest is itself at distance 0, so its k-th neighbour has rank k.
        radii[rows] = np.partition(within, neighbours, axis=1)[:, neighbours]
    return radii
