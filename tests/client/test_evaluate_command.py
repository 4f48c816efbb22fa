"""`fedsynth evaluate`: what it refuses before it computes, what it writes, and what it says of privacy."""

from __future__ import annotations

import io
import json
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedsynth.attacks.values import Attacks, CopyCheck, MembershipAttack, OperatingPoint, Rate
from fedsynth.auditing.values import Audit, AuditedModule
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.evaluation.values import NOT_PUBLIC, Evaluation, Figure, Section, may_be_shared
from fedsynth.files import read_json, write_json
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.statement import PrivacyStatement, SiteStatement
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_client.evaluation.cli import app
from fedsynth_client.evaluation.cohorts import evaluated_patients, named_folders
from fedsynth_client.evaluation.show import show_attacks, show_audit, show_evaluation
from fedsynth_server.release.make import make_candidate

HOLDOUT = 8


@pytest.fixture(scope="module")
def release(tiny_plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate of six patients made of noise, which reads like a release."""
    rng = np.random.default_rng(5)
    image = tiny_plan.image
    grid = (image.slices, image.size, image.size)
    patients = [
        SyntheticPatient(
            f"SYN{number}",
            tiny_plan.label.classes[number % 2],
            rng.normal(size=len(tiny_plan.genes.panel)).astype(np.float32),
            rng.uniform(0.5, 0.9, len(tiny_plan.morphology.features)).astype(np.float32),
            rng.random((len(image.sequences), *grid), dtype=np.float32),
            (rng.random(grid) > 0.8).astype(np.uint8),
        )
        for number in range(6)
    ]
    sites = [
        SiteStatement(
            name=site.name, nominal_patients=40, epsilon=0.0, epsilon_lifetime=0.0, ledger_head="ab" * 32, mechanisms=[]
        )
        for site in tiny_plan.sites
    ]
    statement = PrivacyStatement(
        study=tiny_plan.name,
        plan_digest=tiny_plan.digest,
        private=True,
        epsilon_budget=tiny_plan.privacy.epsilon,
        delta=tiny_plan.privacy.delta,
        accountant="rdp",
        accountant_version="opacus",
        noise_source="operating system",
        sites=sites,
        trust_model="t",
        composition="c",
        not_covered=[],
        intended_use="i",
        forbidden_use="f",
    )
    out = tmp_path_factory.mktemp("release") / "out"
    return make_candidate(out, tiny_plan, patients, statement, {}, datetime(2026, 11, 20, tzinfo=UTC), ["bids"])


@pytest.fixture
def sites(tiny_folder: Path) -> Path:
    """Sites ``a`` and ``b`` with some patients held out."""
    for name in ("a", "b"):
        manifest = tiny_folder / name / "cohort" / "manifest.json"
        content = read_json(manifest)
        for entry in content["patients"][:HOLDOUT]:
            entry["split"] = "holdout"
        write_json(manifest, content)
    return tiny_folder


def evaluation(subject: str, data: str) -> Evaluation:
    figure = Figure(metric="AUC", better="higher", synthetic=0.7, interval=(0.6, 0.8), real=0.9, floor=0.5)
    gap = Figure(
        metric="Dice", better="higher", synthetic=None, note="A note. Not measured (synthetic): too few [red]."
    )
    section = Section(id="utility", title="Usefulness", explanation="e", figures=[figure, gap])
    return Evaluation(subject=subject, data=data, n_train=64, n_holdout=16, n_synthetic=6, sections=[section])


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a quick evaluation in the place of the real one, and keeps what that was asked for."""
    asked: dict[str, Any] = {}

    def quick(plan: StudyPlan, train: Any, holdout: Any, synthetic: Any, **others: Any) -> Evaluation:
        asked.update(others, plan=plan, train=train, holdout=holdout, synthetic=synthetic)
        return evaluation(subject_digest(synthetic), others["data"])

    monkeypatch.setattr("fedsynth.evaluation.evaluate.evaluate", quick)
    return asked


@pytest.fixture
def command() -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)

    return run


def test_an_evaluation_of_cohorts_and_site_folders_is_written_and_warned_of(
    command: Callable[..., Any], evaluated: dict[str, Any], release: Path, sites: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation.json"
    cohorts = ["--cohort", f"a={sites / 'a'}", "--cohort", f"b={sites / 'b' / 'cohort'}"]
    result = command("release", release, *cohorts, "--out", out, "--seed", 9)
    assert result.exception is None
    found = Evaluation.model_validate(read_json(out))
    assert (len(evaluated["train"]), len(evaluated["holdout"]), len(evaluated["synthetic"])) == (64, 16, 6)
    assert evaluated["train"].site_names == ("a", "b") and evaluated["seed"] == 9
    assert NOT_PUBLIC in found.data and not may_be_shared(found.data)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "without privacy" in result.stderr and "64 real patients" in result.stdout


def test_figures_of_public_patients_may_be_passed_on(
    command: Callable[..., Any], evaluated: dict[str, Any], release: Path, sites: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation.json"
    result = command(
        "release", release, "--cohort", f"a={sites / 'a'}", "--out", out, "--public", "--data", "TCGA", "--json"
    )
    assert result.exception is None
    assert may_be_shared(Evaluation.model_validate(read_json(out)).data)
    assert "without privacy" not in result.stderr
    envelope = json.loads(result.stdout)
    assert envelope["status"] == "ok" and envelope["data"]["evaluation"] == read_json(out)


def test_what_is_there_is_not_overwritten_and_nothing_is_computed(
    command: Callable[..., Any], evaluated: dict[str, Any], release: Path, sites: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation.json"
    out.write_text("mine")
    for kind in ("release", "attacks"):
        result = command(kind, release, "--cohort", f"a={sites / 'a'}", "--out", out)
        assert isinstance(result.exception, UsageError) and result.exception.code == "result_exists"
    assert out.read_text() == "mine" and not evaluated
    result = command("release", release, "--cohort", f"a={sites / 'a'}", "--out", tmp_path / "no" / "file")
    assert isinstance(result.exception, UsageError) and result.exception.code == "folder_missing"


@pytest.mark.parametrize("given", [["a"], ["=x"], ["a="], ["a=x", "a=y"]])
def test_a_cohort_without_name_or_folder_or_named_twice_is_refused(given: list[str]) -> None:
    with pytest.raises(UsageError, match="cohort_option"):
        named_folders(given)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("image", "size", 64), ("genes", "panel", ["X", "Y"]), ("label", "classes", ["a", "b", "c"])],
)
def test_a_cohort_of_another_plan_is_refused_by_what_differs(
    tiny_plan: StudyPlan, sites: Path, section: str, key: str, value: Any
) -> None:
    manifest = sites / "a" / "cohort" / "manifest.json"
    content = read_json(manifest)
    content[section][key] = value
    write_json(manifest, content)
    with pytest.raises(Refused, match="cohort_of_other_settings") as refusal:
        evaluated_patients(tiny_plan, named_folders([f"a={sites / 'a'}"]))
    assert f"({section})" in refusal.value.message


def test_a_cohort_that_lacks_a_feature_or_a_file_is_refused(tiny_plan: StudyPlan, sites: Path) -> None:
    import pandas as pd

    path = sites / "a" / "cohort" / "clinical.parquet"
    pd.read_parquet(path).drop(columns="volume").to_parquet(path)
    with pytest.raises(UsageError, match="cohort_unreadable"):
        evaluated_patients(tiny_plan, named_folders([f"a={sites / 'a'}"]))
    image = next((sites / "b" / "cohort" / "patients").iterdir())
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(UsageError, match="cohort_unreadable"):
        evaluated_patients(tiny_plan, named_folders([f"b={sites / 'b'}"]))
    shutil.rmtree(sites / "b" / "cohort" / "patients")
    with pytest.raises(UsageError, match="cohort_unreadable"):
        evaluated_patients(tiny_plan, named_folders([f"b={sites / 'b'}"]))
    with pytest.raises(UsageError, match="cohort_missing"):
        evaluated_patients(tiny_plan, named_folders([f"c={sites / 'study'}"]))


def test_too_few_held_out_patients_are_refused(tiny_plan: StudyPlan, tiny_folder: Path) -> None:
    with pytest.raises(Refused, match="cohort_too_small"):
        evaluated_patients(tiny_plan, named_folders([f"a={tiny_folder / 'a'}"]))  # nobody is held out there


def test_patients_whom_nobody_trained_on_are_not_attacked(
    command: Callable[..., Any], release: Path, sites: Path, tmp_path: Path
) -> None:
    result = command("attacks", release, "--cohort", f"elsewhere={sites / 'a'}", "--out", tmp_path / "attacks.json")
    assert isinstance(result.exception, UsageError) and result.exception.code == "cohort_not_of_study"
    assert "elsewhere" in result.exception.message and not (tmp_path / "attacks.json").exists()


def test_attacks_are_run_on_the_same_patients_and_written(
    command: Callable[..., Any], release: Path, sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def quick(plan: StudyPlan, train: Any, holdout: Any, synthetic: Any, **others: Any) -> Attacks:
        asked.update(others, train=train, holdout=holdout)
        return attacks(plan, subject_digest(synthetic), others["data"])

    monkeypatch.setattr("fedsynth.attacks.run.attack_release", quick)
    out = tmp_path / "attacks.json"
    result = command("attacks", release, "--cohort", f"a={sites / 'a'}", "--out", out, "--transcript", tmp_path)
    assert result.exception is None
    assert (len(asked["train"]), len(asked["holdout"])) == (32, HOLDOUT)
    assert asked["transcript"].folder == tmp_path
    assert not may_be_shared(Attacks.model_validate(read_json(out)).data)
    assert "without privacy" in result.stderr
    missing = command("attacks", release, "--cohort", f"a={sites / 'a'}", "--out", tmp_path / "b", "--transcript", "no")
    assert isinstance(missing.exception, UsageError) and missing.exception.code == "transcript_missing"


def attacks(plan: StudyPlan, subject: str, data: str) -> Attacks:
    chance = Rate(value=0.51, low=0.4, high=0.6)
    attack = MembershipAttack(
        id="a",
        title="Nearest [bold]",
        view="release",
        knows="k",
        source="s",
        members=32,
        non_members=8,
        area=chance,
        points=[OperatingPoint(asked=0.01, reached=chance, true_positive_rate=chance)],
        epsilon_bound=0.0,
    )
    copies = CopyCheck(
        of="genes",
        how="h",
        threshold=0.9,
        compared=6,
        found=2,
        found_holdout=1,
        participants=["SYN1", "SYN2"],
        most_similar=(0.95, 0.92),
    )
    return Attacks(
        plan_digest=plan.digest,
        subject=subject,
        data=data,
        sites=["a"],
        n_synthetic=6,
        membership=[attack],
        attributes=[],
        copies=[copies],
        distances=[],
        not_done=["no transcript"],
    )


def audited(bound: float) -> AuditedModule:
    return AuditedModule(
        module="gan",
        site="a",
        claimed_epsilon=2.0,
        delta=1e-5,
        sample_rate=0.25,
        noise_multiplier=1.0,
        steps=6,
        canaries=100,
        guesses=50,
        correct=49,
        confidence=0.95,
        epsilon_bound=bound,
        reachable=2.9,
        model="m",
        seconds=1.0,
    )


@pytest.mark.parametrize(("bound", "ok"), [(0.5, True), (2.6, False)])
def test_an_audit_that_refutes_the_claim_is_written_and_fails(
    command: Callable[..., Any],
    tiny_plan: StudyPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: float,
    ok: bool,
) -> None:
    found = Audit(
        plan_digest=tiny_plan.digest, code="c0" * 32, software="s", modules=[audited(bound)], checks=[], seconds=1.0
    )
    monkeypatch.setattr("fedsynth_client.auditing.run.audit_plan", lambda plan: found)
    save_plan(tiny_plan, tmp_path / "plan.toml")
    result = command("audit", tmp_path / "plan.toml", "--out", tmp_path / "audit.json", "--json")
    assert Audit.model_validate(read_json(tmp_path / "audit.json")) == found
    assert "without privacy" not in result.stderr, "no patient takes part in an audit"
    if ok:
        assert result.exception is None and json.loads(result.stdout)["data"]["audit"]["seconds"] == 1.0
    else:
        assert isinstance(result.exception, JobFailed) and result.exception.code == "audit_failed"
        assert "gan" in result.exception.message and not result.stdout


def test_tables_show_numbers_and_never_read_text_as_markup(tiny_plan: StudyPlan) -> None:
    def shown(show: Callable[[Any, Console], None], value: Any) -> str:
        console = Console(file=io.StringIO(), width=110)
        show(value, console)
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    text = shown(show_evaluation, evaluation("0" * 64, "patients [b]"))
    assert "0.7 0.6 to 0.8 0.9 0.5" in text and "patients [b]" in text
    assert "Dice. Not measured (synthetic): too few [red]." in text
    text = shown(show_attacks, attacks(tiny_plan, "0" * 64, "d"))
    assert "Nearest [bold] 32/8 0.51 (0.40 to 0.60) 51.0 % (40.0 to 60.0)" in text
    assert "2 of 6 synthetic patients" in text and "no transcript" in text
    found = Audit(plan_digest="0" * 64, code="c", software="s", modules=[audited(2.6)], checks=[], seconds=1.0)
    assert "A claim was refuted." in shown(show_audit, found)
    assert "2 2.6 2.9 49 of 50" in shown(show_audit, found)


def test_help_needs_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import fedsynth_client.evaluation.cli; "
        "print([m for m in ('torch','sklearn','nibabel','pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
