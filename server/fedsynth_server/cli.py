"""`fedsynth study` and `fedsynth release`: what a coordinator and a recipient type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsynth_server.coordinator.commands import add_commands

study = typer.Typer(help="Write and check a study plan; run the study's coordinator.", no_args_is_help=True)
release = typer.Typer(help="Make and verify releases.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@study.command()
def new(
    out: Annotated[Path, typer.Argument(help="The plan to write (TOML).")],
    panel: Annotated[
        Path, typer.Option(help="Gene panel: a TSV with columns gene, center, scale (public references).")
    ],
    site: Annotated[list[str], typer.Option(help="NAME=PATIENTS, the size that the site declares; repeat.")],
    name: Annotated[str, typer.Option(help="Name of the study: lower-case letters, digits and dashes.")],
    purpose: Annotated[str, typer.Option(help="One sentence for those who approve the plan.")],
    epsilon: Annotated[float, typer.Option(min=0.01, help="Budget of a patient over the whole study.")] = 10.0,
    delta: Annotated[float, typer.Option(help="Delta of the budget.")] = 1e-5,
    measure: Annotated[str, typer.Option(help="What expression tables hold: abundance or zscore.")] = "abundance",
    warm_start: Annotated[Path | None, typer.Option(help="Public weights to start the GAN from.")] = None,
) -> None:
    """Write a plan with defaults for the sizes given; read and edit it, then check it."""
    from fedsynth.plan import save_plan
    from fedsynth_server.new_plan import new_plan

    plan = new_plan(
        name=name,
        purpose=purpose,
        panel=panel,
        sites=site,
        epsilon=epsilon,
        delta=delta,
        measure=measure,
        warm_start=warm_start,
    )
    if out.exists():
        from fedsynth.errors import UsageError

        raise UsageError("plan_exists", f"{out} is already there.", "Name another file.")
    save_plan(plan, out)
    typer.echo(f"Wrote {out}, digest {plan.digest}. Next: fedsynth study check {out}")


@study.command("check")
def check_plan(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")],
    weights: Annotated[
        Path | None, typer.Option(help="The plan's file of public weights, for a sharper forecast.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a plan will cost at every site, what its noise leaves to learn, and which engines suit it."""
    from fedsynth.plan import load_plan
    from fedsynth_server.forecast_command import show_forecast

    show_forecast(load_plan(plan), as_json, weights)


add_commands(study)


@release.command()
def keygen(out: Annotated[Path, typer.Argument(help="Where to write the private key (PEM, mode 0600).")]) -> None:
    """Make an Ed25519 key for signing releases; prints the fingerprint to publish."""
    from fedsynth_server.release.manifest import generate_key

    typer.echo(f"Wrote {out}. Publish this fingerprint: {generate_key(out)}")


@release.command()
def make(
    folder: Annotated[Path, typer.Argument(help="The study's folder (plan.toml and checkpoint).")],
    out: Annotated[Path, typer.Option(help="The release to write; must not exist.")],
    key: Annotated[Path, typer.Option(help="Private signing key (see keygen).")],
    patients: Annotated[int, typer.Option(min=1, help="Synthetic patients to draw.")] = 150,
    evaluation: Annotated[Path | None, typer.Option(help="An evaluation to put into the report (JSON).")] = None,
) -> None:
    """Draw synthetic patients from a finished study and write a signed release."""
    from fedsynth_server.release.from_study import release_study

    typer.echo(f"Release: {release_study(folder, out, key, patients, evaluation)}")


@release.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The release.")],
    key: Annotated[
        str | None, typer.Option(help="The coordinator's public key (PEM file) or its fingerprint, from elsewhere.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check integrity, signature, structure and privacy statement of a release."""
    from fedsynth_server.release.command import verify_command

    verify_command(folder, key, as_json)
