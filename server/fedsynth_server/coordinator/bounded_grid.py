"""A grid that takes no more of a site's reply than a reply of the plan can be.

Flower's `HttpGrid` pulls and unpacks whatever a reply declares, and waits for it: a single site could fill the memory of the
study runner, or hold it for hours by announcing objects that it never sends. Here a reply is looked at before it is
unpacked, a wrong one becomes a refusal with a code, and one that is still on its way keeps nobody waiting.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from torch import Tensor

from fedsynth.deployment.unpacking import object_ids, unpacked_bytes
from fedsynth.errors import Refused
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Module, StudyPlan, load_plan
from fedsynth.progress import say
from fedsynth.records import PUBLIC, State, refusal
from fedsynth.translation import translator_template
from fedsynth_server.fitting.fit import statistic_template

_MARGIN = 2
# Message, content, progress and receipt, or a refusal, with room for a record more.
_OTHER_OBJECTS = 16
_OTHER_BYTES = 2**20
_HEADER_BYTES = 1024  # names, ids and headers of an array
_CHUNK_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


@dataclass(frozen=True)
class Limit:
    """How large a reply may be.

    Attributes:
        objects: number of objects (records, arrays and their chunks).
        bytes: of all of them, packed and unpacked.
    """

    objects: int
    bytes: int


def reply_limit(plan: StudyPlan) -> Limit:
    """Twice what the largest reply of `plan` is made of."""
    states = [_sent(plan, module) for module in plan.modules]
    objects = max(sum(1 + math.ceil(_bytes(each) / _CHUNK_BYTES) for each in state.values()) for state in states)
    size = max(sum(_bytes(each) for each in state.values()) for state in states)
    return Limit(_MARGIN * (objects + _OTHER_OBJECTS), _MARGIN * (size + _OTHER_BYTES))


def _sent(plan: StudyPlan, module: Module) -> State:
    """A state like the one that a site sends of `module`; the values mean nothing."""
    if module in PUBLIC:
        return statistic_template(plan, module)
    if module == "gan":
        return dict(make_generator(plan).state_dict())
    if module == "translation":
        return translator_template(plan)
    return dict((make_autoencoder(plan) if module == "autoencoder" else make_radiogenomic_dnn(plan)).state_dict())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _HEADER_BYTES


@dataclass
class _Incoming:
    """A reply that SuperLink has announced, and what has arrived of it."""

    message_id: str
    outside: Metadata
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0


class BoundedGrid(HttpGrid):
    """`HttpGrid` with bounded replies; a reply that exceeds `limit` comes as a refusal.

    Codes: ``reply_too_large`` (more objects or bytes than `limit`, in what is sent or in what it would unpack to),
    ``reply_malformed`` (it cannot be unpacked), ``reply_differs`` (what is inside answers another message or run than what
    was announced).

    Args:
        address: host:port of SuperLink.
        ca: PEM of the authority that vouches for it.
        token: of the task.
        limit: see `reply_limit`.
    """

    def __init__(self, address: str, ca: bytes, token: str, limit: Limit) -> None:
        super().__init__(address, root_certificates=ca, token=token)
        self._limit = limit
        self._incoming: dict[str, _Incoming] = {}  # by the message that the reply answers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to `message_ids` that are complete; one that is still arriving comes at a later call.

        Raises:
            httpx.HTTPError: SuperLink does not answer.
        """
        asked = list(message_ids)
        for gone in set(self._incoming) - set(asked):
            self._confirm(self._incoming.pop(gone))
        refused = self._announced([each for each in asked if each not in self._incoming])
        return [*refused, *(reply for each in list(self._incoming.values()) if (reply := self._arrived(each)))]

    def _announced(self, message_ids: list[str]) -> list[Message]:
        """Look for replies; returns refusals of those that are too large to be pulled."""
        if not message_ids:
            return []
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        refused = []
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            outside, ids = proto.metadata, object_ids(tree)
            incoming = _Incoming(
                message_id=outside.message_id,
                outside=Metadata(
                    run_id=outside.run_id,
                    message_id="",
                    src_node_id=outside.src_node_id,
                    dst_node_id=outside.dst_node_id,
                    reply_to_message_id=outside.reply_to_message_id,
                    group_id=outside.group_id,
                    created_at=outside.created_at,
                    ttl=outside.ttl,
                    message_type=outside.message_type,
                ),
                missing=ids,
            )
            if outside.reply_to_message_id not in message_ids:
                # Whoever may push a reply may also push what answers nothing.
                self._confirm(incoming)
            elif len(ids) > self._limit.objects:
                refused.append(self._refuse(incoming, "reply_too_large"))
            else:
                self._incoming[outside.reply_to_message_id] = incoming
        return refused

    def _arrived(self, incoming: _Incoming) -> Message | None:
        """Take what SuperLink holds of a reply by now; the reply, once it is whole or wrong."""
        run_id = cast(Run, self._run).run_id
        while incoming.missing:
            answer = self._runtime_client.PullObject(
                PullObjectRequest(node=self.node, run_id=run_id, object_id=incoming.missing[0])
            )
            if not answer.object_found:  # the site began to send it and did not go on
                del self._incoming[incoming.outside.reply_to_message_id]
                return _lost(incoming)
            if not answer.object_available:
                return None
            incoming.size += len(answer.object_content)
            if incoming.size > self._limit.bytes:
                return self._refuse(incoming, "reply_too_large")
            incoming.contents[incoming.missing.pop(0)] = answer.object_content
        try:
            reply = _unpacked(incoming, self._limit)
        except Refused as error:
            say(f"a reply of node {incoming.outside.src_node_id} is left out: {error}")
            return self._refuse(incoming, error.code)
        self._done(incoming)
        return reply

    def _refuse(self, incoming: _Incoming, code: str) -> Message:
        self._done(incoming)
        return make_message(metadata=incoming.outside, content=refusal(code))

    def _done(self, incoming: _Incoming) -> None:
        self._incoming.pop(incoming.outside.reply_to_message_id, None)
        self._confirm(incoming)

    def _confirm(self, incoming: _Incoming) -> None:
        """Let SuperLink forget the reply."""
        run_id = cast(Run, self._run).run_id
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=incoming.message_id)
        )


def _unpacked(incoming: _Incoming, limit: Limit) -> Message:
    """The reply that has arrived.

    Raises:
        Refused: ``reply_too_large``, ``reply_malformed`` or ``reply_differs``.
    """
    try:
        size = unpacked_bytes(incoming.contents)
        reply = inflate_object_from_contents(incoming.message_id, incoming.contents) if size <= limit.bytes else None
    except Exception as error:
        # Whatever Flower trips over in bytes that the other side wrote; its text may quote them.
        raise Refused("reply_malformed", f"It cannot be unpacked ({type(error).__name__}).") from error
    if reply is None:
        raise Refused("reply_too_large", f"It would unpack to {size} bytes.")
    if not isinstance(reply, Message) or not _well_formed(reply):
        raise Refused("reply_malformed", "What was announced as a reply is none.")
    # The round loop goes by what is inside, which the site wrote; SuperLink looked at what is outside.
    if not _same(reply.metadata, incoming.outside):
        raise Refused("reply_differs", "Inside, it answers another message or run, or comes from another node.")
    reply.metadata.__dict__["_message_id"] = incoming.message_id  # as Flower does: a message cannot hold its own id
    return reply


def _well_formed(message: Message) -> bool:
    """Whether the content is records, and the records of arrays hold arrays: Flower takes any object for a child."""
    if not message.has_content():
        return message.has_error()
    content = message.content
    return isinstance(content, RecordDict) and all(
        isinstance(record, ArrayRecord | MetricRecord | ConfigRecord)
        and (not isinstance(record, ArrayRecord) or all(isinstance(array, Array) for array in record.values()))
        for record in content.values()
    )


def _same(inside: Metadata, outside: Metadata) -> bool:
    return (inside.run_id, inside.src_node_id, inside.reply_to_message_id) == (
        outside.run_id,
        outside.src_node_id,
        outside.reply_to_message_id,
    )


def _lost(incoming: _Incoming) -> Message:
    """What Flower says of a reply that did not arrive: the task can be sent again."""
    metadata = Metadata(
        run_id=incoming.outside.run_id,
        message_id="",
        src_node_id=incoming.outside.dst_node_id,
        dst_node_id=incoming.outside.dst_node_id,
        reply_to_message_id=incoming.outside.reply_to_message_id,
        group_id="",
        created_at=now().timestamp(),
        ttl=0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    return make_message(metadata=metadata, error=Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "not all of it arrived"))


if __name__ == "__main__":
    # Asked by `fedsynth_server.coordinator.start`, which does without torch.
    largest = reply_limit(load_plan(Path(sys.argv[1])))
    print(largest.objects, largest.bytes)
