"""Taking tasks from a Flower process that runs with ``--isolation process``: the Runtime API, as Flower 1.41 speaks it.

Flower's own executor unpacks the bundle that the other side sent and runs what is in it. The site's and the coordinator's
runners use this module instead, so that only installed code runs. It touches Flower's internals: the version is pinned
exactly, and `tests/network` holds the contract.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_AWAY_SECONDS = 20.0  # that a task waits for whoever handed it out


@dataclass(frozen=True)
class RuntimeDoor:
    """Where tasks are handed out.

    Attributes:
        address: host:port of the SuperNode's or SuperLink's Runtime API.
        ca: PEM of the certificate authority that vouches for it.
        secret: bytes of the SuperExec secret, without which no task is handed out.
    """

    address: str
    ca: bytes
    secret: bytes

    def client(self, *interceptors: ProtobufClientInterceptor, component: str = "SuperExec") -> RuntimeHttpClient:
        """A client of the Runtime API."""
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=False,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *interceptors],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def task_client(self, token: str, component: str) -> RuntimeHttpClient:
        """A client for one task; `token` is what the task was handed out with.

        A SuperNode that was started anew knows none of its earlier tokens: there is no use in asking it for minutes.
        """
        client = self.client(RuntimeTokenHttpInterceptor(token), component=component)
        retry = client._retry_invoker
        if retry is None:
            raise TypeError("Flower's client has no retry invoker")
        others = retry.should_giveup
        retry.max_time = _AWAY_SECONDS
        retry.should_giveup = lambda error: _is_unknown_token(error) or (others is not None and others(error))
        return client


def take_tasks(
    door: RuntimeDoor,
    task_type: str,
    work: Callable[[str], None],
    stopped: Callable[[], bool],
    poll_seconds: float = 0.2,
) -> None:
    """Take tasks of one type, one after another, and give each one's token to `work`, until `stopped()`.

    Args:
        door: where tasks are handed out; a door that cannot be reached is tried again (Flower's own back-off).
        task_type: ``"flwr-clientapp"`` or ``"flwr-serverapp"``.
        work: does the task and reports its outcome by itself; what it raises ends the runner.
        stopped: asked between tasks.
        poll_seconds: between two questions for a task.
    """
    signed = SuperExecAuthHttpInterceptor(master_secret=door.secret, protected_methods={_ACQUIRE})
    with door.client(signed) as client:
        while not stopped():
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[task_type]))
            if answer.HasField("task") and answer.token:
                work(answer.token)
            else:
                time.sleep(poll_seconds)


def _is_unknown_token(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED


@contextmanager
def heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell Flower that the task is alive while the block runs.

    Flower's sender tries again by itself, and stops doing so when it is told to. A client that tries again, too, would keep
    the block from ending for as long as the other side is away.
    """
    impatient = copy(client)
    impatient._retry_invoker = None
    sender = HeartbeatSender(make_task_heartbeat_fn_http(impatient))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()
