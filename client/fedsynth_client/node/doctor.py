"""Checks of a site's node, one line each with the remedy: machine, files, way to the coordinator, running processes."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import httpx

from fedsynth.deployment import health, machine, network
from fedsynth.deployment.checks import Line, check
from fedsynth.deployment.supervisor import is_running
from fedsynth.errors import UsageError
from fedsynth.plan import StudyPlan
from fedsynth_client.node.settings import NodeSettings, ca_path, key_path, load_settings
from fedsynth_client.node.start import local_lines
from fedsynth_client.preflight import approved_lines, preflight
from fedsynth_client.site import Site

_SECONDS = 5.0
# The runner takes about half a gigabyte before it reads a cohort, the SuperNode a fifth.
_MEMORY_BYTES = 2 * 2**30


def site_lines(site: Site, plan: StudyPlan | None, offline: bool) -> list[Line]:
    """All checks of a site, in the order in which things depend on each other.

    Args:
        site: the site.
        plan: a plan to check against policy, cohort and ledger; the approved ones if None.
        offline: contact nobody.
    """
    lines = [*machine_lines(site.folder), *preflight(site, plan)]
    if plan is None and site.policy_path.is_file():
        lines += approved_lines(site)
    try:
        settings = load_settings(site.folder)
    except UsageError as error:
        missing = error.code == "node_settings_missing"
        return [*lines, Line("warn" if missing else "fail", error.message, error.hint, error.code)]
    lines += local_lines(site.folder, settings, "node")
    if not offline:
        lines += [*network_lines(site.folder, settings), *running_lines(site.folder, settings)]
    return lines


def machine_lines(folder: Path) -> list[Line]:
    """What the machine has: memory, GPU, versions, a folder that only its owner enters and may write to."""
    return [
        check(machine.versions),
        check(lambda: machine.memory(_MEMORY_BYTES)),
        check(machine.gpu),
        check(lambda: machine.writable(folder)),
        check(lambda: machine.private_folder(folder)),
    ]


def network_lines(folder: Path, settings: NodeSettings) -> list[Line]:
    """The way to the coordinator, each line one step further; behind a step that fails nothing can be told."""
    host, port = network.split_address(settings.gateway)
    ca, proxy = ca_path(folder, settings), network.proxy_for(host, settings.proxy)
    lines = [Line("ok", f"proxy: {'the way out leads over one' if proxy else 'none'}")]
    # A name that only the proxy can look up is as it should be.
    steps: list[Callable[[], str]] = [] if proxy else [lambda: network.resolve(host)]
    steps += [
        lambda: network.connect(host, port, proxy),
        lambda: network.handshake(host, port, ca, proxy),
        lambda: network.gateway_health(settings.gateway, ca, proxy),
        lambda: network.clock_skew(settings.gateway, ca, proxy),
        lambda: _registered(folder, settings, proxy),
    ]
    for step in steps:
        lines.append(check(step))
        if not lines[-1].ok:
            break
    return lines


def running_lines(folder: Path, settings: NodeSettings) -> list[Line]:
    """Whether node and runner run, as the supervisor and the node's health service say."""
    if not is_running(folder):
        return [Line("warn", "node: not started", "fedsynth site start FOLDER", "not_started")]
    return [check(lambda: f"node: {health.serving(settings.health_listen)}")]


def coordinator_line(folder: Path, settings: NodeSettings) -> Line:
    """In one line, whether the coordinator is there and knows this node."""
    host = network.split_address(settings.gateway)[0]
    ca, proxy = ca_path(folder, settings), network.proxy_for(host, settings.proxy)

    def ask() -> str:
        return f"{network.gateway_health(settings.gateway, ca, proxy)}; {_registered(folder, settings, proxy)}"

    return check(ask)


def _registered(folder: Path, settings: NodeSettings, proxy: str) -> str:
    from fedsynth_client.node.registration import registered

    trusted = ssl.create_default_context(cafile=str(ca_path(folder, settings)))
    with httpx.Client(
        base_url=f"https://{settings.gateway}", verify=trusted, proxy=proxy or None, trust_env=False, timeout=_SECONDS
    ) as client:
        return registered(client, key_path(folder, settings).read_bytes())
