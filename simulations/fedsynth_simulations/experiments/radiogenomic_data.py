"""Patients with genes and measured morphology, real or simulated, and profiles of further people for the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli_w
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.plan import GenePlan, ImagePlan, StudyPlan
from fedsynth.progress import say
from fedsynth_client.cohort import load_cohort
from fedsynth_client.ingest.prepare import prepare
from fedsynth_client.ingest.sources import ClinicalSources, ExpressionSources, ImageSources, Sources
from fedsynth_simulations.benchmarking.cohorts import Patients, concatenate, draw_site, load_patients, save_patients
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.expression import public_profiles
from fedsynth_simulations.experiments.profiles import EXPRESSION_FOLDER, network_plan, read_profiles
from fedsynth_simulations.experiments.run import Experiment
from fedsynth_simulations.hospitals.sites import SITES
from fedsynth_simulations.plans import simulated_genes

HOSPITALS = ("CS", "FG", "HT")
FOLDERS = (
    f"a folder with the folders {', '.join(HOSPITALS)}, each with images/<patient>/{{T1,T1c,FLAIR,seg}}.nii.gz, "
    "expression.tsv.gz and clinical.tsv (TCGA-LGG with the segmentations of Buda et al. 2019)."
)
_PUBLIC_PROFILES = 400


@dataclass(frozen=True)
class RadiogenomicData:
    """Patients, one row each.

    Attributes:
        panel: the genes.
        features: names of the morphology features (`fedsynth.morphology`).
        genes: (N, G) float32 on the panel's scale.
        morphology: (N, F) float32 in [0, 1], NaN where not measured.
        labels: (N,) int64 grade, -1 where unknown.
        encoder_profiles: (M, G) float32, of people who are none of the N.
        description: source, sizes, unit.
        encoder_note: whose profiles the encoder is trained on, as a sentence.
    """

    panel: GenePlan
    features: tuple[str, ...]
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]
    encoder_profiles: NDArray[np.float32]
    description: str
    encoder_note: str


def load_data(experiment: Experiment) -> RadiogenomicData:
    """The data that the specification names.

    Raises:
        UsageError: ``data_missing``, ``data_wrong``, with how the folder must look.
    """
    if experiment.spec.data == "tcga-lgg":
        return _tcga_lgg(experiment)
    if experiment.spec.data == "simulated":
        return _simulated(experiment)
    raise UsageError("experiment_invalid", f"data = {experiment.spec.data!r} has no patients with images and genes.")


def _preparation_plan(experiment: Experiment, genes: GenePlan) -> StudyPlan:
    """A plan for ingest, which looks at its image, gene, label and morphology sections alone."""
    sections: dict[str, dict[str, Any]] = {
        name: experiment.spec.plan[name] for name in ("image", "morphology") if name in experiment.spec.plan
    }
    if "features" in sections.get("morphology", {}):
        sections["morphology"] = {**sections["morphology"], "reference_sd": []}
    return network_plan("radiogenomics", sections, {"all": 20}, genes, 1.0)


def _tcga_lgg(experiment: Experiment) -> RadiogenomicData:
    options, folder = experiment.options().model_dump(), experiment.real_data(FOLDERS)
    if not all((folder / name / "images").is_dir() for name in HOSPITALS):
        raise UsageError("data_wrong", f"{folder} does not hold the three hospitals.", f"Expected {FOLDERS}")
    beside = folder / options["encoder_profiles"]
    if not beside.is_dir():
        raise UsageError("data_wrong", f"There is no folder {beside} for the encoder.", f"Expected {EXPRESSION_FOLDER}")
    everybody = read_profiles(beside, options["genes"])
    plan = _preparation_plan(experiment, everybody.genes)
    genes, morphology, labels = [], [], []
    for name in HOSPITALS:
        cohort_folder = experiment.out / "cohorts" / f"{name.lower()}-{plan.digest[:12]}"
        if not cohort_folder.is_dir():
            say(f"Preparing site {name}")
            cohort_folder.parent.mkdir(parents=True, exist_ok=True)
            sources = _sources(folder / name, plan.image, cohort_folder.with_suffix(".toml"))
            prepare(plan, sources, cohort_folder, np.random.default_rng(experiment.spec.seed), workers=1)
        cohort = load_cohort(cohort_folder, list(plan.morphology.features))
        cohort = cohort.rows(cohort.usable_for("radiogenomics"))
        genes.append(cohort.genes)
        morphology.append(cohort.morphology)
        labels.append(cohort.labels)
    imaged = np.concatenate(
        [pd.read_csv(folder / name / "clinical.tsv", sep="\t")["patient_id"].astype(str) for name in HOSPITALS]
    )
    others = everybody.rows(~np.isin(everybody.patients, imaged))
    counts = ", ".join(f"{len(part)} of {name}" for name, part in zip(HOSPITALS, genes, strict=True))
    return RadiogenomicData(
        everybody.genes,
        tuple(plan.morphology.features),
        np.concatenate(genes),
        np.concatenate(morphology),
        np.concatenate(labels),
        others.values,
        f"{sum(map(len, genes))} TCGA-LGG patients with {', '.join(plan.image.sequences)}, tumour mask and expression "
        f"({counts}; TCIA, CC BY 3.0, through Buda et al. 2019, CC BY-NC-SA 4.0; expression through cBioPortal), prepared "
        f"by the project's own ingest; {len(everybody.genes.panel)} genes, evenly spread over the table's alphabetical "
        f"order. Morphology is measured from the masks at {plan.image.size} x {plan.image.size} pixels and "
        f"{plan.image.slices} slices. The unit of privacy is the patient.",
        f"The encoder and the components are of the profiles of {len(others.values)} other glioma patients.",
    )


def _sources(folder: Path, image: ImagePlan, beside: Path) -> Path:
    """Write the `sources.toml` of a TCGA-LGG hospital, nobody held out."""
    described = Sources(
        schema_version=1,
        holdout_fraction=0.0,
        images=ImageSources(
            layout="folders",
            path=str((folder / "images").resolve()),
            sequences={name: [f"{name}.nii*"] for name in image.sequences},
            mask_patterns=["seg.nii*"],
        ),
        expression=ExpressionSources(
            path=str((folder / "expression.tsv.gz").resolve()), orientation="genes_by_patients", scale="zscore"
        ),
        clinical=ClinicalSources(
            path=str((folder / "clinical.tsv").resolve()),
            label_column="grade_code",
            label_codes={"1.0": "low", "2.0": "high"},
        ),
    )
    beside.write_text(tomli_w.dumps(described.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    return beside


def _simulated(experiment: Experiment) -> RadiogenomicData:
    options, seed = experiment.options().model_dump(), experiment.spec.seed
    plan = _preparation_plan(experiment, simulated_genes())
    each = max(options["patients"] // len(SITES), 1)
    path = experiment.out / "cohorts" / f"simulated-{each}-{seed}-{plan.digest[:12]}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"Drawing {each * len(SITES)} simulated patients")
        anatomy = Anatomy.load()
        save_patients(path, concatenate([draw_site(plan, site, seed, "train", range(each), anatomy) for site in SITES]))
    drawn: Patients = load_patients(path)
    return RadiogenomicData(
        plan.genes,
        tuple(plan.morphology.features),
        drawn.genes,
        drawn.morphology,
        drawn.labels,
        public_profiles(plan.genes, _PUBLIC_PROFILES, np.random.default_rng([seed, 1])),
        f"{len(drawn)} simulated patients of three hospitals ({each} each), {len(plan.genes.panel)} genes: nobody's. "
        "Pathways drive both genes and tumour: they explain 40 to 72 % of the variance of what makes a tumour's size, parts "
        "and place. The unit of privacy is the patient.",
        f"The encoder and the components are of the profiles of {_PUBLIC_PROFILES} people of a public simulated population.",
    )
