"""The table of a sweep."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def line(recipe: str, epsilon: str, arrangement: str, auc: float | None, **more: object) -> str:
    run = {"recipe": recipe, "epsilon": epsilon, "patients": 300, "arrangement": arrangement, "size": 32}
    return json.dumps({**run, "tumour_auc": auc, **more})


def test_cells_are_means_over_seeds_beside_ceiling_and_floor(report, tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    lines = [
        line("real", "inf", "pooled", 0.95),
        line("public", "inf", "pooled", 0.5, patients=0),
        line("embedding", "3.0", "federated", 0.7),
        line("embedding", "3.0", "federated", 0.8),
        line("embedding", "10.0", "federated", None),
        line("embedding", "inf", "pooled", 0.9),
        line("warm", "3.0", "federated", 0.6, variant="long"),
        line("warm", "3.0", "federated", 0.1, size=64),
    ]
    path.write_text("\n".join(lines) + "\n")
    rows = report.table(report.read([path], 32), "tumour_auc").splitlines()
    assert rows[0] == "| recipe | epsilon | federated 300 | pooled 300 |"
    assert rows[2:] == [
        "| real | - | 0.950 | 0.950 |",
        "| public | - | 0.500 | 0.500 |",
        "| warm, long | 3 | 0.600 |  |",
        "| embedding | 3 | 0.750 ± 0.050 |  |",
        "| embedding | 10 |  |  |",
        "| embedding | inf |  | 0.900 |",
    ]
    monkeypatch.setattr("sys.argv", ["report.py", "--runs", str(path), "--out", str(tmp_path)])
    report.main()
    assert (tmp_path / "recipes.png").stat().st_size > 5000
    assert "grade" not in (tmp_path / "recipes.md").read_text()  # measured in no run
