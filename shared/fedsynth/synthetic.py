"""Synthetic patients as values, between the generator that draws them and the release that writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A release keeps intensities as whole numbers up to this.
STORED_MAXIMUM = 1000


@dataclass(frozen=True)
class SyntheticPatient:
    """One synthetic patient, all parts of which were drawn along one chain: genes -> morphology -> image and mask.

    Attributes:
        participant_id: ``"SYN0001"``, ...: letters and digits only, as BIDS wants.
        label: one of the plan's classes.
        genes: (G,) expression on the plan's normalised scale (within-sample quantile, centred and scaled).
        morphology: (F,) the morphology that conditioned the image, in physical units, in the plan's feature order.
        images: (C, S, H, W) float32 in [0, 1], LPS order: W runs to the left, H to posterior, S to superior.
        mask: (S, H, W) uint8, 1 in the tumour.
    """

    participant_id: str
    label: str
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    images: NDArray[np.float32]
    mask: NDArray[np.uint8]


def to_stored(image: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Intensities in [0, 1] (clipped) as integers 0..`STORED_MAXIMUM`; what is read back and stored again is the same."""
    return np.rint(np.clip(image, 0.0, 1.0) * STORED_MAXIMUM).astype(np.uint16)


def subject_digest(patients: Iterable[SyntheticPatient]) -> str:
    """SHA-256 (hex) of which patients these are, in their order: ids, labels, genes, morphology, images, masks.

    Intensities count as a release stores them, and all else to the last bit, so it is the same for patients in memory and
    for those that are read back from a release; it ties what was found out about synthetic patients to a release of these
    very ones.
    """
    digest = hashlib.sha256()
    for patient in patients:
        digest.update(f"{patient.participant_id}\n{patient.label}\n".encode())
        parts = (
            (patient.genes, "<f4"),
            (patient.morphology, "<f4"),
            (to_stored(np.nan_to_num(patient.images)), "<u2"),  # no release holds other than numbers
            (patient.mask > 0, "u1"),
        )
        for values, kind in parts:
            digest.update(f"{values.shape}\n".encode() + np.ascontiguousarray(values, dtype=kind).tobytes())
    return digest.hexdigest()
