"""Reading the logs of a study's processes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from fedsynth.errors import UsageError

NAMES = ("supervisor", "runner", "superlink", "gateway")


def find(folder: Path, name: str | None) -> list[Path]:
    """The log called `name`, or all of them.

    Raises:
        UsageError: ``log_unknown`` or ``log_missing``.
    """
    if name is not None and name not in NAMES:
        raise UsageError("log_unknown", f"There is no log {name!r}.", f"There are {', '.join(NAMES)}.")
    paths = [folder / "logs" / f"{each}.log" for each in ([name] if name else NAMES)]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UsageError(
            "log_missing", f"There is no log of {name or 'any process'} in {folder}.", "Nothing was started yet."
        )
    return found


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return [line.rstrip("\n") for line in deque(stream, maxlen=count)]


def follow(paths: list[Path], stopped: Callable[[], bool], poll_seconds: float = 0.5) -> Iterator[tuple[Path, str]]:
    """New lines of logs as they are written, whole lines only, until `stopped()`."""
    places = {path: path.stat().st_size for path in paths}
    rest = dict.fromkeys(paths, b"")
    while not stopped():
        for path in paths:
            try:
                with path.open("rb") as stream:
                    # The supervisor empties a log that grew large.
                    places[path] = stream.seek(places[path] if places[path] <= os.fstat(stream.fileno()).st_size else 0)
                    text = rest[path] + stream.read()
                    places[path] = stream.tell()
            except FileNotFoundError:
                continue
            *lines, rest[path] = text.split(b"\n")
            yield from ((path, line.decode("utf-8", "replace")) for line in lines)
        time.sleep(poll_seconds)
