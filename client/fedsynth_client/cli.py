"""`fedsynth site`: what a hospital types."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedsynth.deployment.checks import Line

app = typer.Typer(help="Run a hospital's side: prepare data, set the policy, read the ledger.", no_args_is_help=True)

SiteFolder = Annotated[Path, typer.Argument(help="The site's folder.")]
PlanFile = Annotated[Path, typer.Argument(help="The study plan (TOML).")]
Plan = Annotated[str, typer.Argument(help="The study plan: its file, or the digest of one that was shown here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Only = Annotated[
    Literal["node", "runner"] | None,
    typer.Option(help="Run one part alone: node (network, no data) or runner (data, no network)."),
]

plan_app = typer.Typer(help="Look at study plans.", no_args_is_help=True)
audit_app = typer.Typer(help="Check that everything the site holds agrees.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
app.add_typer(audit_app, name="audit")


@app.command()
def init(
    folder: SiteFolder,
    name: Annotated[str | None, typer.Option(help="Name under which study plans know this site.")] = None,
    declared_patients: Annotated[
        int | None, typer.Option(help="Cohort size to make public: a rounded figure, not a count.")
    ] = None,
    gateway: Annotated[
        str | None, typer.Option(help="The coordinator's gateway, HOST:PORT: lay out the node, too.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="The authority that vouches for it, from the coordinator (PEM).")
    ] = None,
    runtime_name: Annotated[
        list[str] | None,
        typer.Option(help="Name under which the runner finds the node, if they run in two containers."),
    ] = None,
) -> None:
    """Lay out a site's folder: a policy that allows nothing until it is filled in, and the node's settings and keys."""
    from fedsynth.errors import UsageError
    from fedsynth_client.setup import init_node, init_site

    if (name is None) != (declared_patients is None) or (gateway is None) != (ca is None) or not (name or gateway):
        raise UsageError(
            "options_incomplete",
            "A policy needs --name and --declared-patients, a node --gateway and --ca.",
            "Give one of the two pairs, or both.",
        )
    if name is not None and declared_patients is not None:
        typer.echo(f"Wrote {init_site(folder, name, declared_patients)}: it allows nothing yet. Fill it in, then run")
        typer.echo(f"  fedsynth site prepare PLAN SOURCES --out {folder / 'cohort'}")
        typer.echo(f"  fedsynth site plan show {folder} PLAN")
        typer.echo(f"  fedsynth site approve {folder} PLAN")
    if gateway is not None and ca is not None:
        fingerprint = init_node(folder, gateway, ca, runtime_name or [])
        typer.echo(f"Wrote {folder / 'node.toml'} and the node's keys. Send the coordinator")
        typer.echo(f"  {folder / 'keys' / 'node.pub'}   (the public key; {fingerprint})")
        typer.echo("and tell the fingerprint by another way, e.g. by telephone. Then run")
        typer.echo(f"  fedsynth site check {folder}")
        typer.echo(f"  fedsynth site start {folder}")


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


@plan_app.command("show")
def plan_show(folder: SiteFolder, plan: Plan) -> None:
    """Show what a study plan asks of this site, and keep a copy, so that it can be approved by its digest."""
    from fedsynth_client.setup import find_plan, plan_summary
    from fedsynth_client.site import Site

    site = Site(folder)
    asked = find_plan(site, plan)
    typer.echo(plan_summary(asked, site.policy().site))
    site.offer(asked)
    if asked.digest in site.policy().approved_plans:
        typer.echo("It is approved at this site.")
    else:
        typer.echo(f"To approve it: fedsynth site approve {folder} {asked.digest}")


@app.command()
def approve(
    folder: SiteFolder,
    plan: Plan,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Approve a study plan by its digest, after showing what it asks for."""
    from fedsynth_client.setup import find_plan, plan_summary
    from fedsynth_client.site import Site

    site = Site(folder)
    asked = find_plan(site, plan)
    typer.echo(plan_summary(asked, site.policy().site))
    private = asked.privacy.private
    if not yes:
        typer.confirm(f"Approve this plan{'' if private else ' WITHOUT PRIVACY'} for this site?", abort=True)
    site.approve(asked)
    typer.echo(f"Approved {asked.digest}.")
    if not private and not site.policy().allow_not_private:
        typer.echo("The policy still refuses it: allow_not_private is false.")


@app.command("dry-run")
def dry_run_command(folder: SiteFolder, plan: Plan, as_json: AsJson = False) -> None:
    """Show exactly which records would leave, and which arrive, if a plan ran; trains, spends and sends nothing."""
    from fedsynth.cli import envelope
    from fedsynth_client.dry_run import dry_run, render
    from fedsynth_client.setup import find_plan
    from fedsynth_client.site import Site

    site = Site(folder)
    asked = find_plan(site, plan)
    planned = dry_run(asked, site.policy().site)
    if as_json:
        envelope(planned.model_dump(mode="json"))
    else:
        typer.echo(render(planned, asked.name))


@app.command()
def check(
    folder: SiteFolder,
    plan: Annotated[Path | None, typer.Option(help="A study plan to check against the policy and the ledger.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Contact nobody.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check machine, files, policy, cohort, ledger and the way to the coordinator; spends nothing.

    With --plan also whether that plan could run here.
    """
    from fedsynth.plan import load_plan
    from fedsynth_client.node.doctor import site_lines
    from fedsynth_client.site import Site

    _report(site_lines(Site(folder), load_plan(plan) if plan else None, offline), as_json)


def _report(lines: list[Line], as_json: bool) -> None:
    """Print checks; the command ends as refused when one of them failed."""
    from dataclasses import asdict

    from fedsynth.cli import envelope
    from fedsynth.deployment.checks import show
    from fedsynth.errors import ExitCode

    passed = all(line.ok for line in lines)
    if as_json:
        envelope({"passed": passed, "checks": [asdict(line) for line in lines]})
    else:
        show(lines)
    if not passed:
        raise typer.Exit(ExitCode.REFUSED)


@app.command()
def start(
    folder: SiteFolder,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
    only: Only = None,
) -> None:
    """Run the site's node (SuperNode and runner) until it is stopped; stays in the foreground."""
    from fedsynth.deployment.supervisor import start_detached
    from fedsynth_client.node import start as node

    folder = folder.resolve()
    if detach:
        node.prepare(folder, only)
        process = start_detached(folder, node.start_command(folder, only))
        typer.echo(f"Started (process {process}). fedsynth site status {folder} shows how it does.")
    else:
        node.start(folder, only)


@app.command()
def status(
    folder: SiteFolder,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the coordinator's gateway.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show whether the node runs, reaches the coordinator, and what it answered and sent last."""
    from fedsynth.cli import envelope
    from fedsynth.deployment.checks import show
    from fedsynth.errors import ExitCode
    from fedsynth_client.node.status import lines_of, node_status

    found = node_status(folder, ask_coordinator=not offline)
    if as_json:
        envelope(found.model_dump(mode="json"))
    else:
        show(lines_of(found))
    if not found.running:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def stop(folder: SiteFolder) -> None:
    """Stop the site's node. A task in hand ends; its charge stands, and it runs again under it when asked again."""
    from fedsynth.deployment import supervisor

    there_was_one = supervisor.stop(folder)
    typer.echo("Stopped." if there_was_one else "Ended what a killed supervisor had left running.")


@app.command()
def sent(folder: SiteFolder, as_json: AsJson = False) -> None:
    """Show what left this site: what, how large, with which digest, when, to whom."""
    from fedsynth.cli import envelope
    from fedsynth_client.sent import render
    from fedsynth_client.sent import sent as sent_by
    from fedsynth_client.site import Site

    site = Site(folder)
    site.policy()  # a folder that is no site's must not get a ledger by being asked
    found = sent_by(site)
    if as_json:
        envelope([each.model_dump(mode="json") for each in found])
    else:
        typer.echo(render(found))


@audit_app.command("verify")
def audit_verify(
    folder: SiteFolder,
    head: Annotated[
        str | None,
        typer.Option(help="A ledger head that somebody else noted, or its first 12 digits; it must be in the chain."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the whole ledger against plans, stored answers and policy; changes nothing."""
    from fedsynth_client.audit import audit
    from fedsynth_client.site import Site

    site = Site(folder)
    site.policy()
    _report(audit(site, head), as_json)


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


@app.command("countersign-key")
def countersign_key(folder: SiteFolder) -> None:
    """Make this site's key for countersigning releases, if it has none, and print its public half for the study plan."""
    from fedsynth_client.countersign import make_key
    from fedsynth_client.site import Site

    site = Site(folder)
    name = site.policy().site
    typer.echo(f'In the plan\'s [[sites]] entry of {name}: countersign_key = "{make_key(site)}"')


@app.command()
def countersign(
    folder: SiteFolder,
    candidate: Annotated[Path, typer.Argument(help="The candidate of a release, from the coordinator.")],
    out: Annotated[Path, typer.Option(help="The file to write, for the coordinator.")],
    attacks: Annotated[
        Path | None,
        typer.Option(help="The report of this site's own attacks (fedsynth evaluate attacks); it stays here."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Agree to the release of a candidate, after holding it against this site's own ledger and attacks."""
    from fedsynth_client.countersign import countersign as sign
    from fedsynth_client.countersign import prepare
    from fedsynth_client.site import Site

    site = Site(folder)
    prepared = prepare(site, candidate, attacks)
    typer.echo(prepared.summary)
    if not yes:
        typer.confirm("Countersign this content for this site?", abort=True)
    sign(site, prepared, out)
    typer.echo(f"Wrote {out}. Send it to the coordinator; it holds no figure of yours.")
