"""The report of a release: one HTML file that a clinician, a hospital's data officer and a statistician can read.

The file stands alone: no script, no font, no picture from elsewhere; a content security policy in its head says so to
the browser. Everything it shows was public or privatised before it came here: noised or post-processed curves, the
privacy statement, evidence from public or simulated patients, and pictures of synthetic patients.
"""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedsynth.attacks.values import Attacks
from fedsynth.auditing.values import Audit
from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.site_values import SiteEvaluation
from fedsynth.evaluation.values import Evaluation, may_be_shared
from fedsynth.files import write_atomic
from fedsynth.plan import StudyPlan
from fedsynth.records import PUBLIC
from fedsynth.selection import Selected, sequences_of, words
from fedsynth.statement import PrivacyStatement
from fedsynth_server.outcome import ModuleOutcome, Outcome
from fedsynth_server.release import report_evidence as evidence
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Series
from fedsynth_server.release.decision import GateDecision
from fedsynth_server.release.manifest import PUBLIC_KEY, SIGNATURE, SUMS
from fedsynth_server.release.preview import narrow_sheet
from fedsynth_server.release.report_privacy import privacy
from fedsynth_server.release.report_quality import quality, summary, usefulness
from fedsynth_server.release.report_training import MODULE_TITLES, drawn_sites, training

_TEMPLATES = Path(__file__).parent / "templates"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SOFTWARE = ("fedsynth", "flwr", "opacus", "torch")

# What a recipient types, and what it shows.
VERIFICATION = (
    ("fedsynth release verify .", "Everything: integrity, signature, structure"),
    (f"sha256sum --check --quiet {SUMS}", "Integrity, without fedsynth"),
    (
        f"openssl pkeyutl -verify -rawin -pubin -inkey {PUBLIC_KEY} -sigfile {SIGNATURE} -in {SUMS}",
        "Signature (Ed25519), without fedsynth",
    ),
    (f"openssl pkey -pubin -in {PUBLIC_KEY} -outform DER | sha256sum", "The key's fingerprint"),
)


def write_report(
    path: Path,
    *,
    plan: StudyPlan,
    statement: PrivacyStatement,
    evaluation: Evaluation | None,
    curves: dict[str, list[dict[str, float | int | str]]],
    preview_png: bytes,
    released: datetime,
    n_patients: int,
    comparison_png: bytes | None = None,
    outcome: Outcome | None = None,
    attacks: Attacks | None = None,
    audit: Audit | None = None,
    gate: GateDecision | None = None,
    site_evaluation: SiteEvaluation | None = None,
    selected: Selected | None = None,
) -> None:
    """Write the report to `path`, whole or not at all; equal arguments and versions give equal bytes.

    Args:
        path: the HTML file.
        plan: the study's plan.
        statement: its privacy statement; a statement that is not private puts a warning before everything else.
        evaluation: what was measured, or None when nothing was.
        curves: for each module the rows ``{"round": r, "site": name, quantity: value, ...}``, one a round and site, of
            quantities that are noised or computed from noised ones.
        preview_png: a sheet of synthetic patients (PNG).
        released: when, with its time zone; printed in UTC.
        n_patients: number of synthetic patients in the release.
        comparison_png: synthetic patients beside originals that may be shown (simulated or public ones).
        outcome: what the forecast had said and what came of it, if that was compared.
        attacks: what attacks on the release found.
        audit: what an audit of the plan's mechanisms found.
        gate: the decision about the release; an override comes before everything else.
        site_evaluation: what sites found on their own held-out patients, noised.
        selected: what was selected of all that the study can draw; None where nothing was.

    Raises:
        UsageError: ``report_plan_mismatch`` (something is about another plan), ``report_subject_mismatch`` (evidence is
            about other synthetic patients), or ``report_not_png``.
        Refused: ``report_not_public``: evidence was computed without privacy on patients who are not public.
        ValueError: `released` has no time zone, or a row of `curves` has no round.
        OSError: e.g. a full disk.
    """
    _check_plan(
        plan,
        {
            "privacy statement": statement,
            "outcome": outcome,
            "attacks": attacks,
            "audit": audit,
            "gate's decision": gate,
            "sites' evaluation": site_evaluation,
        },
    )
    _check_subjects({"evaluation": evaluation, "attacks": attacks, "gate's decision": gate})
    _check_public({"evaluation": evaluation, "attacks": attacks})
    if released.tzinfo is None:
        raise ValueError("the time of release needs a time zone")
    drawn = drawn_sites(curves, plan)
    template = _environment().get_template("report.html.j2")
    page = template.render(
        plan=plan,
        statement=statement,
        privacy=privacy(statement),
        gate=evidence.gate(gate),
        attacks=None if attacks is None else evidence.attacks(attacks, statement),
        audit=None if audit is None else evidence.audit(audit),
        sites=None if site_evaluation is None else evidence.site_evaluation(site_evaluation),
        evaluation=evaluation,
        quality=[] if evaluation is None else quality(evaluation),
        summary=None if evaluation is None else summary(evaluation),
        usefulness=[] if evaluation is None else usefulness(evaluation),
        legend=[Series(site, place, ()) for place, site in enumerate(drawn)],
        training=training(curves, drawn),
        released_once=[_in_a_sentence(MODULE_TITLES[module]) for module in plan.modules if module in PUBLIC],
        outcome=[] if outcome is None else [_outcome_row(each) for each in outcome.modules],
        methods=[("Profiles", wording.profile_method(plan)), ("Images", wording.image_method(plan))],
        sequences=sequences_of(plan, selected),
        chosen=[] if selected is None else words(selected.asked, plan),
        selected=selected,
        preview=_picture(preview_png),
        comparison=None if comparison_png is None else _picture(comparison_png),
        released=released.astimezone(UTC),
        n_patients=n_patients,
        verification=VERIFICATION,
        software=[(name, version(name)) for name in _SOFTWARE],
    )
    write_atomic(path, page.encode("utf-8"))


@dataclass(frozen=True)
class Picture:
    """A PNG for an ``img`` element: data URI and size in pixels; `narrow` for small screens, empty for none."""

    source: str
    width: int
    height: int
    narrow: str


@dataclass(frozen=True)
class OutcomeRow:
    """One module's forecast and outcome, every cell as text; `state` names the verdict for the style sheet."""

    title: str
    forecast: str
    found: str
    verdict: str
    state: str
    foretold: str
    sentence: str


_OfPlan = PrivacyStatement | Outcome | Attacks | Audit | GateDecision | SiteEvaluation


def _check_plan(plan: StudyPlan, given: dict[str, _OfPlan | None]) -> None:
    for name, value in given.items():
        if value is not None and value.plan_digest != plan.digest:
            raise UsageError(
                "report_plan_mismatch",
                f"The {name}: about plan {value.plan_digest[:12]}, the report about {plan.digest[:12]}.",
                "Make the release with the plan that the sites approved and trained under, and with evidence about it.",
            )


def _check_subjects(given: dict[str, Evaluation | Attacks | GateDecision | None]) -> None:
    subjects = {name: value.subject for name, value in given.items() if value is not None}
    if len(set(subjects.values())) > 1:
        told = ", ".join(f"{name} {subject[:12]}" for name, subject in subjects.items())
        raise UsageError(
            "report_subject_mismatch",
            f"The evidence is about different synthetic patients: {told}.",
            "Evaluate and attack the very patients that are released.",
        )


def _check_public(given: dict[str, Evaluation | Attacks | None]) -> None:
    for name, value in given.items():
        if value is not None and not may_be_shared(value.data):
            raise Refused(
                "report_not_public",
                f"The {name}: computed without privacy on patients who are neither public nor simulated.",
                "Leave it where it was computed; for a release measure on public or simulated patients.",
            )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": wording.number, "epsilon": wording.epsilon, "percent": wording.percent}
    environment.globals |= {"module_titles": MODULE_TITLES, "statistics": frozenset(PUBLIC)}
    return environment


def _picture(png: bytes) -> Picture:
    if not png.startswith(_PNG_SIGNATURE) or len(png) < 24:
        raise UsageError("report_not_png", "A picture for the report is not a PNG file.")
    width, height = struct.unpack(">II", png[16:24])
    narrow = narrow_sheet(png)
    return Picture(_data_uri(png), width, height, "" if narrow is None else _data_uri(narrow))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _in_a_sentence(title: str) -> str:
    return title[0].lower() + title[1:]


def _outcome_row(found: ModuleOutcome) -> OutcomeRow:
    foretold = {None: "", True: "as foretold", False: "not as foretold"}[found.as_forecast]
    return OutcomeRow(
        title=MODULE_TITLES[found.module],
        forecast=f"{wording.number(found.forecast_noise_to_signal, 2)}: {wording.FORECASTS[found.forecast]}",
        found="–" if found.noise_to_signal is None else wording.number(found.noise_to_signal, 2),
        verdict=wording.VERDICTS[found.verdict],
        state=found.verdict,
        foretold=foretold,
        sentence=found.sentence,
    )
