"""The condition vector that ties an image slice to a patient: label, morphology, slice position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FREQUENCIES = (1, 2)
POSITION_DIM = 1 + 2 * len(_FREQUENCIES)


def condition_dim(classes: int, features: int) -> int:
    """Length of the condition vector."""
    return classes + features + POSITION_DIM


def condition(labels: Tensor, morphology: Tensor, position: Tensor, classes: int) -> Tensor:
    """Build condition vectors.

    Args:
        labels: (B,) int64 class codes; -1 (unknown) gives a zero one-hot.
        morphology: (B, F) normalised to [0, 1]; NaN (not measured) becomes the middle of the range.
        position: (B,) slice position in [-1, 1], inferior to superior.
        classes: number of label classes K.

    Returns:
        (B, K + F + 5): one-hot label, morphology in [-1, 1], position and its Fourier features.
    """
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), classes).to(morphology.dtype)
    one_hot = one_hot * (labels >= 0).to(morphology.dtype)[:, None]
    waves = [f(math.pi * k * position) for k in _FREQUENCIES for f in (torch.sin, torch.cos)]
    centred = torch.nan_to_num(morphology, nan=0.5) * 2 - 1
    return torch.cat([one_hot, centred, torch.stack([position, *waves], dim=1)], dim=1)


def slice_positions(slices: int) -> Tensor:
    """Positions (slices,) in [-1, 1] of a volume's planes, inferior to superior."""
    return torch.linspace(-1, 1, slices) if slices > 1 else torch.zeros(1)
