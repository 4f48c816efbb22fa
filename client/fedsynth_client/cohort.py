"""The prepared cohort: what `fedsynth site prepare` writes and private training reads.

Layout of a cohort folder (nothing in it is a pickle, and nothing in it leaves the site)::

    manifest.json            schema_version, plan image/gene/label settings used, one entry a patient, refusals
    patients/<key>.safetensors   images float16 (C, S, H, W) in [0, 1], mask uint8 (S, H, W); LPS order
    expression.parquet       index "key", one column a panel gene, float32 on the plan's normalised scale
    clinical.parquet         index "key", columns "label" (class code, -1 when unknown), "<feature>" in physical units

`key` is a random name given at ingest ("p" and 12 hex digits): no identifier of the hospital's is needed to train.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedsynth.errors import UsageError
from fedsynth.morphology import normalise
from fedsynth.plan import Module, Population

Split = Population


@dataclass(frozen=True)
class PatientEntry:
    """What the manifest says of one patient: its random key, split, and which parts are usable."""

    key: str
    split: Split
    has_images: bool
    has_genes: bool


@dataclass(frozen=True)
class Cohort:
    """A prepared cohort in memory, one row a patient; parts that a patient lacks are NaN (genes, morphology) or absent.

    Attributes:
        entries: one a patient; row i of every array below belongs to entry i.
        images: (N, C, S, H, W) float16 in [0, 1]; zeros where `has_images` is false.
        masks: (N, S, H, W) uint8 label map (`fedsynth.morphology`); zeros where `has_images` is false.
        genes: (N, G) float32; NaN where `has_genes` is false.
        morphology: (N, F) float32 normalised to [0, 1]; NaN where not measured.
        labels: (N,) int64 class codes; -1 where unknown.
    """

    entries: tuple[PatientEntry, ...]
    images: NDArray[np.float16]
    masks: NDArray[np.uint8]
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_images(self) -> NDArray[np.bool_]:
        """(N,) whether images and mask are usable."""
        return np.array([entry.has_images for entry in self.entries], dtype=bool)

    @property
    def has_genes(self) -> NDArray[np.bool_]:
        """(N,) whether the expression profile is usable."""
        return np.array([entry.has_genes for entry in self.entries], dtype=bool)

    def usable_for(self, module: Module) -> NDArray[np.bool_]:
        """(N,) whether a patient has what `module` needs."""
        return {
            "moments": self.has_genes | self.has_images,
            "autoencoder": self.has_genes,
            "radiogenomics": self.has_genes & self.has_images,
            "embedding": self.has_images,
            "gan": self.has_images,
            "translation": self.has_images,
        }[module]

    def rows(self, keep: NDArray[np.bool_]) -> Cohort:
        """The patients for whom `keep` (N,) is true."""
        return Cohort(
            tuple(entry for entry, kept in zip(self.entries, keep, strict=True) if kept),
            self.images[keep],
            self.masks[keep],
            self.genes[keep],
            self.morphology[keep],
            self.labels[keep],
        )

    def split(self, split: Split) -> Cohort:
        """The patients of one split. Only ``"train"`` may be trained on; ``"holdout"`` is for evaluation."""
        return self.rows(np.array([entry.split == split for entry in self.entries], dtype=bool))


def split_digest(entries: Iterable[PatientEntry]) -> str:
    """SHA-256 (hex) of who is of which split, in whatever order.

    Preparing a cohort anew draws new keys and a new split, so two preparations never have the same digest.
    """
    lines = sorted(f"{entry.key} {entry.split}" for entry in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_entries(folder: Path) -> tuple[PatientEntry, ...]:
    """What the manifest of a prepared cohort says of its patients.

    Raises:
        UsageError: ``cohort_missing`` when the folder holds no manifest.
    """
    return _entries(_manifest(folder))


def load_cohort(folder: Path, feature_names: list[str], only: Split | None = None) -> Cohort:
    """Read a prepared cohort.

    Args:
        folder: the cohort's.
        feature_names: the plan's morphology features, in order.
        only: patients of this split alone; the images of others are not opened.

    Raises:
        UsageError: ``cohort_missing`` when the folder holds no manifest.
    """
    manifest = _manifest(folder)
    entries = tuple(entry for entry in _entries(manifest) if only in (None, entry.split))
    keys = [entry.key for entry in entries]
    image = manifest["image"]
    shape = (len(image["sequences"]), image["slices"], image["size"], image["size"])
    images = np.zeros((len(keys), *shape), dtype=np.float16)
    masks = np.zeros((len(keys), *shape[1:]), dtype=np.uint8)
    for i, entry in enumerate(entries):
        if entry.has_images:
            tensors = load_file(folder / "patients" / f"{entry.key}.safetensors")
            images[i], masks[i] = tensors["images"], tensors["mask"]
    genes = pd.read_parquet(folder / "expression.parquet").reindex(keys).to_numpy(dtype=np.float32)
    clinical = pd.read_parquet(folder / "clinical.parquet").reindex(keys)
    morphology = normalise(clinical[feature_names].to_numpy(dtype=np.float64), feature_names)
    return Cohort(entries, images, masks, genes, morphology, clinical["label"].to_numpy(dtype=np.int64))


def _entries(manifest: dict[str, Any]) -> tuple[PatientEntry, ...]:
    return tuple(
        PatientEntry(row["key"], row["split"], row["has_images"], row["has_genes"]) for row in manifest["patients"]
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise UsageError(
            "cohort_missing",
            f"{folder} is not a prepared cohort: it has no manifest.json.",
            "Run `fedsynth site prepare`.",
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
