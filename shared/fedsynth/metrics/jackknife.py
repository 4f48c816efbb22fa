"""Delete-a-group jackknife (Kott, 2001) of a distance between two sets of patients, from its values without each group.

A bootstrap draws about a third of the patients not at all and others twice. A distance sees that as a poorer set: FID
moves up by more than its spread, and a sample's copy becomes its own nearest neighbour. Leaving out one group of
patients at a time makes no copies and hardly changes the size. (`fedsynth.metrics.leave_out` does so for a statistic of
one set that is given as a function; here the values come from sums that are computed once.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student


def deal(patients: NDArray[np.integer], folds: int) -> NDArray[np.int64]:
    """(N,) fold 0, 1, ... of each sample: patients are dealt in turn, all samples of one into the same fold.

    Args:
        patients: (N,) number of each sample's patient.
        folds: how many folds at most; no more than there are patients.

    >>> deal(np.array([7, 7, 3, 5, 5]), 2)
    array([0, 0, 0, 1, 1])
    """
    _, order = np.unique(patients, return_inverse=True)
    return np.asarray(order % folds, dtype=np.int64)


def standard_error(*without: NDArray[np.floating]) -> float:
    """Standard error of a statistic of independent sets, from its values without each fold of each set.

    Args:
        without: for each set the (folds,) values; a set of a single fold adds nothing.
    """
    variance = sum(
        (len(values) - 1) / len(values) * float(np.square(values - values.mean()).sum())
        for values in without
        if len(values) > 1
    )
    return float(np.sqrt(variance))


def jackknife_interval(
    value: float, *without: NDArray[np.floating], least: float = -np.inf
) -> tuple[float, float] | None:
    """95 % interval: `value`, plus or minus Student's quantile times the standard error.

    It surrounds the statistic *at this number of samples*: a bias from few samples is in the value and stays in it.

    Args:
        value: the statistic on all patients.
        without: as in `standard_error`.
        least: lower bound of the statistic, e.g. 0 for a distance.

    Returns:
        None when a set has fewer than three folds.
    """
    folds = min(len(values) for values in without)
    if folds < 3:
        return None
    half = float(student.ppf(0.975, folds - 1)) * standard_error(*without)
    return max(least, value - half), value + half
