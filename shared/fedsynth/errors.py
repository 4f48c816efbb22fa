"""The errors that a user may meet, each with a code, a cause and a remedy.

A message that can leave a site carries only the code, so codes are public vocabulary and messages are not: messages
may name a file's place in a folder for the person at the site, never a patient, a header value or a traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONNECTION = 3
    TIMEOUT = 4
    REFUSED = 5


class FedsynthError(Exception):
    """An error with a stable code, a sentence on what is wrong, and a remedy.

    Args:
        code: lower-case words joined by underscores, stable over releases, e.g. ``plan_unknown_key``.
        message: what is wrong and where; free of patient identifiers.
        hint: what to do about it.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]" + (f" {self.hint}" if self.hint else "")


class UsageError(FedsynthError):
    """A file, option or value that the user gave is wrong."""

    exit_code = ExitCode.USAGE


class Refused(FedsynthError):
    """Policy, budget or verification says no; nothing was spent and nothing was lost."""

    exit_code = ExitCode.REFUSED


class JobFailed(FedsynthError):
    """Work that was allowed and well-formed could not be completed."""
