"""Making a release: a folder that is whole, described, let pass by the gate, and signed; or not there at all."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsynth.attacks.values import Attacks
from fedsynth.auditing.code import code_digest
from fedsynth.auditing.values import Audit
from fedsynth.countersignature import Countersignature
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.evaluation.site_values import SiteEvaluation
from fedsynth.evaluation.values import Evaluation
from fedsynth.files import DISK_FULL, read_json
from fedsynth.limits import Limits
from fedsynth.plan import StudyPlan
from fedsynth.selection import Selected
from fedsynth.sequences import mr_sequences
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.outcome import Outcome
from fedsynth_server.release.candidate import (
    MARK,
    SUFFIX,
    Curves,
    check_nothing_else,
    draw_content,
    mark,
    publication_of,
)
from fedsynth_server.release.checks import content_checks
from fedsynth_server.release.content import OUTCOME, privacy_faults
from fedsynth_server.release.croissant import write_croissant
from fedsynth_server.release.datasheet import datasheet
from fedsynth_server.release.decision import GateCheck, GateDecision, OverrideRequest, sign_override
from fedsynth_server.release.evidence import Evidence, read_evidence, write_evidence
from fedsynth_server.release.facts import Publication, ReleaseFacts
from fedsynth_server.release.gate import FILE as GATE
from fedsynth_server.release.gate import decide
from fedsynth_server.release.index import ReleaseIndex
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.manifest import fingerprint, load_key, write_manifest
from fedsynth_server.release.opened import Release, open_release, read_tsv
from fedsynth_server.release.preview import ReferenceExamples
from fedsynth_server.release.tables import PARTICIPANTS
from fedsynth_server.release.texts import readme

FORMATS = frozenset({"bids", "dicom"})
DATASHEET = "DATASHEET.md"


class ReleaseRefused(Refused):
    """The gate did not let a release pass.

    Attributes:
        decision: all checks.
        candidate: the folder in which the drawn patients are kept.
    """

    def __init__(
        self, code: str, message: str, hint: str, decision: GateDecision, candidate: Path | None = None
    ) -> None:
        super().__init__(code, message, hint)
        self.decision = decision
        self.candidate = candidate


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
    *,
    audit: Audit | None = None,
    attacks: Attacks | None = None,
    limits: Limits | None = None,
    override: OverrideRequest | None = None,
    site_evaluation: SiteEvaluation | None = None,
    countersignatures: Sequence[Countersignature] = (),
    selected: Selected | None = None,
) -> Path:
    """Write a signed release of `patients` to the new folder `out`, if the gate lets it pass.

    Equal arguments give equal bytes: no clock and no random number is read. `patients` may be a generator; only one
    patient's images are held at a time, and those of the preview.

    Args:
        out: the folder to make; its parent must exist.
        statement: the privacy statement of the same plan.
        evaluation: what was measured on these patients, if anything was.
        curves: training curves by module, each a list of points, for the report; they tell who contributed.
        key_path: the coordinator's signing key (`fedsynth_server.release.manifest.generate_key`).
        released: time of the release, with its time zone.
        formats: which image trees to write, of `FORMATS`.
        real_examples: simulated or public patients to show beside the synthetic ones in ``comparison.png``.
        publication: authors, contact and licence of the data.
        outcome: what the noise left to learn (`fedsynth_server.outcome`), if that was compared with the forecast.
        audit: of this plan by this version of the code.
        attacks: with these patients on simulated or public ones; None where sites countersign that theirs held.
        limits: of attacks; the defaults ask for everything.
        override: by which somebody answers for a release of which exactly the checks that it names fail.
        site_evaluation: what sites found on their held-out patients.
        countersignatures: of sites.
        selected: what was selected of all that the study can draw, when `patients` were drawn; None where nothing was.

    Returns:
        `out`.

    Raises:
        UsageError: a wrong argument; nothing was written.
        ReleaseRefused: ``release_gate``: checks failed; the drawn patients are kept in the candidate ``<out>-candidate``,
            which `finish_release` goes on with. ``override_differs``, as well.
        Refused: ``release_exists``; ``release_privacy``, when a site spent more than the plan allows or than it states.
        JobFailed: ``disk_full``, ``release_empty`` or ``synthetic_patient_invalid``; nothing half-made is left.
    """
    facts = ReleaseFacts(plan, statement, released, publication or Publication(), selected)
    kept = candidate_path(out)
    _check_arguments(out, facts.sequences, formats, curves)
    _check_free(kept)
    _check_statement(out, facts, formats)
    key = load_key(key_path)
    with _draft(out) as draft:
        draw_content(
            draft,
            patients,
            facts,
            limits=limits or Limits(),
            curves=curves,
            formats=formats,
            real_examples=real_examples,
            outcome=outcome,
        )
        write_evidence(
            draft,
            plan,
            audit=audit,
            attacks=attacks,
            evaluation=evaluation,
            site_evaluation=site_evaluation,
            countersignatures=countersignatures,
        )
        try:
            _complete(draft, facts.publication, key, override)
        except ReleaseRefused as refusal:
            mark(draft, facts.publication)
            _publish(draft, kept)
            refusal.candidate = kept
            refusal.hint = (
                f"{refusal.hint} The drawn patients are kept in {kept}: fedsynth release finish {kept} --key KEY."
            )
            raise
        _publish(draft, out)
    return out


def make_candidate(
    out: Path,
    plan: StudyPlan,
    patients: Iterable[SyntheticPatient],
    statement: PrivacyStatement,
    curves: Curves,
    released: datetime,
    formats: Collection[str] = FORMATS,
    publication: Publication | None = None,
    outcome: Outcome | None = None,
    *,
    evaluation: Evaluation | None = None,
    audit: Audit | None = None,
    attacks: Attacks | None = None,
    limits: Limits | None = None,
    site_evaluation: SiteEvaluation | None = None,
    selected: Selected | None = None,
) -> Path:
    """Draw `patients` into the candidate of a release at `out`, for evidence and countersignatures; see `make_release`.

    Returns:
        The candidate, ``<out>-candidate``.
    """
    facts = ReleaseFacts(plan, statement, released, publication or Publication(), selected)
    candidate = candidate_path(out)
    _check_arguments(out, facts.sequences, formats, curves)
    _check_free(candidate)
    _check_statement(out, facts, formats)
    with _draft(candidate) as draft:
        draw_content(draft, patients, facts, limits=limits or Limits(), curves=curves, formats=formats, outcome=outcome)
        write_evidence(
            draft, plan, audit=audit, attacks=attacks, evaluation=evaluation, site_evaluation=site_evaluation
        )
        mark(draft, facts.publication)
        _publish(draft, candidate)
    return candidate


def finish_release(
    candidate: Path,
    out: Path,
    key_path: Path,
    *,
    evaluation: Evaluation | None = None,
    audit: Audit | None = None,
    attacks: Attacks | None = None,
    site_evaluation: SiteEvaluation | None = None,
    countersignatures: Sequence[Countersignature] = (),
    override: OverrideRequest | None = None,
) -> Path:
    """Make a release of `candidate`, if the gate lets it pass; what is given takes the place of evidence in it.

    The candidate stays as it is, whatever comes of it.

    Returns:
        `out`.

    Raises:
        UsageError: ``candidate_missing``, or a key that cannot be read.
        ReleaseRefused: ``release_gate`` or ``override_differs``.
        Refused: ``release_exists``, ``candidate_has_more``, ``release_unreadable``, ``evidence_unreadable``.
        JobFailed: ``disk_full``.
    """
    publication = publication_of(candidate)
    _check_free(out)
    check_nothing_else(candidate)
    key = load_key(key_path)
    plan = open_release(candidate).plan
    with _draft(out) as draft:
        shutil.copytree(candidate, draft, dirs_exist_ok=True, copy_function=shutil.copyfile)
        (draft / MARK).unlink()
        write_evidence(
            draft,
            plan,
            audit=audit,
            attacks=attacks,
            evaluation=evaluation,
            site_evaluation=site_evaluation,
            countersignatures=countersignatures,
        )
        try:
            _complete(draft, publication, key, override)
        except ReleaseRefused as refusal:
            refusal.candidate = candidate
            raise
        _publish(draft, out)
    return out


def candidate_path(out: Path) -> Path:
    """Where the candidate of the release `out` lies."""
    return out.with_name(out.name + SUFFIX)


def _complete(folder: Path, publication: Publication, key: Ed25519PrivateKey, override: OverrideRequest | None) -> None:
    """Decide about the content and evidence in `folder`; describe and sign it, or refuse."""
    release = open_release(folder)
    evidence = read_evidence(folder)
    decision = decide(release, evidence, content_checks(release), code_digest())
    decision = _answered(decision, override, key)
    dump(folder / GATE, decision.model_dump(mode="json"))
    facts = ReleaseFacts(release.plan, release.statement, release.index.released, publication, release.selected)
    _describe(release, facts, evidence, decision, fingerprint(key.public_key()))
    write_manifest(folder, key)


def _answered(decision: GateDecision, override: OverrideRequest | None, key: Ed25519PrivateKey) -> GateDecision:
    """`decision` with the override, if one is needed and allowed.

    Raises:
        ReleaseRefused: ``release_gate``, ``override_differs``.
    """
    failed = decision.failed
    listed = _listed(failed)
    final = [check.id for check in failed if not check.overridable]
    if final or (failed and override is None):
        count = "one check" if len(failed) == 1 else f"{len(failed)} checks"
        never = f" Nobody can answer for {', '.join(final)}." if final else ""
        raise ReleaseRefused("release_gate", f"The gate refuses this release: {count} failed.{listed}", never, decision)
    if override is None:
        return decision
    if {check.id for check in failed} != set(override.checks) or not override.statement or not override.responsible:
        raise ReleaseRefused(
            "override_differs",
            f"The override names {', '.join(sorted(override.checks)) or 'no check'}; "
            f"{', '.join(check.id for check in failed) or 'nothing'} failed.{listed}",
            "An override says why and who answers, and names exactly the checks that fail.",
            decision,
        )
    return decision.model_copy(update={"override": sign_override(override, decision, key)})


def _listed(failed: list[GateCheck]) -> str:
    """What failed, by how much, and what could be done, a line each; checks that failed alike stand together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for check in failed:
        alike.setdefault((check.finding, check.remedy), []).append(check.id)
    return "".join(
        f"\n- {', '.join(ids)}: {finding}\n  What could be done: {remedy}" for (finding, remedy), ids in alike.items()
    )


def _describe(
    release: Release, facts: ReleaseFacts, evidence: Evidence, decision: GateDecision, key_fingerprint: str
) -> None:
    """README, datasheet, Croissant and report over everything that lies in the folder."""
    from fedsynth_server.release.report import write_report

    root, formats, count = release.folder, release.index.formats, release.index.n_patients
    (root / "README.md").write_text(readme(facts, formats, count, key_fingerprint), encoding="utf-8")
    told = Outcome.model_validate_json((root / OUTCOME).read_bytes()) if (root / OUTCOME).is_file() else None
    labels = [row[1] for row in read_tsv(root / PARTICIPANTS)[1]]
    sheet = datasheet(
        facts,
        formats,
        labels,
        evaluation=evidence.evaluation,
        attacks=evidence.attacks,
        audit=evidence.audit,
        gate=decision,
        site_evaluation=evidence.site_evaluation,
        outcome=told,
    )
    (root / DATASHEET).write_text(sheet, encoding="utf-8")
    comparison = root / "comparison.png"
    write_report(
        root / "report.html",
        plan=facts.plan,
        statement=facts.statement,
        evaluation=evidence.evaluation,
        curves=read_json(root / "curves.json"),
        preview_png=(root / "preview.png").read_bytes(),
        released=facts.released,
        n_patients=count,
        comparison_png=comparison.read_bytes() if comparison.is_file() else None,
        outcome=told,
        attacks=evidence.attacks,
        audit=evidence.audit,
        gate=decision,
        site_evaluation=evidence.site_evaluation,
        selected=facts.selected,
    )
    write_croissant(root, facts, formats, count)  # last: it lists the others with their sums


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that is gone afterwards, unless it was published."""
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield draft
    except OSError as error:
        if error.errno in DISK_FULL:
            raise JobFailed(
                "disk_full",
                f"The disk is full; no release was made at {out}.",
                "Free some space and repeat the command.",
            ) from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, out: Path) -> None:
    """Give the whole folder its name.

    Raises:
        Refused: ``release_exists``: somebody made one meanwhile.
    """
    draft.chmod(0o755)
    os.sync()  # What is renamed must be on the disk: thousands of files, so once for all.
    try:
        draft.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(out) from None
        raise


def _exists(out: Path) -> Refused:
    if out.name.endswith(SUFFIX):
        return Refused("release_exists", f"{out} exists.", "Finish that candidate, remove it, or name another release.")
    return Refused("release_exists", f"{out} exists; a release is never changed.", "Name a new folder.")


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise _exists(out)
    if not out.parent.is_dir():
        raise UsageError("folder_missing", f"There is no folder {out.parent} to make the release in.")


def _check_arguments(out: Path, sequences: Sequence[str], formats: Collection[str], curves: Curves) -> None:
    _check_free(out)
    unknown = set(formats) - FORMATS
    if unknown or not formats:
        raise UsageError("format_unknown", f"Formats {sorted(formats)}: name at least one of {sorted(FORMATS)}.")
    mr_sequences(sequences)
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
