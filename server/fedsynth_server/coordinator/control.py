"""SuperLink's Control API, as Flower 1.41 speaks it: who is registered, what runs.

Together with `fedsynth_server.coordinator.runner` this is all that the coordinator knows of Flower's internals; Flower is
pinned exactly, and a contract test says what changed if it did.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import httpx
from flwr.common.constant import Status
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run as RunProto
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedsynth.deployment.bundle import bundle_bytes
from fedsynth.errors import ExitCode, JobFailed, Refused, UsageError
from fedsynth_server.coordinator.settings import Study

_TIMEOUT_SECONDS = 10.0

Answer = TypeVar("Answer")


class SuperlinkUnreachable(JobFailed):
    """SuperLink does not answer: it does not run, is just starting, or is not ours."""

    exit_code = ExitCode.CONNECTION


@dataclass(frozen=True)
class Node:
    """A registered node.

    Attributes:
        id: SuperLink's number for it.
        name: the site's name.
        public_key: PEM (SubjectPublicKeyInfo).
        online: whether it is connected.
        last_seen: when it last connected or left, as far as SuperLink tells; None if it never did.
    """

    id: int
    name: str
    public_key: bytes
    online: bool
    last_seen: datetime | None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        id: SuperLink's number for it.
        status: ``pending``, ``starting``, ``running`` or ``finished``.
        outcome: of a finished one: ``completed``, ``failed`` or ``stopped``.
        details: a code, or what SuperLink says.
    """

    id: int
    status: str
    outcome: str
    details: str

    @property
    def active(self) -> bool:
        """Whether it is still to be run, or running."""
        return self.status != Status.FINISHED

    @property
    def claimed(self) -> bool:
        """Whether a runner took it and has not finished it."""
        return self.status in (Status.STARTING, Status.RUNNING)


class Control:
    """Calls of the Control API; see `open_control`."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def register(self, public_key: bytes, name: str) -> int:
        """Register a node's public key (PEM) under a site's name; returns the node's id.

        Raises:
            UsageError: ``key_in_use``: it is registered, or was and has been revoked. ``key_not_valid``.
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        return _answer(lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))).node_id

    def unregister(self, node_id: int) -> None:
        """Take a node's registration away: from now on SuperLink refuses whatever it signs.

        Raises:
            UsageError: ``node_unknown``.
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        _answer(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def nodes(self) -> list[Node]:
        """Registered nodes.

        Raises:
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        found = _answer(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [_node(node) for node in found if node.status != NodeStatus.UNREGISTERED]

    def start_run(self) -> int:
        """Start a run with our bundle; returns its id.

        Raises:
            JobFailed: ``run_not_started``.
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        answer = _answer(lambda: self._client.StartRun(StartRunRequest(fab=Fab(content=bundle_bytes()))))
        if not answer.HasField("run_id"):
            raise JobFailed("run_not_started", "SuperLink did not start a run.", "logs/superlink.log may say why.")
        return answer.run_id

    def stop_run(self, run_id: int) -> None:
        """End a run; one that has ended already is left as it is.

        Raises:
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        try:
            _answer(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))
        except UsageError as error:
            if error.code != "run_ended":
                raise

    def runs(self) -> list[Run]:
        """The newest runs, latest first.

        Raises:
            SuperlinkUnreachable: ``superlink_unreachable``.
        """
        found = _answer(lambda: self._client.ListRuns(ListRunsRequest())).run_dict.values()
        return [_run(run) for run in sorted(found, key=lambda run: run.pending_at, reverse=True)]


@contextmanager
def open_control(study: Study) -> Iterator[Control]:
    """A connection to the study's SuperLink, verified by the study's authority; it never goes through a proxy.

    Raises:
        UsageError: ``ca_unreadable``; of the settings.
    """
    path = study.path(study.settings.superlink.ca)
    try:
        trust = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(path))
    except (OSError, ssl.SSLError):
        raise UsageError(
            "ca_unreadable", f"{path} is no readable certificate.", "See `fedsynth deploy certs`."
        ) from None
    client = ControlHttpClient(
        f"https://{study.superlink_address}",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        verify=trust,
        timeout=_TIMEOUT_SECONDS,
    )
    # Flower's client takes a proxy from the environment, where a hospital or university often has one; and it keeps its
    # connections, for whose end SuperLink would wait half a minute when it is told to stop.
    client._client.close()
    client._client = httpx.Client(
        verify=trust, timeout=_TIMEOUT_SECONDS, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
    )
    try:
        yield Control(client)
    finally:
        client.close()


# What SuperLink says, and what a person is told.
_CAUSES: dict[int, tuple[str, str, str]] = {
    ApiErrorCode.PUBLIC_KEY_NOT_VALID: (
        "key_not_valid",
        "SuperLink does not take this key.",
        "It must be an elliptic-curve key over P-256, P-384 or P-521.",
    ),
    ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE: (
        "key_in_use",
        "This key is registered already, or was and has been revoked.",
        "A site that was revoked comes back with a new key.",
    ),
    ApiErrorCode.NODE_NOT_FOUND: ("node_unknown", "SuperLink knows no such node.", ""),
    ApiErrorCode.RUN_ALREADY_FINISHED: ("run_ended", "The run has ended.", ""),
    ApiErrorCode.RUN_ID_NOT_FOUND: ("run_ended", "SuperLink knows no such run.", ""),
}


def _answer(call: Callable[[], Answer]) -> Answer:
    try:
        return call()
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        if said is not None and said.code in _CAUSES:
            raise UsageError(*_CAUSES[said.code]) from None
        raise Refused(
            "superlink_refused",
            f"SuperLink answered with HTTP {error.response.status_code}" + (f" (code {said.code})." if said else "."),
            "logs/superlink.log may say why.",
        ) from None
    except httpx.HTTPError as error:
        raise SuperlinkUnreachable(
            "superlink_unreachable",
            f"SuperLink does not answer ({type(error).__name__}).",
            "Is the study started? `fedsynth study status` and logs/superlink.log tell more.",
        ) from None


def _node(node: NodeInfo) -> Node:
    times = [text for text in (node.last_activated_at, node.last_deactivated_at) if text]
    return Node(
        id=node.node_id,
        name=node.name,
        public_key=node.public_key,
        online=node.status == NodeStatus.ONLINE,
        last_seen=max(map(datetime.fromisoformat, times)) if times else None,
    )


def _run(run: RunProto) -> Run:
    return Run(run.run_id, run.status.status, run.status.sub_status, run.status.details)
