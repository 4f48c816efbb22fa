"""Whether synthetic patients repeat real ones: the nearest similarity against what different real patients reach.

A copy need not be exact. Images are compared up to mirroring left to right and shifts by a pixel, after the average
patient was subtracted, since all heads resemble each other; genes by correlation of what differs from the average
profile. A similarity counts as a copy from a threshold that pairs of *different* real patients (held-out against
training) practically never reach: a Gumbel distribution is fitted to how similar the most similar training patient of a
held-out one is, and the threshold is what it exceeds once in a hundred releases of this size (extreme value theory;
Coles, 2001), or the largest of them, if that is larger. A person who is among the training patients as well as among the
held-out ones would raise it until no copy is found: pairs that are far beyond the bulk of the others are left out, and told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.attacks.rates import MIN_PATIENTS
from fedsynth.attacks.values import CopyCheck
from fedsynth.evaluation.samples import shrink
from fedsynth.metrics.measurable import require_rows

_SAME = 1e-6  # probability that a pair of different people is taken for one person twice
_MOST = 0.9995  # of a threshold: an exact copy, rounded as images are, lies above
_FALSE_ALARM = 0.01  # probability that a release without any copy is said to hold one
_CANDIDATES = 4  # real patients to whom a synthetic one is compared under all shifts
_COARSE, _FINE = 16, 32  # pixels of a slice's side when searching, and when comparing
_AT_ONCE = 32  # patients
_TINY = 1e-9
# Largest correlation in Fisher's transform: an exact copy is 1, whose transform would be infinite.
_LARGEST = 1 - 1e-9

Floats = NDArray[np.float32]


# Images (C, S, H, W) in [0, 1] and mask (S, H, W) of a patient.
Volume = tuple[NDArray[np.floating], NDArray[np.integer]]


@dataclass(frozen=True)
class Stack:
    """Volumes in few pixels: (N, C + 1, S, P, P) float16, image channels in [0, 1] and the mask.

    Attributes:
        coarse: P = `_COARSE` at most.
        fine: P = `_FINE` at most.
    """

    coarse: NDArray[np.float16]
    fine: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.coarse)


def stack(volumes: Iterable[Volume]) -> Stack:
    """Of one volume a patient; they are read one by one."""
    parts: dict[int, list[NDArray[np.float16]]] = {_COARSE: [], _FINE: []}
    for volume in volumes:
        both = _with_mask(volume)
        for size, kept in parts.items():
            kept.append(_pooled(both, size).astype(np.float16))
    return Stack(*(np.stack(kept) if kept else np.zeros(0, dtype=np.float16) for kept in parts.values()))


def image_copies(
    training: Stack,
    held_out: Stack,
    held_out_volumes: Iterable[Volume],
    synthetic: Iterable[Volume],
    participants: Sequence[str],
) -> CopyCheck:
    """Copies among the images and masks of synthetic patients.

    Args:
        training, held_out: real patients.
        held_out_volumes: the volumes that `held_out` was made of; read one by one.
        synthetic: volumes of the release; read one by one.
        participants: their names.

    Raises:
        NotMeasurable: too few patients with images.
    """
    _require(training.coarse, held_out.coarse, np.asarray(participants))
    common = _Common.of(training, held_out)
    against_training = _Searched.of(training, common)
    similar = np.array([against_training.most_similar(volume) for volume in held_out_volumes])
    # A held-out patient who is a training patient, too, can have been copied: only the others say what chance does.
    kept = of_different_people(similar)
    against_held_out = _Searched.of(Stack(held_out.coarse[kept], held_out.fine[kept]), common)
    found = np.array([[each.most_similar(v) for each in (against_training, against_held_out)] for v in synthetic])
    return _check(
        "images",
        "Correlation of all sequences and the mask after the average real patient is subtracted, mirrored and shifted by "
        "up to a pixel",
        similar,
        found[:, 0],
        found[:, 1],
        participants,
    )


def gene_copies(training: Floats, held_out: Floats, synthetic: Floats, participants: Sequence[str]) -> CopyCheck:
    """Copies among synthetic profiles; all (N, G).

    Raises:
        NotMeasurable: too few profiles.
    """
    _require(training, held_out, synthetic)
    real = np.concatenate([training, held_out])
    middle, spread = real.mean(axis=0), np.maximum(real.std(axis=0), 1e-3)

    def unit(profiles: Floats) -> Floats:
        return _unit(((profiles - middle) / spread).astype(np.float32))

    inside, outside, made = unit(training), unit(held_out), unit(synthetic)
    similar = _largest_products(outside, inside)
    return _check(
        "genes",
        "Correlation of the expression profiles after the average real profile is subtracted",
        similar,
        _largest_products(made, inside),
        _largest_products(made, outside[of_different_people(similar)]),
        participants,
    )


def of_different_people(similar: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N,) which patients are *not* far more like the most similar of the others than their quartiles let expect.

    Who is would be the same person twice. The quartiles hardly move for a few of those.

    Args:
        similar: (N,) correlation of each patient with the most similar of the others.
    """
    maxima = _fisher(similar)
    quarters = np.quantile(maxima, [0.25, 0.5, 0.75])
    scale = float(quarters[2] - quarters[0]) / (_reduced(0.75) - _reduced(0.25))
    location = float(quarters[1]) - scale * _reduced(0.5)
    return np.asarray(maxima <= location + scale * _reduced(1 - _SAME))


def copy_threshold(different: NDArray[np.floating], compared: int) -> float:
    """The correlation that `compared` patients who copied nobody reach once in a hundred releases.

    Args:
        different: (N,) correlation of each of N patients with the most similar of the others, none being a copy.
        compared: patients of a release.

    Raises:
        NotMeasurable: too few pairs.
    """
    require_rows("pairs of different patients", different, MIN_PATIENTS)
    maxima = _fisher(different)
    # Gumbel by moments: the sd is pi / sqrt(6) scale, the mean location + 0.5772 scale.
    scale = float(maxima.std(ddof=1)) * np.sqrt(6) / np.pi
    location = float(maxima.mean()) - np.euler_gamma * scale
    rare = location - scale * np.log(-np.log1p(-_FALSE_ALARM / compared))
    return min(float(np.tanh(max(rare, maxima.max()))), _MOST)


def _fisher(correlations: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.arctanh(np.clip(correlations.astype(np.float64), -_LARGEST, _LARGEST))


def _reduced(probability: float) -> float:
    """Quantile of the Gumbel distribution of location 0 and scale 1."""
    return -float(np.log(-np.log(probability)))


def _check(
    of: Literal["images", "genes"],
    how: str,
    similar: NDArray[np.float64],
    to_training: NDArray[np.float64],
    to_held_out: NDArray[np.float64],
    participants: Sequence[str],
) -> CopyCheck:
    different = similar[of_different_people(similar)]
    twice = len(similar) - len(different)
    threshold = copy_threshold(different, len(to_training))
    copied = np.flatnonzero(to_training >= threshold)
    return CopyCheck(
        of=of,
        how=f"{how}. The threshold is what a release of {len(to_training)} patients who copied nobody exceeds once in a "
        f"hundred times, by {len(different)} held-out patients against training patients "
        f"(median {np.median(different):.2f}, largest {different.max():.2f})."
        + (
            f" Left out: {twice} held-out patients who are so like a training patient that they may be the same person "
            "twice; if they are, the split between training and held-out patients is broken."
            if twice
            else ""
        ),
        threshold=threshold,
        compared=len(to_training),
        found=len(copied),
        found_holdout=int((to_held_out >= threshold).sum()),
        participants=[participants[int(row)] for row in copied],
        most_similar=(float(to_training.max()), float(to_held_out.max())),
    )


@dataclass(frozen=True)
class _Common:
    """What all real patients share: their mean volume, and the spread of each channel, at both sizes."""

    means: tuple[Floats, Floats]
    weights: tuple[Floats, Floats]

    @classmethod
    def of(cls, training: Stack, held_out: Stack) -> _Common:
        means, weights = [], []
        for inside, outside in ((training.coarse, held_out.coarse), (training.fine, held_out.fine)):
            total = inside.sum(axis=0, dtype=np.float32) + outside.sum(axis=0, dtype=np.float32)
            mean = total / (len(inside) + len(outside))
            # Every channel and the mask count alike, by how much patients differ in them.
            squares = [
                np.square(part[start : start + _AT_ONCE] - mean).mean(axis=(2, 3, 4)).sum(axis=0)
                for part in (inside, outside)
                for start in range(0, len(part), _AT_ONCE)
            ]
            spread = np.sqrt(np.sum(squares, axis=0) / (len(inside) + len(outside)))
            means.append(mean)
            weights.append((1 / np.maximum(spread, 1e-3))[:, None, None, None].astype(np.float32))
        return cls((means[0], means[1]), (weights[0], weights[1]))

    def unit(self, volumes: NDArray[np.floating], fine: bool) -> Floats:
        """(N, D) unit vectors of how volumes differ from the mean."""
        different = (volumes.astype(np.float32) - self.means[fine]) * self.weights[fine]
        return _unit(different.reshape(len(volumes), -1))


@dataclass(frozen=True)
class _Searched:
    """Real patients among whom the most similar one is searched, coarsely first.

    Attributes:
        coarse: (N, D) unit vectors of how they differ from the mean.
    """

    real: Stack
    common: _Common
    coarse: Floats

    @classmethod
    def of(cls, real: Stack, common: _Common) -> _Searched:
        parts = [common.unit(real.coarse[i : i + _AT_ONCE], False) for i in range(0, len(real), _AT_ONCE)]
        return cls(real, common, np.concatenate(parts))

    def most_similar(self, volume: Volume) -> float:
        """Largest correlation of `volume`, however moved, with anybody."""
        both = _with_mask(volume)
        small = _pooled(both, _COARSE)
        ways = self.common.unit(np.stack([small, small[..., ::-1]]), False)
        similar = self.coarse @ ways.T
        mirrored = similar[:, 1].max() > similar[:, 0].max()
        count = min(_CANDIDATES, len(similar))
        likely = np.argpartition(-similar[:, int(mirrored)], count - 1)[:count]
        moved = self.common.unit(_pooled(_moved(both[..., ::-1] if mirrored else both), _FINE), True)
        return float((moved @ self.common.unit(self.real.fine[likely], True).T).max())


def _with_mask(volume: Volume) -> NDArray[np.float32]:
    """(C + 1, S, P, P) on a grid of at most `LARGEST_SIZE` pixels."""
    images, mask = volume
    return shrink(np.concatenate([images, (mask > 0)[None]]).astype(np.float32)).astype(np.float32)


def _moved(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    """(9, C, S, P, P) the volume shifted by -1, 0 or 1 pixels along both axes of a slice."""
    return np.stack([np.roll(volume, (down, across), axis=(-2, -1)) for down in (-1, 0, 1) for across in (-1, 0, 1)])


def _pooled(volumes: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    *rest, height, width = volumes.shape
    factor = max(1, height // size)
    planes = torch.from_numpy(np.ascontiguousarray(volumes)).reshape(-1, 1, height, width)
    pooled = torch.nn.functional.avg_pool2d(planes, factor)
    return np.asarray(pooled.reshape(*rest, *pooled.shape[-2:]).numpy())


def _largest_products(made: Floats, real: Floats) -> NDArray[np.float64]:
    parts = [(made[i : i + 256] @ real.T).max(axis=1) for i in range(0, len(made), 256)]
    return np.concatenate(parts).astype(np.float64)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY), dtype=np.float32)


def _require(*sets: NDArray[np.generic]) -> None:
    for name, values in zip(("training patients", "held-out patients", "synthetic patients"), sets, strict=True):
        require_rows(name, values, MIN_PATIENTS if name != "synthetic patients" else 1)
