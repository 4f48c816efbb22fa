"""What an attacker compares patients by: features of their images, masks and morphology, and their genes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.samples import shrink, synthetic_profiles
from fedsynth.metrics.domain_extractor import DomainExtractor, extract
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient

Space = Literal["images", "genes", "both"]
SPACES: tuple[Space, ...] = ("images", "genes", "both")

_PATIENTS_AT_ONCE = 32
_MASK_CELLS = 8  # along each side of a slice
_TINY = 1e-6


@dataclass(frozen=True)
class Described:
    """Patients as an attacker sees them, one row each; parts that a patient lacks are NaN.

    Attributes:
        slices: (N, S * D) features of every slice by the extractor, in the order of the slices.
        mask: (N, S * 64) share of each cell of an 8 x 8 grid that the tumour covers, of every slice.
        morphology: (N, F) in [0, 1].
        genes: (N, G) on the plan's scale.
        labels: (N,) class codes, -1 where unknown.
        sites: (N,) site codes, -1 for synthetic patients.
    """

    slices: NDArray[np.float32]
    mask: NDArray[np.float32]
    morphology: NDArray[np.float32]
    genes: NDArray[np.float32]
    labels: NDArray[np.int64]
    sites: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Described:
        """The patients `rows`."""
        return Described(
            self.slices[rows],
            self.mask[rows],
            self.morphology[rows],
            self.genes[rows],
            self.labels[rows],
            self.sites[rows],
        )

    def has(self, space: Space) -> NDArray[np.bool_]:
        """(N,) whether a patient has what `space` compares."""
        images, genes = _complete(self.slices), _complete(self.genes)
        return {"images": images, "genes": genes, "both": images & genes}[space]


def describe_real(patients: Patients, extractor: DomainExtractor) -> Described:
    """Real patients; a few volumes at a time are in memory as features are made."""
    n, _, depth, *_ = patients.images.shape
    slices = np.full((n, depth * extractor.num_features), np.nan, dtype=np.float32)
    mask = np.full((n, depth * _MASK_CELLS**2), np.nan, dtype=np.float32)
    rows = np.flatnonzero(patients.has_images)
    for some in np.array_split(rows, max(1, -(-len(rows) // _PATIENTS_AT_ONCE))):
        slices[some] = _slice_features(extractor, patients.images[some])
        mask[some] = _cells(patients.masks[some] > 0)
    genes = np.where(patients.has_genes[:, None], patients.genes, np.float32(np.nan))
    return Described(slices, mask, patients.morphology, genes, patients.labels, patients.sites)


def describe_synthetic(plan: StudyPlan, patients: Sequence[SyntheticPatient], extractor: DomainExtractor) -> Described:
    """Synthetic patients, at least one, with the morphology that the release states of them.

    Raises:
        UsageError: ``synthetic_label_unknown``.
    """
    parts = []
    for start in range(0, len(patients), _PATIENTS_AT_ONCE):
        # One by one: what is read from a release is read here, once, and a few volumes are in memory.
        some = [patients[row] for row in range(start, min(start + _PATIENTS_AT_ONCE, len(patients)))]
        profiles = synthetic_profiles(plan, some)
        parts.append(
            Described(
                _slice_features(extractor, np.stack([patient.images for patient in some])),
                _cells(np.stack([patient.mask > 0 for patient in some])),
                profiles.morphology,
                profiles.genes,
                profiles.labels,
                profiles.sites,
            )
        )
    return Described(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Described)))


@dataclass(frozen=True)
class Scale:
    """By what each part is divided so that their Euclidean distances can be added: public or reference numbers only.

    A part's scale is the root mean square distance between two reference patients. One number a part, since dividing each
    coordinate by its own spread would let those decide in which hardly anybody differs.
    """

    slices: float
    mask: float
    morphology: float
    genes: float


def scale_of(reference: Described) -> Scale:
    """The scale of `reference` patients."""
    return Scale(*(_spread(getattr(reference, part)) for part in ("slices", "mask", "morphology", "genes")))


def points(described: Described, space: Space, scale: Scale, middle: Described) -> NDArray[np.float32]:
    """Patients as points whose Euclidean distances an attack compares.

    Slices count as much as mask and morphology together, and images as much as genes. Morphology that was not measured is
    taken to be the mean of `middle`'s.

    Args:
        described: patients who have what `space` asks for.
        space: what is compared.
        scale: see `Scale`.
        middle: the reference patients.
    """
    usual = np.nanmean(middle.morphology, axis=0) if len(middle) else np.full(described.morphology.shape[1], 0.5)
    usual = np.nan_to_num(usual, nan=0.5)
    morphology = np.where(np.isfinite(described.morphology), described.morphology, usual)
    images = [
        described.slices / scale.slices,
        described.mask * (0.7 / scale.mask),
        morphology * (0.7 / scale.morphology),
    ]
    genes = [described.genes * (1.4 / scale.genes)]
    chosen = {"images": images, "genes": genes, "both": [*images, *genes]}[space]
    return np.concatenate(chosen, axis=1).astype(np.float32)


def _complete(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N,) whether a row has no NaN."""
    return np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)


def _spread(values: NDArray[np.floating]) -> float:
    variances = np.nanvar(values, axis=0) if len(values) else np.zeros(1)
    return float(max(np.sqrt(2 * np.nansum(variances)), _TINY))


def _slice_features(extractor: DomainExtractor, images: NDArray[np.floating]) -> NDArray[np.float32]:
    n, channels, depth, height, width = images.shape
    slices = images.transpose(0, 2, 1, 3, 4).reshape(n * depth, channels, height, width)
    return extract(extractor, shrink(slices)).astype(np.float32).reshape(n, -1)


def _cells(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    n, depth, height, width = masks.shape
    blocks = masks.reshape(n, depth, _MASK_CELLS, height // _MASK_CELLS, _MASK_CELLS, width // _MASK_CELLS)
    return blocks.mean(axis=(3, 5), dtype=np.float32).reshape(n, -1)
