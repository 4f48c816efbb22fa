"""`fedsynth study` and `fedsynth release`: what a coordinator and a recipient type."""

from __future__ import annotations

import typer

study = typer.Typer(help="Write and check a study plan.", no_args_is_help=True)
release = typer.Typer(help="Make and verify releases.", no_args_is_help=True)


@study.callback()
def _study() -> None:
    """Write and check a study plan."""


@release.callback()
def _release() -> None:
    """Make and verify releases."""
