"""A release as a BIDS 1.11.1 data set: NIfTI images with sidecars, masks as a derivative, genes as phenotype tables."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsynth import __version__
from fedsynth.sequences import MrSequence, mr_sequences
from fedsynth.synthetic import STORED_MAXIMUM, SyntheticPatient, to_stored
from fedsynth_server.release.facts import MODEL, NOT_A_PATIENT, NOT_FOR_DIAGNOSIS, SOFTWARE, ReleaseFacts
from fedsynth_server.release.geometry import Grid, to_ras
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.patients import Row
from fedsynth_server.release.tables import Column, expression_columns, label_column, morphology_columns, write_tsv

BIDS_VERSION = "1.11.1"
MASKS = "derivatives/seg"
# Without these it is no BIDS dataset with the tables that a release promises.
REQUIRED = (
    "dataset_description.json",
    "participants.json",
    "participants.tsv",
    "phenotype/expression.json",
    "phenotype/expression.tsv",
    "phenotype/morphology.json",
    "phenotype/morphology.tsv",
    f"{MASKS}/dataset_description.json",
)
# What the tree holds beside images, masks and their sidecars; `verify` refuses any other.
DATASET_FILES = frozenset(
    {
        "CHANGES",
        "README.md",
        *REQUIRED,
        "genetic_info.json",
        f"{MASKS}/README.md",
    }
)
# All free text of a NIfTI header; `verify` refuses any other.
NIFTI_DESCRIPTION = "synthetic data, not a patient"


def image_path(participant_id: str, sequence: MrSequence) -> str:
    """Path of an image inside the BIDS tree."""
    return f"sub-{participant_id}/anat/sub-{participant_id}_{sequence.bids}.nii.gz"


def mask_path(participant_id: str) -> str:
    """Path of a mask inside the BIDS tree."""
    return f"{MASKS}/sub-{participant_id}/anat/sub-{participant_id}_label-tumor_mask.nii.gz"


def write_bids_patient(root: Path, patient: SyntheticPatient, facts: ReleaseFacts) -> None:
    """Write the images, the mask and their sidecars of one patient below `root`."""
    grid = Grid.of(facts.plan.image)
    sequences = mr_sequences(facts.sequences)
    for sequence, image in zip(sequences, patient.images, strict=True):
        path = root / image_path(patient.participant_id, sequence)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_nifti(path, to_stored(image).astype(np.int16), grid)
        _write_sidecar(path, _image_sidecar(sequence, facts))
    path = root / mask_path(patient.participant_id)
    path.parent.mkdir(parents=True)
    _write_nifti(path, patient.mask.astype(np.uint8), grid)
    sources = [f"bids:raw:{image_path(patient.participant_id, sequence)}" for sequence in sequences]
    _write_sidecar(path, _mask_sidecar(sources))


def write_bids_dataset(root: Path, rows: Sequence[Row], facts: ReleaseFacts) -> None:
    """Write what the BIDS tree says of the data set as a whole, once all patients of `rows` are written."""
    root.mkdir(exist_ok=True)
    dump(root / "dataset_description.json", _description(facts))
    (root / "README.md").write_text(_readme(facts, len(rows)), encoding="utf-8")
    changes = f"{facts.version} {facts.released:%Y-%m-%d}\n  - Release {facts.identifier}\n"
    (root / "CHANGES").write_text(changes, encoding="utf-8")
    dump(
        root / "genetic_info.json",
        {
            "GeneticLevel": "Transcriptomic",
            "AnalyticalApproach": "RNA Seq (NGS)",
            "SampleOrigin": "brain",
            "Description": "Synthetic expression profiles, as of tumour tissue: phenotype/expression.tsv.",
        },
    )
    _write_table(root / "participants", [label_column(facts.plan)], rows, [[row.label] for row in rows])
    (root / "phenotype").mkdir()
    _write_table(root / "phenotype/expression", expression_columns(facts.plan), rows, [row.genes for row in rows])
    _write_table(root / "phenotype/morphology", morphology_columns(facts.plan), rows, [row.morphology for row in rows])
    (root / MASKS / "README.md").write_text(_masks_readme(facts), encoding="utf-8")
    dump(
        root / MASKS / "dataset_description.json",
        {
            "Name": f"Tumour masks of {facts.identifier}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "License": facts.publication.licence.spdx,
            "Authors": facts.authors,
            "GeneratedBy": [{"Name": SOFTWARE, "Version": __version__, "Description": _HOW}],
            "DatasetLinks": {"raw": "../.."},
        },
    )


_HOW = "Each mask was drawn by the generator together with its images; nobody drew or corrected it."


def _masks_readme(facts: ReleaseFacts) -> str:
    return f"""# Tumour masks of study {facts.plan.name}

{NOT_A_PATIENT}. Release {facts.identifier}.

{_HOW} A mask lies on the grid of its images: 1 in the tumour, 0 elsewhere; a patient may have no tumour voxel at all.
"""


def _write_nifti(path: Path, volume: NDArray[Any], grid: Grid) -> None:
    """Write an LPS volume as NIfTI-1 in RAS order; neither time nor name goes into the gzip header."""
    image = nibabel.Nifti1Image(to_ras(volume), grid.ras_affine, dtype=volume.dtype)
    image.set_qform(grid.ras_affine, code="scanner")
    image.set_sform(grid.ras_affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = NIFTI_DESCRIPTION.encode()
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def _write_sidecar(image: Path, content: dict[str, Any]) -> None:
    dump(image.with_name(image.name.removesuffix(".nii.gz") + ".json"), content)


def _image_sidecar(sequence: MrSequence, facts: ReleaseFacts) -> dict[str, Any]:
    """What was never acquired (field strength, echo time, ...) is left out, not made up."""
    return {
        "Modality": "MR",
        "Manufacturer": SOFTWARE,
        "ManufacturersModelName": MODEL,
        "DeviceSerialNumber": "0",
        "SoftwareVersions": __version__,
        "BodyPart": "BRAIN",
        "SeriesDescription": f"Synthetic {sequence.meaning}",
        "ScanningSequence": "RM",
        "SequenceVariant": "NONE",
        "MRAcquisitionType": "3D",
        "ImageType": ["DERIVED", "SECONDARY", "OTHER"],
        "ImageComments": NOT_FOR_DIAGNOSIS,
        "SyntheticData": True,
        "SyntheticDataDescription": facts.guarantee,
        "Units": "arbitrary",
        "IntensityRange": [0, STORED_MAXIMUM],
    }


def _mask_sidecar(sources: list[str]) -> dict[str, Any]:
    return {
        "Type": "Lesion",
        "SpatialReference": "orig",
        "Sources": sources,
        "Manual": False,
        "SyntheticData": True,
        "Description": "1 in the synthetic tumour, 0 elsewhere.",
    }


def _write_table(stem: Path, columns: list[Column], rows: Sequence[Row], values: Sequence[Any]) -> None:
    """A BIDS table with the data dictionary beside it."""
    identifiers = [f"sub-{row.participant_id}" for row in rows]
    write_tsv(stem.with_suffix(".tsv"), columns, identifiers, values)
    dump(stem.with_suffix(".json"), {column.name: column.bids for column in columns})


def _description(facts: ReleaseFacts) -> dict[str, Any]:
    return {
        "Name": f"Synthetic glioma patients of study {facts.plan.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "raw",
        "License": facts.publication.licence.spdx,
        "Authors": facts.authors,
        "HowToAcknowledge": f"Cite {facts.identifier}.",
        "GeneratedBy": [{"Name": SOFTWARE, "Version": __version__, "Description": facts.guarantee}],
        "Genetics": {"Dataset": "phenotype/expression.tsv"},
        "Keywords": ["synthetic data", "differential privacy", "magnetic resonance imaging", "gene expression"],
    }


def _readme(facts: ReleaseFacts, n_patients: int) -> str:
    selection = f"\n\n{facts.selection}" if facts.selection else ""
    return f"""# Synthetic patients of study {facts.plan.name}

{NOT_A_PATIENT}. Release {facts.identifier}.

This data set holds {n_patients} synthetic patients. Images, masks, gene expression and morphology of a patient were
drawn together by a generative model; no image was acquired and no person is described. {facts.guarantee}{selection}

- `sub-*/anat`: images, intensities 0 to {STORED_MAXIMUM} in arbitrary units, one grid for all.
- `{MASKS}`: tumour masks.
- `phenotype/expression.tsv`: gene expression, `phenotype/morphology.tsv`: morphology of the tumour.

Being synthetic does not by itself make data anonymous. The files that come with this tree (`privacy.json`,
`report.html`) say what is guaranteed, what is not, and what the data are for.
"""
