"""``node.toml``: where the coordinator is, which keys this node uses, which bundles it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import AfterValidator, Field

from fedsynth.deployment.network import split_address
from fedsynth.errors import UsageError
from fedsynth.plan import Section
from fedsynth.toml import load_toml


def _address(value: str) -> str:
    try:
        split_address(value)
    except UsageError as error:  # pydantic gathers the faults of all keys, and knows them by this type
        raise ValueError(error.message) from None
    return value


def _proxy(value: str) -> str:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError("a proxy is written as http://host:port, or left empty")
    return value


Address = Annotated[str, AfterValidator(_address)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class NodeSettings(Section):
    """What a site's node needs to know. Relative paths are relative to the site's folder.

    Attributes:
        gateway: host:port of the coordinator's public door; its certificate must name the host.
        ca: certificate authority that vouches for the gateway (PEM).
        key: the node's private key (P-384, OpenSSH PEM), by which the coordinator knows this site.
        runtime_listen: host:port where the SuperNode offers tasks to the runner.
        runtime: host:port where the runner finds them; differs from `runtime_listen` when the two run in two containers.
        health_listen: host:port of the SuperNode's gRPC health service.
        bundles: SHA-256 of further bundles whose runs are accepted, beside the one of this version.
        proxy: HTTPS proxy of the node's way out; empty: as the environment says.
    """

    schema_version: Literal[1] = 1
    gateway: Address
    ca: str = "keys/coordinator-ca.crt"
    key: str = "keys/node.key"
    runtime_listen: Address = "127.0.0.1:18094"
    runtime: Address = "127.0.0.1:18094"
    health_listen: Address = "127.0.0.1:18095"
    bundles: list[Sha256] = Field(default=[])
    proxy: Annotated[str, AfterValidator(_proxy)] = ""


def settings_path(folder: Path) -> Path:
    """Where the settings of the site in `folder` lie."""
    return folder / "node.toml"


def load_settings(folder: Path) -> NodeSettings:
    """Read the node's settings.

    Raises:
        UsageError: ``node_settings_missing``, ``node_settings_not_toml`` or ``node_settings_invalid``.
    """
    try:
        return load_toml(settings_path(folder), NodeSettings, "node_settings")
    except UsageError as error:
        if error.code != "node_settings_missing":
            raise
        raise UsageError(
            error.code,
            f"{folder} has no node.toml, which names the coordinator's gateway.",
            "Write it with `fedsynth site init FOLDER --gateway HOST:PORT --ca FILE`.",
        ) from None


def save_settings(settings: NodeSettings, folder: Path) -> None:
    """Write the settings as TOML."""
    head = "# Where the coordinator is and which keys this node uses; relative paths start at this folder.\n"
    settings_path(folder).write_text(head + tomli_w.dumps(settings.model_dump(mode="json")), encoding="utf-8")


def ca_path(folder: Path, settings: NodeSettings) -> Path:
    """The authority that vouches for the gateway."""
    return folder / settings.ca


def key_path(folder: Path, settings: NodeSettings) -> Path:
    """The node's private key."""
    return folder / settings.key


def keys(folder: Path) -> Path:
    """Where keys and certificates lie."""
    return folder / "keys"


def runtime_ca_path(folder: Path) -> Path:
    """The site's own authority, by which the runner knows the SuperNode."""
    return keys(folder) / "runtime-ca.crt"


def secret_path(folder: Path) -> Path:
    """The secret without which the SuperNode hands out no task."""
    return keys(folder) / "superexec.secret"
