"""`fedsynth study init|start|status|...`: what the person types who runs a study's coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StudyFolder = Annotated[Path, typer.Argument(help="The study's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Detach = Annotated[bool, typer.Option("--detach", help="Start in the background and return.")]


def init(
    folder: StudyFolder,
    plan: Annotated[Path, typer.Option(help="The study plan (TOML).")],
    gateway: Annotated[str, typer.Option(help="HOST:PORT under which the sites will reach the gateway.")],
    weights: Annotated[Path | None, typer.Option(help="The plan's file of public weights, if it names any.")] = None,
) -> None:
    """Lay out a study's folder for its coordinator."""
    from fedsynth.deployment.network import split_address
    from fedsynth_server.coordinator.setup import init_study

    study = init_study(folder, plan, gateway, weights)
    typer.echo(f"Laid out {folder} for study {study.plan.name}, digest {study.plan.digest}. Next:")
    typer.echo(f"  put ca.crt, gateway.crt and gateway.key (for {split_address(gateway)[0]}), superlink.crt and")
    typer.echo(f"  superlink.key (for localhost and 127.0.0.1) and superexec.secret into {folder / 'keys'}")
    typer.echo("  (`fedsynth deploy` makes them)")
    typer.echo(f"  fedsynth study add-site {folder} KEY.pub --name {study.plan.sites[0].name}   and so on")
    typer.echo(f"  fedsynth study doctor {folder}")
    typer.echo(f"  fedsynth study start {folder}")


def start(folder: StudyFolder, detach: Detach = False) -> None:
    """Run SuperLink, gateway and the study; goes on from a checkpoint if there is one. Ends when the study does."""
    from fedsynth_server.coordinator.settings import Study
    from fedsynth_server.coordinator.start import prepare, run_detached, run_supervised

    study = Study(folder)
    if prepare(study):
        run_detached(study) if detach else run_supervised(study)


def resume(folder: StudyFolder, detach: Detach = False) -> None:
    """Go on from the checkpoint; refuses when there is none."""
    from fedsynth.errors import UsageError
    from fedsynth_server.coordinator.progress import progress_of
    from fedsynth_server.coordinator.settings import Study

    study = Study(folder)
    if progress_of(folder, study.plan) is None:
        raise UsageError(
            "no_checkpoint", f"There is no checkpoint in {folder}.", f"To begin: fedsynth study start {folder}"
        )
    start(folder, detach)


def stop(folder: StudyFolder) -> None:
    """End the run and the processes; the checkpoint of the last complete round stays."""
    from fedsynth_server.coordinator.settings import Study
    from fedsynth_server.coordinator.stopping import stop_study

    typer.echo(stop_study(Study(folder)))


def status(folder: StudyFolder, as_json: AsJson = False) -> None:
    """Show processes, progress and every site, and what is missing."""
    from fedsynth.cli import envelope
    from fedsynth_server.coordinator.overview import overview, render
    from fedsynth_server.coordinator.settings import Study

    view = overview(Study(folder))
    if as_json:
        envelope(view.model_dump(mode="json"))
    else:
        typer.echo("\n".join(render(view)))


def watch(
    folder: StudyFolder, seconds: Annotated[float, typer.Option(min=0.5, help="Between two looks.")] = 2.0
) -> None:
    """Show the status as it changes, until the study ends or Ctrl-C."""
    from fedsynth_server.coordinator.settings import Study
    from fedsynth_server.coordinator.watching import watch_study

    watch_study(Study(folder), seconds)


def log(
    folder: StudyFolder,
    name: Annotated[
        str | None, typer.Argument(help="supervisor, runner, superlink or gateway; all if left out.")
    ] = None,
    lines: Annotated[int, typer.Option(min=0, help="How many of the last lines.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
) -> None:
    """Show what the processes wrote."""
    from fedsynth_server.coordinator import logs

    paths = logs.find(folder, name)
    for path in paths:
        for line in logs.last_lines(path, lines):
            typer.echo(line if name else f"{path.stem:10} {line}")
    if follow:
        for path, line in logs.follow(paths, stopped=lambda: False):
            typer.echo(line if name else f"{path.stem:10} {line}")


def add_site(
    folder: StudyFolder,
    key: Annotated[Path, typer.Argument(help="The site's public key (node.pub).")],
    name: Annotated[str, typer.Option(help="The site's name in the plan.")],
) -> None:
    """Let a site of the plan take part, under its public key."""
    from fedsynth_server.coordinator.registry import add_site as add
    from fedsynth_server.coordinator.settings import Study
    from fedsynth_server.coordinator.stopping import apply_registry

    study = Study(folder)
    record = add(study, key, name)
    typer.echo(f"Added {name} with key {record.fingerprint}. Compare this fingerprint with the site, by telephone.")
    typer.echo(apply_registry(study, f"{name} is registered.", f"{name} is registered as soon as SuperLink runs."))


def sites(folder: StudyFolder, as_json: AsJson = False) -> None:
    """List the sites that were added, and the revoked ones."""
    from fedsynth.cli import envelope
    from fedsynth_server.coordinator.registry import read_registry

    records = read_registry(folder).sites
    if as_json:
        envelope([record.model_dump(mode="json", exclude={"public_key"}) for record in records])
        return
    for record in records:
        state = f"revoked {record.revoked:%Y-%m-%d %H:%M}" if record.revoked else f"added {record.added:%Y-%m-%d %H:%M}"
        typer.echo(f"{record.name:20} {record.fingerprint}  {state}")
    if not records:
        typer.echo("No site was added yet.")


def revoke(
    folder: StudyFolder,
    name: Annotated[str, typer.Argument(help="The site's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Revoke a site's key: it is refused from then on. The site can be added anew with a new key."""
    from fedsynth_server.coordinator.registry import revoke_site
    from fedsynth_server.coordinator.settings import Study
    from fedsynth_server.coordinator.stopping import apply_registry

    study = Study(folder)
    if not yes:
        typer.confirm(f"Revoke the key of {name}? It cannot be taken back.", abort=True)
    record = revoke_site(study, name)
    typer.echo(f"Revoked {name}, key {record.fingerprint}.")
    typer.echo(
        apply_registry(
            study, "SuperLink refuses it from now on.", "SuperLink does not run; it will refuse this key when it does."
        )
    )


def gateway_config(
    folder: StudyFolder,
    keys: Annotated[
        Path | None, typer.Option(help="The folder there that holds keys/, run/ and logs/; this one if left out.")
    ] = None,
    superlink: Annotated[str | None, typer.Option(help="HOST:PORT of SuperLink as seen from there.")] = None,
) -> None:
    """Print the nginx configuration for a gateway that runs elsewhere."""
    from fedsynth_server.coordinator.gateway import render
    from fedsynth_server.coordinator.settings import Study

    typer.echo(render(Study(folder), elsewhere=keys or folder.absolute(), superlink=superlink), nl=False)


def doctor(folder: StudyFolder, as_json: AsJson = False) -> None:
    """Check everything that the coordinator needs: one line each, with the remedy; changes nothing."""
    from dataclasses import asdict

    from fedsynth.cli import envelope
    from fedsynth.deployment.checks import show
    from fedsynth.errors import ExitCode
    from fedsynth_server.coordinator.doctor import examine
    from fedsynth_server.coordinator.settings import Study

    lines = examine(Study(folder))
    if as_json:
        envelope([asdict(line) for line in lines])
    else:
        show(lines)
    if not all(line.ok for line in lines):
        raise typer.Exit(ExitCode.REFUSED)


def add_commands(study: typer.Typer) -> None:
    """Add the coordinator's commands to `fedsynth study`."""
    for command in (init, doctor, start, status, watch, stop, resume, log, sites, revoke):
        study.command()(command)
    study.command("add-site")(add_site)
    study.command("gateway-config")(gateway_config)
