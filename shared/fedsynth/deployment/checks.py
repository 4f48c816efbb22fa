"""Checks before work: one line each, with the remedy; a check spends nothing and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import typer

from fedsynth.errors import FedsynthError

State = Literal["ok", "warn", "fail"]
_MARKS: dict[State, tuple[str, str]] = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@dataclass(frozen=True)
class Line:
    """One check: whether it passed, what was found, what to do.

    A warning is something that works today and deserves a look, such as a certificate that expires in two weeks.
    """

    state: State
    what: str
    remedy: str = ""
    code: str = ""

    @property
    def ok(self) -> bool:
        """Whether work may go on."""
        return self.state != "fail"


class Doubt(FedsynthError):
    """Raised by a check for what works today and deserves a look."""


def check(work: Callable[[], str]) -> Line:
    """Run one check: `work` returns what was found, or raises what is wrong and what to do."""
    try:
        return Line("ok", work())
    except FedsynthError as error:
        state: State = "warn" if isinstance(error, Doubt) else "fail"
        return Line(state, error.message, error.hint, error.code)


def show(lines: Iterable[Line]) -> None:
    """Print checks, one line each, and the remedy of those that did not pass below them."""
    for line in lines:
        mark, colour = _MARKS[line.state]
        code = f" [{line.code}]" if line.code else ""
        typer.echo(
            f"{typer.style(mark, fg=colour)} {line.what}{code}" + (f"\n     {line.remedy}" if line.remedy else "")
        )
