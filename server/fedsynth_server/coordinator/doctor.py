"""`fedsynth study doctor`: what a coordinator needs, checked one by one; nothing is changed."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from fedsynth.deployment import machine, network
from fedsynth.deployment.certificates import check_certificate
from fedsynth.deployment.checks import Doubt, Line, check
from fedsynth.deployment.health import serving
from fedsynth.deployment.keys import check_private, read_secret
from fedsynth.deployment.network import split_address
from fedsynth.deployment.supervisor import is_running, processes_of, read_status
from fedsynth.errors import JobFailed, UsageError
from fedsynth.marks import marks
from fedsynth_server.coordinator import gateway
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.coordinator.registry import changes, read_registry
from fedsynth_server.coordinator.settings import Study

_FREE_BYTES = 5 * 2**30
_MEMORY_BYTES = 4 * 2**30


def ready(study: Study) -> list[Line]:
    """What has to be right before the processes start; needs no network."""
    settings = check(lambda: _settings(study))
    if not settings.ok:
        return [settings]
    checks: list[Callable[[], str]] = [
        lambda: _plan(study),
        lambda: _weights_there(study),
        lambda: machine.writable(study.folder),
        lambda: machine.private_folder(study.folder / "keys"),
        lambda: machine.private_folder(study.database_path.parent),
        lambda: _superlink_certificate(study),
        lambda: check_private(study.path(study.settings.superlink.key)),
        lambda: _secret(study),
    ]
    if study.settings.gateway.managed:
        checks += [
            lambda: _gateway_certificate(study),
            lambda: check_private(study.path(study.settings.gateway.key)),
            lambda: _nginx(study),
        ]
    checks += [
        lambda each=each: _port(study, *each)  # type: ignore[misc]
        for each in _ports(study)
    ]
    return [settings, *map(check, checks)]


def examine(study: Study) -> list[Line]:
    """Everything: `ready`, the machine, the weights' digests, and of what runs its health, doors, clock and sites."""
    lines = ready(study)
    if len(lines) == 1:  # without settings there is nothing to look at
        return lines
    checks: list[Callable[[], str]] = [
        lambda: machine.disk(study.folder, _FREE_BYTES),
        lambda: machine.memory(_MEMORY_BYTES),
        machine.versions,
        lambda: _weights(study),
        lambda: _checkpoint(study),
        lambda: _bundle(),
        lambda: _account(),
        lambda: _authority_elsewhere(study),
    ]
    public, ca = study.settings.gateway.address, study.path(study.settings.superlink.ca)
    checks.append(lambda: _processes(study))
    if is_running(study.folder):
        checks += [
            lambda: serving(study.health_address),
            lambda: _superlink(study),
            lambda: network.resolve(split_address(public)[0]),
            lambda: network.connect(*split_address(public)),
            lambda: network.handshake(*split_address(public), ca),
            lambda: network.gateway_health(public, ca),
            lambda: network.closed_paths(public, ca),
            lambda: network.clock_skew(public, ca),
        ]
    checks.append(lambda: _sites(study))
    return [*lines, *map(check, checks)]


def _settings(study: Study) -> str:
    listen = study.settings.superlink.listen
    if not listen.startswith("127.") and listen != "::1":
        raise Doubt(
            "superlink_exposed",
            f"SuperLink listens on {listen}: whoever reaches it there can start runs at every site.",
            "Use 127.0.0.1, or make sure that only the gateway is in that network.",
        )
    return f"settings: gateway {study.settings.gateway.address}, SuperLink {study.superlink_address}"


def _plan(study: Study) -> str:
    plan = study.plan
    found = f"plan {plan.name}: {len(plan.sites)} sites, digest {plan.digest[:12]}"
    if protects_nobody := marks(plan.privacy):
        raise Doubt("not_private", f"{found}. {' '.join(protects_nobody)}", "Only for public or simulated data.")
    return found


def _names_weights(study: Study) -> bool:
    plan = study.plan
    starts = (plan.gan.warm_start, plan.autoencoder.warm_start if "autoencoder" in plan.modules else None)
    return any(start is not None for start in (*starts, plan.moments, plan.embedding))


def _weights_there(study: Study) -> str:
    if not _names_weights(study):
        return "public weights: the plan names none"
    if not study.weights_path.is_file():
        raise UsageError(
            "warm_start_missing",
            f"The plan names public weights, but there is no {study.weights_path}.",
            "Put the file there that the plan was written with.",
        )
    return "public weights: there"


def _weights(study: Study) -> str:
    """Digests of the weights against those in the plan."""
    from fedsynth_server.checkpoint import first_state
    from fedsynth_server.warm_start import check_made_for, load_warm_start

    if not study.weights_path.is_file():
        return _weights_there(study)
    check_made_for(study.weights_path, study.plan)
    first_state(study.plan, load_warm_start(study.weights_path)[0])
    return "public weights: their digests are those that the plan names"


def _checkpoint(study: Study) -> str:
    progress = progress_of(study.folder, study.plan)
    return f"checkpoint: {progress.summary(study.plan)}" if progress is not None else "checkpoint: none yet"


def _bundle() -> str:
    from fedsynth.deployment.bundle import bundle_sha256

    return f"bundle: {bundle_sha256()[:16]}, the same at every site with this version"


def _account() -> str:
    if os.geteuid() == 0:
        raise Doubt(
            "runs_as_root",
            "This is the superuser.",
            "Run the coordinator under an account of its own; it needs no privilege.",
        )
    return f"account: uid {os.geteuid()}, not the superuser"


def _authority_elsewhere(study: Study) -> str:
    """Where ``fedsynth deploy certs`` leaves the authority's key, until somebody carries it away."""
    left = sorted((study.folder / "ca").rglob("*.key"))
    if left:
        raise Doubt(
            "authority_key_here",
            f"The authority's private key lies here ({left[0]}): who has it can pose as the gateway.",
            "Move it to a medium in a safe.",
        )
    return "authority: its private key is not in this folder"


def _superlink_certificate(study: Study) -> str:
    superlink = study.settings.superlink
    paths = [study.path(name) for name in (superlink.certificate, superlink.key, superlink.ca)]
    # The gateway calls it localhost (nginx compares names, not addresses), runner and commands call its address.
    check_certificate(paths[0], paths[1], paths[2], split_address(study.superlink_address)[0])
    return check_certificate(paths[0], paths[1], paths[2], "localhost")


def _gateway_certificate(study: Study) -> str:
    settings = study.settings
    return check_certificate(
        study.path(settings.gateway.certificate),
        study.path(settings.gateway.key),
        study.path(settings.superlink.ca),
        split_address(settings.gateway.address)[0],
    )


def _secret(study: Study) -> str:
    read_secret(study.path(study.settings.superlink.secret))
    return "secret of the study runner: there, private"


def _nginx(study: Study) -> str:
    """Let nginx read what it would be started with, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fedsynth-doctor-") as scratch:
        (Path(scratch) / "run").mkdir()
        text = gateway.render(study).replace(str(study.folder.absolute() / "run"), f"{scratch}/run")
        configuration = Path(scratch) / "nginx.conf"
        configuration.write_text(text, encoding="utf-8")
        gateway.check_configuration(study, configuration)
    return f"gateway: {gateway.program(study)} takes the configuration"


def _ports(study: Study) -> list[tuple[str, str, int, str]]:
    """What listens where: name in the settings, host, port, process."""
    settings = study.settings
    found = [
        ("superlink.port", settings.superlink.listen, settings.superlink.port, "superlink"),
        ("superlink.health_port", "127.0.0.1", settings.superlink.health_port, "superlink"),
    ]
    if settings.gateway.managed:
        found.append(("gateway.listen", *split_address(settings.gateway.listen), "gateway"))
    return found


def _port(study: Study, setting: str, host: str, port: int, process: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except PermissionError:
            raise UsageError(
                "port_not_permitted", f"Port {port} ({setting}) needs privileges.", "Take one above 1023."
            ) from None
        except OSError as error:
            if _ours(study, process, port):
                return f"port {port} ({setting}): held by this study's {process}"
            raise JobFailed(
                "port_in_use",
                f"{host}:{port} ({setting}) cannot be bound: {error.strerror}.",
                "Another program listens there: end it, or take another port in coordinator.toml.",
            ) from None
    return f"port {port} ({setting}): free"


def _ours(study: Study, process: str, port: int) -> bool:
    """Whether the study's own process, or what a killed supervisor left of it, listens on `port`."""
    status = read_status(study.folder)
    children = [child for child in (status.children if status is not None else []) if child.name == process]
    try:
        family = [member for child in children for member in processes_of(child)]
        return any(each.laddr.port == port for member in family for each in member.net_connections("inet"))
    except psutil.AccessDenied:  # it lives, and its doors are not shown to this account
        return True
    except psutil.NoSuchProcess:
        return False


def _processes(study: Study) -> str:
    status = read_status(study.folder)
    if status is None or not is_running(study.folder):
        raise Doubt("not_running", "The study does not run.", f"fedsynth study start {study.folder}")
    down = [child.name for child in status.children if child.state != "running"]
    if down:
        raise JobFailed(
            "process_down",
            f"{', '.join(down)} does not run; it is started again.",
            "The log of that name in logs/ says why it ended.",
        )
    return f"processes: {', '.join(child.name for child in status.children)} run"


def _superlink(study: Study) -> str:
    from fedsynth_server.coordinator.control import open_control

    with open_control(study) as control:
        return f"SuperLink: answers, knows {len(control.nodes())} nodes"


def _sites(study: Study) -> str:
    registry = read_registry(study.folder)
    named = [site.name for site in study.plan.sites]
    missing = [name for name in named if name not in registry.valid()]
    if missing:
        raise Doubt(
            "sites_not_added",
            f"Not added yet: {', '.join(missing)}.",
            f"fedsynth study add-site {study.folder} KEY.pub --name {missing[0]}",
        )
    if not is_running(study.folder):
        return f"sites: all {len(named)} added"
    from fedsynth_server.coordinator.control import open_control

    with open_control(study) as control:
        nodes = control.nodes()
    needed = changes(registry, nodes)
    if needed.register or needed.unregister:
        raise JobFailed(
            "registrations_differ",
            "SuperLink's registrations are not those of sites.json.",
            "They are made to agree within seconds while the study runs; logs/supervisor.log says if that fails.",
        )
    online = {node.name for node in nodes if node.online}
    absent = [name for name in named if name not in online]
    if absent:
        raise Doubt(
            "sites_not_connected",
            f"Not connected: {', '.join(absent)}.",
            "There, `fedsynth site check` tells what is in the way.",
        )
    return f"sites: all {len(named)} added and connected"
