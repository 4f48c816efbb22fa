"""The real patients of `fedsynth evaluate`: prepared cohorts of one or more sites that fit a release's plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.patients import Patients
from fedsynth.files import read_json
from fedsynth.plan import StudyPlan
from fedsynth_client.cohort import Cohort, load_cohort
from fedsynth_client.evaluation.patients import patients_of

# With fewer, next to nothing can be measured; how wide an interval gets before that is for the reader to judge.
MIN_PATIENTS = 3


@dataclass(frozen=True)
class Evaluated:
    """Patients that were trained on, and held-out patients, of the same sites."""

    train: Patients
    holdout: Patients


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """Cohort folders by site from ``NAME=FOLDER`` each; a site's folder stands for the cohort in it.

    Raises:
        UsageError: ``cohort_option``, for text of another form or a name that is given twice.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder) or name in folders:
            raise UsageError(
                "cohort_option",
                f"--cohort {text}: a site's name, '=' and its folder are wanted, each name once.",
                "For example: --cohort north=sites/north",
            )
        path = Path(folder)
        inner = path / "cohort"
        folders[name] = inner if (inner / "manifest.json").is_file() else path
    return folders


def evaluated_patients(plan: StudyPlan, folders: dict[str, Path]) -> Evaluated:
    """The training and the held-out patients of the cohorts in `folders`, all on the scales of `plan`.

    Raises:
        UsageError: ``cohort_option`` without a folder; ``cohort_missing``; ``cohort_unreadable``.
        Refused: ``cohort_of_other_settings``, for a cohort prepared for other images, genes, labels or features;
            ``cohort_too_small``, with fewer than `MIN_PATIENTS` training or held-out patients over all sites.
    """
    if not folders:
        raise UsageError(
            "cohort_option", "No real patients to evaluate with.", "Name a cohort: --cohort north=sites/north"
        )
    cohorts = {name: _load(plan, name, folder) for name, folder in folders.items()}
    parts = Evaluated(
        patients_of({name: cohort.split("train") for name, cohort in cohorts.items()}),
        patients_of({name: cohort.split("holdout") for name, cohort in cohorts.items()}),
    )
    if min(len(parts.train), len(parts.holdout)) < MIN_PATIENTS:
        raise Refused(
            "cohort_too_small",
            f"An evaluation needs at least {MIN_PATIENTS} training and {MIN_PATIENTS} held-out patients over all cohorts.",
            "Name more cohorts, or prepare them with a larger holdout_fraction before a study trains on them.",
        )
    return parts


def _load(plan: StudyPlan, name: str, folder: Path) -> Cohort:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UsageError(
            "cohort_missing",
            f"{name}: {folder} holds no prepared cohort.",
            "Name a site's folder, or the cohort that `fedsynth site prepare` wrote.",
        )
    unreadable = UsageError("cohort_unreadable", f"{name}: {folder} is not a whole cohort.", "Prepare it again.")
    try:
        settings = read_json(manifest)
        held = {part: settings[part] for part in ("image", "genes", "label")}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise unreadable from None
    asked = {"image": plan.image, "genes": plan.genes, "label": plan.label}
    differ = [part for part, section in asked.items() if held[part] != section.model_dump(mode="json")]
    if differ:
        raise Refused(
            "cohort_of_other_settings",
            f"{name}: the cohort was prepared with other settings than the release's plan has ({', '.join(differ)}).",
            "Prepare a cohort for this plan with `fedsynth site prepare`.",
        )
    try:
        return load_cohort(folder, plan.morphology.features)
    except (
        OSError,
        ValueError,
        KeyError,
        SafetensorError,
    ):  # a file that is missing or damaged, or a feature that was not measured
        raise unreadable from None
