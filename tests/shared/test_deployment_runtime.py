"""A task's client gives up on a door that has forgotten the task, or is gone, instead of asking for minutes."""

from __future__ import annotations

import signal
import time
from types import FrameType

import httpx
import pytest
from flwr.proto.runtime_pb2 import PullTaskInputRequest

from fedsynth.deployment import certificates, runtime
from fedsynth.deployment.runtime import RuntimeDoor


def door(address: str = "127.0.0.1:9") -> RuntimeDoor:
    return RuntimeDoor(address, certificates.make_ca("test")[0], b"s" * 32)


def test_a_token_that_is_not_known_is_given_up_at_once_and_interrupts_nobody() -> None:
    def interrupted(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the process was interrupted")

    before = signal.signal(signal.SIGINT, interrupted)
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(401, request=request)

    try:
        with door().task_client("token", "flwr-clientapp") as client:
            client._client.close()
            client._client = httpx.Client(transport=httpx.MockTransport(answer))
            with pytest.raises(httpx.HTTPStatusError):
                client.PullTaskInput(PullTaskInputRequest())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(asked) == 1


def test_a_door_that_is_gone_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_AWAY_SECONDS", 0.5)
    began = time.monotonic()
    with door().task_client("token", "flwr-clientapp") as client, pytest.raises(httpx.ConnectError):
        client.PullTaskInput(PullTaskInputRequest())
    assert time.monotonic() - began < 10
