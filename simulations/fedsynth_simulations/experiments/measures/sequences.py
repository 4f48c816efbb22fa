"""Whether the sequences of a synthetic slice are of one head: do their edges lie in the same places."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.experiments.bench import REAL, Bench, Measured, with_interval
from fedsynth_simulations.experiments.values import Cell, Row

_REAL_NOTE = "Column real: test slices"
_FLAT = 1e-6  # variance of edges below which a picture has none


def consistency(bench: Bench) -> Measured:
    """Mean correlation over the pixels of two sequences' edges, for each pair of sequences and for sequence and mask."""
    names = bench.data.image.sequences
    pairs = list(combinations(range(len(names)), 2))
    rows: list[Row] = []
    sets = {column: (drawn.images, drawn.masks, np.arange(len(drawn))) for column, drawn in bench.drawn.items()}
    sets[REAL] = (bench.test.images, bench.test.masks, bench.test.owners)
    for first, second in pairs:
        cells = {
            column: _cell(correlation(edges(images[:, first]), edges(images[:, second])), owners, bench)
            for column, (images, _, owners) in sets.items()
        }
        what = f"Correlation of edges, {names[first]} and {names[second]} (near real is good)"
        key = f"edges-{names[first]}-{names[second]}".lower()
        rows.append(bench.experiment.row(key, what, cells, _REAL_NOTE))
    contrast = {}
    for column, (images, masks, owners) in sets.items():
        inside = [
            image[:, mask].mean(axis=1) - image.mean(axis=(1, 2))
            for image, mask in zip(images, masks, strict=True)
            if mask.any()
        ]
        kept = np.array([i for i, mask in enumerate(masks) if mask.any()], dtype=np.int64)
        contrast[column] = np.array(inside), owners[kept]
    for channel, name in enumerate(names):
        cells = {
            column: _cell(found[:, channel], owners, bench)
            if len(found)
            else Cell(value=None, note="no slice has a mask")
            for column, (found, owners) in contrast.items()
        }
        what = f"Brightness of the tumour over that of the slice, {name} (near real is good)"
        rows.append(bench.experiment.row(f"contrast-{name}".lower(), what, cells, _REAL_NOTE))
    return Measured(rows)


def _cell(values: NDArray[np.float64], owners: NDArray[np.int64], bench: Bench) -> Cell:
    usable = np.isfinite(values)
    if not usable.any():
        return Cell(value=None, note="the slices have no edges")
    kept = values[usable]
    return with_interval(lambda rows: float(kept[rows].mean()), owners[usable], bench.rng(12))


def edges(planes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Length of the gradient (N, H, W) by central differences of planes (N, H, W)."""
    down, across = np.gradient(planes.astype(np.float64), axis=(1, 2))
    return np.hypot(down, across)


def correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) Pearson correlation over the pixels of each pair of planes; NaN where one of them is flat."""
    a = left.reshape(len(left), -1) - left.mean(axis=(1, 2))[:, None]
    b = right.reshape(len(right), -1) - right.mean(axis=(1, 2))[:, None]
    spread = np.sqrt((a**2).mean(axis=1) * (b**2).mean(axis=1))
    return np.divide((a * b).mean(axis=1), spread, out=np.full(len(a), np.nan), where=spread > _FLAT)
