"""Healthy anatomy: the MNI152 T1 atlas and tissue maps that nilearn carries in its package (Fonov et al., 2011)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth_simulations.cohort.fields import sample

# Channels of the atlas tensor.
DETAIL, GREY, WHITE, FLUID, WHITE_SOFT, FLUID_SOFT = range(6)


@dataclass(frozen=True)
class Anatomy:
    """The atlas on its 2 mm grid, in coordinates whose origin is the middle of the brain (LPS, mm).

    Attributes:
        volume: (6, Z, Y, X): T1 detail beyond the tissue means, grey matter, white matter, fluid, and white matter and
            fluid blurred, by which oedema spreads. The brain is where grey, white and fluid add up to 1.
        half_extent_mm: (3,) distance from the middle of the volume to its outermost voxel centres, x, y, z.
        middle_mm: (3,) middle of the volume in these coordinates.
        tumour_sites_mm: (N, 3) places deep enough in a hemisphere for the middle of a tumour.
    """

    volume: torch.Tensor
    half_extent_mm: NDArray[np.float32]
    middle_mm: NDArray[np.float32]
    tumour_sites_mm: NDArray[np.float32]

    def at(self, points_mm: NDArray[np.float32]) -> NDArray[np.float32]:
        """Channels (6, N) at atlas places `points_mm` (N, 3); zeros outside the head."""
        return sample(self.volume, (points_mm - self.middle_mm) / self.half_extent_mm)

    @classmethod
    def load(cls) -> Anatomy:
        """Read the atlas; needs the extra ``simulations`` and no network."""
        from nilearn import datasets
        from scipy import ndimage

        template = datasets.load_mni152_template(resolution=2)
        maps = [
            template,
            datasets.load_mni152_gm_template(resolution=2),
            datasets.load_mni152_wm_template(resolution=2),
        ]
        # RAS (x, y, z) to LPS (z, y, x): flip x and y, then reverse the axes.
        t1, grey, white = (np.asarray(m.dataobj, dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0) for m in maps)
        spacing = float(abs(template.affine[0, 0]))

        brain = ndimage.binary_fill_holes(ndimage.binary_closing(t1 > 0.05, iterations=2)).astype(np.float32)
        grey, white = np.clip(grey, 0, 1) * brain, np.clip(white, 0, 1) * brain
        excess = np.maximum(grey + white, 1.0)
        grey, white = grey / excess, white / excess
        fluid = np.clip(brain - grey - white, 0, 1)
        detail = (t1 - _tissue_means(t1, grey, white, fluid, brain)) * brain
        soft = [ndimage.gaussian_filter(tissue, 3.0 / spacing) for tissue in (white, fluid)]
        volume = np.stack([detail, grey, white, fluid, *soft]).astype(np.float32)

        inside = np.argwhere(brain > 0)
        middle_voxel = (inside.min(axis=0) + inside.max(axis=0)) / 2
        extent = (np.array(brain.shape) - 1) / 2
        return cls(
            volume=torch.from_numpy(volume),
            half_extent_mm=(extent * spacing)[::-1].astype(np.float32),
            middle_mm=((extent - middle_voxel) * spacing)[::-1].astype(np.float32),
            tumour_sites_mm=_tumour_sites(brain, fluid, middle_voxel, spacing),
        )


def _tissue_means(
    t1: NDArray[np.float32],
    grey: NDArray[np.float32],
    white: NDArray[np.float32],
    fluid: NDArray[np.float32],
    brain: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The least-squares fit of T1 by tissue shares: what a piecewise constant brain would look like."""
    inside = brain > 0
    shares = np.stack([grey[inside], white[inside], fluid[inside]], axis=1)
    means, *_ = np.linalg.lstsq(shares, t1[inside], rcond=None)
    return np.asarray(grey * means[0] + white * means[1] + fluid * means[2], dtype=np.float32)


def _tumour_sites(
    brain: NDArray[np.float32], fluid: NDArray[np.float32], middle_voxel: NDArray[np.float64], spacing: float
) -> NDArray[np.float32]:
    """Places at least 14 mm under the surface and 10 mm off the midline, outside fluid, brain stem and cerebellum."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(brain) * spacing
    voxels = np.argwhere((depth >= 14.0) & (fluid < 0.3))[::3]
    places = ((voxels - middle_voxel) * spacing)[:, ::-1].astype(np.float32)
    x, y, z = places.T
    # The tentorium falls from anterior to posterior: above this plane lies the cerebrum.
    return places[(np.abs(x) >= 10.0) & (z > -22.0 + 0.25 * np.maximum(y, 0.0))]
