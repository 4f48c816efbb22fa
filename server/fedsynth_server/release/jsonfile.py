"""JSON inside a release that is being made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def dump(path: Path, value: Any) -> None:
    """Write `value` as indented, key-sorted JSON; NaN is an error (it is not JSON).

    Not `fedsynth.files.write_json`: the folder of a release becomes visible as a whole, after one sync of everything, so
    syncing each of its thousands of files would only cost time.
    """
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
