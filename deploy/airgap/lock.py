"""Turn reports of ``pip install --report`` into a requirements file with hashes: ``lock.py REPORT...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def locked(reports: list[str]) -> list[str]:
    """One line a package, sorted by name: name, exact version and SHA-256 of the file that pip chose.

    Args:
        reports: texts of pip's installation reports (https://pip.pypa.io/en/stable/reference/installation-report/).
    """
    lines = {}
    for report in reports:
        for item in json.loads(report)["install"]:
            name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines[name] = f"{name}=={version} --hash=sha256:{digest}"
    return [lines[name] for name in sorted(lines)]


if __name__ == "__main__":
    print("\n".join(locked([Path(path).read_text(encoding="utf-8") for path in sys.argv[1:]])))
