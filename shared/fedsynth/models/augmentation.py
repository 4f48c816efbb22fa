"""Changes of images in front of the discriminator, the same in law for real and fake (Zhao et al. 2020, DiffAugment).

A discriminator of few patients learns them by heart; one that sees them moved and recoloured does so later (Karras et al.
2020). Every image is changed by itself, by random numbers that depend on no image, so the change of a patient's slice is
part of that patient's gradient and of no other's. Everything is differentiable, since the generator learns through it.

A slice moves together with its mask and with the place that the condition states, so image and condition still belong
together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fedsynth.models.condition import TumourMap
from fedsynth.plan import Augmentation

_SHIFT = 1 / 16  # of the image's side: 2 pixels of 32
_BRIGHTNESS, _CONTRAST = 0.2, 0.2
_TURN = math.radians(10)


@dataclass(frozen=True)
class Changes:
    """Random changes of B images.

    Attributes:
        right, down: (B,) int64, pixels by which an image moves.
        brightness: (B,) what is added to intensities, whose range is [-1, 1].
        contrast: (B,) by what intensities' distance from the image's mean is multiplied.
        mirrored: (B,) bool, whether left and right change places.
        turned: (B,) radians clockwise about the middle, after mirroring and before moving.
    """

    right: Tensor
    down: Tensor
    brightness: Tensor
    contrast: Tensor
    mirrored: Tensor
    turned: Tensor

    def __getitem__(self, rows: Tensor) -> Changes:
        """The changes of some images."""
        return Changes(**{name: each[rows] for name, each in vars(self).items()})


def draw_changes(augmentation: Sequence[Augmentation], images: int, size: int, generator: torch.Generator) -> Changes:
    """Draw changes for a number of images of `size` pixels a side; what is not named stays as it is."""
    largest = max(round(size * _SHIFT), 1)

    def uniform() -> Tensor:
        return 2 * torch.rand(images, generator=generator) - 1

    def pixels() -> Tensor:
        return torch.randint(-largest, largest + 1, (images,), generator=generator)

    right = down = torch.zeros(images, dtype=torch.int64)
    brightness, contrast = torch.zeros(images), torch.ones(images)
    if "translation" in augmentation:
        right, down = pixels(), pixels()
    if "intensity" in augmentation:
        brightness, contrast = _BRIGHTNESS * uniform(), 1 + _CONTRAST * uniform()
    mirrored, turned = torch.zeros(images, dtype=torch.bool), torch.zeros(images)
    if "flip" in augmentation:
        mirrored = torch.rand(images, generator=generator) < 0.5
    if "rotation" in augmentation:
        turned = _TURN * uniform()
    return Changes(right, down, brightness, contrast, mirrored, turned)


def augmented(images: Tensor, condition: Tensor, changes: Changes, tumour_map: TumourMap) -> tuple[Tensor, Tensor]:
    """Apply `changes` to slices and to the places that their conditions state.

    Args:
        images: (B, C + 1, H, W) in [-1, 1], the last channel being the mask, which is moved but not recoloured.
        condition: (B, c) of `fedsynth.models.condition.condition`.
        changes: one a slice.
        tumour_map: says where in a condition the place of the tumour stands.

    Returns:
        Images, what moves in being background (-1), intensities not clamped; and conditions.
    """
    channels, mask = images[:, :-1], images[:, -1:]
    mean = channels.mean(dim=(1, 2, 3), keepdim=True)
    contrast, brightness = changes.contrast[:, None, None, None], changes.brightness[:, None, None, None]
    # Written so that contrast 1 and brightness 0 leave every bit as it is.
    recoloured = channels + (channels - mean) * (contrast - 1) + brightness
    shown = _moved(_turned(_mirrored(torch.cat([recoloured, mask], dim=1), changes), changes), changes)
    stated = tumour_map.turned(tumour_map.mirrored(condition, changes.mirrored), changes.turned)
    return shown, tumour_map.moved(stated, changes.right, changes.down)


def _mirrored(images: Tensor, changes: Changes) -> Tensor:
    return torch.where(changes.mirrored[:, None, None, None], images.flip(-1), images)


def _turned(images: Tensor, changes: Changes) -> Tensor:
    """Interpolated linearly; what turns in from outside is background."""
    if not changes.turned.any():
        return images  # unturned images are not to be interpolated
    cosine, sine = changes.turned.cos(), changes.turned.sin()
    rows = [torch.stack([cosine, sine, 0 * sine], dim=1), torch.stack([-sine, cosine, 0 * sine], dim=1)]
    places = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images + 1, places, align_corners=False) - 1


def _moved(images: Tensor, changes: Changes) -> Tensor:
    """What moves in from outside is background."""
    size = images.shape[-1]
    across = torch.arange(size) - changes.right[:, None]  # (B, W), where each column comes from
    down = torch.arange(size) - changes.down[:, None]
    inside = _within(down, size)[:, None, :, None] & _within(across, size)[:, None, None, :]
    rows = torch.arange(len(images))[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    taken = images[
        rows, channels, down.clamp(0, size - 1)[:, None, :, None], across.clamp(0, size - 1)[:, None, None, :]
    ]
    return torch.where(inside, taken, -1.0)


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)
