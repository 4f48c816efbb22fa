"""What a machine lacks is named."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsynth.deployment import machine
from fedsynth.errors import FedsynthError

GIB = 2**30


def code_of(probe: Callable[[], object]) -> str:
    with pytest.raises(FedsynthError) as caught:
        probe()
    assert caught.value.hint
    return caught.value.code


def test_disk(tmp_path: Path) -> None:
    assert "GiB free" in machine.disk(tmp_path, 1)
    assert code_of(lambda: machine.disk(tmp_path, 10**18)) == "disk_low"
    assert code_of(lambda: machine.disk(tmp_path / "absent", 1)) == "folder_missing"


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert "this machine has" in machine.memory(1, tmp_path)
    assert code_of(lambda: machine.memory(total + 1, tmp_path)) == "memory_low"
    (tmp_path / "memory.max").write_text("max\n")
    assert "this machine has" in machine.memory(1, tmp_path)
    (tmp_path / "memory.max").write_text(f"{GIB // 2}\n")
    assert "may use 0.5 GiB" in machine.memory(1, tmp_path)
    assert code_of(lambda: machine.memory(GIB, tmp_path)) == "memory_low"
    (tmp_path / "memory.max").write_text(f"{total * 2}\n")
    assert "this machine has" in machine.memory(1, tmp_path)


def test_gpu_is_information_only() -> None:
    import torch

    assert ("none found" in machine.gpu()) == (not torch.cuda.is_available())


def test_folders(tmp_path: Path) -> None:
    assert "written" in machine.writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)
    assert "private" in machine.private_folder(tmp_path)
    for mode in (0o750, 0o705, 0o710):
        tmp_path.chmod(mode)
        assert code_of(lambda: machine.private_folder(tmp_path)) == "folder_open_to_others"
    for probe in (machine.writable, machine.private_folder):
        assert code_of(lambda: probe(tmp_path / "absent")) == "folder_missing"  # noqa: B023


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EROFS, "folder_not_writable")]
)
def test_a_folder_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine.os, "fsync", fail)
    assert code_of(lambda: machine.writable(tmp_path)) == code


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "flwr 1.41.0" in machine.versions() and "fedsynth" in machine.versions()
    monkeypatch.setattr(machine, "version", lambda name: "1.42.0")
    assert code_of(machine.versions) == "flower_version"


def test_the_version_that_is_asked_for_is_the_one_that_is_pinned() -> None:
    from importlib.metadata import requires

    assert f"flwr=={machine.FLOWER}" in (requires("fedsynth") or [])
