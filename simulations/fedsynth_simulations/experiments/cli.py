"""`fedsynth experiment`: the systems of the source papers, run side by side and set beside the papers' figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run the systems of the source papers, privately and not, beside the papers' figures.")

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command("list")
def list_experiments() -> None:
    """Name the experiments that this installation carries."""
    import tomllib

    from fedsynth_simulations.experiments.spec import folder

    for path in sorted(folder().glob("*.toml")):
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
        typer.echo(f"{path.stem:18} {spec['data']:14} {spec['title']}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="An experiment of `fedsynth experiment list`, or a TOML file.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the real data that the experiment names.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; an interrupted one goes on. Default: runs/experiments/NAME.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that all works, on simulated data.")] = False,
) -> None:
    """Train every column of an experiment, measure, and write result.json, table.md and figures."""
    from fedsynth_simulations.experiments.run import run_experiment
    from fedsynth_simulations.experiments.spec import find

    path = find(name)
    folder = out or Path("runs/experiments") / path.stem
    run_experiment(path, data, folder, quick=quick)
    typer.echo(f"Table: {folder / 'table.md'}")


@app.command()
def draw(
    run: Run,
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    count: Annotated[int, typer.Option(min=1, max=400, help="How many synthetic slices.")] = 24,
    column: Annotated[str, typer.Option(help="Whose generator; default: the first column's.")] = "",
    label: Annotated[str, typer.Option(help="Of this class only.")] = "",
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal slices.")] = 0,
) -> None:
    """Draw synthetic slices with a generator that a run has saved."""
    from fedsynth_simulations.experiments.drawing import draw_from_run

    draw_from_run(run, column, label, count, seed, out)
    typer.echo(str(out))


@app.command()
def note(
    run: Run, text: Annotated[str, typer.Argument(help="What somebody saw who looked at the pictures and tables.")]
) -> None:
    """Add a finding in words to a finished run."""
    from fedsynth_simulations.experiments.run import load_result, write_result

    result = load_result(run)
    write_result(run, result.model_copy(update={"notes": [*result.notes, text]}))


@app.command()
def overview(
    runs: Annotated[Path, typer.Argument(help="Folder of the folders of finished runs.")],
) -> None:
    """Print one table of all finished runs in a folder, as Markdown."""
    from fedsynth_simulations.experiments.rendering import overview_text
    from fedsynth_simulations.experiments.run import load_result

    folders = sorted(path.parent for path in runs.glob("*/result.json"))
    typer.echo(overview_text([load_result(folder) for folder in folders]), nl=False)
