"""A Flower Grid in this process: drives the very ServerApp and ClientApp of a deployment without servers or Ray.

Messages are serialised and parsed on their way in both directions, as on the wire, so that neither side can change what
the other holds, and what a message carries can be looked at as bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Wiretap = Callable[[str, int, bytes], None]


def untapped(direction: str, node: int, content: bytes) -> None:
    """Look at nothing."""


class InProcessGrid(Grid):
    """Delivers messages to one ClientApp under several contexts.

    Args:
        client_app: the app that every node runs.
        site_folders: node id -> the site's folder.
        run_config: run configuration, the same for all.
        wiretap: called with direction ("to site" or "to coordinator"), node id and the message's bytes.
    """

    def __init__(
        self,
        client_app: ClientApp,
        site_folders: dict[int, Path],
        run_config: dict[str, bool | float | int | str] | None = None,
        wiretap: Wiretap = untapped,
    ) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        self._wiretap = wiretap
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"site-folder": str(folder)},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node, folder in site_folders.items()
        }
        # Flower's message classes read these when they are built outside its own processes.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build a message (Flower's older way)."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes, with their ids only: on one machine nobody registered keys under names."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver each message and hold its reply; returns the messages' ids."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out, once, the replies to `message_ids`."""
        return [self._replies.pop(each) for each in list(message_ids) if each in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver and gather; `timeout` has no meaning here, since delivery is synchronous."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        message_id = str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        node = message.metadata.dst_node_id
        received = make_message(message.metadata, self._wire("to site", node, message.content))
        try:
            reply = self._app(received, self._contexts[node])
        except Exception as error:  # noqa: BLE001  what a SuperNode does; our handlers let nothing through
            # The text too, as a SuperNode sends it: a handler that lets one through must be seen here.
            reason = f"{type(error)}:<'{error}'>"
            self._wiretap("to coordinator", node, reason.encode())
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        if reply.has_content():
            reply = make_message(reply.metadata, self._wire("to coordinator", node, reply.content))
        self._replies[message_id] = reply
        return message_id

    def _wire(self, direction: str, node: int, content: RecordDict) -> RecordDict:
        data = recorddict_to_proto(content).SerializeToString()
        self._wiretap(direction, node, data)
        return recorddict_from_proto(RecordDictProto.FromString(data))


def run_in_process(server_app: ServerApp, grid: InProcessGrid, run_config: dict[str, bool | float | int | str]) -> None:
    """Run `server_app` to its end over `grid`."""
    server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config))
