"""Which code was audited: one digest over the sources of the packages that touch or protect patients."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from fedsynth.errors import JobFailed

PACKAGES = ("fedsynth", "fedsynth_client")


def code_digest() -> str:
    """SHA-256 (hex) over names and bytes of every Python source of `PACKAGES`, in the order of their names.

    A source's name is its path from the folder that holds its package, with slashes. Compiled files do not count.

    Raises:
        JobFailed: ``code_not_found``: a package is not installed as files.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)  # finds without importing
        if spec is None or not spec.submodule_search_locations:
            raise JobFailed("code_not_found", f"The sources of {package} are not installed as files.")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
