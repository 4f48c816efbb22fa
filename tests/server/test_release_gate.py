"""Every condition of a release, each with a planted failure: refused in its own words and with a remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsynth.attacks.values import Attacks, CopyCheck, MembershipAttack, OperatingPoint, Rate
from fedsynth.auditing.values import Audit
from fedsynth.budget import evaluation_mechanism
from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.site_values import SiteEvaluation, SiteScores
from fedsynth.evaluation.values import NOT_PUBLIC, Evaluation
from fedsynth.files import read_json, write_json
from fedsynth.limits import TEMPLATE, AttributeLimits, CopyLimits, Limits, MembershipLimits, load_limits
from fedsynth.plan import SiteEvaluationPlan, StudyPlan
from fedsynth.statement import HoldoutStatement, PrivacyStatement
from fedsynth.sums import write_content
from fedsynth_server.cli import release as release_app
from fedsynth_server.release import make as make_module
from fedsynth_server.release.checks import Check
from fedsynth_server.release.content import structure_faults
from fedsynth_server.release.decision import GateCheck, GateDecision, OverrideRequest
from fedsynth_server.release.index import ReleaseIndex
from fedsynth_server.release.make import ReleaseRefused, finish_release
from fedsynth_server.release.manifest import load_key, write_manifest
from fedsynth_server.release.opened import Release
from fedsynth_server.release.verify import verify

Make = Callable[..., Path]

WHY = OverrideRequest("The ethics board asked for it in writing.", "head of the study", ("audit",))


@pytest.fixture
def quick(make: Make) -> Make:
    """Without DICOM, which takes most of the time and which the gate does not depend on."""
    return lambda out, **changes: make(out, **({"formats": {"bids"}} | changes))


def refused(quick: Make, out: Path, **changes: Any) -> dict[str, GateCheck]:
    """The checks that failed, by id, of a release that must be refused."""
    with pytest.raises(ReleaseRefused) as refusal:
        quick(out, **changes)
    assert refusal.value.code == "release_gate"
    assert not out.exists()
    failed = {check.id: check for check in refusal.value.decision.failed}
    for check in failed.values():  # cause and remedy of each reach whoever typed the command
        assert check.finding in refusal.value.message
        assert check.remedy and check.remedy in refusal.value.message
    return failed


def with_membership(attacks: Attacks, number: int, **changes: Any) -> Attacks:
    """`attacks` with values of one membership attack changed."""
    changed = list(attacks.membership)
    changed[number] = changed[number].model_copy(update=changes)
    return attacks.model_copy(update={"membership": changed})


def at_one_percent(attack: MembershipAttack, found: Rate, reached: Rate) -> list[OperatingPoint]:
    return [
        point.model_copy(update={"true_positive_rate": found, "reached": reached}) if point.asked == 0.01 else point
        for point in attack.points
    ]


# ---- what passes


def test_a_release_that_meets_every_condition_says_so_and_verifies(made: Path) -> None:
    decision = GateDecision.model_validate(read_json(made / "gate.json"))
    assert decision.failed == [] and decision.override is None
    assert [check.id for check in decision.checks] == [
        "ledgers",
        "private",
        "audit",
        "membership-release",
        "membership-coordinator",
        "attributes",
        "copies",
        "evidence",
        "files",
        "identifiers",
        "countersignatures",
    ]
    result = verify(made, made / "release.pub.pem")
    assert result.ok and result.status("gate") == "ok" and result.warnings == []
    listed = (made / "SHA256SUMS").read_text()
    assert all(
        name in listed for name in ("gate.json", "attacks.json", "audit.json", "limits.toml", "CONTENT.SHA256SUMS")
    )


def test_a_decision_is_about_the_files_and_not_about_what_was_in_memory(
    made: Path, quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    dicom_alone = quick(tmp_path / "dicom", formats={"dicom"})
    subjects = {GateDecision.model_validate(read_json(out / "gate.json")).subject for out in (made, dicom_alone)}
    assert subjects == {release_attacks.subject}


# ---- the audit


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"canaries": 1, "reachable": 0.0, "epsilon_bound": 0.0}, "could have refuted no epsilon at all"),
        ({"noise_multiplier": 50.0}, "audited with the noise multiplier 50; the study used 2.5"),
    ],
)
def test_an_audit_that_could_not_have_found_anything_is_refused(
    quick: Make, tmp_path: Path, release_audit: Audit, changes: dict[str, Any], cause: str
) -> None:
    modules = [module.model_copy(update=changes) for module in release_audit.modules]
    failed = refused(quick, tmp_path / "out", audit=release_audit.model_copy(update={"modules": modules}))
    assert cause in failed["audit"].finding


def test_no_audit_is_refused(quick: Make, tmp_path: Path) -> None:
    failed = refused(quick, tmp_path / "out", audit=None)
    assert list(failed) == ["audit"] and failed["audit"].overridable
    assert "No audit" in failed["audit"].finding
    assert "fedsynth evaluate audit" in failed["audit"].remedy


def test_an_audit_of_another_version_of_the_code_is_refused(quick: Make, tmp_path: Path, release_audit: Audit) -> None:
    failed = refused(quick, tmp_path / "out", audit=release_audit.model_copy(update={"code": "ab" * 32}))
    assert "it is of other code (abababababab" in failed["audit"].finding
    assert "this very version" in failed["audit"].remedy


def test_an_audit_of_another_plan_is_refused_for_good(quick: Make, tmp_path: Path, release_audit: Audit) -> None:
    failed = refused(quick, tmp_path / "out", audit=release_audit.model_copy(update={"plan_digest": "ab" * 32}))
    assert "it is of plan abababababab" in failed["audit"].finding
    assert "audit.json is of another plan" in failed["evidence"].finding
    assert not failed["evidence"].overridable


def test_an_audit_that_left_a_module_out_is_refused(quick: Make, tmp_path: Path, release_audit: Audit) -> None:
    short = release_audit.model_copy(update={"modules": release_audit.modules[:-1]})
    assert "gan was not audited" in refused(quick, tmp_path / "out", audit=short)["audit"].finding


def test_an_audit_that_tested_nothing_directly_is_refused(quick: Make, tmp_path: Path, release_audit: Audit) -> None:
    bare = release_audit.model_copy(update={"checks": []})
    assert "no property" in refused(quick, tmp_path / "out", audit=bare)["audit"].finding


def test_a_refuted_epsilon_is_refused_by_how_much_and_nobody_can_override_it(
    quick: Make, tmp_path: Path, release_audit: Audit
) -> None:
    gan = release_audit.modules[-1].model_copy(update={"epsilon_bound": 4.25})
    audit = release_audit.model_copy(update={"modules": [*release_audit.modules[:-1], gan]})
    failed = refused(quick, tmp_path / "out", audit=audit, override=WHY)
    assert "at least 4.250 (95% confidence), 1.250 above the 3.000 claimed" in failed["audit"].finding
    assert not failed["audit"].overridable
    assert "train anew" in failed["audit"].remedy


def test_a_claim_above_the_budget_cannot_excuse_a_bound(quick: Make, tmp_path: Path, release_audit: Audit) -> None:
    gan = release_audit.modules[-1].model_copy(update={"epsilon_bound": 20.0, "claimed_epsilon": 30.0})
    audit = release_audit.model_copy(update={"modules": [*release_audit.modules[:-1], gan]})
    assert "more than the plan's budget" in refused(quick, tmp_path / "out", audit=audit)["audit"].finding


def test_a_mechanism_that_is_not_what_it_should_be_is_refused_for_good(
    quick: Make, tmp_path: Path, release_audit: Audit
) -> None:
    broken = release_audit.checks[0].model_copy(update={"ok": False, "finding": "Noise of 1.25 in place of 2.50."})
    failed = refused(quick, tmp_path / "out", audit=release_audit.model_copy(update={"checks": [broken]}))
    assert "Noise of 1.25 in place of 2.50" in failed["audit"].finding
    assert not failed["audit"].overridable


# ---- attacks


def test_an_attack_that_surely_beats_chance_is_refused_by_how_much(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    strong = with_membership(release_attacks, 0, site="north", area=Rate(value=0.7, low=0.62, high=0.78))
    failed = refused(quick, tmp_path / "out", attacks=strong)
    assert list(failed) == ["membership-release"]
    check = failed["membership-release"]
    assert "north: area 0.700, at least 0.620, which is 0.070 above the limit of 0.55" in check.finding
    assert check.overridable and "smaller epsilon" in check.remedy


def test_what_the_coordinator_saw_is_held_against_epsilon_and_against_a_limit_where_one_is_set(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    """Holding a release back takes nothing from the coordinator, so only who sets a limit has one."""
    strong = with_membership(release_attacks, 1, site="north", area=Rate(value=0.8, low=0.72, high=0.87))
    out = quick(tmp_path / "open", attacks=strong)
    checks = {check["id"]: check for check in read_json(out / "gate.json")["checks"]}
    assert checks["membership-coordinator"]["status"] == "ok"
    assert (
        "an area of 0.800, at least 0.720; for this view there is no limit but"
        in (checks["membership-coordinator"]["finding"])
    )
    strict = Limits(membership=MembershipLimits(coordinator_area=0.6))
    failed = refused(quick, tmp_path / "strict", attacks=strong, limits=strict)
    assert "which is 0.120 above the limit of 0.6" in failed["membership-coordinator"].finding
    proving = with_membership(release_attacks, 1, site="north", epsilon_bound=99.0)
    assert not refused(quick, tmp_path / "proving", attacks=proving)["membership-coordinator"].overridable


def test_attacks_that_spare_a_site_or_leave_a_way_untried_are_refused(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    spared = release_attacks.model_copy(update={"sites": release_attacks.sites[:1]})
    failed = refused(quick, tmp_path / "spared", attacks=spared)
    assert f"Patients of {', '.join(release_attacks.sites[1:])} were trained on" in failed["membership-release"].finding
    assert {"membership-coordinator", "attributes", "copies"} <= set(failed)
    kept = [attack for attack in release_attacks.membership if not attack.id.startswith("density-ratio")]
    failed = refused(quick, tmp_path / "few", attacks=release_attacks.model_copy(update={"membership": kept}))
    assert list(failed) == ["membership-release"]
    assert "Nobody tried density-ratio on the release" in failed["membership-release"].finding


def test_an_interval_that_reaches_over_the_limit_is_luck(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    lucky = with_membership(release_attacks, 0, area=Rate(value=0.62, low=0.549, high=0.69))
    assert verify(quick(tmp_path / "out", attacks=lucky)).ok


def test_finding_few_members_for_sure_is_refused(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    points = at_one_percent(
        release_attacks.membership[0], Rate(value=0.12, low=0.09, high=0.16), Rate(value=0.01, low=0.002, high=0.029)
    )
    failed = refused(quick, tmp_path / "out", attacks=with_membership(release_attacks, 0, points=points))
    assert (
        "finds 12.0% of the members, at least 9.0%, at 1% false positives, which is 4.0% above the limit of 5.0%"
        in (failed["membership-release"].finding)
    )


def test_few_non_members_leave_the_false_positive_rate_open(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    """Above all of 30 others: the true false positive rate may be 11.6 %, so 9 % true positives show nothing."""
    points = at_one_percent(
        release_attacks.membership[0], Rate(value=0.12, low=0.09, high=0.16), Rate(value=0.0, low=0.0, high=0.116)
    )
    assert verify(quick(tmp_path / "out", attacks=with_membership(release_attacks, 0, points=points))).ok


def test_an_attack_that_proves_more_than_is_claimed_is_refused_for_good(
    quick: Make, tmp_path: Path, release_attacks: Attacks, release_statement: PrivacyStatement
) -> None:
    claimed = release_statement.sites[0].epsilon
    proving = with_membership(release_attacks, 0, site="north", epsilon_bound=claimed + 0.5)
    failed = refused(quick, tmp_path / "out", attacks=proving)["membership-release"]
    assert f"an epsilon of at least {claimed + 0.5:.2f}, 0.50 above the {claimed:.2f} that is claimed" in failed.finding
    assert not failed.overridable
    assert "privacy statement is wrong" in failed.remedy


def test_attacks_on_other_patients_are_refused_for_good(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    failed = refused(quick, tmp_path / "out", attacks=release_attacks.model_copy(update={"subject": "ab" * 32}))
    assert set(failed) == {"membership-release", "membership-coordinator", "attributes", "copies", "evidence"}
    assert "attacks.json is about other synthetic patients (abababababab" in failed["evidence"].finding
    assert "other synthetic patients" in failed["copies"].finding


def test_no_attacks_are_refused_and_both_ways_out_are_named(quick: Make, tmp_path: Path) -> None:
    failed = refused(quick, tmp_path / "out", attacks=None)
    assert set(failed) == {"membership-release", "membership-coordinator", "attributes", "copies"}
    for check in failed.values():
        assert (
            "No attacks were given, and of the 2 contributing sites north, south did not countersign" in check.finding
        )
        assert "fedsynth evaluate attacks" in check.remedy and "fedsynth site countersign" in check.remedy


def test_an_attack_on_a_handful_of_patients_counts_for_nothing(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    small = with_membership(release_attacks, 1, non_members=8)
    failed = refused(quick, tmp_path / "out", attacks=small)["membership-coordinator"]
    assert "8 members" in failed.finding and "the limits ask for 20" in failed.finding
    assert "more patients" in failed.remedy


def test_attributes_that_are_guessed_better_of_members_are_refused(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    gap = release_attacks.attributes[0].model_copy(update={"gap": Rate(value=0.2, low=0.12, high=0.28)})
    failed = refused(quick, tmp_path / "out", attacks=release_attacks.model_copy(update={"attributes": [gap]}))
    assert (
        "0.200 higher on members, at least 0.120, which is 0.070 above the limit of 0.05"
        in failed["attributes"].finding
    )
    none = refused(quick, tmp_path / "none", attacks=release_attacks.model_copy(update={"attributes": []}))
    assert "not tried" in none["attributes"].finding


@pytest.mark.parametrize("of", ["images", "genes"])
def test_a_copy_beyond_chance_is_refused(quick: Make, tmp_path: Path, release_attacks: Attacks, of: str) -> None:
    def copied(check: CopyCheck, found: int, found_holdout: int) -> CopyCheck:
        return check.model_copy(update={"found": found, "found_holdout": found_holdout}) if check.of == of else check

    planted = [copied(check, 2, 1) for check in release_attacks.copies]
    failed = refused(quick, tmp_path / "out", attacks=release_attacks.model_copy(update={"copies": planted}))
    assert f"{of}: 2 of 3 synthetic patients repeat one who was trained on, 1 a held-out one, the limit is 0 more" in (
        failed["copies"].finding
    )
    assert "Remove what repeats a person" in failed["copies"].remedy
    chance = [copied(check, 1, 1) for check in release_attacks.copies]
    assert verify(quick(tmp_path / "chance", attacks=release_attacks.model_copy(update={"copies": chance}))).ok


def test_copies_that_nobody_looked_for_are_refused(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    only = [check for check in release_attacks.copies if check.of == "genes"]
    failed = refused(quick, tmp_path / "out", attacks=release_attacks.model_copy(update={"copies": only}))
    assert "Nobody looked for copies of images" in failed["copies"].finding


def test_copies_that_were_looked_for_in_a_part_are_refused(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    genes = release_attacks.copies[1].model_copy(update={"compared": 1})
    partly = release_attacks.model_copy(update={"copies": [release_attacks.copies[0], genes]})
    failed = refused(quick, tmp_path / "out", attacks=partly)
    assert "genes: only 1 of 3 synthetic patients were compared" in failed["copies"].finding


def test_evidence_on_a_part_of_the_patients_is_refused(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    fewer = [check.model_copy(update={"compared": 1}) for check in release_attacks.copies]
    partly = release_attacks.model_copy(update={"n_synthetic": 1, "copies": fewer})
    failed = refused(quick, tmp_path / "out", attacks=partly)
    assert "attacks.json is about 1 synthetic patients; these are 3" in failed["evidence"].finding


def test_attacks_that_could_not_be_made_are_named(quick: Make, tmp_path: Path, release_attacks: Attacks) -> None:
    partly = release_attacks.model_copy(update={"not_done": ["Density ratio: too few patients."]})
    out = quick(tmp_path / "out", attacks=partly)
    decision = GateDecision.model_validate(read_json(out / "gate.json"))
    assert "could not be made: Density ratio" in next(c.finding for c in decision.checks if c.id == "evidence")


# ---- limits


def test_what_limits_do_not_ask_for_is_said_to_the_recipient(quick: Make, tmp_path: Path) -> None:
    nothing = Limits(
        reason="There are no real patients at the coordinator.",
        membership=MembershipLimits(views=[]),
        attributes=AttributeLimits(asked=False),
        copies=CopyLimits(asked=False),
    )
    out = quick(tmp_path / "out", limits=nothing, attacks=None)
    result = verify(out, out / "release.pub.pem")
    assert result.ok
    assert sum(warning.startswith("Not checked: ") for warning in result.warnings) == 4
    assert all("no real patients at the coordinator" in warning for warning in result.warnings)


def test_limits_that_leave_something_out_need_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Limits(copies=CopyLimits(asked=False))
    with pytest.raises(ValueError, match="reason"):
        Limits(reason=" " * 20, copies=CopyLimits(asked=False))


@pytest.mark.parametrize(
    ("name", "loose"),
    [
        ("membership.area", {"membership": MembershipLimits(area=0.99)}),
        ("membership.true_positive_rate", {"membership": MembershipLimits(true_positive_rate=0.9)}),
        ("membership.least_patients", {"membership": MembershipLimits(least_patients=2)}),
        ("attributes.gap", {"attributes": AttributeLimits(gap=0.9)}),
        ("copies.beyond_chance", {"copies": CopyLimits(beyond_chance=1000)}),
    ],
)
def test_a_limit_that_nothing_reaches_asks_nothing_and_needs_a_reason_as_well(name: str, loose: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"looser .*{name}"):
        Limits(**loose)
    assert Limits(reason="Twins are in this study.", **loose).loosened[0].startswith(name)
    assert Limits(membership=MembershipLimits(area=0.52)).loosened == []


def test_loose_limits_are_said_to_the_recipient(quick: Make, tmp_path: Path) -> None:
    loose = Limits(reason="Twins are in this study.", copies=CopyLimits(beyond_chance=2))
    out = quick(tmp_path / "out", limits=loose)
    (warning,) = verify(out, out / "release.pub.pem").warnings
    assert "copies.beyond_chance 2 instead of 0" in warning and "Twins" in warning


def test_the_template_of_limits_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    assert CliRunner().invoke(release_app, ["limits", "--out", str(path)]).exit_code == 0
    assert path.read_text() == TEMPLATE
    assert load_limits(path) == Limits()


# ---- ledgers, noise, files


def test_a_site_that_contributed_without_a_receipt_is_refused_for_good(
    quick: Make, tmp_path: Path, release_statement: PrivacyStatement
) -> None:
    north, _ = release_statement.sites
    curves = {"gan": [{"round": 1, "site": "north", "loss": 0.7}, {"round": 1, "site": "south", "loss": 0.7}]}
    failed = refused(
        quick, tmp_path / "out", curves=curves, statement=release_statement.model_copy(update={"sites": [north]})
    )
    assert "site south contributed, but no receipt of its ledger is there" in failed["ledgers"].finding
    assert not failed["ledgers"].overridable
    assert "receipts" in failed["ledgers"].remedy


def test_a_site_without_a_ledger_entry_is_refused(
    quick: Make, tmp_path: Path, release_statement: PrivacyStatement
) -> None:
    north, south = release_statement.sites
    blank = south.model_copy(update={"ledger_head": "0" * 64})
    failed = refused(quick, tmp_path / "out", statement=release_statement.model_copy(update={"sites": [north, blank]}))
    assert "site south states no entry of its ledger" in failed["ledgers"].finding


def test_a_module_that_was_trained_without_a_charge_is_refused(
    quick: Make, tmp_path: Path, release_statement: PrivacyStatement
) -> None:
    north, south = release_statement.sites
    silent = north.model_copy(update={"mechanisms": [each for each in north.mechanisms if each.module != "gan"]})
    failed = refused(quick, tmp_path / "out", statement=release_statement.model_copy(update={"sites": [silent, south]}))
    assert "site north contributed to gan, which it states no charge of" in failed["ledgers"].finding


def held_out(plan: StudyPlan, statement: PrivacyStatement, epsilon: float) -> dict[str, Any]:
    """A plan with an evaluation by sites, of which north states that it cost its held-out patients `epsilon`."""
    asking = plan.model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=2.0)})
    account = HoldoutStatement(
        epsilon=epsilon,
        epsilon_lifetime=epsilon,
        noise_multiplier=evaluation_mechanism(asking).noise_multiplier,
        max_grad_norm=1.0,
    )
    north, south = statement.sites
    sites = [north.model_copy(update={"holdout": account}), south]
    told = {"plan_digest": asking.digest, "holdout_epsilon_budget": 2.0, "sites": sites}
    return {"plan": asking, "statement": statement.model_copy(update=told)}


def evaluated(plan: StudyPlan, site: str, epsilon: float) -> SiteEvaluation:
    noise = evaluation_mechanism(plan).noise_multiplier
    scores = SiteScores(site=site, epsilon=epsilon, epsilon_lifetime=epsilon, noise_multiplier=noise, scores=[])
    return SiteEvaluation(
        plan_digest=plan.digest,
        evaluators="ab" * 32,
        epsilon_budget=2.0,
        delta=1e-5,
        private=True,
        meanings=[],
        sites=[scores],
        missing={},
        pooled=[],
        explanation="Noisy sums.",
    )


@pytest.mark.parametrize(("site", "epsilon"), [("south", 1.99), ("north", 1.5)])
def test_sites_that_evaluated_state_what_it_cost_their_held_out_patients(
    quick: Make,
    tmp_path: Path,
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    release_audit: Audit,
    site: str,
    epsilon: float,
) -> None:
    asked = held_out(release_plan, release_statement, 1.99)
    found = evaluated(asked["plan"], site, epsilon)
    failed = refused(quick, tmp_path / "out", **asked, site_evaluation=found)
    assert f"site {site} evaluated, but its account of held-out patients is not in the statement" in (
        failed["ledgers"].finding
    )
    noise = evaluation_mechanism(asked["plan"]).noise_multiplier
    whole = release_audit.modules[0].model_copy(
        update={"module": "evaluation", "claimed_epsilon": 1.99, "noise_multiplier": noise}
    )
    audited = {"plan_digest": asked["plan"].digest, "modules": [*release_audit.modules, whole]}
    out = quick(
        tmp_path / "next",
        **asked,
        audit=release_audit.model_copy(update=audited),
        site_evaluation=evaluated(asked["plan"], "north", 1.99),
    )
    assert verify(out).ok
    assert "held-out patients 1.990" in read_json(out / "gate.json")["checks"][0]["finding"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"private": False}, "reproducible noise"), ({"noise_multiplier": 0.01}, "with the noise multiplier 0.01")],
)
def test_sites_evaluated_with_the_noise_that_is_stated(
    quick: Make,
    tmp_path: Path,
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    changes: dict[str, Any],
    cause: str,
) -> None:
    asked = held_out(release_plan, release_statement, 1.99)
    found = evaluated(asked["plan"], "north", 1.99)
    if "private" in changes:
        found = found.model_copy(update=changes)
    else:
        found = found.model_copy(update={"sites": [found.sites[0].model_copy(update=changes)]})
    assert cause in refused(quick, tmp_path / "out", **asked, site_evaluation=found)["ledgers"].finding


@pytest.mark.parametrize(("epsilon", "cause"), [(2.5, "not within 2"), (0.3, "more than stated")])
def test_held_out_patients_have_a_budget_too(
    quick: Make,
    tmp_path: Path,
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    epsilon: float,
    cause: str,
) -> None:
    with pytest.raises(Refused, match=cause) as refusal:
        quick(tmp_path / "out", **held_out(release_plan, release_statement, epsilon))
    assert refusal.value.code == "release_privacy"


def test_damaged_files_and_identifiers_are_refused_for_good(
    quick: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = make_module.content_checks

    def planted(release: Any) -> list[Check]:
        faults = {"geometry": "an image is not on the grid", "identifiers": "has a name in PatientName"}
        return [
            Check(each.name, "failed", faults[each.name]) if each.name in faults else each for each in honest(release)
        ]

    monkeypatch.setattr(make_module, "content_checks", planted)
    failed = refused(quick, tmp_path / "out")
    assert failed["files"].finding == "geometry: an image is not on the grid."
    assert failed["identifiers"].finding == "has a name in PatientName."
    assert not failed["files"].overridable and not failed["identifiers"].overridable


def test_evidence_that_may_not_leave_its_site_is_refused_for_good(
    quick: Make, tmp_path: Path, release_attacks: Attacks
) -> None:
    kept = release_attacks.model_copy(update={"data": f"real patients ({NOT_PUBLIC})"})
    failed = refused(quick, tmp_path / "out", attacks=kept)
    assert "attacks.json was computed on patients who are not public" in failed["evidence"].finding
    assert not failed["evidence"].overridable


def test_an_evaluation_of_other_patients_is_refused(quick: Make, tmp_path: Path) -> None:
    other = Evaluation(subject="ab" * 32, data="simulated", n_train=1, n_holdout=1, n_synthetic=3, sections=[])
    failed = refused(quick, tmp_path / "out", evaluation=other)
    assert "evaluation.json is about other synthetic patients" in failed["evidence"].finding


# ---- candidate


def test_a_refusal_keeps_what_was_drawn_and_the_release_can_be_finished(
    quick: Make, tmp_path: Path, release_key: Path, release_audit: Audit
) -> None:
    with pytest.raises(ReleaseRefused) as refusal:
        quick(tmp_path / "out", audit=None)
    candidate = tmp_path / "out-candidate"
    assert refusal.value.candidate == candidate
    assert str(candidate) in refusal.value.hint
    result = verify(candidate)
    assert not result.ok and result.status("manifest") == "ok"
    assert "this is a candidate" in next(each.reason for each in result.checks if each.name == "signature")
    assert "NOT A RELEASE" in (candidate / "CANDIDATE.json").read_text()
    before = (candidate / "CONTENT.SHA256SUMS").read_bytes()
    out = finish_release(candidate, tmp_path / "out", release_key, audit=release_audit)
    assert verify(out).ok
    assert (out / "CONTENT.SHA256SUMS").read_bytes() == before
    assert not (out / "CANDIDATE.json").exists()


def test_finishing_gives_the_same_release_as_one_step(
    made: Path, quick: Make, tmp_path: Path, release_key: Path, release_audit: Audit
) -> None:
    with pytest.raises(ReleaseRefused):
        quick(tmp_path / "out", audit=None, formats={"bids", "dicom"})
    out = finish_release(tmp_path / "out-candidate", tmp_path / "out", release_key, audit=release_audit)
    assert (out / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()


def test_a_candidate_is_not_drawn_over(quick: Make, tmp_path: Path) -> None:
    (tmp_path / "out-candidate").mkdir()
    with pytest.raises(Refused, match="Finish that candidate") as refusal:
        quick(tmp_path / "out")
    assert refusal.value.code == "release_exists"


def test_a_candidate_that_was_altered_or_added_to_is_refused(
    quick: Make, tmp_path: Path, release_key: Path, release_audit: Audit
) -> None:
    with pytest.raises(ReleaseRefused):
        quick(tmp_path / "out", audit=None)
    candidate = tmp_path / "out-candidate"
    (candidate / "attacks-north.json").write_text("{}")
    with pytest.raises(Refused, match="attacks-north") as refusal:
        finish_release(candidate, tmp_path / "out", release_key, audit=release_audit)
    assert refusal.value.code == "candidate_has_more"
    (candidate / "attacks-north.json").unlink()
    limits = (candidate / "limits.toml").read_text()
    (candidate / "limits.toml").write_text(limits.replace("area = 0.55", "area = 0.54"))
    with pytest.raises(ReleaseRefused, match="altered: limits"):
        finish_release(candidate, tmp_path / "out", release_key, audit=release_audit)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_candidate_is_named(made: Path, tmp_path: Path, release_key: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        finish_release(made, tmp_path / "out", release_key)
    assert refusal.value.code == "candidate_missing"


# ---- override


def test_an_override_is_signed_recorded_shown_first_and_warned_of(quick: Make, tmp_path: Path) -> None:
    out = quick(tmp_path / "out", audit=None, override=WHY)
    decision = GateDecision.model_validate(read_json(out / "gate.json"))
    assert decision.override is not None and decision.override.failed == ["audit"]
    result = verify(out, out / "release.pub.pem")
    assert result.ok
    loud = result.warnings[0]
    assert loud.startswith("RELEASED ALTHOUGH CHECKS FAILED (audit)")
    assert WHY.statement in loud and WHY.responsible in loud
    report = (out / "report.html").read_text(encoding="utf-8")
    assert WHY.statement in report and WHY.responsible in report


@pytest.mark.parametrize("checks", [("audit", "copies"), ("copies",), ("private",)])
def test_an_override_names_exactly_what_failed(quick: Make, tmp_path: Path, checks: tuple[str, ...]) -> None:
    with pytest.raises(ReleaseRefused, match="audit failed") as refusal:
        quick(tmp_path / "out", audit=None, override=OverrideRequest("Because.", "head", checks))
    assert refusal.value.code == "override_differs"
    assert not (tmp_path / "out").exists()


def test_an_override_of_nothing_is_refused(quick: Make, tmp_path: Path) -> None:
    with pytest.raises(ReleaseRefused, match="nothing failed"):
        quick(tmp_path / "out", override=WHY)


def test_what_is_never_overridden_is_not(quick: Make, tmp_path: Path, release_statement: PrivacyStatement) -> None:
    north, south = release_statement.sites
    blank = south.model_copy(update={"ledger_head": "0" * 64})
    with pytest.raises(ReleaseRefused, match="states no entry") as refusal:
        quick(
            tmp_path / "out",
            statement=release_statement.model_copy(update={"sites": [north, blank]}),
            override=OverrideRequest("Trust us.", "head", ("ledgers",)),
        )
    assert "Nobody can answer for ledgers" in refusal.value.hint


# ---- tampering: by somebody who holds the coordinator's key


@pytest.fixture
def overridden(quick: Make, tmp_path: Path) -> Path:
    return quick(tmp_path / "overridden", audit=None, override=WHY)


def forge(folder: Path, key: Path, change: Callable[[dict[str, Any]], None], name: str = "gate.json") -> str:
    """Change a file of a release, sign everything anew, and give back what verify says of the gate."""
    value = read_json(folder / name)
    change(value)
    write_json(folder / name, value)
    write_manifest(folder, load_key(key))
    result = verify(folder)
    assert result.status("manifest") == result.status("signature") == "ok"
    assert not result.ok
    return next(each.reason for each in result.checks if each.name == "gate")


def test_a_failed_check_that_was_painted_over_is_found(overridden: Path, release_key: Path) -> None:
    def paint(decision: dict[str, Any]) -> None:
        decision["override"] = None
        for check in decision["checks"]:
            check["status"] = "ok"

    said = forge(overridden, release_key, paint)
    assert "gate.json says ok of audit; found: failed" in said
    assert "it was released although audit failed" in said


def test_an_override_that_was_reworded_is_found(overridden: Path, release_key: Path) -> None:
    said = forge(overridden, release_key, lambda decision: decision["override"].update(statement="All is well."))
    assert "the override is not signed with the key of the release" in said


def test_an_override_that_was_taken_away_is_found(overridden: Path, release_key: Path) -> None:
    assert "released although audit failed" in forge(overridden, release_key, lambda d: d.update(override=None))


def test_evidence_that_was_changed_after_the_decision_is_found(made: Path, tmp_path: Path, release_key: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))

    def worsen(attacks: dict[str, Any]) -> None:
        attacks["membership"][0]["area"] = {"value": 0.9, "low": 0.85, "high": 0.95}

    assert "gate.json says ok of membership-release; found: failed" in forge(copy, release_key, worsen, "attacks.json")


def test_a_finding_that_was_reworded_is_found(made: Path, tmp_path: Path, release_key: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    said = forge(copy, release_key, lambda decision: decision["checks"][0].update(finding="Nobody spent anything."))
    assert "words ledgers otherwise" in said


def test_another_state_of_the_same_version_may_word_it_otherwise_but_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release_key: Path
) -> None:
    monkeypatch.setattr("fedsynth_server.release.gate.code_digest", lambda: "ab" * 32)
    result = verify(made, made / "release.pub.pem")
    assert result.ok and "other sources (c0dec0dec0de) than yours (abababababab)" in result.warnings[0]
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    decision = read_json(copy / "gate.json")
    decision["checks"][0]["finding"] = "Said in other words."
    write_json(copy / "gate.json", decision)
    write_manifest(copy, load_key(release_key))
    assert verify(copy).ok
    assert "says failed of audit" in forge(copy, release_key, lambda d: d["checks"][2].update(status="failed"))


@pytest.mark.parametrize(
    "name",
    [
        "patients.csv",
        "bids/patients.csv",
        "bids/sub-SYN0001/anat/notes.txt",
        "genes/raw.tsv",
        "countersignatures/x.csv",
    ],
)
def test_nothing_else_can_be_published_with_a_release(made: Path, tmp_path: Path, release_key: Path, name: str) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("a name, a birthday")
    write_content(copy)
    write_manifest(copy, load_key(release_key))
    result = verify(copy)
    failed = {check.name for check in result.checks if check.status == "failed"}
    assert failed & {"structure", "participants", "gate"}


def test_a_release_that_sites_wanted_to_countersign_cannot_pass_as_one_from_before_the_gate(
    quick: Make, tmp_path: Path, release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    sites = [site.model_copy(update={"countersign_key": "ab" * 32}) for site in release_plan.sites]
    release = Release(
        tmp_path,
        ReleaseIndex.model_construct(schema_version=1, formats=[]),
        release_plan.model_copy(update={"sites": sites}),
        release_statement,
    )
    assert any("reserved in the plan to countersign" in fault for fault in structure_faults(release))


def test_a_release_without_its_decision_fails(made: Path, tmp_path: Path, release_key: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / "gate.json").unlink()
    write_manifest(copy, load_key(release_key))
    result = verify(copy)
    assert result.status("structure") == "failed" and result.status("gate") == "skipped"


def test_a_release_from_before_the_gate_verifies_with_a_warning(
    made: Path, tmp_path: Path, release_key: Path, release_plan: StudyPlan
) -> None:
    old = Path(shutil.copytree(made, tmp_path / "old"))
    for name in ("gate.json", "limits.toml", "CONTENT.SHA256SUMS", "attacks.json", "audit.json", "DATASHEET.md"):
        (old / name).unlink()
    write_json(old / "release.json", read_json(old / "release.json") | {"schema_version": 1})
    write_manifest(old, load_key(release_key))
    result = verify(old)
    assert result.ok
    assert any("made before there was a gate" in warning for warning in result.warnings)


def without_privacy(plan: StudyPlan, statement: PrivacyStatement, **changes: Any) -> dict[str, Any]:
    """The same study without privacy: plan, statement, and no audit, since nothing could be audited."""
    endless = float("inf")
    bare = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": endless}), **changes})
    sites = [
        site.model_copy(
            update={
                "epsilon": endless,
                "epsilon_lifetime": endless,
                "mechanisms": [
                    each.model_copy(update={"noise_multiplier": 0.0, "epsilon_alone": endless})
                    for each in site.mechanisms
                ],
            }
        )
        for site in statement.sites
    ]
    budget = bare.site_evaluation.epsilon if bare.site_evaluation else None
    told = {
        "plan_digest": bare.digest,
        "private": False,
        "epsilon_budget": endless,
        "holdout_epsilon_budget": budget,
        "sites": sites,
    }
    stated = PrivacyStatement.model_validate_json(statement.model_copy(update=told).model_dump_json())
    return {"plan": bare, "statement": stated, "audit": None}


def test_a_study_without_privacy_is_refused_in_its_own_words(
    quick: Make, tmp_path: Path, release_plan: StudyPlan, release_statement: PrivacyStatement, release_attacks: Attacks
) -> None:
    bare = without_privacy(release_plan, release_statement)
    attacks = release_attacks.model_copy(update={"plan_digest": bare["plan"].digest})
    failed = refused(quick, tmp_path / "out", **bare, attacks=attacks)
    assert set(failed) == {"privacy"}  # attacks at chance say nothing of a guarantee that is not there
    assert "trained without privacy" in failed["privacy"].finding
    assert "simulated or public patients" in failed["privacy"].remedy
    answered = OverrideRequest("Public patients: a reproduction.", "maintainer", ("privacy",))
    assert verify(quick(tmp_path / "answered", **bare, attacks=attacks, override=answered)).ok


def test_a_seed_and_an_evaluation_of_a_study_without_privacy_are_judged_as_ever(
    quick: Make, tmp_path: Path, release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    seeded = release_plan.privacy.model_copy(update={"reproducible_seed": 3})
    both = without_privacy(release_plan.model_copy(update={"privacy": seeded}), release_statement)
    assert {"privacy", "private"} <= set(refused(quick, tmp_path / "out", **both))
    # Held-out patients were promised noise, and that promise is audited.
    evaluating = without_privacy(release_plan, release_statement, site_evaluation=SiteEvaluationPlan(epsilon=2.0))
    assert "No audit" in refused(quick, tmp_path / "evaluating", **evaluating)["audit"].finding


def test_a_private_study_cannot_state_a_mechanism_without_noise(
    quick: Make, tmp_path: Path, release_statement: PrivacyStatement
) -> None:
    site = release_statement.sites[0]
    silent = site.mechanisms[0].model_copy(update={"noise_multiplier": 0.0})
    sites = [site.model_copy(update={"mechanisms": [silent, *site.mechanisms[1:]]}), *release_statement.sites[1:]]
    with pytest.raises(Refused, match="its mechanisms cost epsilon inf"):
        quick(tmp_path / "out", statement=release_statement.model_copy(update={"sites": sites}))
    with pytest.raises(ValueError, match="an infinite epsilon protects nobody"):
        PrivacyStatement.model_validate(release_statement.model_dump() | {"epsilon_budget": None})
