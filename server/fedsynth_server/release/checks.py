"""One check of a release: what it asks, how it ended, and why; and the checks of its content, made in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fedsynth.errors import Refused
from fedsynth_server.release import content
from fedsynth_server.release.opened import Release

Status = Literal["ok", "failed", "skipped"]
_SHOWN_FAULTS = 5
# What the readers of the formats raise on content that was signed and is malformed all the same.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class Check:
    """One check: what it asks, how it ended, and why."""

    name: str
    status: Status
    reason: str


def check(name: str, says: str, faults: Callable[[], list[str]]) -> Check:
    """Make one check; its reason is what holds, or the first faults."""
    try:
        found = faults()
    except Refused as error:
        found = [error.message]
    except _UNREADABLE as error:
        found = [f"a file does not have the form that it must have ({type(error).__name__}: {error})"]
    if not found:
        return Check(name, "ok", says)
    more = f"; and {len(found) - _SHOWN_FAULTS} more" if len(found) > _SHOWN_FAULTS else ""
    return Check(name, "failed", "; ".join(found[:_SHOWN_FAULTS]) + more)


def content_checks(release: Release) -> list[Check]:
    """All checks of what cannot change after a release is countersigned."""
    return [check(name, says, partial(test, release)) for name, says, test in content.CHECKS]
