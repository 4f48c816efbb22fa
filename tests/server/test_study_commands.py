"""What a coordinator types before a study: a plan from declared sizes, and its forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsynth.errors import UsageError
from fedsynth.plan import load_plan
from fedsynth_server.cli import study

PANEL = "gene\tcenter\tscale\n" + "".join(f"G{i}\t0.{i}\t1.{i}\n" for i in range(9))


def new(tmp_path: Path, *extra: str, panel: str = PANEL) -> Path:
    (tmp_path / "panel.tsv").write_text(panel)
    out = tmp_path / "plan.toml"
    arguments = ["new", str(out), "--panel", str(tmp_path / "panel.tsv"), "--name", "trial"]
    arguments += ["--purpose", "a trial of the software", *(extra or ("--site", "a=200", "--site", "b=400"))]
    result = CliRunner().invoke(study, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out


def test_new_writes_a_plan_that_loads_and_holds_what_was_said(tmp_path: Path) -> None:
    plan = load_plan(new(tmp_path, "--site", "a=200", "--site", "b=400", "--epsilon", "3"))
    assert {site.name: site.nominal_patients for site in plan.sites} == {"a": 200, "b": 400}
    assert plan.privacy.epsilon == 3
    assert plan.genes.panel == [f"G{i}" for i in range(9)]
    assert plan.genes.scale[3] == 1.3


def test_new_never_writes_over_a_plan(tmp_path: Path) -> None:
    before = new(tmp_path).read_bytes()
    with pytest.raises(UsageError, match="already there"):
        new(tmp_path, "--site", "a=100")
    assert (tmp_path / "plan.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("site", "panel", "code"),
    [
        ("a", PANEL, "site_malformed"),
        ("a=-4", PANEL, "site_malformed"),
        ("Clinic A=40", PANEL, "site_malformed"),
        ("a=200", "gene\tcenter\nG0\t0\n", "panel_unreadable"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t\nG1\t0\t1\n", "panel_unreadable"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t1\nG0\t0\t1\n", "plan_invalid"),
        ("a=200", "gene\tcenter\tscale\nG0\t0\t-1\nG1\t0\t1\n", "plan_invalid"),
    ],
)
def test_new_says_what_is_wrong(tmp_path: Path, site: str, panel: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        new(tmp_path, "--site", site, panel=panel)
    assert caught.value.code == code
    assert not (tmp_path / "plan.toml").exists()


def test_check_prints_cost_and_advice_before_anything_is_spent(tmp_path: Path) -> None:
    path = new(tmp_path, "--site", "tiny=30")
    shown = CliRunner().invoke(study, ["check", str(path)])
    assert "all modules together epsilon" in shown.output
    assert "gan will drown in noise" in shown.output and "twice the epsilon" in shown.output
    found = json.loads(CliRunner().invoke(study, ["check", str(path), "--json"]).stdout)["data"]
    assert found["digest"] == load_plan(path).digest
    assert found["epsilon"]["tiny"] == pytest.approx(10.0, abs=0.1) and found["epsilon"]["tiny"] <= 10.0
    assert {row["module"] for row in found["modules"]} == {"autoencoder", "radiogenomics", "gan"}
