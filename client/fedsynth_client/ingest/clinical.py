"""The clinical table: one label a patient."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedsynth.plan import LabelPlan
from fedsynth_client.ingest.refusals import Reason, Refusal
from fedsynth_client.ingest.sources import ClinicalSources
from fedsynth_client.ingest.tables import read_table

UNKNOWN = -1


@dataclass
class Labels:
    """Class code by patient id (`UNKNOWN` where the table does not tell), each row's place, and what was refused."""

    codes: dict[str, int] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)


def read_clinical(sources: ClinicalSources, base: Path, label: LabelPlan) -> Labels:
    """Read labels by the codes of `sources.toml`; a code is compared as it is written, so ``1`` is not ``1.0``.

    A patient with several rows gets no label, whatever the rows say.

    Raises:
        Unusable: the table as a whole cannot be used.
    """
    table = read_table(base / sources.path, as_text=True)
    patients = table.column(sources.patient_column).tolist()
    values = table.column(sources.label_column).tolist()
    labels = Labels()
    for row, (patient, value) in enumerate(zip(patients, values, strict=True), start=table.first_row):
        where = f"{sources.path}: row {row}"
        if not patient:
            continue
        labels.where.setdefault(patient, where)
        if patients.count(patient) > 1:
            labels.codes[patient] = UNKNOWN
            labels.refused.append(Refusal("clinical", where, Reason.DUPLICATE_PATIENT))
        elif value in sources.label_codes:
            labels.codes[patient] = label.classes.index(sources.label_codes[value])
        else:
            labels.codes[patient] = UNKNOWN
            labels.refused.append(Refusal("label", where, Reason.UNKNOWN_LABEL))
    return labels
