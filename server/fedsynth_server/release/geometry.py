"""Where the voxels of a synthetic volume lie, in the words of DICOM (LPS) and of NIfTI (RAS).

A synthetic head has no scanner, so the centre of its grid is put at the origin of the patient coordinate system; the
axes of the grid are the patient's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsynth.plan import ImagePlan

Scalar = TypeVar("Scalar", bound=np.generic)

# Columns run to the patient's left, rows to posterior (DICOM PS3.3 C.7.6.2.1.1).
IMAGE_ORIENTATION_PATIENT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

# Intensities [0, 1] are stored as integers 0..1000 in NIfTI and DICOM alike, so that both hold the same numbers.


@dataclass(frozen=True)
class Grid:
    """A grid of `slices` x `rows` x `columns` voxels in LPS order, spacings in mm.

    >>> Grid(slices=3, rows=2, columns=5, pixel_spacing=2.0, slice_spacing=4.0).position(0)
    (-4.0, -1.0, -4.0)
    """

    slices: int
    rows: int
    columns: int
    pixel_spacing: float
    slice_spacing: float

    @classmethod
    def of(cls, image: ImagePlan) -> Grid:
        """The grid of a study plan."""
        return cls(image.slices, image.size, image.size, image.pixel_spacing_mm, image.slice_spacing_mm)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, H, W)."""
        return self.slices, self.rows, self.columns

    def position(self, index: int) -> tuple[float, float, float]:
        """ImagePositionPatient of slice `index`: LPS millimetres of the centre of its first voxel."""
        return (
            _first(self.columns, self.pixel_spacing),
            _first(self.rows, self.pixel_spacing),
            _first(self.slices, self.slice_spacing) + index * self.slice_spacing,
        )

    @property
    def ras_affine(self) -> NDArray[np.float64]:
        """(4, 4) affine from voxel indices of `to_ras` arrays to RAS millimetres."""
        spacing = (self.pixel_spacing, self.pixel_spacing, self.slice_spacing)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = [
            _first(n, step) for n, step in zip((self.columns, self.rows, self.slices), spacing, strict=True)
        ]
        return affine


def _first(n: int, spacing: float) -> float:
    """Coordinate of the first of `n` points with the given spacing and their middle at 0."""
    return -(n - 1) / 2 * spacing


def to_ras(volume: NDArray[Scalar]) -> NDArray[Scalar]:
    """Turn an LPS volume (S, H, W) into NIfTI's order (W, H, S) with axes to right, anterior, superior."""
    return np.ascontiguousarray(volume[:, ::-1, ::-1].transpose(2, 1, 0))
