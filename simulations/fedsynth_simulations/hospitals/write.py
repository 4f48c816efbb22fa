"""Writing the three hospitals: patient by patient, on all cores, the same bytes for the same seed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from fedsynth.errors import UsageError
from fedsynth.files import write_json
from fedsynth.progress import track
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.latents import DRIVERS, link_matrix
from fedsynth_simulations.cohort.panel import pathways
from fedsynth_simulations.cohort.patient import Subject, draw_subject
from fedsynth_simulations.hospitals.cases import Case, draw_cases
from fedsynth_simulations.hospitals.identity import Identity, draw_identity
from fedsynth_simulations.hospitals.images import Job, write_east, write_north, write_south
from fedsynth_simulations.hospitals.sites import SITES, Site, SiteName, batch_effect, generator
from fedsynth_simulations.hospitals.tables import Row, write_tables

# Purposes of random streams, see `sites.generator`; 1 is the batch effect.
_CASES, _IDENTITY, _SITE_IDENTITY, _SUBJECT, _SCAN, _TABLES = 2, 3, 4, 5, 6, 7
# Starting a process costs as much as writing this many patients.
_WORTH_A_PROCESS = 60
_WRITERS: dict[SiteName, Callable[[Job, Anatomy], None]] = {
    "north": write_north,
    "south": write_south,
    "east": write_east,
}


@dataclass(frozen=True)
class _Task:
    """One patient to write: small enough to send to another process."""

    folder: Path
    site: Site
    seed: int
    case: Case


@dataclass(frozen=True)
class _Written:
    """What the tables and the ground truth need of a patient whose images are on disk."""

    site: SiteName
    row: Row
    truth: dict[str, object]


def write_hospitals(folder: Path, patients: int, seed: int, workers: int | None = None) -> None:
    """Write the hospitals ``north`` (DICOM), ``south`` (BIDS) and ``east`` (patient folders) below `folder`.

    Each site's folder holds image files, an expression table, a clinical table and the `sources.toml` that says what
    they mean. ``truth/`` holds, for evaluation only, ``<site>.json`` (latents, label, fault and absences by the
    hospital's patient id), ``link.json`` (the gene -> morphology link) and ``planted_identifiers.json`` (strings that
    must be found nowhere else).

    Args:
        folder: made if need be; must be empty.
        patients: at each site, at least 1.
        seed: of everything; the same seed writes the same bytes, with any number of workers.
        workers: processes; by default one a core, and one alone for few patients.

    Raises:
        UsageError: ``hospitals_exist`` when `folder` is not empty, ``too_few_patients``.
    """
    if patients < 1:
        raise UsageError("too_few_patients", f"Each hospital needs at least one patient; got {patients}.")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError("hospitals_exist", f"{folder} is not empty.", "Name a new folder.")
    tasks = []
    for site in SITES:
        (folder / site.name / "images").mkdir(parents=True)
        cases = draw_cases(site, patients, generator(seed, site, _CASES))
        tasks += [_Task(folder / site.name, site, seed, case) for case in cases]
    # Sites take turns, so that the slow DICOM patients do not all come first.
    tasks.sort(key=lambda task: task.case.index)
    if workers is None:
        workers = min(os.cpu_count() or 1, max(1, len(tasks) // _WORTH_A_PROCESS))
    written = list(track(_run(tasks, workers), "Writing hospitals", len(tasks)))
    for site in SITES:
        own = [patient for patient in written if patient.site == site.name]
        write_tables(folder / site.name, site, [patient.row for patient in own], generator(seed, site, _TABLES))
    _write_export_log(folder / "north" / "images", [patient.row for patient in written if patient.site == "north"])
    _describe_bids(folder / "south" / "images")
    _write_truth(folder / "truth", written)


def _run(tasks: list[_Task], workers: int) -> Iterator[_Written]:
    if workers == 1:
        yield from map(_write_patient, tasks)
        return
    # A forked child of a process that runs threads, as torch does, can hang; a spawned one cannot.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(_write_patient, tasks, chunksize=4)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@cache
def _anatomy() -> Anatomy:
    return Anatomy.load()


def _write_patient(task: _Task) -> _Written:
    site, case, seed = task.site, task.case, task.seed
    identity = draw_identity(
        site.name, case.index, generator(seed, site, _IDENTITY, case.index), generator(seed, site, _SITE_IDENTITY)
    )
    anatomy = _anatomy()
    subject = draw_subject(
        anatomy, site.style, generator(seed, site, _SUBJECT, case.index), site.severity, batch_effect(seed, site)
    )
    if case.has_images:
        job = Job(task.folder, identity, case, subject, generator(seed, site, _SCAN, case.index))
        _WRITERS[site.name](job, anatomy)
    row = Row(identity, case, tuple(subject.tpm.tolist()), subject.label)
    return _Written(site.name, row, _truth(site, identity, case, subject))


def _truth(site: Site, identity: Identity, case: Case, subject: Subject) -> dict[str, object]:
    wish = subject.head.tumour.wish
    return {
        "patient_id": identity.patient_id,
        "planted": identity.planted(site.name),
        "label": subject.label,
        "pathways": dict(zip(pathways(), subject.latents.pathways.tolist(), strict=True)),
        "drivers": subject.latents.drivers,
        "volume_ml": wish.volume_ml,
        "enhancing_fraction": wish.enhancing,
        "necrotic_fraction": wish.necrotic,
        "fault": case.fault,
        "missing_sequence": case.missing_sequence,
        "has_images": case.has_images,
        "has_expression": case.has_expression,
        "has_label": case.has_label,
        "orientation_known": case.orientation_known,
    }


def _write_export_log(images: Path, rows: list[Row]) -> None:
    """What an export tool leaves beside the images: a text that names everyone."""
    lines = [f"exported {row.identity.patient_id} {row.identity.family}" for row in rows if row.case.has_images]
    (images / "export.log").write_text("\n".join(lines) + "\n")


def _describe_bids(images: Path) -> None:
    """The description that BIDS requires at the root of a data set and of each derivative."""
    derivative = images / "derivatives" / "segmentation"
    derivative.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Simulated glioma cohort", "BIDSVersion": "1.10.0"}
    (images / "dataset_description.json").write_text(json.dumps(description, indent=1))
    derived = description | {"DatasetType": "derivative", "GeneratedBy": [{"Name": "Manual segmentation"}]}
    (derivative / "dataset_description.json").write_text(json.dumps(derived, indent=1))


def _write_truth(folder: Path, written: list[_Written]) -> None:
    folder.mkdir()
    for site in SITES:
        truths = {patient.row.identity.patient_id: patient.truth for patient in written if patient.site == site.name}
        write_json(folder / f"{site.name}.json", truths)
    matrix = link_matrix()
    link = {
        driver: dict(zip(pathways(), row, strict=True)) for driver, row in zip(DRIVERS, matrix.tolist(), strict=True)
    }
    write_json(folder / "link.json", link)
    by_site = {
        site.name: sorted(
            {
                text
                for patient in written
                if patient.site == site.name
                for text in patient.row.identity.planted(site.name)
            }
        )
        for site in SITES
    }
    everything = sorted({text for texts in by_site.values() for text in texts})
    write_json(folder / "planted_identifiers.json", {"strings": everything, "by_site": by_site})
