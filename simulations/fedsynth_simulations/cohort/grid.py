"""The grid of a scan: shape and place in the patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """Voxel centres of an array (S, H, W).

    Attributes:
        shape: (S, H, W).
        affine: (4, 4); ``affine @ (s, h, w, 1)`` is the place in mm in LPS (x to the left, y to posterior, z to
            superior).
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbours along S, H and W."""
        s, h, w = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return s, h, w

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def points_mm(self) -> NDArray[np.float32]:
        """(S * H * W, 3) LPS places of all voxels, in the array's C order."""
        steps = [
            np.multiply.outer(np.arange(count), self.affine[:3, axis]).astype(np.float32)
            for axis, count in enumerate(self.shape)
        ]
        s, h, w = steps
        points = (s[:, None, None] + h[:, None]) + (w + self.affine[:3, 3].astype(np.float32))
        return points.reshape(-1, 3)


def axial_grid(slices: int, size: int, slice_spacing_mm: float, pixel_spacing_mm: float) -> Grid:
    """Axial slices in LPS order, (S, H, W) = (slices, size, size), centred on the origin."""
    directions = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    return centred_grid((slices, size, size), directions, (slice_spacing_mm, pixel_spacing_mm, pixel_spacing_mm))


def centred_grid(
    shape: tuple[int, int, int], directions: NDArray[np.float64], spacing: tuple[float, float, float]
) -> Grid:
    """A grid centred on the origin.

    Args:
        shape: (S, H, W).
        directions: (3, 3); column i is the LPS unit vector along array axis i.
        spacing: mm along S, H and W.
    """
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def tilt(degrees: float, axis: int) -> NDArray[np.float64]:
    """(3, 3) rotation about LPS axis 0, 1 or 2."""
    angle = np.deg2rad(degrees)
    i, j = [other for other in range(3) if other != axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = np.cos(angle)
    rotation[i, j], rotation[j, i] = -np.sin(angle), np.sin(angle)
    return rotation
