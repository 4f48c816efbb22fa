"""`fedsynth simulate`: a whole study on one machine."""

from __future__ import annotations

import typer

app = typer.Typer(help="Simulate hospitals and run a whole study on one machine.", invoke_without_command=True)


@app.callback()
def simulate() -> None:
    """Run a whole study on one machine."""
