"""What the tables of a release say of a synthetic patient, and the refusal of one that does not fit its plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.errors import JobFailed
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.release.facts import ReleaseFacts, digest_of

PARTICIPANT_ID = re.compile(r"[A-Za-z0-9]{1,32}")


@dataclass(frozen=True)
class Row:
    """A synthetic patient without its images.

    Attributes:
        genes: (G,) in the order of ``plan.genes.panel``.
        morphology: (F,) in physical units, in the order of ``plan.morphology.features``.
    """

    participant_id: str
    label: str
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]


def row_of(patient: SyntheticPatient) -> Row:
    """The part of `patient` that goes into tables."""
    return Row(patient.participant_id, patient.label, patient.genes, patient.morphology)


def check_patient(patient: SyntheticPatient, plan: StudyPlan, sequences: Sequence[str]) -> None:
    """Refuse a patient that could not be released faithfully with images of `sequences`.

    Raises:
        JobFailed: ``synthetic_patient_invalid``, naming the participant and each fault.
    """
    image = plan.image
    grid = (image.slices, image.size, image.size)
    faults = []
    if not PARTICIPANT_ID.fullmatch(patient.participant_id):
        faults.append("its id is not 1 to 32 letters and digits")
    if patient.label not in plan.label.classes:
        faults.append(f"label {patient.label!r} is none of {plan.label.classes}")
    for name, values, shape in (
        ("genes", patient.genes, (len(plan.genes.panel),)),
        ("morphology", patient.morphology, (len(plan.morphology.features),)),
        ("images", patient.images, (len(sequences), *grid)),
        ("mask", patient.mask, grid),
    ):
        if values.shape != shape:
            faults.append(f"{name} has shape {values.shape}, expected {shape}")
        elif not np.isfinite(values).all():
            faults.append(f"{name} holds values that are not finite")
    if not np.isin(patient.mask, (0, 1)).all():
        faults.append("its mask holds values other than 0 and 1")
    if faults:
        raise JobFailed(
            "synthetic_patient_invalid", f"Synthetic patient {patient.participant_id!r}: {'; '.join(faults)}."
        )


def patient_key(patient: SyntheticPatient, facts: ReleaseFacts) -> str:
    """Digest that names this patient of this release; the DICOM UIDs are derived from it.

    The content is part of it, so two draws that were released in the same second never share a UID.
    """
    arrays = (patient.genes, patient.morphology, patient.images, patient.mask)
    return digest_of(facts.identifier, patient.participant_id, patient.label, *(array.tobytes() for array in arrays))
