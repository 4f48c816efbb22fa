"""The `fedsynth` command: gathers the sub-commands that the installed packages declare as entry points.

Only typer is imported here and in the packages' `cli` modules; everything heavy is imported inside a command, so that
`--help` is instant.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from typing import Any

import click
import typer

from fedsynth import __version__
from fedsynth.errors import ExitCode, FedsynthError, JobFailed
from fedsynth.files import DISK_FULL

_INTERRUPTED = 130  # what typer makes of Ctrl-C, after the shells' custom


def build() -> typer.Typer:
    """The root command with every sub-command of the group ``fedsynth.commands``."""
    root = typer.Typer(
        name="fedsynth",
        help="Federated, differentially private synthesis of paired MRI and gene-expression cohorts.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @root.callback(invoke_without_command=True)
    def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            typer.echo(__version__)
            raise typer.Exit

    for entry in sorted(entry_points(group="fedsynth.commands"), key=lambda entry: entry.name):
        root.add_typer(entry.load(), name=entry.name)
    return root


def envelope(data: Any) -> None:
    """Print the one JSON object that `--json` promises on stdout."""
    typer.echo(json.dumps({"schema_version": 1, "status": "ok", "data": data}, indent=2, allow_nan=False))


def main() -> None:
    """Run the command; a known error becomes one clear line (or the JSON envelope) and its exit code."""
    try:
        code = build()(standalone_mode=False)
    except click.exceptions.Abort:  # a question was answered with no
        typer.echo("Not done.", err=True)
        sys.exit(ExitCode.FAILED)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except FedsynthError as error:
        _show(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _show(JobFailed("disk_full", "The disk is full.", "Free some space and repeat the command; it goes on."))
        sys.exit(JobFailed.exit_code)
    if code == _INTERRUPTED:
        typer.echo("Interrupted. Nothing that was finished is lost; the same command goes on from there.", err=True)
    sys.exit(code if isinstance(code, int) else ExitCode.OK)


def _show(error: FedsynthError) -> None:
    if "--json" in sys.argv:
        failure = {"error_code": error.code, "message": error.message, "hint": error.hint}
        typer.echo(json.dumps({"schema_version": 1, "status": "error", **failure}, indent=2))
        return
    typer.secho(f"Error: {error.message}", err=True, fg=typer.colors.RED)
    typer.echo(f"       code: {error.code}" + (f"\n       {error.hint}" if error.hint else ""), err=True)
