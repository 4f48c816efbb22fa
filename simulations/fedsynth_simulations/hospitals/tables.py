"""Expression and clinical tables, and `sources.toml`, in the words of each hospital."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w

from fedsynth_simulations.cohort.expression import biology, draw_counts
from fedsynth_simulations.cohort.panel import load_panel
from fedsynth_simulations.hospitals.cases import Case
from fedsynth_simulations.hospitals.identity import Identity
from fedsynth_simulations.hospitals.sites import Site

_GENES_NOT_MEASURED = {"north": 3, "south": 6, "east": 9}


@dataclass(frozen=True)
class Row:
    """What the tables say of one patient."""

    identity: Identity
    case: Case
    tpm: tuple[float, ...]
    label: str


def write_tables(folder: Path, site: Site, rows: list[Row], rng: np.random.Generator) -> None:
    """Write the site's expression table, clinical table and `sources.toml`.

    Args:
        folder: of the site.
        site: decides names, orientation and scale.
        rows: one a patient.
        rng: for the genes that the laboratory did not measure, for read counts, ages and the rows' order.
    """
    rows = [rows[i] for i in rng.permutation(len(rows))]
    _write_expression(folder, site, [row for row in rows if row.case.has_expression], rng)
    _write_clinical(folder, site, rows, rng)
    (folder / "sources.toml").write_text(tomli_w.dumps(_SOURCES[site.name]), encoding="utf-8")


def _write_expression(folder: Path, site: Site, rows: list[Row], rng: np.random.Generator) -> None:
    panel = [gene for gene, _ in load_panel()]
    lost = set(rng.choice(panel, _GENES_NOT_MEASURED[site.name], replace=False).tolist())
    kept = [i for i, gene in enumerate(biology().genes) if gene not in lost]
    genes = [biology().genes[i] for i in kept]
    patients = [_patient(site, row) for row in rows]
    tpm = np.array([row.tpm for row in rows]).reshape(len(rows), len(biology().genes))
    if site.name == "north":
        table = pd.DataFrame(tpm[:, kept].T.round(3), index=pd.Index(genes, name="Hugo_Symbol"), columns=patients)
        _write_text(folder / "rnaseq_tpm.tsv.gz", table.to_csv(sep="\t"))
    elif site.name == "south":
        table = pd.DataFrame(np.log2(tpm[:, kept] + 1).round(4), index=pd.Index(patients, name="participant"))
        table.columns = pd.Index(genes)
        _write_text(folder / "expression_log2.csv", table.to_csv())
    else:
        counts = np.array([draw_counts(profile, rng)[kept] for profile in tpm]).reshape(len(rows), len(kept))
        repeated = [i for i, row in enumerate(rows) if row.case.fault == "duplicate_expression_column"]
        columns = [*range(len(rows)), *repeated]
        names = [patients[i] for i in columns]
        table = pd.DataFrame(counts[columns].T, index=pd.Index(genes, name="gene"), columns=pd.Index(names))
        _write_text(folder / "counts.tsv.gz", table.to_csv(sep="\t"))


def _write_clinical(folder: Path, site: Site, rows: list[Row], rng: np.random.Generator) -> None:
    patients = [_patient(site, row) for row in rows]
    grades = [site.labels[row.label] if row.case.has_label else "" for row in rows]
    ages = np.clip(rng.normal(52, 14, len(rows)), 18, 88).round().astype(int)
    sexes = rng.choice(["F", "M"], len(rows))
    if site.name == "north":
        table = pd.DataFrame({"PatientID": patients, "Age": ages, "Sex": sexes, "WHO_grade": grades})
        table["Surname"] = [row.identity.family for row in rows]
        _write_text(folder / "clinical.tsv", table.to_csv(sep="\t", index=False))
    elif site.name == "south":
        table = pd.DataFrame({"participant_id": patients, "age": ages, "sex": sexes, "tumour_grade": grades})
        table["hospital_number"] = [row.identity.other_id for row in rows]
        again = table[[row.case.fault == "duplicate_clinical_row" for row in rows]]
        _write_text(folder / "images" / "participants.tsv", pd.concat([table, again]).to_csv(sep="\t", index=False))
    else:
        table = pd.DataFrame({"Case": patients, "Age at diagnosis": ages, "Diagnosis": grades})
        table["Address"] = [row.identity.address for row in rows]
        _write_text(folder / "registry.csv", table.to_csv(index=False))


def _patient(site: Site, row: Row) -> str:
    # BIDS tables name a participant with the prefix that its folder has.
    return f"sub-{row.identity.patient_id}" if site.name == "south" else row.identity.patient_id


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content, compresslevel=6, mtime=0) if path.suffix == ".gz" else content)


_SOURCES: dict[str, dict[str, object]] = {
    "north": {
        "images": {
            "layout": "dicom",
            "path": "images",
            "sequences": {"T1": ["*T1*PRE*"], "T1c": ["*T1*POST*"], "FLAIR": ["*FLAIR*"]},
            "mask_patterns": ["TUMOUR*"],
            "mask_codes": {"1": "necrosis", "2": "oedema", "3": "enhancing"},
        },
        "expression": {"path": "rnaseq_tpm.tsv.gz", "orientation": "genes_by_patients", "scale": "tpm"},
        "clinical": {
            "path": "clinical.tsv",
            "patient_column": "PatientID",
            "label_column": "WHO_grade",
            "label_codes": {"II": "low", "IV": "high"},
        },
    },
    "south": {
        "images": {
            "layout": "bids",
            "path": "images",
            "sequences": {"T1": ["*_T1w.nii*"], "T1c": ["*_ce-gadolinium_T1w.nii*"], "FLAIR": ["*_FLAIR.nii*"]},
            "mask_patterns": ["*_dseg.nii*"],
            "mask_codes": {"1": "necrosis", "2": "oedema", "4": "enhancing"},
        },
        "expression": {"path": "expression_log2.csv", "orientation": "patients_by_genes", "scale": "log2tpm1"},
        "clinical": {
            "path": "images/participants.tsv",
            "patient_column": "participant_id",
            "label_column": "tumour_grade",
            "label_codes": {"LGG": "low", "HGG": "high"},
        },
    },
    "east": {
        "images": {
            "layout": "folders",
            "path": "images",
            "sequences": {"T1": ["T1.nii*"], "T1c": ["T1c.nii*"], "FLAIR": ["FLAIR.nii*"]},
            "mask_patterns": ["seg.nii*"],
            "mask_codes": {"1": "oedema", "2": "necrosis", "3": "enhancing"},
        },
        "expression": {"path": "counts.tsv.gz", "orientation": "genes_by_patients", "scale": "counts"},
        "clinical": {
            "path": "registry.csv",
            "patient_column": "Case",
            "label_column": "Diagnosis",
            "label_codes": {"glioma, low grade": "low", "glioblastoma": "high"},
        },
    },
}
