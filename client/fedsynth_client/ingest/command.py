"""What `fedsynth site prepare` does; the command line itself lies in `fedsynth_client.cli`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsynth.cli import envelope
from fedsynth.plan import load_plan
from fedsynth.progress import say
from fedsynth_client.ingest.prepare import NothingUsable, prepare
from fedsynth_client.ingest.report import PreparationReport, render


def report_path(out: Path) -> Path:
    """Where the report of the cohort at `out` lies: beside the cohort, because it names the hospital's files."""
    return out.with_name(f"{out.name}-report.json")


def prepare_command(plan_path: Path, sources_path: Path, out: Path, as_json: bool, replace: bool) -> PreparationReport:
    """Prepare a cohort, save the report beside it, and print it as tables or as JSON on stdout.

    Raises:
        FedsynthError: see `prepare`; when no patient is usable, the report is saved and printed all the same.
    """
    plan = load_plan(plan_path)
    try:
        report = prepare(plan, sources_path, out, np.random.default_rng(), replace=replace)
    except NothingUsable as error:
        _save(error.report, out)
        if not as_json:
            _print(error.report)
        raise
    _save(report, out)
    if as_json:
        envelope({"cohort": str(out), "report": str(report_path(out)), **report.as_json()})
    else:
        _print(report)
        say(f"Cohort: {out}. Full report: {report_path(out)}")
    return report


def _save(report: PreparationReport, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    report.save(report_path(out))


def _print(report: PreparationReport) -> None:
    from rich.console import Console

    render(report, Console())
