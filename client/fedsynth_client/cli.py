"""`fedsynth site`: what a hospital types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run a hospital's side: prepare data, set the policy, read the ledger.", no_args_is_help=True)

SiteFolder = Annotated[Path, typer.Argument(help="The site's folder.")]
PlanFile = Annotated[Path, typer.Argument(help="The study plan (TOML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def init(
    folder: SiteFolder,
    name: Annotated[str, typer.Option(help="Name under which study plans know this site.")],
    declared_patients: Annotated[int, typer.Option(help="Cohort size to make public: a rounded figure, not a count.")],
) -> None:
    """Lay out a site's folder with a policy that allows nothing until it is filled in."""
    from fedsynth_client.setup import init_site

    typer.echo(f"Wrote {init_site(folder, name, declared_patients)}: it allows nothing yet. Fill it in, then run")
    typer.echo(f"  fedsynth site prepare PLAN SOURCES --out {folder / 'cohort'}")
    typer.echo(f"  fedsynth site approve {folder} PLAN")


@app.command()
def prepare(
    plan: PlanFile,
    sources: Annotated[Path, typer.Argument(help="sources.toml: where the hospital's files are and what they mean.")],
    out: Annotated[Path, typer.Option(help="The cohort folder to write, usually SITE/cohort.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace a cohort that is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn the hospital's images, expression and clinical tables into a prepared cohort."""
    from fedsynth_client.ingest.command import prepare_command

    prepare_command(plan, sources, out, as_json, replace)


@app.command()
def approve(
    folder: SiteFolder,
    plan: PlanFile,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Approve a study plan by its digest, after showing what it asks for."""
    from fedsynth.plan import load_plan
    from fedsynth_client.setup import plan_summary
    from fedsynth_client.site import Site

    asked = load_plan(plan)
    site = Site(folder)
    typer.echo(plan_summary(asked, site.policy().site))
    if not yes:
        typer.confirm("Approve this plan for this site?", abort=True)
    site.approve(asked)
    typer.echo(f"Approved {asked.digest}.")


@app.command()
def check(
    folder: SiteFolder,
    plan: Annotated[Path | None, typer.Option(help="A study plan to check against the policy and the ledger.")] = None,
) -> None:
    """Check policy, cohort, ledger and, with --plan, whether the plan could run here; spends nothing."""
    from fedsynth.errors import ExitCode
    from fedsynth.plan import load_plan
    from fedsynth_client.preflight import preflight
    from fedsynth_client.site import Site

    lines = preflight(Site(folder), load_plan(plan) if plan else None)
    for line in lines:
        mark = typer.style("ok  ", fg="green") if line.ok else typer.style("FAIL", fg="red")
        typer.echo(f"{mark} {line.what}" + (f"\n     {line.remedy}" if line.remedy else ""))
    if not all(line.ok for line in lines):
        raise typer.Exit(ExitCode.REFUSED)


@app.command()
def ledger(folder: SiteFolder, as_json: AsJson = False) -> None:
    """Show what was spent on what, and what is left."""
    from fedsynth.cli import envelope
    from fedsynth_client.account import account, render
    from fedsynth_client.site import Site

    current = account(Site(folder))
    if as_json:
        envelope(current.model_dump(mode="json"))
    else:
        render(current)
