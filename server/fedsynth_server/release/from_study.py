"""From a finished study's folder to a release, or to the candidate of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import torch

from fedsynth.attacks.values import Attacks
from fedsynth.auditing.values import Audit
from fedsynth.countersignature import Countersignature, read_countersignature
from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.site_values import FILE as SITE_EVALUATION
from fedsynth.evaluation.site_values import SiteEvaluation
from fedsynth.evaluation.values import Evaluation
from fedsynth.limits import Limits, load_limits
from fedsynth.plan import StudyPlan, load_plan
from fedsynth.selection import Selection
from fedsynth_server.checkpoint import load_state
from fedsynth_server.outcome import study_outcome
from fedsynth_server.release.candidate import SUFFIX
from fedsynth_server.release.decision import OverrideRequest
from fedsynth_server.release.evidence import load_evidence
from fedsynth_server.release.make import finish_release, make_candidate, make_release
from fedsynth_server.statement import privacy_statement
from fedsynth_server.synthesis import synthesise_selected


class Found(TypedDict):
    """Evidence, as `make_release` takes it."""

    evaluation: Evaluation | None
    attacks: Attacks | None
    audit: Audit | None
    site_evaluation: SiteEvaluation | None


@dataclass(frozen=True)
class EvidenceFiles:
    """Files of evidence that a command was given; None for what was not."""

    evaluation: Path | None = None
    attacks: Path | None = None
    audit: Path | None = None
    site_evaluation: Path | None = None

    def read(self) -> Found:
        """What they hold.

        Raises:
            UsageError: ``evaluation_unreadable``, ``attacks_unreadable``, ``audit_unreadable``,
                ``site_evaluation_unreadable``.
        """
        return Found(
            evaluation=load_evidence(self.evaluation, Evaluation, "evaluation") if self.evaluation else None,
            attacks=load_evidence(self.attacks, Attacks, "attacks") if self.attacks else None,
            audit=load_evidence(self.audit, Audit, "audit") if self.audit else None,
            site_evaluation=load_evidence(self.site_evaluation, SiteEvaluation, "site_evaluation")
            if self.site_evaluation
            else None,
        )


def release_study(
    folder: Path,
    out: Path,
    key: Path | None,
    select: Callable[[StudyPlan], Selection],
    evidence: EvidenceFiles | None = None,
    limits: Path | None = None,
    override: OverrideRequest | None = None,
) -> Path:
    """Draw the patients that `select` asks for, given the plan, and write the release `out`, signed with `key`.

    Without a key only its candidate is made. What sites found on their held-out patients is taken from the study's folder,
    unless it is given.

    Returns:
        The release or the candidate.

    Raises:
        Refused: ``study_not_started``, ``study_not_finished``, ``subset_too_rare``, or what `make_release` refuses.
        UsageError: what `select` raises; a file of evidence or of limits cannot be read.
    """
    plan = load_plan(folder / "plan.toml")
    selection = select(plan)
    state = load_state(folder, plan)
    if state is None:
        raise Refused("study_not_started", f"{folder} holds no checkpoint.", "Run the study first.")
    statement = privacy_statement(plan, state)
    given = evidence or EvidenceFiles()
    if given.site_evaluation is None and (folder / SITE_EVALUATION).is_file():
        given = replace(given, site_evaluation=folder / SITE_EVALUATION)
    found = given.read()
    asked = load_limits(limits) if limits else Limits()
    generator = torch.Generator()
    generator.seed()
    drawn = synthesise_selected(plan, state, selection, generator)
    released = datetime.now(UTC).replace(microsecond=0)
    curves, outcome = state.curves_by_name(), study_outcome(plan, state)
    if key is None:
        return make_candidate(
            out,
            plan,
            drawn.patients,
            statement,
            curves,
            released,
            outcome=outcome,
            limits=asked,
            selected=drawn.selected,
            **found,
        )
    return make_release(
        out,
        plan,
        drawn.patients,
        statement,
        curves=curves,
        key_path=key,
        released=released,
        outcome=outcome,
        limits=asked,
        override=override,
        selected=drawn.selected,
        **found,
    )


def finish_candidate(
    candidate: Path,
    out: Path | None,
    key: Path,
    evidence: EvidenceFiles,
    countersignatures: list[Path],
    override: OverrideRequest | None,
) -> Path:
    """Make the release of `candidate`; without `out` beside it, under its name without ``-candidate``.

    Raises:
        UsageError: ``release_unnamed``, or a file cannot be read.
        Refused: what `finish_release` refuses.
    """
    if out is None:
        if not candidate.name.endswith(SUFFIX):
            raise UsageError(
                "release_unnamed", f"{candidate} does not end with {SUFFIX}.", "Name the release with --out."
            )
        out = candidate.with_name(candidate.name.removesuffix(SUFFIX))
    signed: list[Countersignature] = [read_countersignature(path) for path in countersignatures]
    return finish_release(candidate, out, key, countersignatures=signed, override=override, **evidence.read())


def override_request(checks: list[str], statement: str, responsible: str) -> OverrideRequest | None:
    """The override that a command was asked for; None when it was not.

    Raises:
        UsageError: ``override_incomplete``.
    """
    if not checks and not statement and not responsible:
        return None
    if not (checks and statement.strip() and responsible.strip()):
        raise UsageError(
            "override_incomplete",
            "An override names the checks (--override, once for each), says why (--statement) and who answers for it "
            "(--responsible).",
        )
    return OverrideRequest(statement.strip(), responsible.strip(), tuple(checks))
