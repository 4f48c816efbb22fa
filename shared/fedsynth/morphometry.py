"""Measuring the morphology features of one patient, real or synthetic, on the study grid.

Shape follows the Image Biomarker Standardisation Initiative (IBSI; Zwanenburg et al., Radiology 2020): the surface is
that of the marching-cubes mesh of the mask (Lewiner et al. 2003), the volume that of its voxels, and sphericity
(IBSI QCFX) takes both from the mesh.

Where a mask only tells tumour from no tumour, enhancement and oedema are estimated from the intensities by public
thresholds. Such fractions are surrogates: they order patients, they do not replace a segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphology import BACKGROUND, ENHANCING, FEATURES, OEDEMA, WHOLE_TUMOUR

# On images in [0, 1]: what is brighter than this is head.
HEAD_THRESHOLD = 0.08
# A tumour voxel enhances when T1c, in units of the rest of the head's mean, is this much above T1 in the same units.
ENHANCEMENT_THRESHOLD = 0.35
# A tumour voxel that does not enhance is oedema when FLAIR is this many times the rest of the head's mean.
OEDEMA_THRESHOLD = 1.5


def largest_region(mask: NDArray[np.integer]) -> NDArray[np.uint8]:
    """`mask` (S, H, W) with only its largest contiguous region of any label; voxels touching at a corner are joined."""
    from skimage.measure import label

    labels: NDArray[np.uint8] = np.asarray(mask, dtype=np.uint8)
    parts, count = label(labels != BACKGROUND, connectivity=3, return_num=True)
    if count <= 1:
        return labels
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), labels, BACKGROUND).astype(np.uint8)


def measure(
    images: NDArray[np.floating],
    mask: NDArray[np.integer],
    sequences: Sequence[str],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """Measure every feature of `fedsynth.morphology.FEATURES`, in that order and in physical units.

    Args:
        images: (C, S, H, W) in [0, 1], LPS order.
        mask: (S, H, W) label map; a map that only tells tumour from none holds WHOLE_TUMOUR, not 1.
        sequences: names of the C channels; ``"T1"``, ``"T1c"`` and ``"FLAIR"`` have a meaning here.
        spacing_mm: (s, h, w) distance between voxel centres.

    Returns:
        (F,) values; NaN where a needed sequence is lacking, and everywhere when the mask is empty.
    """
    images = np.asarray(images, dtype=np.float32)
    mask = largest_region(mask)
    tumour = mask != BACKGROUND
    if not tumour.any():
        return np.full(len(FEATURES), np.nan)
    head = images.max(axis=0) > HEAD_THRESHOLD
    rest = head & ~tumour
    relative = {
        name: channel / float(channel[rest].mean())
        for name, channel in zip(sequences, images, strict=True)
        if rest.any() and float(channel[rest].mean()) > 0
    }
    enhancing, oedema = _fractions(mask, tumour, relative)
    superior, posterior, left = _position(head | tumour, tumour)
    values = {
        "volume": float(tumour.sum()) * float(np.prod(spacing_mm)) / 1000.0,
        "enhancing_fraction": enhancing,
        "oedema_fraction": oedema,
        "sphericity": sphericity(tumour, spacing_mm),
        "position_left": left,
        "position_posterior": posterior,
        "position_superior": superior,
        "t1c_ratio": _mean(relative, "T1c", tumour),
        "flair_ratio": _mean(relative, "FLAIR", tumour),
    }
    return np.array([values[feature.name] for feature in FEATURES])


def sphericity(region: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> float:
    """Surface of the ball of equal volume over the surface of `region` (S, H, W), in (0, 1]; 1 is a ball.

    A region of one slice or one voxel has a surface like any other, because the mesh is closed around it.
    """
    from skimage.measure import marching_cubes, mesh_surface_area

    box = tuple(
        slice(int(rows[0]), int(rows[-1]) + 1)
        for rows in (
            np.flatnonzero(region.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)
        )
    )
    vertices, faces, _, _ = marching_cubes(
        np.pad(region[box], 1).astype(np.float32), level=0.5, spacing=spacing_mm, allow_degenerate=False
    )
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    volume = abs(float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum())) / 6.0
    surface = float(mesh_surface_area(vertices, faces))
    return min(1.0, float((36.0 * np.pi * volume**2) ** (1.0 / 3.0)) / surface)


def _fractions(
    mask: NDArray[np.uint8], tumour: NDArray[np.bool_], relative: dict[str, NDArray[np.floating]]
) -> tuple[float, float]:
    """Enhancing and oedema share of the tumour: counted where the mask tells its parts, estimated where it does not."""
    size = float(tumour.sum())
    if not (mask == WHOLE_TUMOUR).any():
        return float((mask == ENHANCING).sum()) / size, float((mask == OEDEMA).sum()) / size
    if "T1" not in relative or "T1c" not in relative:
        return np.nan, np.nan
    enhancing = tumour & (relative["T1c"] - relative["T1"] > ENHANCEMENT_THRESHOLD)
    if "FLAIR" not in relative:
        return float(enhancing.sum()) / size, np.nan
    oedema = tumour & ~enhancing & (relative["FLAIR"] > OEDEMA_THRESHOLD)
    return float(enhancing.sum()) / size, float(oedema.sum()) / size


def _position(head: NDArray[np.bool_], tumour: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Centroid of `tumour` in the bounding box of `head`, in [0, 1] along each axis (S, H, W).

    A hundredth of the head's voxels may stick out at either end of the box, so that stray noise does not move it.
    """
    places = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        cumulative = np.cumsum(head.sum(axis=others)) / head.sum()
        low, high = int(np.argmax(cumulative > 0.01)), int(np.argmax(cumulative >= 0.99))
        profile = tumour.sum(axis=others)
        centroid = float((profile * np.arange(len(profile))).sum() / profile.sum())
        places.append(float(np.clip((centroid - low) / max(high - low, 1), 0.0, 1.0)))
    return places[0], places[1], places[2]


def _mean(relative: dict[str, NDArray[np.floating]], name: str, tumour: NDArray[np.bool_]) -> float:
    """Mean of the channel `name` in the tumour, in units of the rest of the head; NaN without that channel."""
    return float(relative[name][tumour].mean()) if name in relative else np.nan
