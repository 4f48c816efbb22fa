"""The report and the datasheet over evidence: what failed comes first, and no sentence says more than its numbers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsynth.attacks.values import (
    Attacks,
    AttributeAttack,
    CopyCheck,
    Distances,
    MembershipAttack,
    OperatingPoint,
    Rate,
)
from fedsynth.auditing.values import Audit, AuditedModule, MechanismCheck
from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.site_values import NoisyScore, ScoreMeaning, SiteEvaluation, SiteScores
from fedsynth.evaluation.values import NOT_PUBLIC, Curve, Evaluation, Figure, Group, Line, Section
from fedsynth.files import read_json, sha256_file
from fedsynth.plan import StudyPlan
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.release import report_wording as words
from fedsynth_server.release.datasheet import datasheet
from fedsynth_server.release.decision import GateCheck, GateDecision, Override
from fedsynth_server.release.facts import ReleaseFacts
from fedsynth_server.release.preview import TILE, example_of, narrow_sheet, preview_sheet
from fedsynth_server.release.report import write_report

RELEASED = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)
SUBJECT = "5a" * 32
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def rate(value: float, low: float, high: float) -> Rate:
    return Rate(value=value, low=low, high=high)


def membership(
    name: str = "nearest-neighbour",
    area: tuple[float, float, float] = (0.52, 0.48, 0.56),
    bound: float = 0.0,
    **changes: Any,
) -> MembershipAttack:
    values: dict[str, Any] = {
        "id": name,
        "title": name.replace("-", " ").capitalize(),
        "view": "release",
        "knows": "The release, and the patient in question: images and genes.",
        "source": "Hayes et al., PoPETs 2019",
        "members": 576,
        "non_members": 144,
        "area": rate(*area),
        "points": [
            OperatingPoint(asked=0.001, reached=rate(0.0, 0.0, 0.025), true_positive_rate=rate(0.002, 0.0, 0.01)),
            OperatingPoint(asked=0.01, reached=rate(0.007, 0.0, 0.038), true_positive_rate=rate(0.014, 0.006, 0.027)),
        ],
        "epsilon_bound": bound,
    }
    return MembershipAttack(**(values | changes))


def attacks(of: StudyPlan, **changes: Any) -> Attacks:
    values: dict[str, Any] = {
        "plan_digest": of.digest,
        "subject": SUBJECT,
        "data": "simulated patients",
        "sites": ["north", "south"],
        "n_synthetic": 150,
        "membership": [
            membership(),
            membership("monte-carlo", (0.507, 0.47, 0.545)),
            membership("calibrated", (0.541, 0.503, 0.579), bound=0.02),
            membership("density-ratio", (0.49, 0.45, 0.53)),
            membership("nearest-neighbour", (0.55, 0.46, 0.64), site="north", members=190, non_members=48),
            membership("nearest-neighbour", (0.47, 0.38, 0.56), site="south", members=190, non_members=48),
            membership("updates", (0.53, 0.49, 0.57), view="coordinator", knows="Every update that each site sent."),
        ],
        "attributes": [
            AttributeAttack(
                id="genes-from-image",
                title="Genes from images",
                knows="the patient’s images",
                guesses="the expression profile",
                metric="R², mean over genes",
                members=0.112,
                non_members=0.104,
                gap=rate(0.008, -0.021, 0.037),
                baseline=0.0,
                note="Without the release: the panel’s public mean.",
            )
        ],
        "copies": [
            CopyCheck(
                of="images",
                how="Largest correlation over slices with a tumour; the threshold is the largest between two real patients.",
                threshold=0.981,
                compared=150,
                found=0,
                found_holdout=0,
                participants=[],
                most_similar=(0.953, 0.951),
            )
        ],
        "distances": [
            Distances(
                of="genes",
                training=(10.2, 12.4, 16.0),
                holdout=(10.4, 12.5, 16.1),
                nearer=rate(0.51, 0.43, 0.59),
                note="Euclidean, in the public directions of the panel.",
            )
        ],
        "not_done": ["LOGAN needs the discriminators, which never left the sites."],
    }
    return Attacks(**(values | changes))


def audited(bound: float = 0.7, **changes: Any) -> AuditedModule:
    values: dict[str, Any] = {
        "module": "gan",
        "site": "north",
        "claimed_epsilon": 3.94,
        "delta": 1e-5,
        "sample_rate": 0.2,
        "noise_multiplier": 2.5,
        "steps": 60,
        "canaries": 1000,
        "guesses": 200,
        "correct": 121,
        "confidence": 0.95,
        "epsilon_bound": bound,
        "reachable": 4.18,
        "model": "the plan’s discriminator at 32 pixels",
        "seconds": 61.0,
    }
    return AuditedModule(**(values | changes))


def audit(of: StudyPlan, **changes: Any) -> Audit:
    values: dict[str, Any] = {
        "plan_digest": of.digest,
        "code": "c0" * 32,
        "software": "fedsynth 0.1.0, torch 2.9.1",
        "modules": [audited(), audited(0.0, module="autoencoder", reachable=2.1)],
        "checks": [
            MechanismCheck(
                id="noise-scale",
                title="The noise has the size that the accountant assumes",
                module="gan",
                ok=True,
                finding="Standard deviation 2.498 of 20,000 draws; 2.5 was asked for, 2.46 to 2.54 allowed.",
            ),
            MechanismCheck(
                id="clipping", title="A patient counts once", module=None, ok=True, finding="Largest norm 1.0000 of 1."
            ),
        ],
        "seconds": 148.0,
    }
    return Audit(**(values | changes))


def gate(of: StudyPlan, **changes: Any) -> GateDecision:
    values: dict[str, Any] = {
        "plan_digest": of.digest,
        "subject": SUBJECT,
        "checks": [
            GateCheck(id="ledgers", title="Ledgers of all sites", status="ok", finding="2 of 2 present, within 8.00."),
            GateCheck(id="membership", title="Membership", status="ok", finding="Largest low end 0.503, limit 0.55."),
            GateCheck(id="copies", title="Copies", status="ok", finding="0 found, limit 0."),
            GateCheck(
                id="countersignatures", title="Countersignatures", status="not asked", finding="No site asked for one."
            ),
        ],
    }
    return GateDecision(**(values | changes))


def overridden(
    of: StudyPlan, statement: str = "Needed for the course on Monday; recipients are on our ward."
) -> GateDecision:
    checks = [
        GateCheck(
            id="membership",
            title="Membership",
            status="failed",
            finding="The low end of the area is 0.61, limit 0.55.",
            remedy="Train with a smaller epsilon, or release fewer patients.",
        ),
        *gate(of).checks[2:],
    ]
    signed = Override(
        statement=statement, responsible="head of data protection", failed=["membership"], signature="ab" * 64
    )
    return gate(of, checks=checks, override=signed)


def site_evaluation(of: StudyPlan) -> SiteEvaluation:
    def scores(shift: float, drowned: bool) -> list[NoisyScore]:
        dice = NoisyScore(
            name="dice",
            value=0.62 + shift,
            interval=(0.55 + shift, 0.69 + shift),
            standard_error=0.036,
            floor=0.14,
            gain=(0.38 + shift, 0.58 + shift),
            patients=51.3,
            drowned=False,
        )
        label = NoisyScore(
            name="label",
            value=None if drowned else 0.71,
            interval=None if drowned else (0.48, 0.94),
            standard_error=None if drowned else 0.12,
            floor=None if drowned else 0.55,
            gain=None if drowned else (-0.1, 0.42),
            patients=12.9,
            drowned=drowned,
        )
        return [dice, label]

    return SiteEvaluation(
        plan_digest=of.digest,
        evaluators="e0" * 32,
        epsilon_budget=2.0,
        delta=1e-5,
        private=True,
        meanings=[
            ScoreMeaning(
                name="dice",
                title="Dice of the tumour",
                meaning="Overlap of the hospital’s outline with that of a network that learned from synthetic patients.",
                floor="the whole head called tumour.",
            ),
            ScoreMeaning(
                name="label",
                title="Right grade",
                meaning="Share of patients graded rightly.",
                floor="the commoner grade.",
            ),
        ],
        sites=[
            SiteScores(
                site=site.name,
                epsilon=1.98,
                epsilon_lifetime=1.98,
                noise_multiplier=2.3,
                scores=scores(0.02 * k, k == 1),
            )
            for k, site in enumerate(of.sites)
        ],
        missing={},
        pooled=scores(0.0, False),
        explanation="Networks that learned from synthetic patients alone were tested at each site; every number is noisy.",
    )


def evaluation(**changes: Any) -> Evaluation:
    by = [
        ("class", "low"),
        ("class", "high"),
        ("sequence", "T1"),
        ("sequence", "FLAIR"),
        ("site", "north"),
        ("site", "south"),
    ]
    groups = [
        Group(
            by=kind, name=name, n=48 + 3 * k, synthetic=3.1 + 0.4 * k, interval=(2.7 + 0.4 * k, 3.6 + 0.4 * k), real=0.8
        )
        for k, (kind, name) in enumerate(by)
    ]
    extractor = "domain CNN, 64 features, trained on 150 public simulated patients (weights 0123456789ab)"
    values: dict[str, Any] = {
        "subject": SUBJECT,
        "data": "simulated patients",
        "n_train": 576,
        "n_holdout": 144,
        "n_synthetic": 150,
        "sections": [
            Section(
                id="fidelity",
                title="Fidelity of the images",
                explanation="Distances between the features of synthetic and of held-out real slices.",
                figures=[
                    Figure(
                        metric="FID in domain features",
                        better="lower",
                        synthetic=3.26,
                        interval=(2.9, 3.7),
                        real=0.738,
                        floor=16.6,
                        public_only=5.4,
                        extractor=extractor,
                        groups=groups,
                    ),
                    Figure(metric="Sharpness of edges", better="none", synthetic=0.21, interval=(0.2, 0.22), real=0.31),
                ],
            ),
            Section(
                id="utility",
                title="Usefulness: train on synthetic, test on real",
                explanation="Networks learn from each column and are tested on held-out real patients.",
                figures=[
                    Figure(
                        metric="AUC, grade from images",
                        better="higher",
                        synthetic=0.774,
                        interval=(0.686, 0.853),
                        real=0.902,
                        floor=0.5,
                    ),
                    Figure(
                        metric="Dice, tumour, trained on real and tested on synthetic",
                        better="higher",
                        synthetic=0.61,
                        real=0.8,
                        floor=0.1,
                    ),
                ],
                curves=[
                    Curve(
                        title="Calibration of the grade",
                        x="predicted probability",
                        y="share that is high grade",
                        lines=[
                            Line(
                                name="synthetic", points=[(0.1, 0.2), (0.3, 0.35), (0.5, 0.55), (0.7, 0.6), (0.9, 0.8)]
                            ),
                            Line(name="real", points=[(0.1, 0.08), (0.3, 0.33), (0.5, 0.5), (0.7, 0.72), (0.9, 0.93)]),
                        ],
                        explanation="On the diagonal a probability means what it says.",
                    )
                ],
            ),
        ],
    }
    return Evaluation(**(values | changes))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (80, 40), 90).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def report(release_plan: StudyPlan, release_statement: PrivacyStatement, tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        values: dict[str, Any] = {
            "plan": release_plan,
            "statement": release_statement,
            "evaluation": evaluation(),
            "curves": {},
            "preview_png": png(),
            "released": RELEASED,
            "n_patients": 150,
            "attacks": attacks(release_plan),
            "audit": audit(release_plan),
            "gate": gate(release_plan),
            "site_evaluation": site_evaluation(release_plan),
        }
        write_report(tmp_path / "report.html", **(values | changes))
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


class Page(HTMLParser):
    """Elements, text and identifiers of a page; fails where an element is not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "source"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_whole_page_is_well_formed_and_every_reference_resolves(report: Callable[..., str]) -> None:
    page = Page(report())
    names = [name for _, given in page.tags if (name := given.get("id"))]
    assert len(names) == len(set(names))
    targets = [href[1:] for _, given in page.tags if (href := given.get("href") or "").startswith("#")]
    labels = [name for _, given in page.tags for name in (given.get("aria-labelledby") or "").split()]
    assert targets and labels and set(targets) | set(labels) <= set(names)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"\bNone\b(?! of \d)|\bnan\b|Undefined", page.text)


def test_every_reader_has_an_entry(report: Callable[..., str]) -> None:
    text = Page(report()).text
    for reader in ("For clinicians", "For data officers", "For statisticians"):
        assert text.index("May it be used") < text.index(reader) < text.index("The decision A release is made")


def test_small_screens_get_the_same_tiles_in_rows_of_three(
    report: Callable[..., str], release_patients: list[SyntheticPatient]
) -> None:
    sheet = preview_sheet([example_of(patient) for patient in release_patients], ["T1", "FLAIR"], "title")
    narrow = narrow_sheet(sheet)
    assert narrow is not None
    with Image.open(io.BytesIO(sheet)) as wide, Image.open(io.BytesIO(narrow)) as small:
        assert small.width == 3 * (TILE + 4) < wide.width
        step = TILE + 4
        for column in range(6):  # T1 with mask, T1, FLAIR, FLAIR at three levels
            line, place = divmod(column, 3)
            tile = wide.crop((132 + column * step, 58, 132 + column * step + TILE, 58 + TILE))
            y = 20 + 4 + 72 + line * (20 + step) + 20
            assert (
                small.crop((place * step, y, place * step + TILE, y + TILE)).tobytes()
                == tile.convert(small.mode).tobytes()
            )
    source = report(preview_png=sheet)
    assert source.count("<source media=") == 1 and 'srcset="data:image/png;base64,' in source
    assert narrow_sheet(png()) is None and "<source" not in report()


def test_an_override_comes_before_everything_else(report: Callable[..., str], release_plan: StudyPlan) -> None:
    page = Page(report(gate=overridden(release_plan)))
    start = page.text.index("Released under an override: not every check held")
    assert start < page.text.index("Synthetic data · not for diagnosis")
    alarm = page.text[start : page.text.index("Synthetic data · not for diagnosis")]
    assert "Needed for the course on Monday" in alarm and "head of data protection" in alarm
    assert "The low end of the area is 0.61, limit 0.55." in alarm
    assert "All 2 checks" not in page.text


def test_a_gate_that_held_says_what_was_not_asked(report: Callable[..., str]) -> None:
    text = Page(report()).text
    assert "All 3 checks that were asked for held. 1 check was not asked for." in text
    assert 'role="alert"' not in report()


def test_a_release_without_evidence_says_what_is_missing(report: Callable[..., str]) -> None:
    text = Page(report(gate=None, attacks=None, audit=None, site_evaluation=None, evaluation=None)).text
    assert "nobody checked this release against limits" in text
    assert "Nobody attacked this release" in text
    assert "The mechanisms of this plan were not audited." in text
    assert "The quality of this release was not measured." in text


def test_attacks_stand_beside_what_the_claim_permits(report: Callable[..., str]) -> None:
    text = Page(report()).text
    assert "0.52 (0.48 to 0.56) claim permits" in text
    assert "With 48 to 144 non-members the smallest false positive rate above 0 is 0.69 %." in text
    assert text.count("the threshold lies above every non-member") == 2  # once a view
    assert "No better than guessing: 0.5 lies within the interval, and more than 0.56 is ruled out." in text
    assert "as one in forty does where there is nothing to find" in text  # the interval from 0.503
    assert "a sanity check, no test of privacy" in text
    assert "LOGAN needs the discriminators" in text
    assert "Every update that each site sent." in text


def test_an_attack_that_refutes_the_claim_is_said_on_the_first_page(
    report: Callable[..., str], release_plan: StudyPlan
) -> None:
    strong = membership("planted", (0.97, 0.95, 0.99), bound=11.0)
    page = Page(report(attacks=attacks(release_plan, membership=[membership(), strong])))
    first = page.text[: page.text.index("For clinicians")]
    assert "The claim is refuted: this attack alone proves an epsilon of at least 11" in first
    assert "0.97 AUC of the strongest attack" in first


def test_what_each_attacker_reaches_is_told_apart_on_the_first_page(
    report: Callable[..., str], release_plan: StudyPlan
) -> None:
    """What a coordinator can tell is no property of the released files, and the other way round."""
    seen = membership("heard", (0.86, 0.8, 0.91), view="coordinator")
    page = Page(report(attacks=attacks(release_plan, membership=[membership("m", (0.52, 0.47, 0.57)), seen])))
    first = page.text[: page.text.index("For clinicians")]
    assert "Whoever holds the release guesses who was trained on with an AUC of at most 0.52" in first
    assert (
        "A coordinator who kept every message of the training guesses who was trained on with an AUC of at most 0.86"
        in first
    )


def test_a_rate_that_the_claim_forbids_is_marked(report: Callable[..., str], release_plan: StudyPlan) -> None:
    beyond = OperatingPoint(asked=0.01, reached=rate(0.0, 0.0, 0.00001), true_positive_rate=rate(0.995, 0.9, 0.999))
    source = report(attacks=attacks(release_plan, membership=[membership(points=[beyond])]))
    assert '<b class="bad">99.5\N{NO-BREAK SPACE}%</b>' in source
    assert "99.5 % (90 to 99.9 %) at 1 % false positives" in Page(source).text
    assert '<b class="bad">' not in report()


def test_attacks_that_could_not_have_refuted_the_claim_say_so(
    report: Callable[..., str], release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    claimed = max(site.epsilon for site in release_statement.sites)
    weak = attacks(release_plan, membership=[membership(largest_bound=claimed - 1)])
    assert "none could have refuted the claim" in Page(report(attacks=weak)).text
    able = attacks(
        release_plan, membership=[membership(largest_bound=claimed - 1), membership(largest_bound=claimed + 1)]
    )
    assert "none could have refuted the claim" not in Page(report(attacks=able)).text


def test_an_audit_shows_claim_bound_and_power(report: Callable[..., str], release_plan: StudyPlan) -> None:
    text = Page(report()).text
    assert (
        "an epsilon of at least 0.7; 3.94 is claimed. Had every guess been right, the audit would have shown 4.18."
        in text
    )
    assert "This audit was too small to refute it: had every guess been right, it would have shown 2.1." in text
    refuted = Page(report(audit=audit(release_plan, modules=[audited(5.1, reachable=6.0)]))).text
    assert "The claim is refuted: with 95 % confidence epsilon is at least 5.1, more than the 3.94" in refuted
    broken = MechanismCheck(id="noise", title="Noise", module="gan", ok=False, finding="Standard deviation 0.")
    assert "The audit refutes what is claimed: Noise." in Page(report(audit=audit(release_plan, checks=[broken]))).text


def test_figures_are_shown_by_class_sequence_and_site_with_extractor_and_curves(report: Callable[..., str]) -> None:
    page = Page(report())
    for title in ("By class", "By sequence", "By site"):
        assert title in page.text
    assert "Features: domain CNN, 64 features" in page.text
    assert "On the diagonal a probability means what it says." in page.text
    assert "Below real data by 32 %." in page.text  # 0.21 beside 0.31, which has no good direction
    charts = [given for tag, given in page.tags if tag == "svg" and given.get("class") == "chart"]
    assert len(charts) == 1


def test_the_first_page_counts_only_models_that_learned_from_the_release_alone(report: Callable[..., str]) -> None:
    text = Page(report()).text
    first = text[: text.index("For clinicians")]
    assert "AUC, grade from images: 0.774 (0.686 to 0.853); real data reach 0.902, a trivial answer 0.5." in first
    assert "trained on real" not in first and "trained on real" in text


def test_a_group_that_was_not_measured_says_why(report: Callable[..., str]) -> None:
    groups = [Group(by="site", name="north", n=3, synthetic=None, note="Not measured: 3 patients.")]
    figure = Figure(metric="FID", better="lower", synthetic=3.0, real=1.0, floor=9.0, groups=groups)
    section = Section(id="fidelity", title="t", explanation="e", figures=[figure])
    assert "north n 3 Not measured: 3 patients." in Page(report(evaluation=evaluation(sections=[section]))).text


def test_sites_scores_are_noisy_and_say_when_they_drowned(report: Callable[..., str]) -> None:
    text = Page(report()).text
    assert "All sites together" in text and "about 51 patients (noisy)" in text
    assert "Above its floor, the noise allowed for." in text
    assert "Not told apart from its floor." in text
    assert "The noise leaves nothing to say." in text


def test_hostile_text_of_evidence_stays_text(report: Callable[..., str], release_plan: StudyPlan) -> None:
    found = attacks(release_plan)
    hostile = found.model_copy(
        update={
            "data": HOSTILE,
            "not_done": [HOSTILE],
            "membership": [membership(title=HOSTILE, knows=HOSTILE, source=HOSTILE, note=HOSTILE)],
            "attributes": [
                found.attributes[0].model_copy(update={"title": HOSTILE, "note": HOSTILE, "knows": HOSTILE})
            ],
        }
    )
    check = GateCheck(id="a", title=HOSTILE, status="failed", finding=HOSTILE, remedy=HOSTILE)
    signed = Override(statement=HOSTILE, responsible=HOSTILE, failed=["a"], signature="ab" * 64)
    checked = MechanismCheck(id="c", title=HOSTILE, module=None, ok=True, finding=HOSTILE)
    section = Section(
        id="fidelity",
        title=HOSTILE,
        explanation=HOSTILE,
        figures=[
            Figure(
                metric=HOSTILE,
                better="none",
                synthetic=1.0,
                extractor=HOSTILE,
                groups=[Group(by="site", name=HOSTILE, n=3, synthetic=1.0, note=HOSTILE)],
            )
        ],
        curves=[
            Curve(title=HOSTILE, x=HOSTILE, y=HOSTILE, lines=[Line(name=HOSTILE, points=[(0, 1)])], explanation=HOSTILE)
        ],
    )
    page = Page(
        report(
            attacks=hostile,
            gate=gate(release_plan, checks=[check], override=signed),
            audit=audit(release_plan, checks=[checked], software=HOSTILE, modules=[audited(model=HOSTILE)]),
            site_evaluation=site_evaluation(release_plan).model_copy(
                update={"explanation": HOSTILE, "missing": {HOSTILE: HOSTILE}}
            ),
            evaluation=evaluation(sections=[section]),
        )
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [given for tag, given in page.tags if tag == "img" and not (given["src"] or "").startswith("data:")]
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 20


@pytest.mark.parametrize("name", ["attacks", "audit", "gate", "site_evaluation"])
def test_evidence_about_another_plan_is_refused(
    report: Callable[..., str], release_plan: StudyPlan, name: str, tmp_path: Path
) -> None:
    other = {"attacks": attacks, "audit": audit, "gate": gate, "site_evaluation": site_evaluation}[name](release_plan)
    with pytest.raises(UsageError, match="report_plan_mismatch"):
        report(**{name: other.model_copy(update={"plan_digest": "0" * 64})})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["attacks", "evaluation", "gate"])
def test_evidence_about_other_synthetic_patients_is_refused(
    report: Callable[..., str], release_plan: StudyPlan, name: str
) -> None:
    given: dict[str, Any] = {
        "attacks": attacks(release_plan),
        "evaluation": evaluation(),
        "gate": gate(release_plan),
    }
    with pytest.raises(UsageError, match="report_subject_mismatch"):
        report(**{name: given[name].model_copy(update={"subject": "0" * 64})})


def test_figures_of_patients_who_are_not_public_are_never_put_into_a_report(
    report: Callable[..., str], release_plan: StudyPlan
) -> None:
    data = f"patients of one hospital ({NOT_PUBLIC})"
    with pytest.raises(Refused, match="report_not_public"):
        report(evaluation=evaluation(data=data))
    with pytest.raises(Refused, match="report_not_public"):
        report(attacks=attacks(release_plan, data=data))


@pytest.mark.parametrize(
    ("area", "state", "said"),
    [
        ((0.52, 0.48, 0.56), "good", "No better than guessing: 0.5 lies"),
        ((0.52, 0.38, 0.66), "open", "up to 0.66 is not ruled out"),
        ((0.54, 0.503, 0.577), "open", "Barely better than guessing"),
        ((0.62, 0.56, 0.68), "bad", "Better than guessing"),
        ((0.97, 0.95, 0.99), "bad", "Far better than guessing"),
        ((0.40, 0.35, 0.45), "open", "Worse than guessing"),
    ],
)
def test_an_area_in_words(area: tuple[float, float, float], state: str, said: str) -> None:
    found = words.area(rate(*area))
    assert found.state == state and said in found.sentence


@given(st.floats(0.0, 30.0), st.floats(0.0, 0.1), st.floats(0.0, 1.0))
def test_the_permitted_rate_is_the_trade_off_of_differential_privacy(claimed: float, delta: float, fpr: float) -> None:
    most = words.permitted_rate(fpr, claimed, delta)
    assert fpr - 1e-12 <= most <= 1
    assert most <= math.exp(claimed) * fpr + delta + 1e-12
    # The same bound with the two kinds of error exchanged.
    assert 1 - most + 1e-12 >= math.exp(-claimed) * (1 - delta - fpr)
    assert words.permitted_rate(fpr, claimed + 1, delta) >= most - 1e-12


@pytest.mark.parametrize(("claimed", "delta"), [(0.0, 0.2), (0.1, 0.0), (1.0, 1e-3), (3.0, 0.01), (8.0, 1e-5)])
def test_the_permitted_area_is_that_under_the_permitted_rates(claimed: float, delta: float) -> None:
    rates = np.linspace(0, 1, 20001)
    under = np.trapezoid([words.permitted_rate(float(fpr), claimed, delta) for fpr in rates], rates)
    assert words.permitted_area(claimed, delta) == pytest.approx(under, abs=1e-6)


def test_copies_beyond_chance_are_bad_and_chance_is_called_chance() -> None:
    values = {
        "of": "genes",
        "how": "h",
        "threshold": 0.9,
        "compared": 150,
        "participants": [],
        "most_similar": (0.95, 0.9),
    }
    assert words.copies(CopyCheck(**values, found=0, found_holdout=0)).state == "good"
    assert words.copies(CopyCheck(**values, found=3, found_holdout=3)).state == "open"
    found = words.copies(CopyCheck(**values, found=3, found_holdout=1))
    assert found.state == "bad" and "3 of 150" in found.sentence


def test_members_that_are_guessed_better_are_said_to_show() -> None:
    values = {"id": "a", "title": "t", "knows": "k", "guesses": "g", "metric": "R²", "members": 0.3, "non_members": 0.1}
    assert words.attribute(AttributeAttack(**values, gap=rate(0.2, 0.1, 0.3))).state == "bad"
    assert words.attribute(AttributeAttack(**values, gap=rate(0.2, -0.1, 0.5))).state == "good"


def test_the_datasheet_answers_from_the_evidence(release_plan: StudyPlan, release_statement: PrivacyStatement) -> None:
    facts = ReleaseFacts(release_plan, release_statement, RELEASED)
    text = datasheet(
        facts,
        {"bids", "dicom"},
        ["low", "high", "high"],
        evaluation=evaluation(),
        attacks=attacks(release_plan),
        audit=audit(release_plan),
        gate=gate(release_plan),
        site_evaluation=site_evaluation(release_plan),
    )
    for title in (
        "Motivation",
        "Composition",
        "Collection process",
        "Preprocessing",
        "Uses",
        "Distribution",
        "Maintenance",
    ):
        assert f"## {title}" in text
    assert "3; by grade: 1 low, 2 high." in text
    assert "AUC, grade from images | 0.774 (0.686 to 0.853) | 0.902 | 0.5" in text
    assert (
        "membership attacks by who sees the release; the strongest (Calibrated) reaches an AUC of 0.54 (0.50 to 0.58)"
        in text
    )
    assert "All 3 checks that were asked for held" in text
    assert "does not by itself make data anonymous" in text
    assert not re.search(r"\*\*[^*]+\?\*\*\s*$", text, re.MULTILINE), "a question without an answer"
    assert not re.search(r"\bNone\b(?! of \d|\. Every)", text)


def test_the_datasheet_without_evidence_says_so_and_an_override_comes_first(
    release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    facts = ReleaseFacts(release_plan, release_statement, RELEASED)
    text = datasheet(facts, {"bids"}, ["low"])
    for said in ("Not measured.", "Nobody attacked this release", "were not audited", "nobody checked this release"):
        assert said in text
    decision = overridden(release_plan, "See [our site](http://example.org) <b>now</b>")
    text = datasheet(facts, {"bids"}, ["low"], gate=decision)
    assert text.index("Released under an override") < text.index("## Motivation")
    assert "<b>" not in text.replace("\\<b\\>", "") and "](" not in text.replace("\\](", "")


# Properties of the Responsible AI vocabulary, as its ontology lists them (croissant_rai.ttl, version 1.0).
RAI = [
    "annotationsPerItem",
    "annotatorDemographics",
    "dataAnnotationAnalysis",
    "dataAnnotationPlatform",
    "dataAnnotationProtocol",
    "dataBiases",
    "dataCollection",
    "dataCollectionMissingData",
    "dataCollectionRawData",
    "dataCollectionTimeframe",
    "dataCollectionType",
    "dataImputationProtocol",
    "dataLimitations",
    "dataManipulationProtocol",
    "dataPreprocessingProtocol",
    "dataReleaseMaintenancePlan",
    "dataSocialImpact",
    "dataUseCases",
    "machineAnnotationTools",
    "personalSensitiveInformation",
]


def test_croissant_lists_the_evidence_and_uses_the_vocabulary(made: Path) -> None:
    croissant = read_json(made / "croissant.json")
    listed = {entry["@id"]: entry for entry in croissant["distribution"] if entry["@type"] == "cr:FileObject"}
    for name in ("report.html", "DATASHEET.md", "privacy.json", "gate.json", "attacks.json", "audit.json", "plan.toml"):
        assert listed[name]["sha256"] == sha256_file(made / name)
    assert "evaluation.json" not in listed, "this release was not evaluated"
    used = [key.removeprefix("rai:") for key in croissant if key.startswith("rai:")]
    assert len(used) >= 10 and set(used) <= set(RAI)
    limits = " ".join(croissant["rai:dataLimitations"])
    assert "attacks.json" in limits and "as measured on real patients: not done" in limits
    assert all(isinstance(value, str | list) and value for key, value in croissant.items() if key.startswith("rai:"))


def test_a_release_holds_report_and_datasheet_over_its_evidence(made: Path) -> None:
    page = Page((made / "report.html").read_text(encoding="utf-8"))
    assert "checks that were asked for held" in page.text
    sheet = (made / "DATASHEET.md").read_text(encoding="utf-8")
    assert "## Motivation" in sheet and "checks that were asked for held" in sheet


def test_a_study_without_privacy_shows_no_bound_that_nothing_permits(
    report: Callable[..., str], release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    endless = float("inf")
    bare = release_plan.model_copy(update={"privacy": release_plan.privacy.model_copy(update={"epsilon": endless})})
    sites = [
        site.model_copy(update={"epsilon": endless, "epsilon_lifetime": endless}) for site in release_statement.sites
    ]
    told = {"plan_digest": bare.digest, "private": False, "epsilon_budget": endless, "sites": sites}
    stated = release_statement.model_copy(update=told)
    strong = membership("planted", (0.97, 0.95, 0.99), bound=11.0)
    source = report(
        plan=bare,
        statement=stated,
        audit=None,
        gate=gate(bare),
        attacks=attacks(bare, membership=[membership(), strong]),
        site_evaluation=site_evaluation(bare),
    )
    page = Page(source)
    assert page.text.index("NOT PRIVATE: a study without privacy") < page.text.index("For clinicians")
    assert "This study protects nobody." in page.text
    assert "The claim is refuted" not in page.text  # nothing was claimed
    assert not re.search(r"\bnan\b", re.sub(r"data:image/png;base64,[^\"]*", "", source))
