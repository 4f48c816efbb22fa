"""Kernel distance: unbiased squared MMD with a cubic kernel (Bińkowski et al., ICLR 2018, "KID").

With every sample a patient of its own it is what torchmetrics computes with one subset of all samples, to 1e-6. Slices
of one patient are alike, so pairs within a patient are left out like pairs of a sample with itself: else the distance of
two halves of one cohort would be above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.jackknife import deal
from fedsynth.metrics.measurable import require_finite, require_rows

MIN_SAMPLES = 10
FOLDS = 20
CHUNK = 1024


@dataclass(frozen=True)
class _Sums:
    """Sums of the kernel over pairs of different patients, and how many pairs, between the folds of two sets."""

    total: NDArray[np.float64]
    pairs: NDArray[np.float64]

    def mean(self, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> float:
        return float(self.total[rows][:, columns].sum() / self.pairs[rows][:, columns].sum())


def kernel_distance(
    real: NDArray[np.floating],
    fake: NDArray[np.floating],
    real_patients: NDArray[np.integer] | None = None,
    fake_patients: NDArray[np.integer] | None = None,
) -> float:
    """Squared MMD with the kernel (x.y / D + 1)^3 over all pairs of different patients; 0 in expectation for equal laws.

    Unbiased, so it may come out negative, the more so the fewer the samples and the heavier the features' tails.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        real_patients: (N,) number of each sample's patient; None for one sample a patient.
        fake_patients: (M,) likewise.

    Raises:
        NotMeasurable: fewer than `MIN_SAMPLES` samples or two patients, or features that are not finite.
    """
    return kernel_folds(real, fake, real_patients, fake_patients, folds=1)[0]


def kernel_folds(
    real: NDArray[np.floating],
    fake: NDArray[np.floating],
    real_patients: NDArray[np.integer] | None = None,
    fake_patients: NDArray[np.integer] | None = None,
    folds: int = FOLDS,
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """`kernel_distance`, and the same without each fold of the real and of the fake patients, at no further cost.

    Raises:
        NotMeasurable: as `kernel_distance`.
    """
    for what, values in (("real samples", real), ("compared samples", fake)):
        require_rows(what, values, MIN_SAMPLES)
        require_finite(what, values)
    own_real = np.arange(len(real)) if real_patients is None else real_patients
    own_fake = np.arange(len(fake)) if fake_patients is None else fake_patients
    require_rows("real patients", np.unique(own_real), 2)
    require_rows("compared patients", np.unique(own_fake), 2)
    fold_real, fold_fake = deal(own_real, folds), deal(own_fake, folds)
    within_real = _sums(real, real, fold_real, fold_real, own_real)
    within_fake = _sums(fake, fake, fold_fake, fold_fake, own_fake)
    between = _sums(real, fake, fold_real, fold_fake, None)

    def distance(rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> float:
        return within_real.mean(rows, rows) + within_fake.mean(columns, columns) - 2 * between.mean(rows, columns)

    rows, columns = np.ones(len(within_real.total), dtype=bool), np.ones(len(within_fake.total), dtype=bool)
    without_real = [distance(_all_but(fold, rows), columns) for fold in range(len(rows))] if len(rows) > 1 else []
    without_fake = [distance(rows, _all_but(fold, columns)) for fold in range(len(columns))] if len(columns) > 1 else []
    return distance(rows, columns), np.array(without_real), np.array(without_fake)


def _all_but(fold: int, every: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rest = every.copy()
    rest[fold] = False
    return rest


def _sums(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    first_folds: NDArray[np.int64],
    second_folds: NDArray[np.int64],
    patients: NDArray[np.integer] | None,
) -> _Sums:
    """Sums by folds, in blocks of `CHUNK` x `CHUNK`; with `patients` of one set against itself, without own pairs."""
    total = np.zeros((int(first_folds.max()) + 1, int(second_folds.max()) + 1))
    pairs = np.zeros_like(total)
    for i in range(0, len(first), CHUNK):
        for j in range(0, len(second), CHUNK):
            rows, columns = slice(i, i + CHUNK), slice(j, j + CHUNK)
            kernel = (first[rows].astype(np.float64) @ second[columns].T.astype(np.float64) / first.shape[1] + 1) ** 3
            counted = np.ones_like(kernel)
            if patients is not None:
                counted[patients[rows][:, None] == patients[columns][None, :]] = 0
            left, right = _members(first_folds[rows], len(total)), _members(second_folds[columns], total.shape[1])
            total += left.T @ (kernel * counted) @ right
            pairs += left.T @ counted @ right
    return _Sums(total, pairs)


def _members(folds: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return (folds[:, None] == np.arange(count)[None, :]).astype(np.float64)
