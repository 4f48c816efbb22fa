"""Structural similarity (Wang et al., 2004) and its form over several scales (Wang et al., 2003), by torchmetrics.

`similarity` agrees with scikit-image's `structural_similarity` with a Gaussian window to 1e-5, but for the margin of half a
window, which scikit-image leaves out. Between *different* patients both measure diversity, to be read against real
patients: well above means too little variety, well below means noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.patient_pairs import compare_pairs, draw_pairs

# Weights of the scales in the paper, finest first; they sum to 1.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11


def similarity(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, C) SSIM of each channel of slices (N, C, H, W) in [0, 1]; 1 for equal slices."""
    return _by_channel(
        left, right, lambda a, b: structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    )


def scales_of(size: int) -> int:
    """Number of scales that MS-SSIM has on planes of `size` pixels: halved as long as the window fits, five at most.

    >>> [scales_of(size) for size in (16, 32, 64, 256)]
    [1, 2, 3, 5]
    """
    scales = 1
    while scales < len(SCALE_WEIGHTS) and size // 2**scales > WINDOW - 1:
        scales += 1
    return scales


def multiscale_similarity(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, C) MS-SSIM of each channel of slices (N, C, H, W) in [0, 1], over `scales_of` H scales.

    The paper's weights are for five scales, which want 176 pixels; on smaller planes the finest ones are used with
    their weights scaled to sum to 1, so that values of other sizes cannot be compared. Negative terms count as 0.
    """
    weights = np.array(SCALE_WEIGHTS[: scales_of(min(left.shape[-2:]))])
    betas = tuple(float(weight) for weight in weights / weights.sum())
    return _by_channel(
        left,
        right,
        lambda a, b: multiscale_structural_similarity_index_measure(
            a, b, data_range=1.0, reduction="none", betas=betas, normalize="relu"
        ),
    )


def mean_pairwise_ssim(volumes: NDArray[np.floating], rng: np.random.Generator, pairs: int = 400) -> float:
    """Mean SSIM between random pairs of different patients at the same slice position; 1 when all patients are alike.

    Args:
        volumes: (N, C, S, H, W) images in [0, 1].
        rng: source of the pairs.
        pairs: number of pairs.

    Raises:
        NotMeasurable: fewer than two patients, or values that are not finite.
    """
    require_rows("patients with images", volumes, 2)
    drawn = draw_pairs(len(volumes), np.arange(volumes.shape[2]), pairs, rng)
    return float(compare_pairs(volumes, drawn, similarity).mean())


def _by_channel(
    left: NDArray[np.float32], right: NDArray[np.float32], measure: Callable[[torch.Tensor, torch.Tensor], object]
) -> NDArray[np.float64]:
    """`measure` of single-channel planes: each channel becomes a slice of its own."""
    n, channels, height, width = left.shape
    if min(height, width) < WINDOW:
        raise NotMeasurable(f"planes of {height} x {width} pixels are smaller than the window of {WINDOW}")
    require_finite("images", left)
    require_finite("images", right)
    planes = (torch.from_numpy(np.ascontiguousarray(x).reshape(-1, 1, height, width)) for x in (left, right))
    values = measure(*planes)
    if not isinstance(values, torch.Tensor):
        raise TypeError("torchmetrics returned more than the similarity")
    return np.asarray(values.reshape(n, channels).double().numpy())
