"""How the command ends when something that it did not expect happens on the disk."""

from __future__ import annotations

import errno
import os

import pytest

from fedsynth import cli


def failing(number: int) -> object:
    def command(*, standalone_mode: bool) -> None:
        assert not standalone_mode
        raise OSError(number, os.strerror(number))

    return lambda: command


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "build", failing(number))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    shown = capsys.readouterr().err
    assert "The disk is full" in shown and "disk_full" in shown and "Traceback" not in shown


def test_another_fault_of_the_system_is_not_called_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        cli.main()
