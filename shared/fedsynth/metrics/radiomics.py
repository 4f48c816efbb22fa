"""Radiomics-like features of a patient, for a Fréchet distance in features that have names (as Konz et al., 2026, "FRD").

First-order intensity and grey-level co-occurrence (GLCM; Haralick et al., 1973) of each sequence in the head, intensity
of the tumour against the rest of the head, and the shape of the mask. Definitions follow the Image Biomarker
Standardisation Initiative (IBSI; Zwanenburg et al., 2020) where it has one, but on the study grid and on slices, so
values cannot be compared with those of a radiomics package. Shape takes marching cubes from `fedsynth.morphometry`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import require_finite
from fedsynth.morphometry import HEAD_THRESHOLD, largest_region, sphericity

FIRST_ORDER = ("mean", "sd", "skewness", "10th percentile", "90th percentile", "entropy")
TEXTURE = ("GLCM contrast", "GLCM homogeneity", "GLCM correlation", "GLCM energy")
TUMOUR = ("tumour over head, mean", "tumour over head, sd")
SHAPE = ("volume", "sphericity", "elongation", "flatness")
GREY_LEVELS = 16
TEXTURE_SLICES = 4


def feature_names(sequences: Sequence[str]) -> tuple[str, ...]:
    """Names of the columns of `radiomics`: all of one sequence, then of the next, and the mask's shape last."""
    of_sequences = [f"{name}: {part}" for name in sequences for part in (*FIRST_ORDER, *TEXTURE, *TUMOUR)]
    return (*of_sequences, *(f"mask: {part}" for part in SHAPE))


def sequence_columns(sequences: Sequence[str], name: str) -> NDArray[np.int64]:
    """Columns of `radiomics` that belong to the sequence `name`."""
    return np.flatnonzero([column.startswith(f"{name}: ") for column in feature_names(sequences)])


def radiomics(
    images: NDArray[np.floating],
    tumour: NDArray[np.bool_],
    positions: NDArray[np.integer],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """(F,) features of one patient, in the order of `feature_names`.

    Args:
        images: (C, S, H, W) in [0, 1].
        tumour: (S, H, W) true in the tumour.
        positions: slices that texture may be computed on; `TEXTURE_SLICES` are spread evenly over them.
        spacing_mm: (s, h, w) distance between voxel centres.

    Returns:
        0 for what has nothing to be measured on (no tumour, no head): what is missing is a difference that a distance
        has to show.

    Raises:
        NotMeasurable: images that are not finite.
    """
    require_finite("images", images)
    values = np.asarray(images, dtype=np.float64)
    head = values.max(axis=0) > HEAD_THRESHOLD
    shown = positions[np.linspace(0, len(positions) - 1, min(TEXTURE_SLICES, len(positions))).round().astype(int)]
    rest = head & ~tumour
    parts: list[float] = []
    for channel in values:
        parts += _first_order(channel[head]) if head.any() else [0.0] * len(FIRST_ORDER)
        parts += _texture(channel[shown], head[shown])
        parts += _tumour(channel, tumour, rest)
    return np.array(parts + _shape(tumour, spacing_mm))


def _first_order(values: NDArray[np.float64]) -> list[float]:
    mean, sd = values.mean(), values.std()
    skewness = (((values - mean) / sd) ** 3).mean() if sd > 1e-9 else 0.0
    histogram = np.bincount(_grey(values), minlength=GREY_LEVELS) / len(values)
    entropy = -(histogram[histogram > 0] * np.log2(histogram[histogram > 0])).sum()
    return [float(x) for x in (mean, sd, skewness, *np.quantile(values, [0.1, 0.9]), entropy)]


def _texture(slices: NDArray[np.float64], head: NDArray[np.bool_]) -> list[float]:
    """Means over slices of the properties of the symmetric GLCM at distance 1 in four directions, inside the head."""
    from skimage.feature import graycomatrix, graycoprops

    found = []
    for plane, inside in zip(slices, head, strict=True):
        if not inside.any():
            continue
        # Grey level 0 stands for outside: its row and column are left out, so only pairs inside the head count.
        levels = np.where(inside, _grey(plane) + 1, 0).astype(np.uint8)
        angles = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
        matrix = graycomatrix(levels, [1], angles, levels=GREY_LEVELS + 1, symmetric=True)[1:, 1:].sum(axis=3)
        if matrix.sum() == 0:
            continue
        matrix = (matrix / matrix.sum())[..., None]
        found.append([graycoprops(matrix, name)[0, 0] for name in ("contrast", "homogeneity", "correlation", "energy")])
    return [float(x) for x in np.mean(found, axis=0)] if found else [0.0] * len(TEXTURE)


def _tumour(channel: NDArray[np.float64], tumour: NDArray[np.bool_], rest: NDArray[np.bool_]) -> list[float]:
    if not tumour.any() or not rest.any() or channel[rest].mean() <= 0:
        return [0.0, 0.0]
    scale = channel[rest].mean()
    return [float(channel[tumour].mean() / scale), float(channel[tumour].std() / scale)]


def _shape(tumour: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> list[float]:
    """Of the largest region: cube root of its volume in mm, sphericity, and ratios of its axes (IBSI Q3CK, N17B)."""
    region = largest_region(tumour.astype(np.uint8)) > 0
    if not region.any():
        return [0.0] * len(SHAPE)
    size = np.array(spacing_mm)
    # The variance of a voxel's own extent is a twelfth of its square: without it one slice would have no third axis.
    spread = np.cov((np.argwhere(region) * size).T, bias=True) + np.diag(size**2 / 12)
    axes = np.linalg.eigvalsh(spread)[::-1]
    elongation, flatness = np.sqrt(axes[1] / axes[0]), np.sqrt(axes[2] / axes[0])
    return [
        float(np.cbrt(region.sum() * np.prod(size))),
        sphericity(region, spacing_mm),
        float(elongation),
        float(flatness),
    ]


def _grey(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.clip((values * GREY_LEVELS).astype(np.int64), 0, GREY_LEVELS - 1)
