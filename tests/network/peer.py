"""Hostile peers, made by hand: a registered site that does not keep to the rules, and a coordinator that does not.

A `Peer` speaks to the gateway with a node's key, as a SuperNode would, but says what a test wants it to say. A `Master` has
SuperLink's port and secret, as somebody who took the coordinator over would, and sends sites what a test wants to send.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import Message as Proto

from fedsynth.deployment.runtime import RuntimeDoor
from fedsynth_server.coordinator.control import Control, open_control
from fedsynth_server.coordinator.runner import COMPONENT
from fedsynth_server.coordinator.settings import Study

_HEARTBEAT_SECONDS = 30.0


@dataclass
class Kept:
    """Keeps the newest request that passes, as somebody would who reads what is sent."""

    requests: list[httpx.Request] = field(default_factory=list)

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        self.requests.append(context.request)
        return call_next(context)


class Peer:
    """A node with a key of its own, at a gateway (or wherever `address` leads)."""

    def __init__(self, address: str, ca: Path, key: Path) -> None:
        private = load_ssh_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self.address, self.ca, self.private, self.public = address, ca, private, private.public_key()
        self.kept = Kept()
        self.client = FleetHttpClient.from_server_address(
            address,
            False,
            ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self.private, self.public),
                self.kept,  # the last one: it sees what goes out
            ],
        )
        self.node = Node()

    def activate(self) -> int:
        """Say hello; returns the node's id."""
        asked = ActivateNodeRequest(public_key=public_key_to_bytes(self.public), heartbeat_interval=_HEARTBEAT_SECONDS)
        self.node = Node(node_id=self.client.ActivateNode(asked).node_id)
        return self.node.node_id

    def leave(self) -> None:
        """Say goodbye, so that nobody waits for this node; one that is not there has left."""
        with suppress(httpx.HTTPStatusError):
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))

    def pull(self) -> Message | None:
        """The next task, without its content."""
        found = self.client.PullMessages(PullMessagesRequest(node=self.node))
        return message_from_proto(found.messages_list[0]) if found.messages_list else None

    def task(self, seconds: float) -> Message:
        """Wait for the next task."""
        deadline = time.monotonic() + seconds
        while (message := self.pull()) is None:
            assert time.monotonic() < deadline, "no task came"
            self.client.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=_HEARTBEAT_SECONDS)
            )
            time.sleep(0.2)
        return message

    def reply(self, task: Message, content: RecordDict) -> Message:
        """A reply to `task`, as Flower would make it."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = task.metadata.run_id, self.node.node_id, 1
        message = Message(content, reply_to=task)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def push(self, message: Message, tree: ObjectTree | None = None, **outside: object) -> PushMessagesResponse:
        """Announce `message` (by another object tree, with other metadata, if told so), then send its objects."""
        proto = message_to_proto(remove_content_from_message(message))
        for name, value in outside.items():
            setattr(proto.metadata, name, value)
        trees = [tree if tree is not None else get_object_tree(message)]
        announced = self.client.PushMessages(
            PushMessagesRequest(node=self.node, messages_list=[proto], message_object_trees=trees)
        )
        for key, each in get_all_nested_objects(message).items():
            if key in announced.objects_to_push:
                self.client.PushObject(
                    PushObjectRequest(
                        node=self.node,
                        run_id=message.metadata.run_id,
                        object_id=key,
                        object_content=each.deflate(),
                        session_id=announced.session_id,
                    )
                )
        return announced

    def say(self, path: str, body: Proto, *, at: str, signer: Peer | None = None) -> int:
        """Send `body` signed for the moment `at` (ISO 8601), by another node's key if told so; returns the HTTP code."""
        by = signer if signer is not None else self
        headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(by.public)).decode(),
            TIMESTAMP_HEADER: at,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(by.private, at.encode())).decode(),
        }
        return self.again(
            httpx.Request("POST", f"https://{self.address}{path}", headers=headers, content=body.SerializeToString())
        ).status_code

    def again(self, request: httpx.Request) -> httpx.Response:
        """Send a request that was seen before over another connection."""
        with httpx.Client(verify=ssl.create_default_context(cafile=str(self.ca)), trust_env=False) as other:
            return other.send(
                other.build_request(request.method, request.url, headers=request.headers, content=request.content)
            )


@dataclass
class Master:
    """A run of somebody who holds SuperLink's port and secret."""

    grid: HttpGrid
    bundle: bytes

    def ask(self, seconds: float, *messages: Message) -> list[str]:
        """Send `messages` to sites; returns the code of each refusal, in that order (``answered`` where it is none)."""
        ids = list(self.grid.push_messages(messages))
        codes: dict[str, str] = {}
        deadline = time.monotonic() + seconds
        while len(codes) < len(ids):
            assert time.monotonic() < deadline, f"only {codes} of {len(ids)} were answered"
            for reply in self.grid.pull_messages([each for each in ids if each not in codes]):
                codes[reply.metadata.reply_to_message_id] = code(reply)
            time.sleep(0.2)
        return [codes[each] for each in ids]


def code(reply: Message) -> str:
    """The code of a refusal."""
    if reply.has_error():
        return f"flower_error_{reply.error.code}"
    refused = reply.content.config_records.get("refusal")
    return str(refused["code"]) if refused is not None else "answered"


@contextmanager
def master(study: Study, bundle: bytes) -> Iterator[Master]:
    """Start a run with `bundle` and take it, as the study runner would; nobody else may run."""
    settings = study.settings.superlink
    door = RuntimeDoor(
        study.superlink_address, study.path(settings.ca).read_bytes(), study.path(settings.secret).read_bytes()
    )
    with open_control(study) as control:
        run_id = start_run(control, bundle)
        signed = SuperExecAuthHttpInterceptor(
            master_secret=door.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        with door.client(signed) as client:
            token = client.AcquireTask(AcquireTaskRequest(supported_task_types=[COMPONENT])).token
        grid = HttpGrid(door.address, root_certificates=door.ca, token=token)
        try:
            given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            assert given.run.run_id == run_id and given.run.fab_hash == hashlib.sha256(bundle).hexdigest()
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, run_id, 1
            grid.set_run(run_from_proto(given.run))
            yield Master(grid, bundle)
        finally:
            grid.close()
            control.stop_run(run_id)


def start_run(control: Control, bundle: bytes, **config: float | str) -> int:
    """Ask SuperLink to run `bundle` with this run config."""
    asked = StartRunRequest(fab=Fab(content=bundle), override_config=user_config_to_proto(dict(config)))
    return control._client.StartRun(asked).run_id
