"""Dice coefficient of a segmentation (Dice, 1945; Taha and Hanbury, 2015), one value a patient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dice_by_patient(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) volume overlap 2 |A and B| / (|A| + |B|) of each patient; NaN where truth and prediction are both empty.

    Args:
        predicted: (N, ...) masks.
        truth: (N, ...) masks of the same shape.
    """
    axes = tuple(range(1, truth.ndim))
    overlap = (predicted & truth).sum(axis=axes, dtype=np.float64)
    total = predicted.sum(axis=axes, dtype=np.float64) + truth.sum(axis=axes, dtype=np.float64)
    return np.divide(2 * overlap, total, out=np.full(len(truth), np.nan), where=total > 0)
