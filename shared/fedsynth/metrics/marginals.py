"""Gene by gene: distance of the distributions (1-Wasserstein) and ratio of their spreads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows


def mean_wasserstein(real: NDArray[np.floating], fake: NDArray[np.floating]) -> float:
    """Mean over genes of the 1-Wasserstein distance, in units of the plan's normalised expression scale.

    Args:
        real: (N, G) expression.
        fake: (M, G) expression.

    Raises:
        NotMeasurable: fewer than two profiles, or values that are not finite.
    """
    _check(real, fake)
    return float(np.mean([wasserstein_distance(a, b) for a, b in zip(real.T, fake.T, strict=True)]))


def sd_ratios(real: NDArray[np.floating], fake: NDArray[np.floating]) -> NDArray[np.float64]:
    """(G',) standard deviation in `fake` (M, G) over that in `real` (N, G), for the genes that vary in `real`.

    Raises:
        NotMeasurable: fewer than two profiles, values that are not finite, or no gene varies in `real`.
    """
    _check(real, fake)
    spread = real.std(axis=0, ddof=1, dtype=np.float64)
    varies = spread > 1e-6
    if not varies.any():
        raise NotMeasurable("no gene varies among the real profiles")
    return np.asarray(fake.std(axis=0, ddof=1, dtype=np.float64)[varies] / spread[varies])


def spread_error(real: NDArray[np.floating], fake: NDArray[np.floating]) -> float:
    """Mean over genes of ``|log2 (sd in fake / sd in real)|``: 0 is right, 1 is half or double the real spread.

    Ratios are held within 1/1024 and 1024, so that a constant gene counts as 10 and not as infinity.
    """
    return float(np.abs(np.log2(np.clip(sd_ratios(real, fake), 2.0**-10, 2.0**10))).mean())


def _check(real: NDArray[np.floating], fake: NDArray[np.floating]) -> None:
    for what, values in (("real profiles", real), ("compared profiles", fake)):
        require_rows(what, values, 2)
        require_finite(what, values)
