"""The condition that ties an image slice to a patient: label, morphology, slice position, and where the tumour lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.morphology import features
from fedsynth.plan import StudyPlan

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


# Extent of an adult brain in mm, right to left, anterior to posterior, inferior to superior (MNI152 template).
_BRAIN_MM = (140.0, 175.0, 140.0)
_POSITIONS = ("position_left", "position_posterior", "position_superior")


@dataclass(frozen=True)
class TumourMap:
    """Draws the place and size that a condition vector states as a ball on the slice.

    Convolutions turn numbers into places badly, and a private discriminator has few steps in which to learn it. The ball
    has the volume of the tumour and its centroid in a brain of average extent, which the study grid is centred on; what
    differs from that is left to the networks. It is a function of the condition alone.

    Attributes:
        size: height and width in pixels.
        places: indices of the three position features in the condition vector, or None where the plan lacks one.
        volume: index of the volume, or None.
        volume_ml: bounds (low, high) of the volume, which is normalised on a log scale.
        pixel_mm, stack_mm: pixel spacing, and distance between the outermost slices.
    """

    size: int
    places: tuple[int, int, int] | None
    volume: int | None
    volume_ml: tuple[float, float]
    pixel_mm: float
    stack_mm: float

    def __call__(self, condition: Tensor) -> Tensor:
        """condition (B, c) -> (B, 1, size, size) in [0, 1], a Gaussian of the ball's radius; zeros where it is undefined."""
        if self.places is None or self.volume is None:
            return condition.new_zeros((len(condition), 1, self.size, self.size))
        offsets = [condition[:, i] / 2 * extent for i, extent in zip(self.places, _BRAIN_MM, strict=True)]
        low, high = self.volume_ml
        volume = low * (high / low) ** ((condition[:, self.volume] + 1) / 2)
        radius = (3000.0 * volume / (4 * math.pi)) ** (1 / 3)
        axis = (
            torch.arange(self.size, dtype=condition.dtype, device=condition.device) - (self.size - 1) / 2
        ) * self.pixel_mm
        across = (axis[None, :] - offsets[0][:, None]) ** 2
        down = (axis[None, :] - offsets[1][:, None]) ** 2
        along = (condition[:, -POSITION_DIM] * self.stack_mm / 2 - offsets[2]) ** 2
        distance = along[:, None, None] + down[:, :, None] + across[:, None, :]
        return torch.exp(-0.5 * distance / radius[:, None, None] ** 2)[:, None]

    def moved(self, condition: Tensor, right: Tensor, down: Tensor) -> Tensor:
        """Conditions (B, c) whose ball lies `right` and `down` pixels (B,) further; the same where it is undefined."""
        if self.places is None:
            return condition
        result = condition.clone()
        for place, extent, pixels in zip(self.places[:2], _BRAIN_MM[:2], (right, down), strict=True):
            result[:, place] += 2 * self.pixel_mm * pixels / extent
        return result

    def mirrored(self, condition: Tensor, which: Tensor) -> Tensor:
        """Conditions (B, c) of which those of `which` (B,) have their ball on the other side; the same where undefined."""
        if self.places is None:
            return condition
        result, across = condition.clone(), self.places[0]
        result[:, across] = torch.where(which, -condition[:, across], condition[:, across])
        return result

    def turned(self, condition: Tensor, angle: Tensor) -> Tensor:
        """Conditions (B, c) whose ball lies `angle` (B,) radians further clockwise; the same where it is undefined."""
        if self.places is None:
            return condition
        (across, down), (wide, deep) = self.places[:2], _BRAIN_MM[:2]
        x, y, cosine, sine = condition[:, across] * wide, condition[:, down] * deep, angle.cos(), angle.sin()
        result = condition.clone()
        result[:, across] = (x * cosine - y * sine) / wide
        result[:, down] = (x * sine + y * cosine) / deep
        return result


def tumour_map(plan: StudyPlan) -> TumourMap:
    """The map of a plan's condition vectors."""
    names = plan.morphology.features
    first = len(plan.label.classes)
    indices = [first + names.index(name) for name in _POSITIONS if name in names]
    (volume,) = features(["volume"])
    return TumourMap(
        size=plan.image.size,
        places=(indices[0], indices[1], indices[2]) if len(indices) == len(_POSITIONS) else None,
        volume=first + names.index("volume") if "volume" in names else None,
        volume_ml=(volume.low, volume.high),
        pixel_mm=plan.image.pixel_spacing_mm,
        stack_mm=plan.image.slice_spacing_mm * (plan.image.slices - 1),
    )


def slice_positions(slices: int) -> Tensor:
    """Positions (slices,) in [-1, 1] of a volume's planes, inferior to superior."""
    return torch.linspace(-1, 1, slices) if slices > 1 else torch.zeros(1)
