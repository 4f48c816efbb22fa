"""`fedsynth deploy`: keys, certificates and configuration files for coordinator and sites."""

from __future__ import annotations

import typer

app = typer.Typer(help="Make keys, certificates and configuration for a deployment.", no_args_is_help=True)
