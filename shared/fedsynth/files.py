"""Files that are whole or absent: a crash never leaves half a file under a final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

# What the operating system says when there is no room: on the device, or in the user's quota.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary neighbour, fsync and rename.

    Raises:
        OSError: e.g. a full disk; an earlier file at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented, key-sorted JSON; NaN is an error (it is not JSON)."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
