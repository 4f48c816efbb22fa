"""A file is whole or as it was before, whatever goes wrong while it is written."""

from __future__ import annotations

import errno
import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fedsynth.files import read_json, sha256_file, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"first", b"", b"second" * 1000):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"earlier")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, b"later")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"earlier"
    assert names(tmp_path) == ["a.bin"]


def test_the_system_refusing_to_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"earlier")
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom fedsynth.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), bytes(100_000))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "OSError" in run.stderr
    assert path.read_bytes() == b"earlier"
    assert names(tmp_path) == ["a.bin"]


def test_a_process_that_dies_while_writing_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"earlier")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fedsynth.files import write_atomic\n"
        "os.fsync = lambda _: os._exit(9)\nwrite_atomic(Path(sys.argv[1]), b'later')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"earlier"
    # What it left is hidden and not called like the file; the next write is not disturbed by it.
    assert all(name.startswith(".") for name in names(tmp_path) if name != "a.bin")
    write_atomic(path, b"later")
    assert path.read_bytes() == b"later"


def test_json_is_readable_sorted_and_never_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": "grün"})
    assert read_json(path) == {"a": "grün", "b": [1, 2.5]}
    assert path.read_text(encoding="utf-8").index('"a"') < path.read_text(encoding="utf-8").index('"b"')
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert read_json(path) == {"a": "grün", "b": [1, 2.5]}
