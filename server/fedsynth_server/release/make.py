"""Making a release: a folder that is whole, described and signed, or not there at all."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.evaluation.values import Evaluation
from fedsynth.files import DISK_FULL
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.outcome import Outcome
from fedsynth_server.release.bids import write_bids_dataset, write_bids_patient
from fedsynth_server.release.content import OUTCOME, privacy_faults
from fedsynth_server.release.croissant import write_croissant
from fedsynth_server.release.dicom import write_dicom_patient
from fedsynth_server.release.facts import NOT_A_PATIENT, Publication, ReleaseFacts
from fedsynth_server.release.index import ReleaseIndex
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.manifest import fingerprint, load_key, write_manifest
from fedsynth_server.release.opened import Release
from fedsynth_server.release.patients import Row, check_patient, row_of
from fedsynth_server.release.preview import Example, ReferenceExamples, comparison_sheet, example_of, preview_sheet
from fedsynth_server.release.sequences import mr_sequences
from fedsynth_server.release.tables import write_tables
from fedsynth_server.release.texts import licence, readme

FORMATS = frozenset({"bids", "dicom"})
PREVIEWED = 8

Curves = Mapping[str, Sequence[Mapping[str, float | int | str]]]


def make_release(
    out: Path,
    plan: StudyPlan,
    patients: Iterable[SyntheticPatient],
    statement: PrivacyStatement,
    evaluation: Evaluation | None,
    curves: Curves,
    key_path: Path,
    released: datetime,
    formats: Collection[str] = FORMATS,
    real_examples: ReferenceExamples | None = None,
    publication: Publication | None = None,
    outcome: Outcome | None = None,
) -> Path:
    """Write a signed release of `patients` to the new folder `out`.

    Equal arguments give equal bytes: no clock and no random number is read. `patients` may be a generator; only one
    patient's images are held at a time, and those of the preview.

    Args:
        out: the folder to make; its parent must exist.
        statement: the privacy statement of the same plan.
        evaluation: what was measured, if anything was.
        curves: training curves by module, each a list of points, for the report.
        key_path: the coordinator's signing key (`fedsynth_server.release.manifest.generate_key`).
        released: time of the release, with its time zone.
        formats: which image trees to write, of `FORMATS`.
        real_examples: simulated or public patients to show beside the synthetic ones in ``comparison.png``.
        publication: authors, contact and licence of the data.
        outcome: what the noise left to learn (`fedsynth_server.outcome`), if that was compared with the forecast.

    Returns:
        `out`.

    Raises:
        UsageError: a wrong argument; nothing was written.
        Refused: ``release_exists``; ``release_privacy``, when a site spent more than the plan allows or than it states.
        JobFailed: ``disk_full``, ``release_empty`` or ``synthetic_patient_invalid``; nothing half-made is left.
    """
    facts = ReleaseFacts(plan, statement, released, publication or Publication())
    _check_arguments(out, plan, formats, curves)
    _check_statement(out, facts, formats)
    key = load_key(key_path)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        rows, shown = _write_patients(draft, patients, facts, formats)
        _write_descriptions(draft, rows, facts, formats, fingerprint(key.public_key()))
        _write_results(draft, rows, shown, facts, evaluation, curves, real_examples, outcome)
        write_manifest(draft, key)
        draft.chmod(0o755)
        os.sync()  # What is renamed below must be on the disk: thousands of files, so once for all.
        draft.rename(out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise JobFailed(
                "disk_full",
                f"The disk is full; no release was made at {out}.",
                "Free some space and repeat the command.",
            ) from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(out) from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _exists(out: Path) -> Refused:
    return Refused("release_exists", f"{out} exists; a release is never changed.", "Name a new folder.")


def _check_arguments(out: Path, plan: StudyPlan, formats: Collection[str], curves: Curves) -> None:
    if out.exists() or out.is_symlink():
        raise _exists(out)
    if not out.parent.is_dir():
        raise UsageError("folder_missing", f"There is no folder {out.parent} to make the release in.")
    unknown = set(formats) - FORMATS
    if unknown or not formats:
        raise UsageError("format_unknown", f"Formats {sorted(formats)}: name at least one of {sorted(FORMATS)}.")
    mr_sequences(plan.image.sequences)
    for name, points in curves.items():
        for point in points:
            if any(isinstance(value, float) and not math.isfinite(value) for value in point.values()):
                raise UsageError("curve_not_finite", f"The training curve {name!r} holds a value that is not finite.")


def _check_statement(out: Path, facts: ReleaseFacts, formats: Collection[str]) -> None:
    """Refuse what a recipient would refuse, before anything is written."""
    release = Release(out, ReleaseIndex.of(facts, formats, n_patients=1), facts.plan, facts.statement)
    faults = privacy_faults(release)
    if faults:
        raise Refused("release_privacy", f"The privacy statement does not hold: {'; '.join(faults)}.")


def _write_patients(
    root: Path, patients: Iterable[SyntheticPatient], facts: ReleaseFacts, formats: Collection[str]
) -> tuple[list[Row], list[Example]]:
    """Write every patient's images; give back the rows of the tables and the first patients for the preview."""
    rows: dict[str, Row] = {}
    shown: list[Example] = []
    for patient in patients:
        check_patient(patient, facts.plan)
        if patient.participant_id in rows:
            raise JobFailed("synthetic_patient_invalid", f"Participant {patient.participant_id} was drawn twice.")
        rows[patient.participant_id] = row_of(patient)
        if len(shown) < PREVIEWED:
            shown.append(example_of(patient))
        if "bids" in formats:
            write_bids_patient(root / "bids", patient, facts)
        if "dicom" in formats:
            write_dicom_patient(root / "dicom", patient, facts)
    if not rows:
        raise JobFailed("release_empty", "There is no synthetic patient to release.")
    return list(rows.values()), shown


def _write_descriptions(
    root: Path, rows: list[Row], facts: ReleaseFacts, formats: Collection[str], key_fingerprint: str
) -> None:
    """Everything that says what the data are."""
    write_tables(root, rows, facts)
    if "bids" in formats:
        write_bids_dataset(root / "bids", rows, facts)
    write_croissant(root, facts, formats, len(rows))
    save_plan(facts.plan, root / "plan.toml")
    dump(root / "privacy.json", facts.statement.model_dump(mode="json"))
    index = ReleaseIndex.of(facts, formats, len(rows))
    dump(root / "release.json", index.model_dump(mode="json"))
    (root / "README.md").write_text(readme(facts, formats, len(rows), key_fingerprint), encoding="utf-8")
    (root / "LICENSE").write_text(licence(facts), encoding="utf-8")


def _write_results(
    root: Path,
    rows: list[Row],
    shown: list[Example],
    facts: ReleaseFacts,
    evaluation: Evaluation | None,
    curves: Curves,
    real_examples: ReferenceExamples | None,
    outcome: Outcome | None,
) -> None:
    """Pictures, measurements, training curves and the report over them."""
    from fedsynth_server.release.report import write_report

    sequences = facts.plan.image.sequences
    title = f"{NOT_A_PATIENT} - {facts.identifier}"
    preview = preview_sheet(shown, sequences, title)
    (root / "preview.png").write_bytes(preview)
    comparison = None
    if real_examples is not None:
        comparison = comparison_sheet(real_examples, shown, sequences, facts.identifier)
        (root / "comparison.png").write_bytes(comparison)
    if evaluation is not None:
        dump(root / "evaluation.json", evaluation.model_dump(mode="json"))
    if outcome is not None:
        dump(root / OUTCOME, outcome.model_dump(mode="json"))
    points = {name: [dict(point) for point in curve] for name, curve in curves.items()}
    dump(root / "curves.json", points)
    write_report(
        root / "report.html",
        plan=facts.plan,
        statement=facts.statement,
        evaluation=evaluation,
        curves=points,
        preview_png=preview,
        released=facts.released,
        n_patients=len(rows),
        comparison_png=comparison,
        outcome=outcome,
    )
