"""Smooth random fields over the head, and sampling of volumes at points.

Fields are defined in millimetres over a fixed cube, not over a scan's grid: scans of one patient with different grids
see the same deformation, tumour and texture.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

HALF_CUBE_MM = 120.0
_LATTICE = 31  # 8 mm between lattice points, a quarter of the shortest wavelength that is used


def smooth_field(rng: np.random.Generator, wavelength_mm: float, channels: int = 1) -> NDArray[np.float32]:
    """Draw fields of about unit variance on the lattice of the cube.

    A sum of separable cosines with normal coefficients under a Gaussian spectrum.

    Args:
        rng: source of the coefficients.
        wavelength_mm: wavelength at which the spectrum has fallen to exp(-1/2); at least 32.
        channels: number of independent fields.

    Returns:
        (channels, Z, Y, X) over [-HALF_CUBE_MM, HALF_CUBE_MM]^3.
    """
    basis, spectrum = _cosines(wavelength_mm)
    terms = basis.shape[1]
    coefficients = rng.standard_normal((channels, terms, terms, terms), dtype=np.float32) * spectrum
    field = coefficients @ basis.T
    field = np.einsum("yj,cijx->ciyx", basis, field, optimize=True)
    return np.ascontiguousarray(np.einsum("zi,ciyx->czyx", basis, field, optimize=True))


@cache
def _cosines(wavelength_mm: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine basis (lattice, terms) and spectrum (terms, terms, terms) that gives unit mean variance."""
    if wavelength_mm < 32.0:
        raise ValueError(f"expected a wavelength of at least 32 mm, four lattice steps; got {wavelength_mm}")
    cutoff = 4 * HALF_CUBE_MM / wavelength_mm  # term k has wavelength 4 * HALF_CUBE_MM / k
    k = np.arange(int(np.ceil(2 * cutoff)) + 1)
    position = np.linspace(0, 1, _LATTICE)
    basis = np.cos(np.pi * np.outer(position, k))
    amplitude = np.exp(-0.5 * (k[:, None, None] ** 2 + k[:, None] ** 2 + k**2) / cutoff**2)
    power = np.einsum("zi,yj,xk,ijk->zyx", basis**2, basis**2, basis**2, amplitude**2, optimize=True).mean()
    return basis.astype(np.float32), (amplitude / np.sqrt(power)).astype(np.float32)


def sample_field(field: NDArray[np.float32], points_mm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values (channels, N) of a lattice field at `points_mm` (N, 3) in the order x, y, z; the border value outside."""
    return sample(torch.from_numpy(field), points_mm / HALF_CUBE_MM, padding="border")


def sample(volume: torch.Tensor, positions: NDArray[np.float32], padding: str = "zeros") -> NDArray[np.float32]:
    """Trilinear values of a volume.

    Args:
        volume: (channels, Z, Y, X) float32.
        positions: (N, 3) in the order x, y, z, where -1 and 1 are the centres of the first and last voxel.
        padding: ``"zeros"`` or ``"border"`` outside.

    Returns:
        (channels, N) float32.
    """
    grid = torch.from_numpy(np.ascontiguousarray(positions, dtype=np.float32)).view(1, 1, 1, -1, 3)
    values = torch.nn.functional.grid_sample(volume[None], grid, padding_mode=padding, align_corners=True)
    return values.view(volume.shape[0], -1).numpy()
