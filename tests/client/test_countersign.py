"""From a candidate to a countersigned release: what a site checks before it signs, and what its signature is worth."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsynth.attacks.values import (
    RELEASE_ATTACKS,
    SELECTED,
    Attacks,
    AttributeAttack,
    CopyCheck,
    MembershipAttack,
    OperatingPoint,
    Rate,
    View,
)
from fedsynth.auditing.values import Audit, AuditedModule, MechanismCheck
from fedsynth.countersignature import key_hex, read_countersignature
from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.values import NOT_PUBLIC
from fedsynth.files import read_json, write_json
from fedsynth.limits import Limits, MembershipLimits, limits_toml
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.released import read_release
from fedsynth.sums import write_content
from fedsynth.synthetic import subject_digest
from fedsynth_client.app import app as client_app
from fedsynth_client.cli import app as site_app
from fedsynth_client.countersign import countersign, key_path, load_key, log_path, make_key, prepare
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.cli import release as release_app
from fedsynth_server.release.make import ReleaseRefused
from fedsynth_server.release.manifest import generate_key, write_manifest
from fedsynth_server.release.manifest import load_key as load_release_key
from fedsynth_server.release.verify import verify
from fedsynth_simulations.grid import InProcessGrid, run_in_process

CODE = "c0de" * 16
# What is left out in a deployment whose coordinator keeps no transcript, and said so.
LIMITS = Limits(reason="The messages of the training are not kept.", membership=MembershipLimits(views=["release"]))


@dataclass(frozen=True)
class Study:
    """A finished study whose two sites want to countersign, and the candidate of its release."""

    folder: Path
    plan: StudyPlan

    @property
    def candidate(self) -> Path:
        return self.folder / "release-candidate"

    def site(self, name: str) -> Site:
        return Site(self.folder / name)


@pytest.fixture(autouse=True)
def _one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("make", "gate"):
        monkeypatch.setattr(f"fedsynth_server.release.{module}.code_digest", lambda: CODE)


@pytest.fixture(scope="module")
def _finished(_tiny_template: Path, tiny_plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("countersigned") / "study"
    shutil.copytree(_tiny_template, folder)
    sites = [Site(folder / site.name) for site in tiny_plan.sites]
    for site in sites:
        save_policy(site.policy().model_copy(update={"countersign_releases": True}), site.policy_path)
    keyed = [
        entry.model_copy(update={"countersign_key": make_key(site)})
        for entry, site in zip(tiny_plan.sites, sites, strict=True)
    ]
    plan = tiny_plan.model_copy(update={"sites": keyed})
    save_plan(plan, folder / "study" / "plan.toml")
    for site in sites:
        site.approve(plan)
    grid = InProcessGrid(client_app, dict(enumerate((site.folder for site in sites), start=1)))
    run_in_process(server_app, grid, {"study-folder": str(folder / "study")})
    generate_key(folder / "release.pem")
    (folder / "limits.toml").write_text(limits_toml(LIMITS))
    write_json(folder / "audit.json", audit(plan).model_dump(mode="json"))
    run(
        "make",
        folder / "study",
        "--out",
        folder / "release",
        "--candidate",
        "--patients",
        3,
        "--limits",
        folder / "limits.toml",
    )
    return Study(folder, plan)


@pytest.fixture
def study(_finished: Study, tmp_path: Path) -> Study:
    return Study(Path(shutil.copytree(_finished.folder, tmp_path / "study")), _finished.plan)


def run(*arguments: object, app: Any = release_app) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def audit(plan: StudyPlan) -> Audit:
    modules = [
        AuditedModule(
            module=module,
            site="a",
            claimed_epsilon=3.0,
            delta=1e-5,
            sample_rate=0.25,
            noise_multiplier=0.5,
            steps=6,
            canaries=100,
            guesses=20,
            correct=10,
            confidence=0.95,
            epsilon_bound=0.0,
            reachable=2.0,
            model="small",
            seconds=1.0,
        )
        for module in plan.modules
    ]
    check = MechanismCheck(id="noise-scale", title="Noise", module="gan", ok=True, finding="As planned.")
    return Audit(plan_digest=plan.digest, code=CODE, software="fedsynth", modules=modules, checks=[check], seconds=1.0)


def attack_report(study: Study, path: Path, views: tuple[View, ...] = ("release",), **changes: Any) -> Path:
    """What a site's staff found on its own patients: nothing."""
    found = Attacks(
        plan_digest=study.plan.digest,
        subject=subject_digest(read_release(study.candidate)),
        data=f"patients of one site ({NOT_PUBLIC})",
        sites=["a"],
        n_synthetic=3,
        membership=[
            MembershipAttack(
                id=f"{name}-images",
                title=name,
                view=view,
                knows="the patient",
                source="a paper",
                members=28,
                non_members=22,
                area=Rate(value=0.5137, low=0.35, high=0.67),
                points=[
                    OperatingPoint(
                        asked=0.01,
                        reached=Rate(value=0.0, low=0.0, high=0.15),
                        true_positive_rate=Rate(value=0.03, low=0.0, high=0.18),
                    )
                ],
                epsilon_bound=0.0,
            )
            for view in views
            for name in RELEASE_ATTACKS
        ],
        attributes=[
            AttributeAttack(
                id="genes",
                title="Genes from the image",
                knows="the image",
                guesses="genes",
                metric="R²",
                members=0.0,
                non_members=0.0,
                gap=Rate(value=0.0, low=-0.1, high=0.1),
            )
        ],
        copies=[
            CopyCheck(
                of=of,
                how="Correlation.",
                threshold=0.9,
                compared=3,
                found=0,
                found_holdout=0,
                participants=[],
                most_similar=(0.2, 0.3),
            )
            for of in ("images", "genes")
        ],
        distances=[],
    )
    write_json(path, found.model_copy(update=changes).model_dump(mode="json"))
    return path


def finish(study: Study, *signed: Path) -> Path:
    options = [option for path in signed for option in ("--countersignature", path)]
    run(
        "finish",
        study.candidate,
        "--key",
        study.folder / "release.pem",
        "--audit",
        study.folder / "audit.json",
        *options,
    )
    return study.folder / "release"


def signed_by(study: Study, name: str, attacks: bool = True) -> Path:
    report = attack_report(study, study.folder / f"attacks-{name}.json", sites=[name])
    out = study.folder / f"{name}.countersignature"
    given = ["--attacks", report] if attacks else []
    run("countersign", study.site(name).folder, study.candidate, "--out", out, "--yes", *given, app=site_app)
    return out


# ---- the whole way


def test_sites_attack_at_home_countersign_and_the_release_needs_no_figure_of_theirs(study: Study) -> None:
    signed = [signed_by(study, name) for name in ("a", "b")]
    out = finish(study, *signed)
    result = verify(out, out / "release.pub.pem")
    assert result.ok, [check for check in result.checks if check.status != "ok"]
    checks = {check["id"]: check for check in read_json(out / "gate.json")["checks"]}
    assert checks["membership-release"]["status"] == checks["copies"]["status"] == "ok"
    assert "Tried at a, b, each with its own patients" in checks["copies"]["finding"]
    assert checks["membership-coordinator"]["status"] == "not asked"
    assert checks["countersignatures"]["status"] == "ok"
    assert not (out / "attacks.json").exists()
    assert "0.5137" not in "".join(path.read_text() for path in (out / "countersignatures").glob("*.json"))
    assert any("whether a site countersigned" in item for item in read_json(out / "privacy.json")["not_covered"])
    assert (study.candidate / "CANDIDATE.json").is_file()


def test_a_recipient_can_check_a_countersignature_with_common_tools(study: Study) -> None:
    out = finish(study, *(signed_by(study, name) for name in ("a", "b")))
    home = out / "countersignatures"

    def tool(*command: str) -> bytes:
        return subprocess.run(command, cwd=home, check=True, capture_output=True).stdout

    tool(
        "openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "a.pub.pem", "-sigfile", "a.sig", "-in", "a.json"
    )
    der = tool("openssl", "pkey", "-pubin", "-in", "a.pub.pem", "-outform", "DER")
    assert der[-32:].hex() == study.plan.site("a").countersign_key
    content = tool("sha256sum", "../CONTENT.SHA256SUMS").split()[0].decode()
    assert json.loads((home / "a.json").read_text())["content"] == content
    subprocess.run(["sha256sum", "--check", "--quiet", "CONTENT.SHA256SUMS"], cwd=out, check=True)


def test_the_site_remembers_what_it_signed_and_shows_its_own_figures_to_its_staff_alone(study: Study) -> None:
    site, report = study.site("a"), attack_report(study, study.folder / "own.json")
    prepared = prepare(site, study.candidate, report)
    assert "0.514" in prepared.summary and "For your eyes only" in prepared.summary
    out = study.folder / "a.countersignature"
    countersign(site, prepared, out)
    assert "0.514" not in out.read_text()
    (line,) = log_path(site).read_text().splitlines()
    remembered = json.loads(line)
    assert remembered["signature"] == read_countersignature(out).signature
    assert remembered["statement"]["content"] == prepared.statement.content
    countersign(site, prepared, study.folder / "again")
    assert len(log_path(site).read_text().splitlines()) == 2


def test_a_site_is_told_what_was_selected_before_it_signs(study: Study) -> None:
    chosen = ["--patients", 2, "--balance", "--sequences", "T1c"]
    run("make", study.folder / "study", "--out", study.folder / "chosen", "--candidate", *chosen)
    summary = prepare(study.site("a"), study.folder / "chosen-candidate", None).summary
    assert "Selected: The class mix was chosen, not that of the hospitals (grade: 1 low, 1 high)." in summary
    assert "the images hold T1c" in summary
    assert "Selected:" not in prepare(study.site("a"), study.candidate, None).summary


def test_a_site_does_not_sign_what_was_not_selected_as_it_says(study: Study) -> None:
    chosen, folder = ["--patients", 3, "--count", "high=2", "--count", "low=1"], study.folder / "chosen-candidate"
    run("make", study.folder / "study", "--out", study.folder / "chosen", "--candidate", *chosen)
    told = read_json(folder / "selection.json")
    for counts, code in (({"low": 2, "high": 1}, "candidate_damaged"), ({"unheard": 3}, "release_unreadable")):
        write_json(folder / "selection.json", {**told, "asked": {**told["asked"], "counts": counts}})
        write_content(folder)
        with pytest.raises(Refused) as refused:
            prepare(study.site("a"), folder, None)
        assert refused.value.code == code


def test_a_no_signs_nothing(study: Study) -> None:
    out = study.folder / "out"
    arguments = ["countersign", str(study.site("a").folder), str(study.candidate), "--out", str(out)]
    result = CliRunner().invoke(site_app, arguments, input="n\n")
    assert result.exit_code != 0
    assert not out.exists() and not log_path(study.site("a")).exists()


def test_the_key_is_private_made_once_and_printed_for_the_plan(study: Study) -> None:
    site = study.site("a")
    assert key_path(site).stat().st_mode & 0o777 == 0o600
    printed = run("countersign-key", site.folder, app=site_app)
    assert f'countersign_key = "{key_hex(load_key(site).public_key())}"' in printed
    assert study.plan.site("a").countersign_key in printed


# ---- what the gate makes of missing and false countersignatures


def refused(study: Study, *signed: Path) -> dict[str, str]:
    with pytest.raises(ReleaseRefused) as refusal:
        finish(study, *signed)
    assert not (study.folder / "release").exists()
    return {check.id: check.finding for check in refusal.value.decision.failed}


def test_a_site_that_did_not_sign_is_named_and_nobody_else_can_waive_it(study: Study) -> None:
    signed = signed_by(study, "a")
    found = refused(study, signed)
    assert found["countersignatures"] == "b has not countersigned this content."
    assert "b did not countersign" in found["copies"]
    with pytest.raises(ReleaseRefused, match="Only the site itself can waive it") as refusal:
        run(
            *("finish", study.candidate, "--key", study.folder / "release.pem", "--audit", study.folder / "audit.json"),
            *("--countersignature", signed, "--statement", "b is on holiday", "--responsible", "coordinator"),
            *(option for check in found for option in ("--override", check)),
        )
    assert "Nobody can answer for countersignatures" in refusal.value.hint


def test_a_site_that_signed_without_attacks_does_not_vouch_for_any(study: Study) -> None:
    found = refused(study, signed_by(study, "a"), signed_by(study, "b", attacks=False))
    assert set(found) == {"membership-release", "attributes", "copies"}
    assert "b did not countersign" in found["membership-release"]


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    value = read_json(path)
    change(value)
    write_json(path, value)
    return path


def test_a_site_vouches_for_those_who_fit_a_selection_only_if_it_attacked_them_alone(study: Study) -> None:
    chosen = ["--patients", 3, "--only", "high", "--limits", study.folder / "limits.toml"]
    run("make", study.folder / "study", "--out", study.folder / "chosen", "--candidate", *chosen)
    shutil.rmtree(study.candidate)
    (study.folder / "chosen-candidate").rename(study.candidate)
    report = attack_report(study, study.folder / "all.json")
    prepared = prepare(study.site("a"), study.candidate, report)
    assert "Not tried, though asked for: those alone who fit what was selected." in prepared.summary
    assert '"selected"' not in prepared.statement.model_dump_json()
    found = refused(study, signed_by(study, "a"), signed_by(study, "b"))
    assert set(found) == {"membership-selected"}
    assert "a, b did not countersign" in found["membership-selected"]

    alone = [attack.model_copy(update={"id": f"{attack.id}{SELECTED}"}) for attack in _reported(report).membership]
    both = [*_reported(report).membership, *alone]
    prepared = prepare(study.site("a"), study.candidate, attack_report(study, report, membership=both))
    assert prepared.statement.attacks is not None and prepared.statement.attacks.selected
    leaks = [*both[:-1], both[-1].model_copy(update={"area": Rate(value=0.9, low=0.8, high=0.95)})]
    with pytest.raises(Refused) as refusal:
        prepare(study.site("a"), study.candidate, attack_report(study, report, membership=leaks))
    assert refusal.value.code == "attacks_above_limits"


def _reported(path: Path) -> Attacks:
    return Attacks.model_validate_json(path.read_bytes())


def test_a_statement_that_was_changed_on_the_way_is_not_the_sites(study: Study) -> None:
    def claim(file: dict[str, Any]) -> None:
        file["statement"] = file["statement"].replace('"epsilon": ', '"epsilon": 1')

    signed = forged(signed_by(study, "a"), claim)
    assert (
        "a is not by the key that the plan names" in refused(study, signed, signed_by(study, "b"))["countersignatures"]
    )


def test_a_signature_is_of_one_content_and_the_evidence_beside_it(study: Study) -> None:
    signed = [signed_by(study, name) for name in ("a", "b")]
    (study.candidate / "LICENSE").write_text("Do what you like.\n")
    write_content(study.candidate)
    assert "countersigned another content" in refused(study, *signed)["countersignatures"]


def test_evidence_that_a_site_saw_is_not_exchanged_behind_its_back(study: Study) -> None:
    write_json(
        study.candidate / "audit.json", audit(study.plan).model_copy(update={"seconds": 9.0}).model_dump(mode="json")
    )
    signed = [signed_by(study, name) for name in ("a", "b")]
    assert "a countersigned beside another audit.json" in refused(study, *signed)["countersignatures"]


def test_a_countersignature_that_was_exchanged_in_a_release_is_found(study: Study) -> None:
    out = finish(study, *(signed_by(study, name) for name in ("a", "b")))
    shutil.copyfile(out / "countersignatures/b.sig", out / "countersignatures/a.sig")
    write_manifest(out, load_release_key(study.folder / "release.pem"))
    result = verify(out)
    assert result.status("signature") == "ok" and result.status("gate") == "failed"


# ---- what a site refuses to sign


def test_silence_of_the_policy_means_no(study: Study) -> None:
    site = study.site("a")
    save_policy(site.policy().model_copy(update={"countersign_releases": False}), site.policy_path)
    with pytest.raises(Refused) as refusal:
        prepare(site, study.candidate, None)
    assert refusal.value.code == "countersigning_not_allowed"


def test_a_candidate_that_was_damaged_is_not_signed(study: Study) -> None:
    (study.candidate / "participants.tsv").write_text("altered")
    with pytest.raises(Refused, match="altered: participants") as refusal:
        prepare(study.site("a"), study.candidate, None)
    assert refusal.value.code == "candidate_damaged"


def test_a_plan_that_was_not_approved_is_not_signed(study: Study) -> None:
    site = study.site("a")
    save_policy(site.policy().model_copy(update={"approved_plans": []}), site.policy_path)
    with pytest.raises(Refused) as refusal:
        prepare(site, study.candidate, None)
    assert refusal.value.code == "plan_not_approved"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"epsilon": 0.01}, "spent epsilon 0.0100 of training patients"),
        ({"ledger_head": "ab" * 32}, "which this ledger does not have"),
    ],
)
def test_a_statement_that_the_ledger_contradicts_is_not_signed(
    study: Study, change: dict[str, Any], cause: str
) -> None:
    privacy = read_json(study.candidate / "privacy.json")
    privacy["sites"][0] |= change
    write_json(study.candidate / "privacy.json", privacy)
    write_content(study.candidate)
    with pytest.raises(Refused, match=cause) as refusal:
        prepare(study.site("a"), study.candidate, None)
    assert refusal.value.code == "ledger_disagrees"


def test_a_release_that_leaves_the_site_out_is_not_signed(study: Study) -> None:
    privacy = read_json(study.candidate / "privacy.json")
    privacy["sites"] = privacy["sites"][1:]
    write_json(study.candidate / "privacy.json", privacy)
    write_content(study.candidate)
    with pytest.raises(Refused) as refusal:
        prepare(study.site("a"), study.candidate, None)
    assert refusal.value.code == "site_not_in_candidate"


def test_a_site_speaks_for_its_own_patients_alone(study: Study) -> None:
    report = attack_report(study, study.folder / "own.json", sites=["b"])
    with pytest.raises(Refused, match="run on patients of b") as refusal:
        prepare(study.site("a"), study.candidate, report)
    assert refusal.value.code == "attacks_on_others"


def test_attacks_on_something_else_are_not_signed(study: Study) -> None:
    report = attack_report(study, study.folder / "own.json", subject="ab" * 32)
    with pytest.raises(Refused) as refusal:
        prepare(study.site("a"), study.candidate, report)
    assert refusal.value.code == "attacks_of_others"


def test_attacks_above_the_limits_are_not_signed_away(study: Study) -> None:
    copies = [
        check | {"found": 1, "most_similar": [0.99, 0.3]}
        for check in read_json(attack_report(study, study.folder / "own.json"))["copies"]
    ]
    forged(study.folder / "own.json", lambda report: report.update(copies=copies))
    with pytest.raises(Refused, match="1 of 3 synthetic patients repeat") as refusal:
        prepare(study.site("a"), study.candidate, study.folder / "own.json")
    assert refusal.value.code == "attacks_above_limits"


def test_a_view_that_was_asked_for_and_not_tried_is_not_signed_as_tried(study: Study) -> None:
    (study.candidate / "limits.toml").write_text(limits_toml(Limits()))
    write_content(study.candidate)
    prepared = prepare(study.site("a"), study.candidate, attack_report(study, study.folder / "own.json"))
    assert prepared.statement.attacks is not None and prepared.statement.attacks.views == ["release"]
    assert "Not tried, though asked for: coordinator" in prepared.summary


def test_a_key_that_others_can_read_signs_nothing(study: Study) -> None:
    key_path(study.site("a")).chmod(0o644)
    with pytest.raises(Refused) as refusal:
        prepare(study.site("a"), study.candidate, None)
    assert refusal.value.code == "key_readable_by_others"


def test_a_key_that_the_plan_does_not_name_signs_nothing(study: Study) -> None:
    site = study.site("a")
    key_path(site).unlink()
    with pytest.raises(UsageError) as missing:
        prepare(site, study.candidate, None)
    assert missing.value.code == "countersign_key_missing"
    make_key(site)
    with pytest.raises(UsageError) as other:
        prepare(site, study.candidate, None)
    assert other.value.code == "countersign_key_not_in_plan"
