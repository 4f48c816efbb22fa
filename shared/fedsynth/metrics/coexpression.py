"""Preservation of co-expression: agreement of two gene-by-gene correlation matrices (Viñas et al., 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

MIN_PROFILES = 8


def coexpression(real: NDArray[np.floating], fake: NDArray[np.floating]) -> tuple[float, float]:
    """Pearson correlation and mean absolute difference of the upper triangles of the two correlation matrices.

    Both depend on the number of profiles: compare only values from equal numbers.

    Args:
        real: (N, G) expression.
        fake: (M, G) expression. Genes that are constant in either set are left out.

    Raises:
        NotMeasurable: fewer than `MIN_PROFILES` profiles, values that are not finite, or fewer than three genes vary.
    """
    for what, values in (("real profiles", real), ("compared profiles", fake)):
        require_rows(what, values, MIN_PROFILES)
        require_finite(what, values)
    varies = (real.std(axis=0) > 1e-6) & (fake.std(axis=0) > 1e-6)
    if varies.sum() < 3:
        raise NotMeasurable("fewer than three genes vary, so that there is no co-expression")
    upper = np.triu_indices(int(varies.sum()), k=1)
    first = np.corrcoef(real[:, varies], rowvar=False)[upper]
    second = np.corrcoef(fake[:, varies], rowvar=False)[upper]
    return float(np.corrcoef(first, second)[0, 1]), float(np.abs(first - second).mean())
