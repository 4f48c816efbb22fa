"""`fedsynth site prepare`: from a hospital's folder to a prepared cohort (`fedsynth_client.cohort`).

The hospital's patient ids join images, expression and clinical table here and end here: a patient gets a random key,
patients are put in random order, and nothing of an id, a file name or a header goes into the cohort.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import save

from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.files import DISK_FULL, read_json
from fedsynth.morphology import FEATURES
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth_client.cohort import Split
from fedsynth_client.ingest.clinical import UNKNOWN, Labels, read_clinical
from fedsynth_client.ingest.expression import Profiles, read_expression
from fedsynth_client.ingest.found import Found, PatientFiles
from fedsynth_client.ingest.patient import Built, PatientImages, build
from fedsynth_client.ingest.refusals import Reason, Refusal, Unusable
from fedsynth_client.ingest.report import PreparationReport, Taken
from fedsynth_client.ingest.sources import ImageSources, Sources, load_sources

Value = TypeVar("Value")

# Raised when the same files would give other arrays; written into the manifest.
INGEST_VERSION = 1
# Starting worker processes costs about two seconds; fewer files than this are read sooner without them.
_FILES_FOR_WORKERS = 1500
_WORKERS = 2


class NothingUsable(Refused):
    """No patient could be taken; `report` says why, item by item."""

    def __init__(self, report: PreparationReport) -> None:
        super().__init__(
            "cohort_empty",
            "No patient is usable, so no cohort was written.",
            "See the report for what was refused and what to do about it.",
        )
        self.report = report


def prepare(
    plan: StudyPlan,
    sources_path: Path,
    out: Path,
    rng: np.random.Generator,
    *,
    replace: bool = False,
    workers: int | None = None,
) -> PreparationReport:
    """Turn the files that `sources_path` describes into a prepared cohort at `out`.

    The cohort is written beside `out` under another name and renamed when it is whole.

    Args:
        plan: its image, gene, label and morphology sections decide; the others are not looked at.
        sources_path: the hospital's `sources.toml`; paths in it are relative to its folder.
        out: folder to write; must not exist unless `replace`.
        rng: draws the patients' keys, their order and the split.
        replace: write over an earlier cohort of the same plan settings.
        workers: processes to read with; by default two when there are many files, else none.

    Raises:
        UsageError: ``sources_*`` for a wrong `sources.toml`, ``cohort_exists``, ``cohort_of_other_settings``.
        NothingUsable: no patient was taken; nothing is written.
        JobFailed: ``disk_full``; nothing half written is left.
    """
    started = time.monotonic()
    sources = load_sources(sources_path)
    base = sources_path.parent
    _check_sources(sources, base, plan)
    _check_out(out, plan, replace)
    refused: list[Refusal] = []
    with _pool(sources, base, workers) as pool:
        found = _find_images(sources.images, base, pool) if sources.images else Found()
        refused += found.refused
        patients = _without_duplicates(found.patients, refused)
        built = _build_all(patients, sources, plan, pool)
    for one in built:
        refused += one.refused
    profile_table = _read_profiles(sources, base, plan, refused)
    label_table = _read_labels(sources, base, plan, refused)
    profiles, labels = profile_table or Profiles(), label_table or Labels()
    images = {one.patient_id: one.images for one in built if one.images is not None}
    places = _places(patients, profiles, labels)
    usable = set(images) | set(profiles.values)
    with_files = {patient.patient_id for patient in patients}
    for patient, where in places.items():
        if patient not in usable:
            refused.append(Refusal("patient", where, Reason.NOTHING_USABLE))
            continue
        if sources.images and patient not in with_files:
            refused.append(Refusal("images", where, Reason.MISSING_IMAGES))
        if profile_table and patient not in profiles.where:
            refused.append(Refusal("genes", where, Reason.MISSING_PROFILE))
        if label_table and patient not in labels.codes:
            refused.append(Refusal("label", where, Reason.MISSING_LABEL))
    notes = _notes(with_files, profile_table, label_table)
    rows = _rows(sorted(usable), images, profiles, labels, sources.holdout_fraction, rng)
    report = PreparationReport(_taken(rows), len(places), tuple(refused), notes, time.monotonic() - started)
    if not rows:
        raise NothingUsable(report)
    _write(out, rows, plan, report)
    return report


@dataclass(frozen=True)
class _Row:
    """One patient of the cohort under its random key."""

    key: str
    split: Split
    images: PatientImages | None
    genes: NDArray[np.float32] | None
    label: int


def _rows(
    usable: list[str],
    images: dict[str, PatientImages],
    profiles: Profiles,
    labels: Labels,
    holdout_fraction: float,
    rng: np.random.Generator,
) -> list[_Row]:
    """The usable patients in random order, under random keys, a random part of them held out."""
    order = [usable[i] for i in rng.permutation(len(usable))]
    held_out = rng.permutation(len(usable)) < round(holdout_fraction * len(usable))
    keys: dict[str, None] = {}
    while len(keys) < len(usable):
        keys["p" + rng.bytes(6).hex()] = None
    return [
        _Row(
            key,
            "holdout" if out else "train",
            images.get(patient),
            profiles.values.get(patient),
            labels.codes.get(patient, UNKNOWN),
        )
        for key, patient, out in zip(keys, order, held_out, strict=True)
    ]


def _taken(rows: list[_Row]) -> Taken:
    return Taken(
        patients=len(rows),
        with_images=sum(row.images is not None for row in rows),
        with_genes=sum(row.genes is not None for row in rows),
        with_both=sum(row.images is not None and row.genes is not None for row in rows),
        with_label=sum(row.label != UNKNOWN for row in rows),
        train=sum(row.split == "train" for row in rows),
        holdout=sum(row.split == "holdout" for row in rows),
    )


def settings_digest(plan: StudyPlan) -> str:
    """SHA-256 (hex) of the plan's sections that a prepared cohort depends on: image, genes and label."""
    canonical = json.dumps(
        [INGEST_VERSION, plan.image.model_dump(), plan.genes.model_dump(), plan.label.model_dump()], sort_keys=True
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_sources(sources: Sources, base: Path, plan: StudyPlan) -> None:
    """Refuse a `sources.toml` that cannot serve the plan, before anything is read."""
    if sources.images is None and sources.expression is None:
        raise UsageError("sources_empty", "The sources name neither images nor an expression table.", "Name one.")
    if sources.images is not None:
        missing = [name for name in plan.image.sequences if name not in sources.images.sequences]
        if missing:
            raise UsageError(
                "sources_sequence_missing",
                f"images.sequences does not say which files are {', '.join(missing)}, which the plan needs.",
                "Give each sequence its patterns, or leave the table images out if the hospital has none of it.",
            )
        if not (base / sources.images.path).exists():
            raise UsageError("sources_path_missing", f"There is nothing at {base / sources.images.path} (images.path).")
    if sources.clinical is not None:
        unknown = sorted(set(sources.clinical.label_codes.values()) - set(plan.label.classes))
        if unknown:
            raise UsageError(
                "sources_label_class_unknown",
                f"clinical.label_codes names {', '.join(unknown)}; the plan's classes are {', '.join(plan.label.classes)}.",
            )


def _check_out(out: Path, plan: StudyPlan, replace: bool) -> None:
    """Refuse to overwrite anything but an earlier cohort of the same settings, and that only when asked to."""
    if not out.exists():
        return
    manifest = out / "manifest.json"
    if not manifest.is_file():
        raise UsageError("out_is_no_cohort", f"{out} exists and is not a prepared cohort.", "Choose another folder.")
    if not replace:
        raise UsageError("cohort_exists", f"{out} holds a prepared cohort already.", "Say --replace to make it anew.")
    if read_json(manifest).get("settings_digest") != settings_digest(plan):
        raise UsageError(
            "cohort_of_other_settings",
            f"{out} was prepared with other image, gene or label settings than this plan's.",
            "Choose another folder, or remove the old cohort yourself if no study uses it.",
        )


@contextmanager
def _pool(sources: Sources, base: Path, workers: int | None) -> Iterator[Executor | None]:
    """Processes to read images with, or None where reading in this process is faster."""
    if workers is None:
        root = base / sources.images.path if sources.images else None
        count = sum(len(names) for _, _, names in os.walk(root)) if root else 0
        workers = min(_WORKERS, os.cpu_count() or 1) if count >= _FILES_FOR_WORKERS else 0
    if workers < 2:
        yield None
        return
    # Not fork: the parent may hold threads (torch, gRPC), which a forked child would find frozen.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _find_images(images: ImageSources, base: Path, pool: Executor | None) -> Found:
    """Look for every patient's files by the layout of `images`; the layout's libraries are imported only here."""
    root = base / images.path
    try:
        match images.layout:
            case "dicom":
                from fedsynth_client.ingest import dicom

                found = dicom.find(root, base, images, pool)
            case "slices":
                from fedsynth_client.ingest import slices

                found = slices.find(root, base, images)
            case _:
                from fedsynth_client.ingest import nifti

                finders = {"bids": nifti.find_bids, "folders": nifti.find_folders, "manifest": nifti.find_manifest}
                found = finders[images.layout](root, base, images)
    except Unusable as error:
        return Found(refused=[Refusal("file", images.path, error.reason, error.detail)])
    except NotADirectoryError:
        raise UsageError("sources_path_invalid", f"{root} (images.path) is not a folder.") from None
    if not found.patients and not found.refused:
        found.refused.append(Refusal("file", images.path, Reason.EMPTY_FOLDER))
    return found


def _without_duplicates(patients: list[PatientFiles], refused: list[Refusal]) -> list[PatientFiles]:
    """Patients whose id occurs once, e.g. not ``sub-01`` beside ``01``; the others are refused."""
    ids = Counter(patient.patient_id for patient in patients)
    refused += [Refusal("patient", p.where, Reason.DUPLICATE_PATIENT) for p in patients if ids[p.patient_id] > 1]
    return [patient for patient in patients if ids[patient.patient_id] == 1]


def _build_all(patients: list[PatientFiles], sources: Sources, plan: StudyPlan, pool: Executor | None) -> list[Built]:
    codes = sources.images.mask_codes if sources.images else {}
    work = partial(build, image=plan.image, mask_codes=codes)
    results = map(work, patients) if pool is None else pool.map(work, patients, chunksize=4)
    return list(track(results, "Preparing images", len(patients)))


def _read_profiles(sources: Sources, base: Path, plan: StudyPlan, refused: list[Refusal]) -> Profiles | None:
    """The profiles, or None where there is no usable table."""
    if sources.expression is None:
        return None
    try:
        profiles = read_expression(sources.expression, base, plan.genes)
    except Unusable as error:
        refused.append(Refusal("expression", sources.expression.path, error.reason, error.detail))
        return None
    refused += profiles.refused
    profiles.values = _joined(profiles.values, sources)
    profiles.where = _joined(profiles.where, sources)
    return profiles


def _read_labels(sources: Sources, base: Path, plan: StudyPlan, refused: list[Refusal]) -> Labels | None:
    """The labels, or None where there is no usable table."""
    if sources.clinical is None:
        return None
    try:
        labels = read_clinical(sources.clinical, base, plan.label)
    except Unusable as error:
        refused.append(Refusal("clinical", sources.clinical.path, error.reason, error.detail))
        return None
    refused += labels.refused
    labels.codes = _joined(labels.codes, sources)
    labels.where = _joined(labels.where, sources)
    return labels


def _joined(by_patient: dict[str, Value], sources: Sources) -> dict[str, Value]:
    """The same with ids as the images have them: BIDS tables say ``sub-01`` where the patient is ``01``."""
    if sources.images is None or sources.images.layout != "bids":
        return by_patient
    return {patient.removeprefix("sub-"): value for patient, value in by_patient.items()}


def _places(patients: list[PatientFiles], profiles: Profiles, labels: Labels) -> dict[str, str]:
    """Every patient that any file names, and where: its images' folder, else its line in a table."""
    return {**labels.where, **profiles.where, **{patient.patient_id: patient.where for patient in patients}}


def _notes(with_files: set[str], profiles: Profiles | None, labels: Labels | None) -> tuple[str, ...]:
    notes = []
    if profiles is not None:
        notes.append(f"The expression table holds {profiles.panel_coverage:.1%} of the plan's gene panel.")
        if with_files and not with_files & set(profiles.where):
            notes.append("No patient of the images occurs in the expression table: are the ids written alike?")
    if labels is not None and not set(labels.where) & (with_files | set(profiles.where if profiles else ())):
        notes.append("No patient occurs in the clinical table: are the ids written alike?")
    return tuple(notes)


def _write(out: Path, rows: list[_Row], plan: StudyPlan, report: PreparationReport) -> None:
    """Write the cohort beside `out` and rename it when it is whole; an earlier cohort at `out` gives way only then.

    Raises:
        JobFailed: ``disk_full``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (temporary / "patients").mkdir()
        digests = {}
        for row in rows:
            if row.images is not None:
                tensors: dict[str, NDArray[Any]] = {"images": row.images.images, "mask": row.images.mask}
                name = f"patients/{row.key}.safetensors"
                digests[name] = _put(temporary / name, save(tensors))
        for name, frame in (("expression", _expression_frame(rows, plan)), ("clinical", _clinical_frame(rows))):
            digests[f"{name}.parquet"] = _put(temporary / f"{name}.parquet", _parquet(frame))
        manifest = _manifest(rows, plan, report, digests)
        _put(temporary / "manifest.json", (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.rename(old / out.name)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise JobFailed(
                "disk_full",
                f"The disk is full; no cohort was written to {out}.",
                "Make room and run the command again.",
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(path: Path, content: bytes) -> str:
    """Write `content` durably and return its SHA-256 (hex)."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def _expression_frame(rows: list[_Row], plan: StudyPlan) -> pd.DataFrame:
    """(N, G) float32, NaN for patients without a profile."""
    missing = np.full(len(plan.genes.panel), np.nan, dtype=np.float32)
    values = np.stack([missing if row.genes is None else row.genes for row in rows])
    return pd.DataFrame(values, index=pd.Index([row.key for row in rows], name="key"), columns=plan.genes.panel)


def _clinical_frame(rows: list[_Row]) -> pd.DataFrame:
    """Label and every morphology feature in physical units, NaN for patients without images."""
    missing = np.full(len(FEATURES), np.nan)
    frame = pd.DataFrame(
        np.stack([missing if row.images is None else row.images.morphology for row in rows]),
        index=pd.Index([row.key for row in rows], name="key"),
        columns=[feature.name for feature in FEATURES],
    )
    frame.insert(0, "label", np.array([row.label for row in rows], dtype=np.int64))
    return frame


def _manifest(
    rows: list[_Row], plan: StudyPlan, report: PreparationReport, digests: dict[str, str]
) -> dict[str, object]:
    """What `load_cohort` and a reviewer read. Refusals carry the item number of the site's report, not a place."""
    return {
        "schema_version": 1,
        "ingest_version": INGEST_VERSION,
        "settings_digest": settings_digest(plan),
        "image": plan.image.model_dump(),
        "genes": plan.genes.model_dump(),
        "label": plan.label.model_dump(),
        "mask": "largest contiguous region",
        "patients": [
            {
                "key": row.key,
                "split": row.split,
                "has_images": row.images is not None,
                "has_genes": row.genes is not None,
            }
            for row in rows
        ],
        "refused_counts": report.counts(),
        "refused": [
            {"item": item, "what": refusal.what, "reason": refusal.reason.code}
            for item, refusal in enumerate(report.refused)
        ],
        "sha256": digests,
    }
