"""List the licence that every wheel of a folder declares: ``licenses.py FOLDER`` prints name, version, licence."""

from __future__ import annotations

import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path


def metadata(wheel: Path) -> Message:
    """The METADATA of a wheel (https://packaging.python.org/en/latest/specifications/core-metadata/)."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        return Parser().parsestr(archive.read(inside[0]).decode("utf-8"))


def declared(package: Message) -> str:
    """The licence a package declares: its SPDX expression, else its classifiers, else the first line of its text."""
    expression = package.get("License-Expression")
    if expression:
        return expression
    prefix = "License :: "
    named = [c.rsplit(" :: ", 1)[-1] for c in package.get_all("Classifier", []) if c.startswith(prefix)]
    if named:
        return "; ".join(named)
    lines = package.get("License", "").strip().splitlines()
    return lines[0].strip() if lines else "not declared: read the files in the wheel"


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.whl"), key=lambda path: path.name.lower()):
        found = metadata(path)
        print(found["Name"], found["Version"], declared(found), sep="\t")
