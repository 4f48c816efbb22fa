"""Lists of SHA-256 sums over a folder's files, in the form that ``sha256sum --check`` reads.

A release has two. ``SHA256SUMS`` lists every file, and the coordinator signs it. ``CONTENT.SHA256SUMS`` is made before
that, of what never changes afterwards (images, tables, plan, privacy statement, limits): its own SHA-256 names the
content, and sites countersign that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fedsynth.errors import Refused
from fedsynth.files import sha256_file

SUMS = "SHA256SUMS"
CONTENT = "CONTENT.SHA256SUMS"

# What content consists of; the rest of a release (report, evidence, signatures) may be made after it was countersigned.
CONTENT_TREES = ("bids/", "dicom/", "genes/")
CONTENT_FILES = frozenset(
    {
        "LICENSE",
        "curves.json",
        "datapackage.json",
        "limits.toml",
        "morphology.tsv",
        "participants.tsv",
        "plan.toml",
        "preview.png",
        "privacy.json",
        "release.json",
    }
)
# Content where there is one.
CONTENT_IF_PRESENT = frozenset({"comparison.png", "outcome.json", "selection.json"})

_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\r\\]+)")


def files_of(folder: Path) -> list[str]:
    """POSIX paths of all regular files under `folder`, in the order of their bytes (as ``LC_ALL=C sort``).

    Raises:
        Refused: ``release_not_plain``, for a symbolic link or a special file: neither can be summed faithfully.
    """
    found = []
    for directory, subfolders, names in os.walk(folder):
        for name in (*subfolders, *names):
            path = Path(directory, name)
            plain = not path.is_symlink() and (path.is_file() or path.is_dir())
            if not plain:
                raise Refused("release_not_plain", f"{path.relative_to(folder)} is a link or no plain file.")
        found += [Path(directory, name).relative_to(folder).as_posix() for name in names]
    return sorted(found, key=os.fsencode)


def list_of(folder: Path, names: Iterable[str]) -> bytes:
    """The list of `names` under `folder` as bytes."""
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names).encode()


def read_sums(folder: Path, name: str = SUMS) -> dict[str, str]:
    """SHA-256 (hex) by path, as the list called `name` says.

    Raises:
        Refused: ``manifest_missing`` or ``manifest_malformed``.
    """
    try:
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise Refused("manifest_missing", f"The release has no {name}.") from None
    except UnicodeDecodeError:
        raise Refused("manifest_malformed", f"{name} is not UTF-8 text.") from None
    sums: dict[str, str] = {}
    if lines.pop() != "":
        raise Refused("manifest_malformed", f"{name} does not end with a line break.")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        inside = match is not None and ".." not in PurePosixPath(match[2]).parts and not match[2].startswith("/")
        if match is None or not inside or match[2] in sums:
            raise Refused("manifest_malformed", f"Line {number} of {name} is malformed, repeated or leads outside.")
        sums[match[2]] = match[1]
    return sums


def differences(folder: Path, sums: dict[str, str], present: set[str]) -> list[str]:
    """How the files `present` in `folder` differ from `sums`; empty when they do not."""
    faults = [f"missing: {name}" for name in sorted(sums.keys() - present)]
    faults += [f"not listed: {name}" for name in sorted(present - sums.keys())]
    altered = (name for name in sorted(sums.keys() & present) if sha256_file(folder / name) != sums[name])
    return faults + [f"altered: {name}" for name in altered]


def is_content(name: str) -> bool:
    """Whether the file called `name` belongs to what sites countersign."""
    return name in CONTENT_FILES or name in CONTENT_IF_PRESENT or name.startswith(CONTENT_TREES)


def write_content(folder: Path) -> None:
    """Write ``CONTENT.SHA256SUMS`` over the content in `folder`."""
    (folder / CONTENT).write_bytes(list_of(folder, [name for name in files_of(folder) if is_content(name)]))


def content_digest(folder: Path) -> str:
    """SHA-256 (hex) of ``CONTENT.SHA256SUMS``, which names the content.

    Raises:
        Refused: ``manifest_missing``.
    """
    try:
        return sha256_file(folder / CONTENT)
    except FileNotFoundError:
        raise Refused("manifest_missing", f"The folder has no {CONTENT}.") from None


def content_faults(folder: Path) -> list[str]:
    """How the content of `folder` differs from ``CONTENT.SHA256SUMS``; empty when it does not.

    Raises:
        Refused: the list cannot be read, or `folder` holds links or special files.
    """
    sums = read_sums(folder, CONTENT)
    present = {name for name in files_of(folder) if is_content(name)}
    faults = [f"not content: {name}" for name in sorted(sums) if not is_content(name)]
    faults += [f"missing: {name}" for name in sorted(CONTENT_FILES - present)]
    return faults + [fault for fault in differences(folder, sums, present) if fault not in faults]
