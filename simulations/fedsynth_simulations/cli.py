"""`fedsynth simulate`: a whole study on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Simulate hospitals and run a whole study on one machine.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the study; an interrupted one goes on where it stopped.")] = Path(
        "runs/demo"
    ),
    patients: Annotated[int, typer.Option(min=20, help="Patients a simulated hospital.")] = 240,
    synthetic: Annotated[int, typer.Option(min=1, help="Synthetic patients in the release.")] = 150,
    epsilon: Annotated[
        float, typer.Option(min=0.01, help="Budget of a patient over the whole study; inf is a study without privacy.")
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated hospitals (never of the privacy noise).")] = 23,
    site: Annotated[
        list[Path] | None, typer.Option(help="A real site's folder, in place of simulated ones; repeat for each site.")
    ] = None,
    sources: Annotated[
        Path | None, typer.Option(help="sources.toml that describes all --site folders; paths relative to each folder.")
    ] = None,
    warm_start: Annotated[
        Path | None, typer.Option(help="Public weights to start the GAN from; default: those that the package carries.")
    ] = None,
    cold_start: Annotated[bool, typer.Option("--cold-start", help="Start the GAN from random weights.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the federation over Flower's Ray engine (extra 'ray').")
    ] = False,
    reproducible_seed: Annotated[
        int | None, typer.Option(help="Seed the privacy noise. The run is then reproducible and NOT PRIVATE.")
    ] = None,
) -> None:
    """Make three hospitals, train over them under differential privacy, and release a signed synthetic cohort."""
    if context.invoked_subcommand is not None:
        return
    from fedsynth.errors import UsageError
    from fedsynth_simulations.study import Settings, run
    from fedsynth_simulations.weights import PACKAGED

    if bool(site) != (sources is not None):
        raise UsageError(
            "sources_missing", "--site and --sources go together.", "Name the file that describes the folders."
        )
    start = "" if cold_start else str(warm_start.resolve()) if warm_start else PACKAGED
    release = run(
        out,
        Settings(
            patients=patients,
            seed=seed,
            epsilon=epsilon,
            synthetic=synthetic,
            site_folders=tuple(str(each.resolve()) for each in site or ()),
            sources=str(sources.resolve()) if sources else "",
            warm_start=start,
            reproducible_seed=reproducible_seed,
            backend="ray" if ray else "in-process",
        ),
    )
    typer.echo(f"Release: {release}")
    typer.echo(f"Report:  {release / 'report.html'}")


@app.command()
def hospitals(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    patients: Annotated[int, typer.Option(min=1, help="Patients a hospital.")] = 240,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal files.")] = 23,
) -> None:
    """Write the simulated hospitals alone: DICOM, BIDS and patient folders, with planted identifiers and faults."""
    from fedsynth_simulations.hospitals import write_hospitals

    write_hospitals(out, patients, seed)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    patients: Annotated[int, typer.Option(min=16, help="Public simulated patients to train on.")] = 1600,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 3500,
    seed: Annotated[int, typer.Option(help="Of the public cohort and the training.")] = 11,
    networks_from: Annotated[
        Path | None, typer.Option(help="Take the networks from this file and renew the statistics' weights alone.")
    ] = None,
) -> None:
    """Make the public weights that the package carries, on a public simulated cohort without any private data.

    Generator, discriminator and autoencoder to start from, and the directions and features that statistics are taken in.
    """
    from fedsynth_simulations.weights import make_warm_start, renew_statistics

    if networks_from is not None:
        renew_statistics(out, networks_from, patients, seed)
    else:
        make_warm_start(out, patients, steps, seed)
