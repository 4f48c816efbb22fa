"""``coordinator.toml`` and where things lie in a study's folder.

Layout::

    plan.toml                  the study plan
    warm-start.safetensors     the plan's public weights, where it names any
    coordinator.toml           addresses, ports, certificates, patience
    keys/                      ca.crt, gateway.{crt,key}, superlink.{crt,key}, superexec.secret
    sites.json                 sites that were added, and revoked ones
    checkpoint.safetensors     after the last complete round
    status.json                where the study stands
    superlink/state.sqlite     SuperLink's state; it keeps freed pages, so it belongs on an encrypted volume
    run/, logs/                of the processes
"""

from __future__ import annotations

import ipaddress
import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from fedsynth.deployment.network import split_address
from fedsynth.errors import UsageError
from fedsynth.plan import Section, StudyPlan, load_plan
from fedsynth.toml import load_toml

FILE = "coordinator.toml"
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_HOST_SIGNS = frozenset(string.ascii_letters + string.digits + "-.:_")


def _checked_address(address: str) -> str:
    try:
        host, _ = split_address(address)
    except UsageError as error:
        raise ValueError(error.message) from None
    if set(host) - _HOST_SIGNS:  # it goes into the gateway's configuration as text
        raise ValueError(f"{host!r} is no host name or address")
    return address


def checked_address(address: str) -> str:
    """`address`, if it is host:port.

    Raises:
        UsageError: ``address_invalid``.
    """
    try:
        return _checked_address(address)
    except ValueError as error:
        raise UsageError("address_invalid", f"{error}", "E.g. gateway.example:8443") from None


def _checked_ip(address: str) -> str:
    ipaddress.ip_address(address)
    return address


Address = Annotated[str, AfterValidator(_checked_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
# File names go into the gateway's configuration between double quotes.
PathText = Annotated[str, StringConstraints(pattern=r'^[^"$\\\x00-\x1f]+$')]


class GatewaySettings(Section):
    """The public door.

    Attributes:
        address: host:port under which sites reach it; the host must be in its certificate.
        listen: address:port that it binds.
        managed: whether it is started here; if not, it runs elsewhere with what ``study gateway-config`` prints.
        certificate: its certificate, in the study's folder.
        key: the certificate's private key.
        max_request_mib: largest request (MiB); Flower sends objects in chunks of 5 MB.
        nginx: the program.
    """

    address: Address
    listen: Address = "0.0.0.0:8443"
    managed: bool = True
    certificate: PathText = "keys/gateway.crt"
    key: PathText = "keys/gateway.key"
    max_request_mib: Annotated[int, Field(ge=6, le=1024)] = 16
    nginx: PathText = "nginx"


class SuperlinkSettings(Section):
    """SuperLink, which must not be reachable from outside but through the gateway.

    Attributes:
        listen: address that it binds; 127.0.0.1 unless the gateway lives in another container of the same private network.
        port: of its one HTTPS door.
        health_port: of its gRPC health service, on 127.0.0.1.
        certificate: its certificate, for ``localhost`` and 127.0.0.1.
        key: the certificate's private key.
        ca: certificate of the authority that signed it.
        secret: what the study runner proves itself with.
    """

    listen: Annotated[str, AfterValidator(_checked_ip)] = "127.0.0.1"
    port: Port = 18000
    health_port: Port = 18001
    certificate: PathText = "keys/superlink.crt"
    key: PathText = "keys/superlink.key"
    ca: PathText = "keys/ca.crt"
    secret: PathText = "keys/superexec.secret"


class StudySettings(Section):
    """Patience with sites.

    Attributes:
        patience_s: how long (s) the study pauses for want of sites before it gives up; 0: for ever.
        absent_s: how long (s) a round that has enough sites stays open for sites that are not connected.
        silent_s: after how long (s) a task is sent again to a connected site that says nothing, then after twice as long,
            and so on; 0: never.
    """

    patience_s: Annotated[float, Field(ge=0)] = 0.0
    absent_s: Annotated[float, Field(ge=0)] = 60.0
    silent_s: Annotated[float, Field(ge=0)] = 60.0


class CoordinatorSettings(Section):
    """``coordinator.toml``."""

    schema_version: Literal[1] = 1
    gateway: GatewaySettings
    superlink: SuperlinkSettings = SuperlinkSettings()
    study: StudySettings = StudySettings()


@dataclass(frozen=True)
class Study:
    """The study whose folder is `folder`."""

    folder: Path

    @cached_property
    def settings(self) -> CoordinatorSettings:
        """``coordinator.toml``, read once.

        Raises:
            UsageError: ``settings_missing``, ``settings_not_toml`` or ``settings_invalid``.
        """
        return load_toml(self.folder / FILE, CoordinatorSettings, "settings")

    @cached_property
    def plan(self) -> StudyPlan:
        """The study plan, read once.

        Raises:
            UsageError: as `fedsynth.plan.load_plan`.
        """
        return load_plan(self.plan_path)

    @property
    def plan_path(self) -> Path:
        """Where the plan lies."""
        return self.folder / "plan.toml"

    @property
    def weights_path(self) -> Path:
        """Where the plan's public weights lie, if it names any."""
        return self.folder / "warm-start.safetensors"

    @property
    def database_path(self) -> Path:
        """SuperLink's state."""
        return self.folder / "superlink" / "state.sqlite"

    def path(self, name: str) -> Path:
        """A file that the settings name, relative to the folder."""
        return (self.folder / name).absolute()

    @property
    def superlink_address(self) -> str:
        """host:port of SuperLink for those who live beside it."""
        superlink = self.settings.superlink
        host = _ANYWHERE.get(superlink.listen, superlink.listen)
        return f"[{host}]:{superlink.port}" if ":" in host else f"{host}:{superlink.port}"

    @property
    def health_address(self) -> str:
        """host:port of SuperLink's gRPC health service."""
        return f"127.0.0.1:{self.settings.superlink.health_port}"

    @property
    def gateway_local_address(self) -> str:
        """host:port at which a gateway that is started here answers."""
        host, port = split_address(self.settings.gateway.listen)
        host = _ANYWHERE.get(host, host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
