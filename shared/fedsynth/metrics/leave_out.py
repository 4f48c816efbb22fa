"""Delete-a-group jackknife over patients (Shao and Tu, 1995; Kott, 2001), for statistics that repeated rows would bend.

A bootstrap draws patients twice, which sharpens or blurs a statistic of many correlations, of distances between samples or
of ranks; its quantiles then need not even hold the estimate. Leaving out one group at a time repeats nobody.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import t as student

from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.measurable import NotMeasurable

FOLDS = 20


def leave_out_interval(
    statistic: Callable[[Rows], float], n_patients: int, rng: np.random.Generator
) -> tuple[float, float] | None:
    """95 % interval of a smooth `statistic`: its value, plus or minus Student's quantile times the standard error.

    Args:
        statistic: value on the patients with these distinct row numbers.
        n_patients: number of patients.
        rng: deals the patients out to `FOLDS` groups (fewer patients: one each).

    Returns:
        None when the statistic has no value on all patients or without one of the groups, or there are fewer than three
        patients.
    """
    if n_patients < 3:
        return None
    groups = np.array_split(rng.permutation(n_patients), min(FOLDS, n_patients))
    everyone = np.arange(n_patients)
    try:
        value = statistic(everyone)
        left = np.array([statistic(np.setdiff1d(everyone, group)) for group in groups])
    except NotMeasurable:
        return None
    error = np.sqrt((len(groups) - 1) * left.var())
    half = float(student.ppf(0.975, len(groups) - 1) * error)
    return value - half, value + half
