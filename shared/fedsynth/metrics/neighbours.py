"""Distances between feature sets and the radius to the k-th nearest neighbour, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import require_finite, require_rows

ROUNDING = 1e-12  # of the squared lengths
CHUNK = 512  # rows at a time: 40 MB against 10,000 samples


def distances(
    a: NDArray[np.floating], b: NDArray[np.floating], chunk: int = CHUNK
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Rows of `a` and their Euclidean distances (chunk, M) to the rows of `b` (M, D), chunk after chunk.

    By the expanded square, which for wide features is many times as fast as coordinate by coordinate. Rounding is cut
    off, so that equal rows are at distance 0; others are right to 1e-6 of their distance from the centre.
    """
    centre = b.mean(axis=0, dtype=np.float64) if len(b) else np.zeros(b.shape[1])
    others = b - centre
    lengths = np.square(others).sum(axis=1)
    for start in range(0, len(a), chunk):
        rows = slice(start, min(start + chunk, len(a)))
        some = a[rows] - centre
        sums = np.square(some).sum(axis=1)[:, None] + lengths[None, :]
        squares = sums - 2 * (some @ others.T)
        squares[squares < ROUNDING * sums] = 0
        yield rows, np.sqrt(squares)


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
