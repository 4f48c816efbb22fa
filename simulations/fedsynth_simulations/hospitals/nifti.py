"""NIfTI files in any axis order, from arrays in LPS order."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.cohort.grid import Grid

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(
    path: Path,
    image: NDArray[np.generic],
    grid: Grid,
    axis_codes: str,
    description: str = "",
    name: str = "",
    orientation_known: bool = True,
) -> None:
    """Write a volume with its axes in the order that a converter or scanner left them.

    Args:
        path: ends in ``.nii.gz``; its folder is made if need be.
        image: (S, H, W), or (S, H, W, T), of a type that NIfTI knows.
        grid: place of the volume.
        axis_codes: where the file's three axes grow to, e.g. ``"RAS"`` or ``"PSR"``.
        description: of the header, at most 79 bytes.
        name: `intent_name` of the header, at most 15 bytes.
        orientation_known: false writes qform_code = sform_code = 0, so that only the spacing remains.
    """
    # Axes (S, H, W) to (W, H, S): NIfTI's first index is the fastest.
    data = np.moveaxis(image, (2, 1, 0), (0, 1, 2))
    affine = _LPS_TO_RAS @ grid.affine[:, [2, 1, 0, 3]]
    reorder = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axis_codes)
    )
    turned = nibabel.orientations.apply_orientation(data, reorder)
    affine = affine @ nibabel.orientations.inv_ornt_aff(reorder, data.shape)
    volume = nibabel.Nifti1Image(np.ascontiguousarray(turned), affine)
    volume.header.set_xyzt_units("mm", "sec")
    volume.header["descrip"] = description
    volume.header["intent_name"] = name
    if orientation_known:
        volume.set_sform(affine, code=1)
        volume.set_qform(affine, code=1)
    else:
        volume = nibabel.Nifti1Image(np.ascontiguousarray(turned), None, volume.header)
        volume.header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), *[1.0] * (image.ndim - 3)))
        volume.set_sform(None, code=0)
        volume.set_qform(None, code=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp in the gzip header: the same seed writes the same bytes.
    path.write_bytes(gzip.compress(volume.to_bytes(), compresslevel=1, mtime=0))


def truncate(path: Path) -> None:
    """Cut a file in half, as an interrupted copy does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
