"""Real and synthetic patients in one form, so that every metric treats them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.evaluation.patients import Patients
from fedsynth.metrics.measurable import NotMeasurable, require_finite
from fedsynth.morphology import normalise
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient

LARGEST_SIZE = 64


@dataclass(frozen=True)
class Volumes:
    """Patients with images.

    Attributes:
        images: (N, C, S, H, W) float in [0, 1].
        masks: (N, S, H, W) true in the tumour.
        labels: (N,) class codes, -1 where unknown.
        sites: (N,) site codes, -1 for synthetic patients.
    """

    images: NDArray[np.floating]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    sites: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[np.integer]) -> Volumes:
        """The patients `rows`."""
        return Volumes(self.images[rows], self.masks[rows], self.labels[rows], self.sites[rows])


@dataclass(frozen=True)
class Profiles:
    """Patients with genes.

    Attributes:
        genes: (N, G) float32 on the plan's normalised scale.
        morphology: (N, F) float32 normalised to [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
        sites: (N,) site codes, -1 for synthetic patients.
    """

    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]
    sites: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.genes)

    def take(self, rows: NDArray[np.integer]) -> Profiles:
        """The patients `rows`."""
        return Profiles(self.genes[rows], self.morphology[rows], self.labels[rows], self.sites[rows])

    @property
    def with_morphology(self) -> Profiles:
        """The patients in whom at least one morphology feature was measured."""
        return self.take(np.flatnonzero(np.isfinite(self.morphology).any(axis=1)))


def real_volumes(patients: Patients) -> Volumes:
    """The patients that have images, on a grid of at most `LARGEST_SIZE` pixels."""
    if not patients.has_images.all():  # indexing copies, and images are large
        patients = patients.rows(patients.has_images)
    return Volumes(shrink(patients.images), shrink(patients.masks > 0) >= 0.5, patients.labels, patients.sites)


def real_profiles(patients: Patients) -> Profiles:
    """The patients that have genes."""
    keep = patients.has_genes
    return Profiles(patients.genes[keep], patients.morphology[keep], patients.labels[keep], patients.sites[keep])


def synthetic_volumes(plan: StudyPlan, patients: Sequence[SyntheticPatient]) -> Volumes:
    """The images of synthetic patients.

    Raises:
        UsageError: ``synthetic_label_unknown``.
    """
    shape = (len(plan.image.sequences), plan.image.slices, plan.image.size, plan.image.size)
    images = np.array([patient.images for patient in patients], dtype=np.float16).reshape(-1, *shape)
    masks = np.array([patient.mask > 0 for patient in patients], dtype=bool).reshape(-1, *shape[1:])
    return Volumes(shrink(images), shrink(masks) >= 0.5, _codes(plan, patients), np.full(len(patients), -1))


def synthetic_profiles(plan: StudyPlan, patients: Sequence[SyntheticPatient]) -> Profiles:
    """The genes and conditioning morphology of synthetic patients.

    Raises:
        UsageError: ``synthetic_label_unknown``.
    """
    names = plan.morphology.features
    genes = np.array([patient.genes for patient in patients], dtype=np.float32).reshape(-1, len(plan.genes.panel))
    morphology = np.array([patient.morphology for patient in patients], dtype=np.float64).reshape(-1, len(names))
    return Profiles(genes, normalise(morphology, names), _codes(plan, patients), np.full(len(patients), -1))


def _codes(plan: StudyPlan, patients: Sequence[SyntheticPatient]) -> NDArray[np.int64]:
    unknown = sorted({patient.label for patient in patients} - set(plan.label.classes))
    if unknown:
        raise UsageError("synthetic_label_unknown", f"Synthetic patients carry labels {unknown} that the plan lacks.")
    return np.array([plan.label.classes.index(patient.label) for patient in patients], dtype=np.int64)


def shrink_factor(size: int) -> int:
    """By how much `shrink` divides planes of `size` pixels."""
    return max(1, size // LARGEST_SIZE)


def shrink(planes: NDArray[np.floating] | NDArray[np.bool_]) -> NDArray[np.floating]:
    """Block means of planes (..., H, W) larger than `LARGEST_SIZE`; smaller ones as they are, in float16."""
    *rest, height, width = planes.shape
    factor = shrink_factor(height)
    if factor == 1:
        return planes.astype(np.float16, copy=False)
    blocks = planes.reshape(*rest, height // factor, factor, width // factor, factor)
    return blocks.mean(axis=(-3, -1), dtype=np.float32)


def even_slices(
    volumes: Volumes, patients: int, positions: NDArray[np.integer], slices: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(patients * slices, C, H, W): `slices` distinct ones of `positions` in each of `patients` random patients.

    Slices of one patient are close neighbours: sets compare only with as many patients *and* as many slices of each.
    """
    chosen = rng.permutation(len(volumes))[:patients]
    drawn = np.stack([rng.permutation(positions)[:slices] for _ in chosen])
    return _slices(volumes, np.repeat(chosen, slices), drawn.ravel())[0]


def training_slices(
    volumes: Volumes, n: int, rng: np.random.Generator, tumour_share: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """At most `n` distinct random slices (N, C, H, W) with their masks (N, H, W).

    Args:
        volumes: where they are drawn from.
        n: how many at most.
        rng: source of the draw.
        tumour_share: share of slices with any tumour, as far as there are enough; None leaves it as it comes.

    Raises:
        NotMeasurable: there are no slices, or images are not finite.
    """
    depth = volumes.masks.shape[1]
    order = rng.permutation(len(volumes) * depth)
    if not len(order):
        raise NotMeasurable("no patient with images to train on")
    if tumour_share is not None:
        bearing = volumes.masks.any(axis=(2, 3)).ravel()[order]
        with_tumour = order[bearing][: round(n * tumour_share)]
        order = np.concatenate([with_tumour, order[~bearing][: n - round(n * tumour_share)]])
    return _slices(volumes, order[:n] // depth, order[:n] % depth)


def _slices(
    volumes: Volumes, patients: NDArray[np.integer], positions: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    images = volumes.images[patients, :, positions].astype(np.float32)
    require_finite("images", images)
    return images, volumes.masks[patients, positions]
