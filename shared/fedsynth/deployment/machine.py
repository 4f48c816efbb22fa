"""What a machine must have: room, memory, folders, versions."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from fedsynth.errors import Refused, UsageError
from fedsynth.files import DISK_FULL

# The runners speak Flower's internal Runtime API, which may change with any release.
FLOWER = "1.41.0"
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def disk(folder: Path, least_bytes: int) -> str:
    """Free space for the present user on the disk that holds `folder`.

    Raises:
        UsageError: ``folder_missing``.
        Refused: ``disk_low``.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < least_bytes:
        raise Refused(
            "disk_low",
            f"Only {free / _GIB:.1f} GiB are free at {folder}.",
            f"Free at least {least_bytes / _GIB:.1f} GiB.",
        )
    return f"disk: {free / _GIB:.0f} GiB free at {folder}"


def memory(least_bytes: int, cgroup: Path = _CGROUP) -> str:
    """Memory that may be used: of the machine, or of the container or service if that has a smaller limit.

    Args:
        least_bytes: how much must be there in all.
        cgroup: where the limit of a control group (version 2) is read.

    Raises:
        Refused: ``memory_low``.
    """
    total = psutil.virtual_memory().total
    limit = _memory_limit(cgroup)
    usable = total if limit is None else min(total, limit)
    where = "this machine has" if usable == total else "this container or service may use"
    if usable < least_bytes:
        raise Refused(
            "memory_low",
            f"Memory: {where} {usable / _GIB:.1f} GiB.",
            f"At least {least_bytes / _GIB:.1f} GiB are needed.",
        )
    return f"memory: {where} {usable / _GIB:.1f} GiB"


def gpu() -> str:
    """Which GPU PyTorch finds; information only, as everything runs without one."""
    import torch

    if not torch.cuda.is_available():
        return "GPU: none found, training runs on the CPU"
    found = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"GPU: {', '.join(found)}"


def writable(folder: Path) -> str:
    """Write, read back and remove a small file in `folder`.

    Raises:
        UsageError: ``folder_missing``.
        Refused: ``disk_full``, ``folder_not_writable``.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as stream:
            stream.write(b"x" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno in DISK_FULL:
            raise Refused("disk_full", f"The disk of {folder} is full.", "Free some space.") from None
        raise Refused(
            "folder_not_writable",
            f"{folder} cannot be written to: {error.strerror}.",
            "Run this as the account that owns it, or correct its owner and mode.",
        ) from None
    return f"{folder} can be written to"


def private_folder(folder: Path) -> str:
    """Check that only its owner enters a folder.

    Raises:
        UsageError: ``folder_missing``.
        Refused: ``folder_open_to_others``.
    """
    mode = _existing(folder).stat().st_mode
    if mode & 0o077:
        raise Refused(
            "folder_open_to_others",
            f"Group or others may enter {folder} (mode {mode & 0o777:04o}).",
            f"chmod 700 {folder}",
        )
    return f"{folder} is private"


def versions() -> str:
    """Versions of what matters.

    Raises:
        Refused: ``flower_version``: another release of Flower than the one that this release was tested with.
    """
    installed = {name: _version(name) for name in ("fedsynth", "flwr", "torch")}
    if installed["flwr"] != FLOWER:
        raise Refused(
            "flower_version",
            f"Flower {installed['flwr']} is installed; this release works with {FLOWER} only.",
            f"pip install flwr=={FLOWER}",
        )
    return ", ".join(f"{name} {number}" for name, number in installed.items()) + f", python {platform.python_version()}"


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError("folder_missing", f"There is no folder {folder}.", "Check the path.")
    return folder


def _memory_limit(cgroup: Path) -> int | None:
    """The limit in bytes; None without one, or where control groups of version 2 are not used."""
    try:
        content = (cgroup / "memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(content) if content.isdigit() else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
