"""One task over the SuperNode's Runtime API, as Flower 1.41 speaks it: look at it first, unpack it then, answer it.

Flower's own client pulls and unpacks a message in one go. Here the announcement comes first (bundle, type, sender, number
of objects), so that what is not admitted is never unpacked; and what is admitted is pulled against a limit. Beside
`fedsynth.deployment.runtime` this is the only module that touches Flower's internals; the version is pinned, and
`tests/client/test_node_flower.py` holds the contract.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedsynth.deployment.unpacking import object_ids, unpacked_bytes
from fedsynth.errors import Refused
from fedsynth_client.node.admission import check_kind, check_size

COORDINATOR = SUPERLINK_NODE_ID
MessageLost = ObjectPullError
ReplyLost = ObjectPushError
_DRAIN_SECONDS = 600.0


@dataclass(frozen=True)
class Announcement:
    """What is known of a task before its content is pulled.

    Attributes:
        bundle: bytes of the run's bundle; never unpacked.
        declared: the hash that the other side gives for it.
        message: the message without its content.
        tree: ids of the objects that the content is made of.
        context: Flower's context of the run.
    """

    bundle: bytes
    declared: str
    message: Message
    tree: ObjectTree
    context: Context


def bound_responses(client: RuntimeHttpClient, limit: int) -> None:
    """Make `client` refuse any response of more than `limit` bytes before it reads it.

    The SuperNode's server states the length of every response; one that does not is refused, too.
    """

    def look(response: httpx.Response) -> None:
        length = response.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > limit:
            raise Refused("message_too_large", f"The SuperNode answers with {length or 'unstated'} bytes.")

    client._client.event_hooks = {"response": [look]}


def announced(client: RuntimeHttpClient) -> Announcement:
    """Start the task that `client` holds the token of, and read what it is about; its content stays where it is."""
    task = client.PullTaskInput(PullTaskInputRequest())
    # Flower's message classes read these when a reply is made.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        task.run.run_id,
        task.context.node_id,
    )
    waiting = client.PullMessages(PullAppMessagesRequest())
    if len(waiting.messages_list) != 1 or len(waiting.message_object_trees) != 1:
        raise Refused("message_missing", "The SuperNode handed out a task without exactly one message.")
    message, tree = message_from_proto(waiting.messages_list[0]), waiting.message_object_trees[0]
    message.metadata.__dict__["_message_id"] = tree.object_id  # as Flower does: a message cannot hold its own id
    return Announcement(task.fab.content, task.fab.hash_str, message, tree, context_from_proto(task.context))


def fetch(client: RuntimeHttpClient, announcement: Announcement, limit: int) -> Message:
    """Pull the announced message and unpack it.

    Raises:
        Refused: ``message_too_large``: more objects or bytes than `limit`, in what is sent or in what it would unpack to.
            ``message_malformed``: it cannot be unpacked. ``message_differs``: what was unpacked is not what was announced.
            ``message_type_not_allowed`` or ``sender_not_allowed``.
        ObjectPullError: the SuperNode has lost the message, e.g. because the way to the coordinator broke, or does not
            have all of it before the time for an answer is over.
    """
    ids = object_ids(announcement.tree)
    check_size(len(ids), 0, limit)
    # A SuperNode whose run ended while it was receiving announces the message all the same, and its objects never come.
    patience = min(announcement.message.metadata.ttl, _DRAIN_SECONDS)
    contents = pull_objects(ids, _bounded(_pull(client, announcement), len(ids), limit), max_time=patience)
    try:
        check_size(len(ids), unpacked_bytes(contents), limit)
        message = inflate_object_from_contents(announcement.tree.object_id, contents)
    except Refused:
        raise
    except Exception as error:
        # Whatever Flower trips over in bytes that the other side wrote; the text may quote them.
        raise Refused("message_malformed", f"The message cannot be unpacked ({type(error).__name__}).") from error
    if not isinstance(message, Message) or not message.has_content():
        raise Refused("message_malformed", "What was announced as a message is none, or is empty.")
    # The app goes by what is inside, the announcement was outside; the other side wrote both.
    inside, outside = message.metadata, announcement.message.metadata
    check_kind(inside.message_type, inside.src_node_id, COORDINATOR)
    announced_as = (outside.message_type, outside.run_id, outside.dst_node_id)
    if (inside.message_type, inside.run_id, inside.dst_node_id) != announced_as:
        raise Refused("message_differs", "The message is of another type, run or node than was announced.")
    inside.__dict__["_message_id"] = announcement.tree.object_id
    return message


def drain(client: RuntimeHttpClient, announcement: Announcement) -> None:
    """Wait until the SuperNode holds all of a refused message; nothing of it is kept.

    A task is handed out as soon as its message is announced. To discard it while the SuperNode is still receiving would
    break that off, and the refusal would never be sent.
    """
    pull = _pull(client, announcement)

    def seen(object_id: str) -> bytes:
        with suppress(Refused):  # too large to be read, hence there
            pull(object_id)
        return b""

    pull_objects(object_ids(announcement.tree), seen, max_time=_DRAIN_SECONDS)


def abandon(client: RuntimeHttpClient) -> None:
    """End a task whose message does not come, without an answer: there is nobody left to send one to."""
    push_task_output(client, None, SubStatus.FAILED, "message_lost")


def discard(client: RuntimeHttpClient, announcement: Announcement) -> None:
    """Tell the SuperNode that the message need not be kept any more; all of it must have been pulled or drained."""
    make_confirm_message_received_fn_protobuf(
        client.ConfirmMessageReceived, Node(node_id=announcement.context.node_id), announcement.context.run_id
    )(announcement.tree.object_id)


def answer(client: RuntimeHttpClient, announcement: Announcement, content: RecordDict) -> None:
    """Send the reply and end the task. The reply goes first: the end of the task ends its token.

    Raises:
        ReplyLost: the SuperNode dropped the reply while it was handed over, as it does when the round's time is up.
    """
    try:
        push_message(client, Message(content, reply_to=announcement.message), announcement.context)
    except ReplyLost:
        # A task that is not ended would count as crashed a minute later, in the name of whichever message is in hand then.
        push_task_output(client, None, SubStatus.FAILED, "reply_lost")
        raise
    # Without a context: nothing of this task stays in the SuperNode's memory.
    push_task_output(client, None, SubStatus.COMPLETED, "")


def give_up(client: RuntimeHttpClient, announcement: Announcement, code: str) -> None:
    """Report that the task died, so that nobody waits for its heartbeat to run out; `code` is all that is told."""
    push_message(
        client,
        Message(Error(ErrorCode.CLIENT_APP_CRASHED, code), reply_to=announcement.message),
        announcement.context,
    )
    push_task_output(client, None, SubStatus.FAILED, code)


def _pull(client: RuntimeHttpClient, announcement: Announcement) -> Callable[[str], bytes]:
    context = announcement.context
    return make_pull_object_fn_protobuf(client.PullObject, Node(node_id=context.node_id), context.run_id)


def _bounded(pull: Callable[[str], bytes], objects: int, limit: int) -> Callable[[str], bytes]:
    """`pull`, until the objects have more than `limit` bytes together; Flower calls it from several threads."""
    lock, seen = threading.Lock(), 0

    def bounded(object_id: str) -> bytes:
        nonlocal seen
        content = pull(object_id)
        with lock:
            seen += len(content)
            check_size(objects, seen, limit)
        return content

    return bounded
