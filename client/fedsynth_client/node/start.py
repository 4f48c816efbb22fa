"""Starting a site's node: the two processes, and what is looked at before they start.

Both run under one supervisor, or each in a container of its own: the node's, which reaches the network and holds no data,
and the runner's, which holds the data and reaches nothing but the node.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fedsynth.deployment import keys as key_files
from fedsynth.deployment import machine
from fedsynth.deployment.certificates import check_certificate, load_ca
from fedsynth.deployment.checks import Line, check
from fedsynth.deployment.network import split_address
from fedsynth.deployment.supervisor import Child, flower_environment, python_module, script, supervise
from fedsynth.errors import Refused
from fedsynth_client.node.settings import (
    NodeSettings,
    ca_path,
    key_path,
    keys,
    load_settings,
    runtime_ca_path,
    secret_path,
)
from fedsynth_client.outbox import Outbox, check_ledger_is_whole
from fedsynth_client.site import Site

Part = Literal["node", "runner"]
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
_SETTINGS_WRONG = 2  # both processes end with it, where a restart would be no use


def children(folder: Path, settings: NodeSettings, only: Part | None = None) -> list[Child]:
    """The processes of the site in `folder`: SuperNode and runner, or one of them.

    Raises:
        UsageError: ``program_missing``.
    """
    parts: dict[Part, Callable[[], Child]] = {
        "node": lambda: _supernode(folder, settings),
        "runner": lambda: _runner(folder),
    }
    return [make() for part, make in parts.items() if only in (None, part)]


def start(folder: Path, only: Part | None = None) -> None:
    """Look at what the node needs, then run it in the foreground until a signal comes.

    Raises:
        UsageError: ``already_running``, or settings, keys or programs are missing.
        Refused: the folder's mode, policy, ledger, key files or runtime certificate do not allow it.
        JobFailed: ``child_gave_up``.
    """
    earlier = os.umask(0o077)  # ledger, stored answers and logs are for the owner's eyes
    try:
        prepare(folder, only)
        supervise(folder, children(folder, load_settings(folder), only))
    finally:
        os.umask(earlier)


def prepare(folder: Path, only: Part | None = None) -> None:
    """Renew the local certificate if it is due, and refuse to start what could not work.

    Raises:
        FedsynthError: the first thing that is wrong.
    """
    settings = load_settings(folder)
    if only is None:  # where node and runner live apart, who runs them hands both the same new files
        key_files.renew_runtime_tls(keys(folder), runtime_names(settings))
    for line in (check(lambda: machine.private_folder(folder)), *local_lines(folder, settings, only)):
        if not line.ok:
            raise Refused(line.code, line.what, line.remedy)


def runtime_names(settings: NodeSettings) -> list[str]:
    """Names of the SuperNode for the runner, beside those of this machine."""
    host = split_address(settings.runtime)[0]
    return [] if host in _LOCAL else [host]


def local_lines(folder: Path, settings: NodeSettings, only: Part | None = None) -> list[Line]:
    """Checks of the files that node and runner need; nothing is contacted."""
    both: list[Callable[[], str]] = [lambda: _secret(folder)]
    node: list[Callable[[], str]] = [
        lambda: _authority(folder, settings),
        lambda: _node_key(folder, settings),
        lambda: _runtime(folder, settings),
    ]
    runner: list[Callable[[], str]] = [
        lambda: f"runtime authority: {len(load_ca(runtime_ca_path(folder)))} certificate",
        lambda: f"policy of site {Site(folder).policy().site}",
        lambda: _ledger(Site(folder)),
    ]
    chosen = {None: [*node, *runner], "node": node, "runner": runner}[only]
    return [check(each) for each in (*both, *chosen)]


def _secret(folder: Path) -> str:
    key_files.read_secret(secret_path(folder))
    return "secret between node and runner: private"


def _authority(folder: Path, settings: NodeSettings) -> str:
    return f"coordinator's authority: {len(load_ca(ca_path(folder, settings)))} certificate"


def _node_key(folder: Path, settings: NodeSettings) -> str:
    path = key_path(folder, settings)
    key_files.check_private(path)
    return f"node key: private, {key_files.fingerprint(path)}"


def _runtime(folder: Path, settings: NodeSettings) -> str:
    key_files.check_private(keys(folder) / "runtime.key")
    host = split_address(settings.runtime)[0]
    return check_certificate(keys(folder) / "runtime.crt", keys(folder) / "runtime.key", runtime_ca_path(folder), host)


def _ledger(site: Site) -> str:
    return check_ledger_is_whole(site.ledger(), Outbox(site.folder))


def _supernode(folder: Path, settings: NodeSettings) -> Child:
    host, port = split_address(settings.runtime_listen)
    command = script(
        "flower-supernode",
        *("--superlink", settings.gateway),
        *("--root-certificates", str(ca_path(folder, settings))),
        *("--auth-supernode-private-key", str(key_path(folder, settings))),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret_path(folder))),
        *("--host", host),
        *("--port", str(port)),
        *("--ssl-certfile", str(keys(folder) / "runtime.crt")),
        *("--ssl-keyfile", str(keys(folder) / "runtime.key")),
        *("--ssl-ca-certfile", str(runtime_ca_path(folder))),
        *("--health-server-address", settings.health_listen),
    )
    environment = flower_environment(_flower_home(folder, "node"))
    if settings.proxy:
        # As `fedsynth site check` goes: by the proxy of the settings, whatever the environment excepts from its own.
        environment = _without(environment, (*_PROXIES, "no_proxy"))
        # httpx takes either spelling; grpcio, which only listens here, the lower one.
        environment |= {"HTTPS_PROXY": settings.proxy, "https_proxy": settings.proxy}
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(sorted(_LOCAL)))
    return Child("supernode", command, environment, fatal_codes=frozenset({_SETTINGS_WRONG}))


def _runner(folder: Path) -> Child:
    command = python_module("fedsynth_client.node.runner", str(folder))
    # It speaks to the SuperNode and to nobody else, so it has no use for a proxy.
    environment = _without(flower_environment(_flower_home(folder, "runner")), _PROXIES)
    # A SuperNode waits a minute, and with half a reply for ever, for a runner that died with a task.
    takes_along = frozenset({"supernode"})
    return Child("runner", command, environment, fatal_codes=frozenset({_SETTINGS_WRONG}), takes_along=takes_along)


def _flower_home(folder: Path, part: Part) -> Path:
    home = folder / "run" / "flower" / part
    home.mkdir(parents=True, exist_ok=True)
    return home


def _without(environment: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    dropped = {name.lower() for name in names}
    return {key: value for key, value in environment.items() if key.lower() not in dropped}


def start_command(folder: Path, only: Part | None = None) -> list[str]:
    """The command that runs `start` in a process of its own."""
    return [*script("fedsynth", "site", "start", str(folder)), *(("--only", only) if only else ())]
