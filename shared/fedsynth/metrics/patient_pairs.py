"""Diversity as the mean over random pairs of different patients, with an interval over patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

CHUNK = 40  # pairs at a time: similarity measures hold many copies of their input

Compare = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]


@dataclass(frozen=True)
class Pairs:
    """Slices of two different patients each, at the same slice position.

    Attributes:
        first: (P,) row of the first patient.
        second: (P,) row of the second patient.
        position: (P,) slice.
        patients: number of patients they were drawn from.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    position: NDArray[np.int64]
    patients: int


def draw_pairs(
    patients: int, positions: NDArray[np.integer], pairs: int, rng: np.random.Generator, labels: Rows | None = None
) -> Pairs:
    """Random pairs of different patients; with `labels` (patients,), only of patients of the same label from 0 on.

    Raises:
        NotMeasurable: no two patients (of one label).
    """
    if labels is None:
        labels = np.zeros(patients, dtype=np.int64)
    members = [np.flatnonzero(labels == code) for code in np.unique(labels[labels >= 0])]
    members = [rows for rows in members if len(rows) > 1]
    if not members:
        raise NotMeasurable(f"{patients} patients with images, at least 2 are needed")
    first, second = [], []
    sizes = np.array([len(rows) for rows in members])
    for group in rng.choice(len(members), size=pairs, p=sizes / sizes.sum()):
        a, b = rng.choice(members[group], size=2, replace=False)
        first.append(a)
        second.append(b)
    return Pairs(np.array(first), np.array(second), rng.choice(positions, size=pairs), patients)


def compare_pairs(images: NDArray[np.floating], pairs: Pairs, compare: Compare) -> NDArray[np.float64]:
    """`compare` of the two slices of each pair, in chunks.

    Args:
        images: (N, C, S, H, W) in [0, 1].
        pairs: which slices.
        compare: of two batches of slices (B, C, H, W), float32: values (B, ...).

    Returns:
        (P, ...) values.

    Raises:
        NotMeasurable: values that are not finite.
    """
    parts = []
    for start in range(0, len(pairs.first), CHUNK):
        rows = slice(start, start + CHUNK)
        left = images[pairs.first[rows], :, pairs.position[rows]].astype(np.float32)
        right = images[pairs.second[rows], :, pairs.position[rows]].astype(np.float32)
        require_finite("images", left)
        require_finite("images", right)
        parts.append(compare(left, right))
    return np.concatenate(parts)


def resampled_mean(values: NDArray[np.floating], pairs: Pairs, rows: Rows) -> float:
    """Mean of the pairs' `values` (P,) when the patients `rows` were drawn: each pair counts as often as both were.

    Raises:
        NotMeasurable: no pair has both its patients among `rows`.
    """
    require_rows("pairs", values, 1)
    drawn = np.bincount(rows, minlength=pairs.patients)
    weights = (drawn[pairs.first] * drawn[pairs.second]).astype(np.float64)
    if not weights.any():
        raise NotMeasurable("no pair of the drawn patients was compared")
    return float(np.average(values, weights=weights))
