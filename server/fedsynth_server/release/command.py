"""What `fedsynth release verify` prints."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.cli import envelope
from fedsynth.errors import Refused
from fedsynth_server.release.verify import VerificationResult, verify

_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}
_FINGERPRINT = re.compile(r"[0-9a-fA-F]{64}")


def verify_command(folder: Path, key: str | None, as_json: bool) -> None:
    """Verify the release in `folder` and print the result: a table, or the JSON envelope.

    Args:
        key: the coordinator's public key as a file (PEM) or as its fingerprint (64 hexadecimal digits); None when the
            recipient has neither.

    Raises:
        UsageError: the folder or the key cannot be read.
        Refused: ``release_not_verified``, after the result was printed (with `as_json` it is in the error's place).
    """
    if key is not None and _FINGERPRINT.fullmatch(key):
        result = verify(folder, trusted_fingerprint=key)
    else:
        result = verify(folder, Path(key) if key is not None else None)
    if as_json and result.ok:
        envelope(
            {
                "checks": [asdict(check) for check in result.checks],
                "fingerprint": result.fingerprint,
                "signer_is_trusted": result.signer_is_trusted,
                "warnings": result.warnings,
            }
        )
    elif not as_json:
        show(result, folder, Console())
    if not result.ok:
        failed = [f"{check.name}: {check.reason}" for check in result.checks if check.status == "failed"]
        raise Refused(
            "release_not_verified", f"The release is not what it claims to be. {'. '.join(failed)}.", "Do not use it."
        )


def show(result: VerificationResult, folder: Path, console: Console) -> None:
    """Print `result` for a person."""
    table = Table(title=f"Release {escape(folder.name)}", title_justify="left")
    table.add_column("check")
    table.add_column("result")
    table.add_column("what was found", overflow="fold")
    for check in result.checks:
        table.add_row(check.name, f"[{_COLOURS[check.status]}]{check.status}[/]", escape(check.reason))
    console.print(table)
    console.print(f"Key fingerprint: {result.fingerprint or 'none'}", soft_wrap=True)
    if result.signer_is_trusted:
        console.print("[green]Signed with the key that you trust.[/]")
    for warning in result.warnings:
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
