"""node.toml: what it may say, and that every slip is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsynth.errors import UsageError
from fedsynth_client.node.settings import NodeSettings, ca_path, key_path, load_settings, save_settings, settings_path


def written(folder: Path, text: str) -> Path:
    settings_path(folder).write_text(text)
    return folder


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    settings = NodeSettings(gateway="study.example:8443", bundles=["ab" * 32], proxy="http://proxy.example:3128")
    save_settings(settings, tmp_path)
    assert load_settings(tmp_path) == settings


def test_paths_are_relative_to_the_folder_unless_absolute(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, 'gateway = "study.example:8443"\nkey = "/etc/node.key"\n'))
    assert ca_path(tmp_path, settings) == tmp_path / "keys" / "coordinator-ca.crt"
    assert key_path(tmp_path, settings) == Path("/etc/node.key")


def test_a_folder_without_a_node_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as missing:
        load_settings(tmp_path)
    assert missing.value.code == "node_settings_missing"
    assert "site init" in missing.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        'gateway = "study.example"\n',
        'gateway = "https://study.example:8443"\n',
        'gateway = "study.example:0"\n',
        'gateway = "study.example:8443"\ngatewai = "x:1"\n',
        'gateway = "study.example:8443"\nbundles = ["*"]\n',
        'gateway = "study.example:8443"\nproxy = "socks5://x:1"\n',
        'gateway = "study.example:8443"\nruntime_listen = "127.0.0.1"\n',
        'gateway = "study.example:8443"\nschema_version = 2\n',
    ],
)
def test_a_slip_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_settings(written(tmp_path, text))
    assert refused.value.code == "node_settings_invalid"


def test_a_proxys_password_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        load_settings(written(tmp_path, 'gateway = "study.example:8443"\nproxy = "ftp://user:hunter2@x:1"\n'))
    assert "hunter2" not in str(refused.value)
