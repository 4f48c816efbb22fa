"""Density and coverage (Naeem et al., ICML 2020): precision and recall that an outlier cannot inflate.

Agrees with `prdc.compute_prdc`, the authors' implementation, to rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import require_finite, require_rows
from fedsynth.metrics.neighbours import distances, neighbour_radii


def density_coverage(
    real: NDArray[np.floating], fake: NDArray[np.floating], neighbours: int = 5
) -> tuple[float, float]:
    """How densely fakes lie among reals (1 in expectation for equal laws, may exceed 1), and share of reals covered.

    A real sample is covered when at least one fake lies nearer than its k-th nearest real neighbour.

    Args:
        real: (N, D) features.
        fake: (M, D) features; take M = N, coverage depends on the sizes.
        neighbours: k.

    Raises:
        NotMeasurable: too few samples, or features that are not finite.
    """
    dense, covered = neighbourhood_members(real, fake, neighbours)
    return float(dense.mean()), float(covered.mean())


def neighbourhood_members(
    real: NDArray[np.floating], fake: NDArray[np.floating], neighbours: int = 5
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each fake's density (M,), and which reals (N,) are covered; see `density_coverage`."""
    radii = neighbour_radii("real samples", real, neighbours)
    require_rows("compared samples", fake, 1)
    require_finite("compared samples", fake)
    balls, covered = np.zeros(len(fake)), np.zeros(len(real), dtype=bool)
    for rows, between in distances(real, fake):
        inside = between < radii[rows, None]
        balls += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
    return balls / neighbours, covered
