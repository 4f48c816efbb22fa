"""SuperLink, with what Flower 1.41 does not look at when a node pushes a message.

``python -m fedsynth_server.coordinator.superlink OBJECTS BYTES [SuperLink's own arguments]``. Flower proves who signed a
request, but believes what the message in it names as its sender: a registered site could give another site tasks in the
coordinator's name, and could store any number of bytes here. So a pushed message must come from the node that signed the
request, must answer something, and must not be larger than a reply of the plan can be. And what one node announced of an
object keeps nobody else from announcing the same object rightly.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.linkstate_models import MessageIns
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import select
from sqlalchemy.orm import Session

from fedsynth.errors import ExitCode
from fedsynth.progress import say

_REFUSED = 403
_WARNING = 30
_SESSIONS = 10_000  # uploads that are under way at the same time, at the most


class Guard:
    """Looks at what nodes push before Flower does.

    Args:
        objects: most objects that a reply may be made of.
        bytes: most bytes that they may have together.
    """

    def __init__(self, objects: int, bytes: int) -> None:
        self._objects, self._bytes = objects, bytes
        self._received: OrderedDict[str, int] = OrderedDict()  # upload -> bytes so far
        self._lock = Lock()

    def push_messages(
        self, request: PushMessagesRequest, state: Any, flower: Callable[..., PushMessagesResponse]
    ) -> PushMessagesResponse:
        """Let `flower` take the announcement of a reply.

        Raises:
            HTTPException: 403; why is in SuperLink's log.
        """
        node = request.node.node_id
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise _refused(node, "it pushes other than one message at a time")
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        if (
            metadata.src_node_id != node
            or metadata.dst_node_id != SUPERLINK_NODE_ID
            or not metadata.reply_to_message_id
        ):
            raise _refused(node, "its message is no reply of its own")
        if tree.object_id != metadata.message_id or _more_than(tree, self._objects):
            raise _refused(node, f"its reply is made of other objects than announced, or of more than {self._objects}")
        return flower(request=request, state=state)

    def push_object(
        self, request: PushObjectRequest, state: Any, flower: Callable[..., PushObjectResponse]
    ) -> PushObjectResponse:
        """Let `flower` keep an object of a reply.

        Raises:
            HTTPException: 403; why is in SuperLink's log.
        """
        if not request.session_id:
            raise _refused(request.node.node_id, "it pushes an object that belongs to no reply")
        with self._lock:
            received = self._received.get(request.session_id, 0) + len(request.object_content)
            self._received[request.session_id] = received
            self._received.move_to_end(request.session_id)
            while len(self._received) > _SESSIONS:
                self._received.popitem(last=False)
        if received > self._bytes:
            raise _refused(request.node.node_id, f"its reply has more than {self._bytes} bytes")
        answer = flower(request=request, state=state)
        if not answer.stored:  # sent again over a bad line, or never announced
            with self._lock:
                if request.session_id in self._received:
                    self._received[request.session_id] -= len(request.object_content)
        return answer


def _more_than(tree: ObjectTree, limit: int) -> bool:
    """Whether a tree has more than `limit` nodes; counted no further."""
    waiting, seen = [tree], 0
    while waiting:
        seen += 1
        if seen + len(waiting) - 1 > limit:
            return True
        waiting.extend(waiting.pop().children)
    return False


def displace_false_claims(store: SqlObjectStore, tree: ObjectTree) -> None:
    """Delete replies that claim other children for an object of `tree` than `tree` does, unless the object's content agrees.

    Flower takes an announcement at its word, and refuses whoever announces the same object otherwise from then on. Some
    objects are the same in the replies of all sites (a record without values), and tasks hold public weights: one site
    could shut out the others, or the coordinator. While an object has no content, whose word is right cannot be told: the
    newer counts, and a reply that was right is lost and asked for again. Tasks are the coordinator's word, and stay.
    """
    with store._mutation_session() as session:
        for each in iterate_object_tree(tree):
            claimed = {child.object_id for child in each.children}
            known = session.execute(
                select(StoredObject.object_id).where(StoredObject.object_id == each.object_id)
            ).first()
            if known is None or (stored := _children(session, each.object_id)) == claimed:
                continue
            content = store.get(each.object_id)
            if content and set(get_object_children_ids_from_object_content(content)) == stored:
                continue
            for root in _roots(session, each.object_id):
                is_task = select(MessageIns.message_id).where(MessageIns.message_id == root)
                if session.execute(is_task).first() is None:
                    log(_WARNING, "a reply is dropped: it announced an object otherwise than somebody else did")
                    store.delete(root)


def _children(session: Session, object_id: str) -> set[str]:
    return set(session.scalars(select(ObjectChild.child_id).where(ObjectChild.parent_id == object_id)))


def _roots(session: Session, object_id: str) -> set[str]:
    """The messages that an object is part of."""
    roots, seen, waiting = set[str](), set[str](), [object_id]
    while waiting:
        current = waiting.pop()
        parents = set(session.scalars(select(ObjectChild.parent_id).where(ObjectChild.child_id == current)))
        if not parents:
            roots.add(current)
        waiting.extend(parents - seen)
        seen |= parents
    return roots


def _refused(node: int, why: str) -> HTTPException:
    log(_WARNING, "what node %d pushes is refused: %s", node, why)
    return HTTPException(_REFUSED, "not allowed")


def install(guard: Guard) -> None:
    """Put `guard` before the two calls of the Fleet API by which nodes send something that is kept.

    And `displace_false_claims` before whatever is announced, by nodes or by the coordinator.
    """
    messages, objects = fleet_handlers.push_messages, fleet_handlers.push_object

    def push_messages(request: PushMessagesRequest, state: Any) -> PushMessagesResponse:
        return guard.push_messages(request, state, messages)

    def push_object(request: PushObjectRequest, state: Any) -> PushObjectResponse:
        return guard.push_object(request, state, objects)

    # The routes look both up in this module whenever they are called.
    fleet_handlers.push_messages, fleet_handlers.push_object = push_messages, push_object

    preregister = SqlObjectStore.preregister

    def announce(self: SqlObjectStore, run_id: int, object_tree: ObjectTree) -> list[str]:
        displace_false_claims(self, object_tree)
        return preregister(self, run_id, object_tree)

    SqlObjectStore.preregister = announce  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    """Run SuperLink until a signal comes; returns the exit code."""
    if len(arguments) < 2 or not all(each.isdecimal() for each in arguments[:2]):
        say("usage: python -m fedsynth_server.coordinator.superlink OBJECTS BYTES [SuperLink's own arguments]")
        return ExitCode.USAGE
    from flwr.superlink.cli import flower_superlink

    install(Guard(int(arguments[0]), int(arguments[1])))
    sys.argv = ["flower-superlink", *arguments[2:]]
    flower_superlink()
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
