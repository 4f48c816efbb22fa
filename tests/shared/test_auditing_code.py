"""The digest that says which code was audited."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedsynth.auditing import code
from fedsynth.errors import JobFailed


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "audited_example"
    (root / "inner").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("a.py", "x = 1\n"), ("inner/b.py", "y = 2\n")):
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "PACKAGES", ("audited_example",))
    return root


def test_every_source_counts_and_nothing_else(package: Path) -> None:
    first = code.code_digest()
    assert first == code.code_digest()
    assert "audited_example" not in sys.modules
    (package / "inner" / "__pycache__").mkdir()
    (package / "inner" / "__pycache__" / "b.cpython-311.pyc").write_bytes(b"compiled")
    assert code.code_digest() == first
    (package / "inner" / "b.py").write_text("y = 3\n")
    changed = code.code_digest()
    assert changed != first
    (package / "inner" / "b.py").rename(package / "inner" / "c.py")
    assert code.code_digest() not in (first, changed)


def test_the_packages_are_those_of_both_who_agree_and_who_holds_patients() -> None:
    assert code.PACKAGES == ("fedsynth", "fedsynth_client")
    assert len(code.code_digest()) == 64


def test_sources_that_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "PACKAGES", ("no_such_package_here",))
    with pytest.raises(JobFailed, match="not installed"):
        code.code_digest()
