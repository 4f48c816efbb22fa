"""The Flower app bundle of a study: the same bytes at the coordinator and at every site that has this version installed.

The bundle holds no code. It names the installed apps because Flower wants names; neither side unpacks it. A site accepts a
run only if its bundle has the hash that the site computes here by itself.
"""

from __future__ import annotations

import hashlib

PUBLISHER = "fedsynth"
_PYPROJECT = """\
[project]
name = "fedsynth-study"
version = "1.0.0"
description = "Names the installed fedsynth apps; holds no code"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsynth"

[tool.flwr.app.components]
serverapp = "fedsynth_server.app:app"
clientapp = "fedsynth_client.app:app"
"""


def bundle_bytes() -> bytes:
    """The bundle (a Flower FAB, a zip with fixed dates)."""
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files({"pyproject.toml": _PYPROJECT.encode()})[0]


def bundle_sha256() -> str:
    """SHA-256 (hex) of the bundle: what a site allows unless its settings name others."""
    return hashlib.sha256(bundle_bytes()).hexdigest()
