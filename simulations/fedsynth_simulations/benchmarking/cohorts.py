"""Simulated cohorts for benchmarks: the patients of the simulated hospitals, prepared, without files in between.

A patient is drawn and scanned as `fedsynth_simulations.hospitals` does and prepared by the functions of ingest. What
files add (missing sequences, faults, other axis orders) is left out, so every patient has images, genes and label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.expression import to_panel_scale
from fedsynth.morphology import FEATURES, normalise
from fedsynth.plan import ImagePlan, StudyPlan
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.patient import PatientImages, on_study_grid
from fedsynth_client.ingest.refusals import Unusable
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.expression import biology
from fedsynth_simulations.cohort.grid import Grid, axial_grid
from fedsynth_simulations.cohort.patient import Subject, draw_subject, scan
from fedsynth_simulations.cohort.public import PublicCohort
from fedsynth_simulations.hospitals.sites import Site, SiteName, batch_effect, generator

Split = Literal["train", "holdout"]

# Purposes of random streams, see `sites.generator`; other numbers than those of the hospitals that are written to disk.
_PURPOSE: dict[Split, int] = {"train": 20, "holdout": 21}
# Slices, matrix, slice and pixel spacing in mm, as each hospital scans most of its patients.
_SCANS: dict[SiteName, tuple[int, int, float, float]] = {
    "north": (22, 72, 6.5, 2.7),
    "south": (24, 72, 6.0, 2.7),
    "east": (20, 68, 7.2, 2.9),
}


@dataclass(frozen=True)
class Patients:
    """Prepared patients, one row each.

    Attributes:
        images: (N, C, S, H, W) float16 in [0, 1].
        masks: (N, S, H, W) uint8 label map of `fedsynth.morphology`.
        genes: (N, G) float32 on the plan's normalised scale; (N, 0) where nobody has a profile.
        morphology: (N, F) float32 in [0, 1], the plan's features, NaN where not measured.
        labels: (N,) int64 class codes, -1 where unknown.
    """

    images: NDArray[np.float16]
    masks: NDArray[np.uint8]
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Patients:
        """The first `n` patients.

        Raises:
            ValueError: there are fewer.
        """
        if n > len(self):
            raise ValueError(f"asked for {n} patients of {len(self)}")
        return Patients(self.images[:n], self.masks[:n], self.genes[:n], self.morphology[:n], self.labels[:n])

    def slices(self) -> torch.Tensor:
        """(N, C + 1, S, H, W) float16 in [-1, 1]: image channels and whole-tumour mask, as training takes them."""
        images = torch.from_numpy(self.images) * 2 - 1
        mask = torch.from_numpy(self.masks > 0).to(torch.float16)[:, None] * 2 - 1
        return torch.cat([images, mask], dim=1)


def draw_site(plan: StudyPlan, site: Site, seed: int, split: Split, rows: Iterable[int], anatomy: Anatomy) -> Patients:
    """Draw patients of a simulated hospital, each from a random stream of its own.

    Args:
        plan: image, gene, label and morphology sections.
        site: style, severity and laboratory.
        seed: of the cohort.
        split: training and held-out patients have different streams.
        rows: numbers of the patients.
        anatomy: the atlas.
    """
    effect = batch_effect(seed, site)
    columns = [biology().genes.index(gene) for gene in plan.genes.panel]
    wanted = [[feature.name for feature in FEATURES].index(name) for name in plan.morphology.features]
    prepared, genes, labels = [], [], []
    for row in rows:
        subject, images = _usable_patient(
            plan.image, site, generator(seed, site, _PURPOSE[split], row), effect, anatomy
        )
        prepared.append(images)
        genes.append(to_panel_scale(subject.tpm[columns], plan.genes))
        labels.append(plan.label.classes.index(subject.label))
    morphology = np.stack([patient.morphology[wanted] for patient in prepared])
    return Patients(
        np.stack([patient.images for patient in prepared]),
        np.stack([patient.mask for patient in prepared]),
        np.stack(genes),
        normalise(morphology, plan.morphology.features),
        np.array(labels, dtype=np.int64),
    )


def _usable_patient(
    image: ImagePlan, site: Site, rng: np.random.Generator, effect: NDArray[np.float64], anatomy: Anatomy
) -> tuple[Subject, PatientImages]:
    grid = _scan_grid(site)
    while True:
        subject = draw_subject(anatomy, site.style, rng, site.severity, effect)
        images, mask = scan(anatomy, subject.head, subject.acquisition.only(*image.sequences), grid, rng)
        try:
            volumes = [Volume(images[name], grid.affine) for name in image.sequences]
            return subject, on_study_grid(volumes, Volume(mask, grid.affine), image)
        except Unusable:
            continue  # A tumour beyond the field of view: ingest refuses such a patient, the next one takes the place.


def _scan_grid(site: Site) -> Grid:
    slices, size, slice_mm, pixel_mm = _SCANS[site.name]
    return axial_grid(slices, size, slice_mm, pixel_mm)


def from_public(plan: StudyPlan, public: PublicCohort) -> Patients:
    """A public cohort as `Patients`, without genes."""
    return Patients(
        public.images,
        public.masks,
        np.zeros((len(public.labels), 0), dtype=np.float32),
        normalise(public.morphology, plan.morphology.features),
        public.labels,
    )


def concatenate(parts: Sequence[Patients]) -> Patients:
    """All patients of `parts`, in order."""
    return Patients(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.masks for part in parts]),
        np.concatenate([part.genes for part in parts]),
        np.concatenate([part.morphology for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def at_size(patients: Patients, size: int) -> Patients:
    """The same field of view with `size` pixels: block means of images; of masks the tumour by majority, and of a
    tumour's parts the one with the highest code, so that a thin enhancing ring stays.

    Raises:
        ValueError: the patients' matrix is not a multiple of `size`.
    """
    height = patients.images.shape[-1]
    if height % size:
        raise ValueError(f"{height} pixels cannot be averaged to {size}")
    factor = height // size
    if factor == 1:
        return patients
    blocks = patients.images.reshape(*patients.images.shape[:-2], size, factor, size, factor)
    codes = patients.masks.reshape(*patients.masks.shape[:-2], size, factor, size, factor)
    tumour = (codes > 0).mean(axis=(-3, -1)) >= 0.5
    return Patients(
        blocks.mean(axis=(-3, -1), dtype=np.float32).astype(np.float16),
        np.where(tumour, codes.max(axis=(-3, -1)), 0).astype(np.uint8),
        patients.genes,
        patients.morphology,
        patients.labels,
    )


def save_patients(path: Path, patients: Patients) -> None:
    """Write an uncompressed ``.npz``, under a temporary name until it is whole."""
    draft = path.with_suffix(".part.npz")
    np.savez(
        draft,
        images=patients.images,
        masks=patients.masks,
        genes=patients.genes,
        morphology=patients.morphology,
        labels=patients.labels,
    )
    draft.rename(path)


def load_patients(path: Path) -> Patients:
    """Read what `save_patients` wrote; object arrays are refused."""
    with np.load(path, allow_pickle=False) as arrays:
        return Patients(arrays["images"], arrays["masks"], arrays["genes"], arrays["morphology"], arrays["labels"])


def load_site(folder: Path, seed: int, site: str, split: Split, n: int, size: int) -> Patients:
    """The first `n` patients of a site's split at `size` pixels, from the blocks that ``cohorts.py`` wrote.

    Raises:
        ValueError: the folder holds fewer.
    """
    parts: list[Patients] = []
    for path in sorted(folder.glob(f"seed{seed}-{site}-{split}-[0-9][0-9][0-9].npz")):
        if sum(map(len, parts)) >= n:
            break
        parts.append(at_size(load_patients(path), size))
    if sum(map(len, parts)) < n:
        raise ValueError(f"{folder} holds {sum(map(len, parts))} patients of {site} ({split}), not {n}")
    return concatenate(parts).first(n)


def load_public(folder: Path, n: int, size: int, name: str = "public") -> Patients:
    """The first `n` public patients at `size` pixels.

    Raises:
        ValueError: the folder holds fewer.
    """
    parts = [at_size(load_patients(path), size) for path in sorted(folder.glob(f"{name}-[0-9][0-9][0-9].npz"))]
    if sum(map(len, parts)) < n:
        raise ValueError(f"{folder} holds {sum(map(len, parts))} public patients, not {n}")
    return concatenate(parts).first(n)
