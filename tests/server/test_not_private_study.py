"""A whole study without privacy: its marks, the gate that stops it, and a release that somebody answers for."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsynth.errors import Refused, UsageError
from fedsynth.files import read_json
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.statement import PrivacyStatement
from fedsynth_client.account import account
from fedsynth_client.app import app as client_app
from fedsynth_client.auditing.run import audit_plan
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import load_state
from fedsynth_server.cli import release, study
from fedsynth_server.release.content import privacy_faults
from fedsynth_server.release.opened import open_release
from fedsynth_server.release.verify import verify
from fedsynth_server.statement import check_receipts
from fedsynth_simulations.grid import InProcessGrid, run_in_process

NODES = {10: "a", 11: "b"}
# What nobody tried on patients who are nothing but noise; an audit is not among it, since nothing could be audited.
FAILING = ("privacy", "membership-release", "membership-coordinator", "attributes", "copies")
ANSWERED = ("--statement", "Simulated patients, made of noise.", "--responsible", "tester")


def bare(plan: StudyPlan, **privacy: object) -> StudyPlan:
    """`plan` as a study without privacy, one round a module."""
    changed = plan.privacy.model_copy(update={"epsilon": math.inf, **privacy})
    once = {
        module: plan.training(module).model_copy(update={"rounds": 1})
        for module in ("autoencoder", "radiogenomics", "gan")
    }
    return StudyPlan.model_validate(plan.model_copy(update={"privacy": changed, **once}).model_dump())


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(release, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    return bare(tiny_plan)


@pytest.fixture(scope="module")
def finished(plan: StudyPlan, _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study without privacy that two sites which allow it ran."""
    root = tmp_path_factory.mktemp("bare") / "tiny"
    shutil.copytree(_tiny_template, root)
    for name in NODES.values():
        site = Site(root / name)
        save_policy(site.policy().model_copy(update={"allow_not_private": True}), site.policy_path)
        site.approve(plan)
    save_plan(plan, root / "study" / "plan.toml")
    grid = InProcessGrid(client_app, {node: root / name for node, name in NODES.items()})
    run_in_process(server_app, grid, {"study-folder": str(root / "study")})
    return root


@pytest.fixture(scope="module")
def released(finished: Path) -> Path:
    """Its release, under an override, after the gate refused it."""
    key, out = finished / "key.pem", finished / "release"
    run(["keygen", str(key)])
    with pytest.raises(Refused, match="trained without privacy") as refused:
        run(["make", str(finished / "study"), "--out", str(out), "--key", str(key), "--patients", "2"])
    assert refused.value.code == "release_gate"
    assert not out.exists()
    without = [option for check in FAILING[1:] for option in ("--override", check)]
    with pytest.raises(Refused):  # nobody answered for the privacy
        run(["finish", str(finished / "release-candidate"), "--key", str(key), *without, *ANSWERED])
    named = [option for check in FAILING for option in ("--override", check)]
    run(["finish", str(finished / "release-candidate"), "--key", str(key), *named, *ANSWERED])
    return out


def test_receipts_and_ledgers_say_infinite_and_not_private(finished: Path, plan: StudyPlan) -> None:
    state = load_state(finished / "study", plan)
    assert state is not None
    assert not state.missing_rounds(plan)
    receipts = [receipt for by_module in state.receipts.values() for receipt in by_module.values()]
    assert len(receipts) == 6
    assert all(not each.private and each.epsilon == each.epsilon_lifetime == math.inf for each in receipts)
    for name in NODES.values():
        site = Site(finished / name)
        charges = [entry.body for entry in site.ledger().entries() if entry.kind == "charge"]
        assert charges
        assert all(charge["noise_multiplier"] == 0 and charge["private"] is False for charge in charges)
        assert account(site).epsilon == math.inf
    status = read_json(finished / "study" / "status.json")
    assert "NOT PRIVATE" in status["marks"][0]


def test_whatever_is_released_says_that_it_is_not_private(released: Path) -> None:
    statement = read_json(released / "privacy.json")
    assert statement["private"] is False
    assert statement["epsilon_budget"] is None
    assert [site["epsilon"] for site in statement["sites"]] == [None, None]
    assert PrivacyStatement.model_validate(statement).sites[0].epsilon == math.inf
    assert read_json(released / "release.json")["private"] is False
    said = "NOT PRIVATE: a study without privacy"
    for name in ("README.md", "DATASHEET.md", "report.html", "croissant.json", "bids/dataset_description.json"):
        assert said in (released / name).read_text(encoding="utf-8"), name
    assert "NOT PRIVATE" in (released / "bids" / "README.md").read_text(encoding="utf-8")
    sidecar = next((released / "bids").rglob("*_T1w.json"))
    assert said in sidecar.read_text(encoding="utf-8")
    for path in released.rglob("*.json"):  # JSON has no infinity, and none of these files tries to
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_report_says_so_before_anything_else(released: Path) -> None:
    page = (released / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert body.index("NOT PRIVATE: a study without privacy") < body.index("<h1>")
    assert "neither limited nor noised" in body
    assert not re.search(r"\bnan\b|not a number|\binf\b(?!\")", body)
    told = body[: body.index('id="glossary"')]
    for false in ("DP-SGD", "under noise", "The guarantee rests", "noisy sum over its patients"):
        assert false not in told, false


def test_a_release_without_privacy_verifies_and_warns(released: Path) -> None:
    result = verify(released)
    assert result.ok, [check for check in result.checks if check.status != "ok"]
    assert any("NOT PRIVATE" in warning for warning in result.warnings)
    assert any("RELEASED ALTHOUGH CHECKS FAILED (privacy," in warning for warning in result.warnings)
    printed = run(["verify", str(released)])
    assert "NOT PRIVATE" in printed


def test_a_finite_epsilon_or_noise_that_never_was_is_found_in_the_statement(released: Path) -> None:
    release = open_release(released)
    assert privacy_faults(release) == []
    site = release.statement.sites[0]
    noised = [
        each.model_copy(update={"noise_multiplier": 50.0, "epsilon_alone": 0.1, "sample_rate": 0.1})
        for each in site.mechanisms
    ]
    for lie in ({"epsilon": 2.0, "mechanisms": noised}, {"mechanisms": noised}, {"epsilon": 2.0, "mechanisms": []}):
        sites = [site.model_copy(update=lie), *release.statement.sites[1:]]
        forged = release.statement.model_copy(update={"sites": sites})
        assert any("without privacy" in fault for fault in privacy_faults(replace(release, statement=forged))), lie


def test_dicom_headers_say_so(released: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    image = pydicom.dcmread(next((released / "dicom").rglob("*.dcm")))
    (generator,) = image.ContributingEquipmentSequence
    assert "NOT PRIVATE" in generator.ContributionDescription


def test_study_check_says_in_words_and_in_json_that_nobody_is_protected(plan: StudyPlan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.toml")
    printed = CliRunner().invoke(study, ["check", str(tmp_path / "plan.toml")])
    assert printed.exit_code == 0, printed.output
    assert "NOT PRIVATE" in printed.output
    assert "no patient is protected" in printed.output
    assert "nan" not in printed.output
    told = CliRunner().invoke(study, ["check", str(tmp_path / "plan.toml"), "--json"])
    found = json.loads(told.stdout, parse_constant=pytest.fail)["data"]
    assert found["epsilon"] == {"a": None, "b": None}
    assert "NOT PRIVATE" in found["marks"][0]


def test_nothing_can_be_audited_and_the_gate_asks_for_no_audit(released: Path, plan: StudyPlan) -> None:
    with pytest.raises(UsageError) as refused:
        audit_plan(plan)
    assert refused.value.code == "nothing_to_audit"
    checks = {check["id"]: check for check in read_json(released / "gate.json")["checks"]}
    assert checks["audit"]["status"] == "not asked"
    assert "no mechanism to audit" in checks["audit"]["finding"]
    assert checks["privacy"]["status"] == "failed" and checks["privacy"]["overridable"]
    assert "private" not in checks  # whether noise was unpredictable: there was none


def test_a_site_of_such_a_study_that_states_less_is_found(finished: Path, plan: StudyPlan) -> None:
    state = load_state(finished / "study", plan)
    assert state is not None
    by_module = state.receipts["a"]
    with pytest.raises(Refused) as refused:
        check_receipts(plan, "a", {**by_module, "gan": replace(by_module["gan"], epsilon=3.0)})
    assert refused.value.code == "epsilon_below_charges"


def test_the_checkpoint_goes_on_after_a_restart(finished: Path, plan: StudyPlan) -> None:
    before = {name: len(Site(finished / name).ledger().entries()) for name in NODES.values()}
    grid = InProcessGrid(client_app, {node: finished / name for node, name in NODES.items()})
    run_in_process(server_app, grid, {"study-folder": str(finished / "study")})
    assert {name: len(Site(finished / name).ledger().entries()) for name in NODES.values()} == before
