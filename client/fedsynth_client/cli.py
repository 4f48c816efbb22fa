"""`fedsynth site`: what a hospital types."""

from __future__ import annotations

import typer

app = typer.Typer(help="Run a hospital's side: prepare data, set the policy, read the ledger.", no_args_is_help=True)


@app.callback()
def _site() -> None:
    """Run a hospital's side: prepare data, set the policy, read the ledger."""
