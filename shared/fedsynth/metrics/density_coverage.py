"""Density and coverage (Naeem et al., ICML 2020): precision and recall that an outlier cannot inflate."""

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
    radii = neighbour_radii("real samples", real, neighbours)
    require_rows("compared samples", fake, 1)
    require_finite("compared samples", fake)
    inside = distances(real, fake) <= radii[:, None]
    density = inside.sum(axis=0).mean() / neighbours
    return float(density), float(inside.any(axis=1).mean())
