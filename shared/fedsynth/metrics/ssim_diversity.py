"""Diversity as structural similarity (Wang et al., 2004) between different patients, by torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

from fedsynth.metrics.measurable import require_finite, require_rows

CHUNK = 40  # pairs at a time: torchmetrics holds many copies of its input


def mean_pairwise_ssim(volumes: NDArray[np.floating], rng: np.random.Generator, pairs: int = 400) -> float:
    """Mean SSIM between random pairs of different patients at the same slice position; 1 when all patients are alike.

    Read it against the value among real patients: well above means too little variety, well below means noise.

    Args:
        volumes: (N, C, S, H, W) images in [0, 1].
        rng: source of the pairs.
        pairs: number of pairs.

    Raises:
        NotMeasurable: fewer than two patients, or values that are not finite.
    """
    require_rows("patients with images", volumes, 2)
    first = rng.integers(len(volumes), size=pairs)
    second = (first + rng.integers(1, len(volumes), size=pairs)) % len(volumes)
    position = rng.integers(volumes.shape[2], size=pairs)
    total = 0.0
    for start in range(0, pairs, CHUNK):
        rows = slice(start, start + CHUNK)
        left = volumes[first[rows], :, position[rows]].astype(np.float32)
        right = volumes[second[rows], :, position[rows]].astype(np.float32)
        require_finite("images", left)
        require_finite("images", right)
        similarity = structural_similarity_index_measure(
            torch.from_numpy(left), torch.from_numpy(right), data_range=1.0, reduction="sum"
        )
        if not isinstance(similarity, torch.Tensor):
            raise TypeError("torchmetrics returned more than the similarity")
        total += float(similarity)
    return total / pairs
