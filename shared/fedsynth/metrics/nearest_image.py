"""How near a slice lies to its nearest real one: peak signal-to-noise ratio, and SSIM to that neighbour.

PSNR is a measure of *reconstruction*: it wants two pictures of the same thing, and a synthetic slice has no such
partner. To the nearest real training slice it is a hint only: synthetic slices that lie nearer to training patients than
unseen real patients do may be copies. That they do not proves nothing (data that pass such checks can still leak).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import require_finite, require_rows
from fedsynth.metrics.ssim_diversity import similarity

CHUNK = 256  # slices at a time
LEAST_ERROR = 1e-10  # of the mean square: an exact copy has 100 dB, not infinity


@dataclass(frozen=True)
class Nearest:
    """Of each slice: (N,) row of its nearest neighbour, (N,) PSNR in dB and (N,) SSIM to it, means over channels."""

    row: NDArray[np.int64]
    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]


def psnr(mean_square_error: NDArray[np.floating]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; at most 100. Agrees with torchmetrics.

    >>> float(psnr(np.array(0.01)))
    20.0
    """
    return np.asarray(-10 * np.log10(np.clip(mean_square_error, LEAST_ERROR, None)))


def nearest_slices(slices: NDArray[np.floating], among: NDArray[np.floating]) -> Nearest:
    """The neighbour of the least mean square error of each slice.

    Args:
        slices: (N, C, H, W) in [0, 1], all at one slice position.
        among: (M, C, H, W) at the same position.

    Raises:
        NotMeasurable: no slices on either side, or values that are not finite.
    """
    for what, values in (("slices", slices), ("slices to compare with", among)):
        require_rows(what, values, 1)
        require_finite(what, values)
    row, error = np.zeros(len(slices), dtype=np.int64), np.full(len(slices), np.inf)
    flat = _flat(slices)
    for start in range(0, len(among), CHUNK):
        others = _flat(among[start : start + CHUNK])
        squares = np.square(flat).sum(axis=1)[:, None] + np.square(others).sum(axis=1)[None] - 2 * flat @ others.T
        best = squares.argmin(axis=1)
        nearer = squares[np.arange(len(flat)), best] < error
        row[nearer], error[nearer] = start + best[nearer], squares[np.arange(len(flat)), best][nearer]
    exact = np.empty(len(slices))
    ssim = np.empty(len(slices))
    for start in range(0, len(slices), CHUNK):
        rows = slice(start, start + CHUNK)
        left, right = slices[rows].astype(np.float32), among[row[rows]].astype(np.float32)
        # The expanded square above is right to about 1e-7 and picks the neighbour; its distance is computed afresh.
        exact[rows] = np.square(left - right, dtype=np.float64).mean(axis=(1, 2, 3))
        ssim[rows] = similarity(left, right).mean(axis=1)
    return Nearest(row, psnr(exact), ssim)


def _flat(slices: NDArray[np.floating]) -> NDArray[np.float32]:
    return slices.reshape(len(slices), -1).astype(np.float32)
