"""Whether one patient's data are prepared without a look at the others.

A hospital of three made-up patients is prepared twice with the site's own code, from files to the rows of statistics:
with its third patient, who is brighter and expresses more than any other, and without. Nothing of the first two may
differ, not even in the last bit. A scaling by the cohort's smallest and largest values would show here.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from fedsynth.auditing.values import MechanismCheck
from fedsynth.engines import embedding, moments
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth_client import cohort as cohorts
from fedsynth_client import rounds
from fedsynth_client.cohort import Cohort
from fedsynth_client.ingest import prepare as ingest

_VOXELS, _SPACING_MM = 36, 5.0
_SIZE, _SLICES = 32, 6
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def preprocessing_is_apart(plan: StudyPlan) -> MechanismCheck:
    """Prepare two made-up patients with and without a third, by the plan's genes, label, sequences and statistics."""
    small = plan.model_copy(
        update={
            "image": plan.image.model_copy(
                update={"size": _SIZE, "slices": _SLICES, "pixel_spacing_mm": 5.5, "slice_spacing_mm": 25.0}
            )
        }
    )
    public = _public(small)
    with tempfile.TemporaryDirectory() as folder:
        without, with_third = (
            _by_label(small, public, _prepared(small, Path(folder) / str(patients), patients)) for patients in (2, 3)
        )
    differ = sorted(
        {
            name
            for label, parts in without.items()
            for name, values in parts.items()
            if not np.array_equal(values, with_third[label][name], equal_nan=True)
        }
    )
    parts = sorted(without[0])
    return MechanismCheck(
        id="preprocessing",
        title="A patient is prepared without a look at the others",
        module=None,
        ok=not differ,
        finding=f"Two patients were prepared with and without a third, extreme one; of {', '.join(parts)} "
        + (f"there changed: {', '.join(differ)}." if differ else "not a bit changed."),
    )


def _public(plan: StudyPlan) -> dict[str, State]:
    """Made-up public weights of the plan's statistics."""
    templates: dict[str, State] = {}
    if plan.moments is not None:
        templates["moments"] = moments.public_template(plan)
    if plan.embedding is not None:
        templates["embedding"] = embedding.public_template(plan)
    generator = torch.Generator().manual_seed(0)
    return {
        module: {name: 0.1 + 0.8 * torch.rand(tensor.shape, generator=generator) for name, tensor in template.items()}
        for module, template in templates.items()
    }


def _by_label(plan: StudyPlan, public: dict[str, State], cohort: Cohort) -> dict[int, dict[str, NDArray[Any]]]:
    """What training would take of the two labelled patients, who are told apart by their labels: keys are random."""
    morphology, labels = torch.tensor(cohort.morphology), torch.tensor(cohort.labels)
    slices = rounds.image_slices(cohort)
    parts: dict[str, NDArray[Any]] = {
        "images": cohort.images,
        "masks": cohort.masks,
        "genes": cohort.genes,
        "morphology": cohort.morphology,
        "slices for training": slices.numpy(),
    }
    if "moments" in public:
        rows = moments.rows(plan, public["moments"], torch.tensor(cohort.genes), morphology, labels)
        parts["row of moments"] = rows.numpy()
    if "embedding" in public:
        parts["row of embedding"] = embedding.rows(plan, public["embedding"], slices, morphology, labels).numpy()
    return {
        label: {name: values[int(np.flatnonzero(cohort.labels == label)[0])] for name, values in parts.items()}
        for label in (0, 1)
    }


def _prepared(plan: StudyPlan, folder: Path, patients: int) -> Cohort:
    """The cohort that a site makes of `patients` made-up patients, all of whom are for training."""
    _write_hospital(plan, folder, patients)
    ingest.prepare(plan, folder / "sources.toml", folder / "cohort", np.random.default_rng(0), workers=0)
    return cohorts.load_cohort(folder / "cohort", plan.morphology.features)


def _write_hospital(plan: StudyPlan, folder: Path, patients: int) -> None:
    """Files of patients P0, P1, ...; the first two have labels, the third is extreme in everything."""
    names = [f"P{i}" for i in range(patients)]
    across = np.stack(np.meshgrid(*[np.linspace(-1, 1, _VOXELS)] * 3, indexing="ij"))
    for i, name in enumerate(names):
        head = (across**2).sum(axis=0) < 0.8
        tumour = ((across - (0.3 - 0.2 * i)) ** 2).sum(axis=0) < 0.06
        brightness = 1.0 if i < 2 else 1e4
        rng = np.random.default_rng(
            i
        )  # a stream for each patient: the files of one are the same with and without another
        for sequence in plan.image.sequences:
            tissue = brightness * head * (1 + 0.3 * tumour + 0.1 * rng.random(head.shape))
            _write_nifti(folder / "images" / name / f"{sequence}.nii", tissue.astype(np.float32))
        _write_nifti(folder / "images" / name / "seg.nii", tumour.astype(np.uint8))
    _write_table(folder / "genes.csv", ["patient", *plan.genes.panel], names, _expression(plan, patients))
    labelled = [[plan.label.classes[i]] for i in range(2)]
    _write_table(folder / "clinical.csv", ["patient_id", "label"], names, labelled)
    sources = {
        "holdout_fraction": 0.0,
        "images": {
            "layout": "folders",
            "sequences": {sequence: [f"{sequence}.nii"] for sequence in plan.image.sequences},
            "mask_patterns": ["seg.nii"],
        },
        "expression": {
            "path": "genes.csv",
            "orientation": "patients_by_genes",
            "scale": "zscore" if plan.genes.measure == "zscore" else "counts",
        },
        "clinical": {
            "path": "clinical.csv",
            "label_column": "label",
            "label_codes": {name: name for name in plan.label.classes},
        },
    }
    (folder / "sources.toml").write_text(tomli_w.dumps(sources), encoding="utf-8")


def _expression(plan: StudyPlan, patients: int) -> list[list[float]]:
    z = np.random.default_rng(7).standard_normal((3, len(plan.genes.panel)))
    z[2] *= 3
    if plan.genes.measure == "zscore":
        return [list(row) for row in z[:patients]]
    return [list(row) for row in np.rint(100 * np.exp(z[:patients]))]


def _write_nifti(path: Path, data: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = _RAS_FROM_LPS @ np.diag([_SPACING_MM, _SPACING_MM, _SPACING_MM, 1.0])
    nibabel.save(nibabel.nifti1.Nifti1Image(data, affine), path)


def _write_table(path: Path, header: list[str], names: list[str], values: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows([name, *row] for name, row in zip(names, values, strict=False))
