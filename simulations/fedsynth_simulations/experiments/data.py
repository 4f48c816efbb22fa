"""The images of an experiment: sites' training patients and a test set, by kind of data.

Where an image is a patient of its own (the tumour slices have lost their patients), the unit of privacy is the slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.plan import ImagePlan, LabelPlan, MorphologyPlan, StudyPlan
from fedsynth.progress import say
from fedsynth.recommend import PublicStarts
from fedsynth_client.cohort import load_cohort
from fedsynth_client.ingest.prepare import prepare
from fedsynth_client.ingest.sources import ClinicalSources, ImageSources, Sources
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_simulations.benchmarking.cohorts import Patients, concatenate
from fedsynth_simulations.benchmarking.slices import CLASSES, Slices, load_parts
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.public import public_cohort
from fedsynth_simulations.experiments.run import Experiment
from fedsynth_simulations.plans import study_plan, zscore_genes

_TUMOUR_SLICES = (
    f"a folder with the folders {', '.join(CLASSES)}, each of grey square PNGs called by their number (1.png, ...), in "
    "patient order (Cheng et al., figshare 1512427)."
)
_TCGA_LGG = (
    "a folder with the folders CS, FG, HT, each with images/<patient>/{T1,T1c,FLAIR,seg}.nii.gz, expression.tsv.gz and "
    "clinical.tsv (TCGA-LGG with the segmentations of Buda et al. 2019)."
)
# Of the simulated cohort: enough for a test, few enough for seconds.
_SIMULATED = {"site-a": 10, "site-b": 10, "site-c": 10, "test": 12}
_SIMULATED_SLICES = 4
_HOLDOUT = 0.25  # of few patients


@dataclass(frozen=True)
class ImageData:
    """Images by site, and a test set that nothing is trained on.

    Attributes:
        sites: training patients.
        test: test patients.
        image: sequences and grid.
        label: the class and its names.
        unit: what one row is, and so what privacy protects.
        description: source, sizes, split, unit.
    """

    sites: dict[str, Patients]
    test: Patients
    image: ImagePlan
    label: LabelPlan
    unit: Literal["slice", "patient"]
    description: str

    @property
    def train(self) -> Patients:
        """All sites' training patients."""
        return concatenate(list(self.sites.values()))

    @property
    def has_masks(self) -> bool:
        """Whether any training patient has a tumour outlined."""
        return any(bool(site.masks.any()) for site in self.sites.values())

    def at(self, sites: int) -> dict[str, Patients]:
        """The training patients at `sites` places: all pooled in one, or each where it is."""
        return {"pooled": self.train} if sites == 1 else dict(self.sites)


def load_images(experiment: Experiment, image: Mapping[str, object]) -> ImageData:
    """The data that the specification names, on the grid of the plan's keys `image`.

    Raises:
        UsageError: ``data_missing``, ``data_wrong``, with how the folder must look.
    """
    kind = experiment.spec.data
    if kind == "tumour-slices":
        return _tumour_slices(experiment, image)
    if kind == "tcga-lgg":
        return _tcga_lgg(experiment, image)
    if kind == "simulated":
        return _simulated(experiment, image)
    raise UsageError("experiment_invalid", f"data = {kind!r} has no images; the runner is of images.")


def as_image_patients(patients: Patients) -> ImagePatients:
    """Patients in the form that training takes, their morphology left out: the condition tells class and place alone.

    Real and synthetic slices are then asked for under the same conditions, whatever a population's tumours are like.
    """
    nothing = torch.full((len(patients), 1), float("nan"))
    return ImagePatients(patients.slices(), nothing, torch.from_numpy(patients.labels))


def flat(patients: Patients) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """All slices (M, C, H, W) in [0, 1], masks (M, H, W) and classes (M,), patient by patient."""
    n, channels, slices, height, width = patients.images.shape
    images = patients.images.transpose(0, 2, 1, 3, 4).reshape(n * slices, channels, height, width)
    masks = patients.masks.reshape(n * slices, height, width) > 0
    return images.astype(np.float32), masks, patients.labels.repeat(slices)


def _image_plan(image: Mapping[str, object], defaults: Mapping[str, object]) -> ImagePlan:
    values = {**defaults, **image}
    size = values["size"]
    if not isinstance(size, int):
        raise UsageError("experiment_invalid", "plan.image.size must be a whole number.")
    return ImagePlan.model_validate({"pixel_spacing_mm": 192.0 / size} | values)


def _tumour_slices(experiment: Experiment, image: Mapping[str, object]) -> ImageData:
    folder = experiment.real_data(_TUMOUR_SLICES)
    if not all(any((folder / name).glob("*.png")) for name in CLASSES):
        raise UsageError("data_wrong", f"{folder} does not hold the tumour slices.", f"Expected {_TUMOUR_SLICES}")
    plan = _image_plan(image, {"sequences": ["T1c"], "size": 32, "slices": 1})
    if plan.slices != 1 or plan.sequences != ["T1c"]:
        raise UsageError("experiment_invalid", "data = 'tumour-slices' has one slice of one sequence, T1c.")
    parts = {name: _of_slices(part) for name, part in load_parts(folder, plan.size).items()}
    test = parts.pop("test")
    counts = ", ".join(f"{len(part)}" for part in parts.values())
    return ImageData(
        parts,
        test,
        plan,
        LabelPlan(name="tumour", classes=list(CLASSES)),
        "slice",
        f"{sum(map(len, parts.values())) + len(test)} contrast-enhanced T1 slices of glioma, meningioma and pituitary "
        f"tumour (Cheng et al., figshare 1512427, CC BY 4.0) at {plan.size} x {plan.size} pixels: {counts} to train at "
        f"three sites, {len(test)} to test, split by contiguous ranges of each class since patients' names are lost. So "
        "the unit of privacy is the slice: a patient with many slices is protected less than epsilon says.",
    )


def _of_slices(slices: Slices) -> Patients:
    """Each slice as a patient of one plane, with an empty mask."""
    n, height, width = slices.images.shape
    return Patients(
        slices.images[:, None, None].astype(np.float16),
        np.zeros((n, 1, height, width), dtype=np.uint8),
        np.zeros((n, 0), dtype=np.float32),
        np.full((n, 1), np.nan, dtype=np.float32),
        slices.labels,
    )


def _preparation_plan(image: ImagePlan) -> StudyPlan:
    """A plan for ingest, which looks at its image, gene, label and morphology sections alone."""
    plan = study_plan(
        "experiment",
        "Prepare images for an experiment.",
        {"a": 20},
        genes=zscore_genes(),
        epsilon=1.0,
        starts=PublicStarts(),
    )
    return plan.model_copy(update={"image": image, "morphology": MorphologyPlan(features=["volume"])})


def _tcga_lgg(experiment: Experiment, image: Mapping[str, object]) -> ImageData:
    folder = experiment.real_data(_TCGA_LGG)
    names = ("CS", "FG", "HT")
    if not all((folder / name / "images").is_dir() for name in names):
        raise UsageError("data_wrong", f"{folder} does not hold the three sites.", f"Expected {_TCGA_LGG}")
    plan = _preparation_plan(
        _image_plan(image, {"sequences": ["FLAIR"], "size": 32, "slices": 16, "slice_spacing_mm": 7.0})
    )
    sites: dict[str, Patients] = {}
    tests: list[Patients] = []
    for name in names:
        made_by = f"{plan.image.model_dump_json()} {experiment.spec.seed} {folder.resolve()}"
        grid = f"{plan.image.size}-{plan.image.slices}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"
        cohort_folder = experiment.out / "cohorts" / f"{name.lower()}-{grid}"
        if not cohort_folder.is_dir():
            say(f"Preparing site {name}")
            cohort_folder.parent.mkdir(parents=True, exist_ok=True)
            sources = _sources(folder / name, cohort_folder.with_suffix(".toml"))
            prepare(plan, sources, cohort_folder, np.random.default_rng(experiment.spec.seed), workers=1)
        cohort = load_cohort(cohort_folder, plan.morphology.features)
        cohort = cohort.rows(cohort.has_images)
        parts = [cohort.split(split) for split in ("train", "holdout")]
        train, held = (
            Patients(part.images, part.masks, np.zeros((len(part), 0), dtype=np.float32), part.morphology, part.labels)
            for part in parts
        )
        sites[name.lower()] = train
        tests.append(held)
    test = concatenate(tests)
    counts = ", ".join(f"{len(part)}" for part in sites.values())
    return ImageData(
        sites,
        test,
        plan.image,
        plan.label,
        "patient",
        f"TCGA-LGG patients with {', '.join(plan.image.sequences)} and tumour mask of three real sites (CS, FG, HT; TCIA, "
        f"CC BY 3.0, through Buda et al. 2019, CC BY-NC-SA 4.0), prepared by the project's own ingest to "
        f"{plan.image.slices} slices of {plan.image.size} x {plan.image.size} pixels: {counts} patients to train, "
        f"{len(test)} held out by the ingest's split. The unit of privacy is the patient.",
    )


def _sources(folder: Path, beside: Path) -> Path:
    """Write the `sources.toml` of a TCGA-LGG site, without its genes."""
    described = Sources(
        schema_version=1,
        holdout_fraction=_HOLDOUT,
        images=ImageSources(
            layout="folders",
            path=str((folder / "images").resolve()),
            sequences={name: [f"{name}.nii*"] for name in ("T1", "T1c", "FLAIR")},
            mask_patterns=["seg.nii*"],
        ),
        clinical=ClinicalSources(
            path=str((folder / "clinical.tsv").resolve()),
            label_column="grade_code",
            label_codes={"1.0": "low", "2.0": "high"},
        ),
    )
    beside.write_text(tomli_w.dumps(described.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    return beside


def _simulated(experiment: Experiment, image: Mapping[str, object]) -> ImageData:
    return simulated_images(image, experiment.spec.seed)


def simulated_images(image: Mapping[str, object], seed: int, scale: int = 1) -> ImageData:
    """Public simulated patients; `scale` times as many as a test needs."""
    defaults = {"sequences": ["T1c"], "size": 32, "slices": _SIMULATED_SLICES, "slice_spacing_mm": 20.0}
    plan = _preparation_plan(_image_plan(image, defaults))
    sizes = {name: scale * count for name, count in _SIMULATED.items()}
    total = sum(sizes.values())
    drawn = public_cohort(plan, total, np.random.default_rng(seed), Anatomy.load())
    whole = Patients(
        drawn.images,
        drawn.masks,
        np.zeros((total, 0), dtype=np.float32),
        np.full((total, 1), np.nan, dtype=np.float32),
        drawn.labels,
    )
    starts = np.cumsum([0, *sizes.values()])
    parts = {
        name: _rows(whole, slice(int(low), int(high)))
        for name, low, high in zip(sizes, starts, starts[1:], strict=False)
    }
    test = parts.pop("test")
    return ImageData(
        parts,
        test,
        plan.image,
        plan.label,
        "patient",
        f"{total} simulated patients from the MNI152 atlas, {plan.image.slices} slices of {plan.image.size} x "
        f"{plan.image.size} pixels each: nobody's. The unit of privacy is the patient.",
    )


def _rows(patients: Patients, rows: slice) -> Patients:
    return Patients(
        patients.images[rows],
        patients.masks[rows],
        patients.genes[rows],
        patients.morphology[rows],
        patients.labels[rows],
    )
