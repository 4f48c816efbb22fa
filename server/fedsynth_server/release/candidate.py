"""The candidate of a release: synthetic patients, drawn and written, before anybody agreed that they be released.

A candidate holds what never changes afterwards (`fedsynth.sums`): images, tables, plan, privacy statement and limits, and
``CONTENT.SHA256SUMS`` over them. Evidence can be computed about these very files, and sites can countersign them. It has
neither report nor signature, and ``CANDIDATE.json`` says what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedsynth.countersignature import EVIDENCE, FOLDER
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.limits import Limits
from fedsynth.plan import save_plan
from fedsynth.selection import FILE as SELECTION
from fedsynth.selection import channels_of
from fedsynth.sums import CONTENT, SUMS, files_of, is_content, write_content
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.outcome import Outcome
from fedsynth_server.release.bids import write_bids_dataset, write_bids_patient
from fedsynth_server.release.content import OUTCOME
from fedsynth_server.release.dicom import write_dicom_patient
from fedsynth_server.release.evidence import write_limits
from fedsynth_server.release.facts import NOT_A_PATIENT, Publication, ReleaseFacts
from fedsynth_server.release.index import ReleaseIndex
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.patients import Row, check_patient, row_of
from fedsynth_server.release.preview import Example, ReferenceExamples, comparison_sheet, example_of, preview_sheet
from fedsynth_server.release.tables import write_tables
from fedsynth_server.release.texts import licence

MARK = "CANDIDATE.json"
SUFFIX = "-candidate"
PREVIEWED = 8

Curves = Mapping[str, Sequence[Mapping[str, float | int | str]]]

_NOTE = (
    "NOT A RELEASE. Nobody has agreed that these synthetic patients be released. Keep the folder where it is, compute "
    "evidence about it, let sites countersign it, and make the release with `fedsynth release finish`."
)


@dataclass(frozen=True)
class _Mark:
    """What ``CANDIDATE.json`` holds: a word to whoever finds it, and what the release will need."""

    note: str
    publication: Publication


def draw_content(
    root: Path,
    patients: Iterable[SyntheticPatient],
    facts: ReleaseFacts,
    *,
    limits: Limits,
    curves: Curves,
    formats: Collection[str],
    real_examples: ReferenceExamples | None = None,
    outcome: Outcome | None = None,
) -> None:
    """Write everything that sites countersign into the empty folder `root`, and the list of it.

    Raises:
        JobFailed: ``release_empty`` or ``synthetic_patient_invalid``.
    """
    rows, shown = _write_patients(root, patients, facts, formats)
    write_tables(root, rows, facts)
    if "bids" in formats:
        write_bids_dataset(root / "bids", rows, facts)
    save_plan(facts.plan, root / "plan.toml")
    dump(root / "privacy.json", facts.statement.model_dump(mode="json"))
    dump(root / "release.json", ReleaseIndex.of(facts, formats, len(rows)).model_dump(mode="json"))
    (root / "LICENSE").write_text(licence(facts), encoding="utf-8")
    _write_pictures(root, shown, facts, real_examples)
    if outcome is not None:
        dump(root / OUTCOME, outcome.model_dump(mode="json"))
    if facts.selected is not None:
        dump(root / SELECTION, facts.selected.model_dump(mode="json"))
    dump(root / "curves.json", {name: [dict(point) for point in curve] for name, curve in curves.items()})
    write_limits(root, limits)
    write_content(root)


def mark(root: Path, publication: Publication) -> None:
    """Say of `root` that it is a candidate."""
    dump(root / MARK, {"note": _NOTE, "publication": asdict(publication)})


def is_candidate(folder: Path) -> bool:
    """Whether `folder` says that it is a candidate, and nobody has listed its files as those of a release."""
    return (folder / MARK).is_file() and not (folder / SUMS).exists()


def publication_of(candidate: Path) -> Publication:
    """Who will publish it.

    Raises:
        UsageError: ``candidate_missing``: the folder is no candidate.
    """
    try:
        return TypeAdapter(_Mark).validate_json((candidate / MARK).read_bytes()).publication
    except (OSError, ValidationError):
        raise UsageError(
            "candidate_missing",
            f"{candidate} is no candidate of a release.",
            "Make one: fedsynth release make --candidate.",
        ) from None


def check_nothing_else(candidate: Path) -> None:
    """Refuse a candidate that holds files which are neither content nor evidence: they would be published with it.

    Raises:
        Refused: ``candidate_has_more``, ``release_not_plain``.
    """
    known = {CONTENT, MARK, *EVIDENCE}
    more = [
        name
        for name in files_of(candidate)
        if name not in known and not is_content(name) and not name.startswith(f"{FOLDER}/")
    ]
    if more:
        raise Refused(
            "candidate_has_more",
            f"{candidate} holds files that belong to no release ({', '.join(more[:5])}).",
            "Move them away: whatever lies in the folder would be published.",
        )


def _write_patients(
    root: Path, patients: Iterable[SyntheticPatient], facts: ReleaseFacts, formats: Collection[str]
) -> tuple[list[Row], list[Example]]:
    """Write every patient's images; give back the rows of the tables and the first patients for the preview."""
    rows: dict[str, Row] = {}
    shown: list[Example] = []
    for patient in patients:
        check_patient(patient, facts.plan, facts.sequences)
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


def _write_pictures(
    root: Path, shown: list[Example], facts: ReleaseFacts, real_examples: ReferenceExamples | None
) -> None:
    sequences = facts.sequences
    (root / "preview.png").write_bytes(preview_sheet(shown, sequences, f"{NOT_A_PATIENT} - {facts.identifier}"))
    if real_examples is not None:
        channels = channels_of(facts.plan, sequences)
        originals = tuple(replace(each, images=each.images[channels]) for each in real_examples.examples)
        reference = replace(real_examples, examples=originals)
        sheet = comparison_sheet(reference, shown, sequences, facts.identifier)
        (root / "comparison.png").write_bytes(sheet)
