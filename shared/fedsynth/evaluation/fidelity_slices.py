"""Which slices fidelity compares, and their features: indices into volumes, so that images are read in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.samples import Volumes
from fedsynth.metrics.feature_network import FeatureNetwork
from fedsynth.metrics.measurable import NotMeasurable, require_finite
from fedsynth.morphometry import HEAD_THRESHOLD

Value = TypeVar("Value")

LEAST_HEAD = 0.02  # share of the plane
CHUNK = 256  # slices at a time


@dataclass(frozen=True)
class Slices:
    """Slices of some patients, as many of each.

    Attributes:
        volumes: where they are.
        patients: (N,) row of the patient in `volumes`, all slices of a patient in a row.
        positions: (N,) slice.
    """

    volumes: Volumes
    patients: NDArray[np.int64]
    positions: NDArray[np.int64]

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """The images (n, C, H, W), `CHUNK` at a time.

        Raises:
            NotMeasurable: images that are not finite.
        """
        for start in range(0, len(self.patients), CHUNK):
            rows = slice(start, start + CHUNK)
            images = self.volumes.images[self.patients[rows], :, self.positions[rows]].astype(np.float32)
            require_finite("images", images)
            yield images

    @property
    def tumour(self) -> NDArray[np.bool_]:
        """(N,) whether the slice shows any tumour."""
        return np.asarray(self.volumes.masks.any(axis=(2, 3)))[self.patients, self.positions]


@dataclass(frozen=True)
class FeatureSet:
    """Features of slices, and whose they are.

    Attributes:
        values: (N, D).
        patients: (N,) number of each slice's patient, in the order in which patients were drawn.
        labels: (N,) class of the patient, -1 where unknown.
        sites: (N,) site of the patient, -1 for synthetic patients.
    """

    values: NDArray[np.float64]
    patients: NDArray[np.int64]
    labels: NDArray[np.int64]
    sites: NDArray[np.int64]

    def keep(self, rows: NDArray[np.bool_]) -> FeatureSet:
        """The slices `rows` (N,)."""
        return FeatureSet(self.values[rows], self.patients[rows], self.labels[rows], self.sites[rows])

    def first(self, patients: int) -> FeatureSet:
        """The slices of the first so many patients; their order is random, so these are as good as any."""
        return self.keep(np.isin(self.patients, np.unique(self.patients)[:patients]))

    @property
    def n_patients(self) -> int:
        """Number of patients."""
        return len(np.unique(self.patients))


def present(value: Value | NotMeasurable) -> Value:
    """`value`, or its reason raised."""
    if isinstance(value, NotMeasurable):
        raise value
    return value


def require_images(volumes: Volumes) -> Volumes:
    """`volumes`, or `NotMeasurable` when there are none."""
    if not len(volumes):
        raise NotMeasurable("no patient with images")
    return volumes


def draw_slices(
    volumes: Volumes, patients: int, positions: NDArray[np.integer], slices: int, rng: np.random.Generator
) -> Slices:
    """`slices` distinct ones of `positions` in each of `patients` random patients.

    Slices of one patient are close neighbours: sets compare only with as many patients *and* as many slices of each.
    """
    chosen = rng.permutation(len(require_images(volumes)))[:patients]
    drawn = np.stack([rng.permutation(positions)[:slices] for _ in chosen])
    return Slices(volumes, np.repeat(chosen, slices), drawn.ravel().astype(np.int64))


def features_of(slices: Slices, network: FeatureNetwork, sequence: int | None = None) -> FeatureSet:
    """Features of the slices, of all sequences together or of one alone."""
    values = np.concatenate([network.features(images, sequence) for images in slices.chunks()])
    # Numbered in the order of the draw: row numbers of a cohort are in the order of its files, site by site.
    order = np.cumsum(np.concatenate([[0], slices.patients[1:] != slices.patients[:-1]]))
    return FeatureSet(
        values,
        order.astype(np.int64),
        slices.volumes.labels[slices.patients],
        slices.volumes.sites[slices.patients],
    )


def head_positions(holdout: Volumes) -> NDArray[np.int64]:
    """Slice positions that show the head in at least nine of ten held-out patients, or all when there is none.

    Blank slices are all alike: they would count as neighbours of one another and hide a collapsed generator.
    """
    if not len(holdout):
        return np.arange(holdout.images.shape[2])
    bright = holdout.images.max(axis=1) > HEAD_THRESHOLD
    shown = np.flatnonzero((bright.mean(axis=(2, 3)) > LEAST_HEAD).mean(axis=0) >= 0.9)
    return shown if len(shown) else np.arange(holdout.images.shape[2])


def one_mean_patient(real: Volumes, patients: int) -> Volumes:
    """The mean real volume, `patients` times: what a generator draws that has collapsed to the mean."""
    mean = real.images.mean(axis=0, dtype=np.float32)
    return Volumes(
        np.broadcast_to(mean, (patients, *mean.shape)),
        np.zeros((patients, *real.masks.shape[1:]), dtype=bool),
        np.full(patients, -1),
        np.full(patients, -1),
    )
