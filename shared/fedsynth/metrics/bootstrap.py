"""Percentile bootstrap over patients (Efron and Tibshirani, 1993)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import NotMeasurable

Rows = NDArray[np.int64]


def bootstrap_interval(
    statistic: Callable[[Rows], float], n_patients: int, rng: np.random.Generator, resamples: int = 500
) -> tuple[float, float] | None:
    """95 % interval of `statistic` when patients are drawn anew with replacement.

    Patients, not slices, are resampled, because slices of one patient are not independent. The interval holds the
    chance of which patients were tested, not that of training again.

    Args:
        statistic: value of the statistic on the patients with these row numbers (repeated rows allowed).
        n_patients: number of patients.
        rng: source of the resamples.
        resamples: how many.

    Returns:
        The 2.5 % and 97.5 % quantiles, or None when more than a tenth of the resamples have no value.
    """
    values: list[float] = []
    for _ in range(resamples):
        try:
            values.append(statistic(rng.integers(n_patients, size=n_patients)))
        except NotMeasurable:  # e.g. a resample in which only one class is present
            continue
    if len(values) < 0.9 * resamples:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
