"""What the coordinator takes of a reply: real objects of Flower's, served by a stand-in for SuperLink."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsynth.deployment.supervisor import python_module
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.records import check_reply, to_record
from fedsynth_server.coordinator.bounded_grid import BoundedGrid, Limit, reply_limit

NODE, RUN = 77, 5
LIMIT = Limit(objects=30, bytes=40_000)


@dataclass
class SuperLink:
    """Announces `replies` and hands out `objects`; counts what is asked of it."""

    replies: list[tuple[Any, ObjectTree]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    asked: list[list[str]] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        self.asked.append(list(request.message_ids))
        given, self.replies = self.replies, []
        return PullAppMessagesResponse(
            messages_list=[proto for proto, _ in given], message_object_trees=[tree for _, tree in given]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        known = request.object_id in self.objects
        there = known and request.object_id not in self.withheld
        content = self.objects[request.object_id] if there else b""
        return PullObjectResponse(object_found=known, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)

    def close(self) -> None:
        return

    def take(self, message: Message, tree: ObjectTree | None = None, **outside: object) -> str:
        """A node's reply, as SuperLink would hold it; returns the message that it answers."""
        message.metadata.__dict__["_message_id"] = message.object_id
        proto = message_to_proto(remove_content_from_message(message))
        for name, value in outside.items():
            setattr(proto.metadata, name, value)
        self.objects |= {key: each.deflate() for key, each in get_all_nested_objects(message).items()}
        self.replies.append((proto, tree if tree is not None else get_object_tree(message)))
        return str(proto.metadata.reply_to_message_id)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(superlink: SuperLink) -> Iterator[BoundedGrid]:
    made = BoundedGrid("127.0.0.1:1", b"", "token", LIMIT)
    made._client = superlink  # type: ignore[assignment]
    made.set_run(Run.create_empty(RUN))
    yield made


def reply(content: RecordDict, answers: str = "a" * 64) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
    task = Message(
        RecordDict({"task": ConfigRecord({"round": 1})}), dst_node_id=NODE, message_type="train.gan", ttl=600
    )
    task.metadata.__dict__["_message_id"] = answers
    TaskIdentity.node_id = NODE
    return Message(content, reply_to=task)


def weights(values: int = 100) -> RecordDict:
    return RecordDict({"generator": ArrayRecord({"w": Array(np.arange(values, dtype=np.float32))})})


def code(message: Message) -> str:
    """The code that the round loop would show."""
    check_reply(message.content, "gan")
    return str(message.content.config_records["refusal"]["code"])


def test_a_reply_comes_as_it_was_sent(grid: BoundedGrid, superlink: SuperLink) -> None:
    sent = reply(weights())
    answers = superlink.take(sent)
    (got,) = grid.pull_messages([answers])
    assert np.array_equal(got.content.array_records["generator"]["w"].numpy(), np.arange(100, dtype=np.float32))
    assert got.metadata.reply_to_message_id == answers and got.metadata.src_node_id == NODE
    assert superlink.confirmed == [sent.metadata.message_id]
    assert list(grid.pull_messages([])) == [] and len(superlink.asked) == 1


def test_too_many_objects_are_refused_unpulled(grid: BoundedGrid, superlink: SuperLink) -> None:
    many = RecordDict({"generator": ArrayRecord({f"w{i}": Array(np.float32([i])) for i in range(20)})})
    answers = superlink.take(reply(many))
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_too_large" and got.metadata.reply_to_message_id == answers
    assert superlink.pulled == [] and len(superlink.confirmed) == 1


def test_too_many_bytes_are_refused_as_soon_as_they_are_too_many(grid: BoundedGrid, superlink: SuperLink) -> None:
    answers = superlink.take(reply(weights(20_000)))
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_too_large"
    assert len(superlink.pulled) == 1  # the chunk comes first


def test_few_bytes_that_would_unpack_to_many_are_refused(grid: BoundedGrid, superlink: SuperLink) -> None:
    message = reply(weights())
    array = message.content.array_records["generator"]["w"]
    (chunk,) = array.children
    places = {"dtype": "float32", "shape": [100], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 1000}
    bomb = add_header_to_object_body(json.dumps(places).encode(), array)
    answers = superlink.take(message)
    superlink.objects[array.object_id] = bomb
    assert sum(map(len, superlink.objects.values())) < LIMIT.bytes < 1000 * len(superlink.objects[chunk])
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_too_large"


@pytest.mark.parametrize("content", [b"", b"no object", b"Message 7 \0abc", b"Nothing  3\0abc"])
def test_what_cannot_be_unpacked_is_refused(grid: BoundedGrid, superlink: SuperLink, content: bytes) -> None:
    message = reply(weights())
    answers = superlink.take(message)
    superlink.objects[message.metadata.message_id] = content
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_malformed"


def test_a_record_in_place_of_a_message_is_refused(grid: BoundedGrid, superlink: SuperLink) -> None:
    record = ConfigRecord({"code": "x"})
    message = reply(weights())
    superlink.objects[record.object_id] = record.deflate()
    answers = superlink.take(message, ObjectTree(object_id=record.object_id), message_id=record.object_id)
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_malformed"


def test_records_that_hold_something_else_than_arrays_are_refused(grid: BoundedGrid, superlink: SuperLink) -> None:
    stray = ConfigRecord({"code": "x"})
    body = json.dumps([["w", 0]]).encode()
    message = reply(weights())
    array_record = message.content.array_records["generator"]
    (kind,) = {type(array_record).__qualname__}
    forged = f"{kind} {stray.object_id} {len(body)}".encode() + b"\0" + body
    replaced = _rebuilt(message, array_record.object_id, forged)
    superlink.objects |= replaced | {stray.object_id: stray.deflate()}
    root = list(replaced)[-1]
    proto = message_to_proto(remove_content_from_message(message))
    proto.metadata.message_id = root
    tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=key) for key in [stray.object_id, *replaced][:-1]])
    superlink.replies.append((proto, tree))
    (got,) = grid.pull_messages([proto.metadata.reply_to_message_id])
    assert code(got) == "reply_malformed"


def _rebuilt(message: Message, old: str, forged: bytes) -> dict[str, bytes]:
    """Objects of `message` from `forged`, in place of the object `old`, up to the message itself."""
    made = {get_object_id(forged): forged}
    for parent in (message.content, message):
        packed = parent.deflate().replace(old.encode(), get_object_id(forged).encode())
        old, forged = parent.object_id, packed
        made[get_object_id(packed)] = packed
    return made


@pytest.mark.parametrize("outside", [{"reply_to_message_id": "b" * 64}, {"src_node_id": 78}, {"run_id": 6}])
def test_a_reply_that_inside_answers_for_another_is_refused(
    grid: BoundedGrid, superlink: SuperLink, outside: dict[str, object]
) -> None:
    answers = superlink.take(reply(weights()), **outside)
    (got,) = grid.pull_messages([answers])
    assert code(got) == "reply_differs" and got.metadata.reply_to_message_id == answers


def test_a_reply_that_stays_away_keeps_nobody_waiting(grid: BoundedGrid, superlink: SuperLink) -> None:
    slow, quick = reply(weights(50), "a" * 64), reply(weights(60), "b" * 64)
    first, second = superlink.take(slow), superlink.take(quick)
    superlink.withheld = {slow.content.array_records["generator"].object_id}
    (got,) = grid.pull_messages([first, second])
    assert got.metadata.reply_to_message_id == second
    before = len(superlink.pulled)
    assert list(grid.pull_messages([first])) == []
    assert len(superlink.pulled) == before + 1  # only what is missing is asked for again
    superlink.withheld = set()
    (got,) = grid.pull_messages([first])
    assert got.metadata.reply_to_message_id == first
    assert superlink.asked == [[first, second]]  # SuperLink tells of a reply once


def test_a_reply_that_was_broken_off_can_be_asked_for_again(grid: BoundedGrid, superlink: SuperLink) -> None:
    message = reply(weights())
    answers = superlink.take(message)
    del superlink.objects[message.content.object_id]
    (got,) = grid.pull_messages([answers])
    assert got.has_error() and got.error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert got.metadata.reply_to_message_id == answers


def test_what_answers_nothing_is_not_pulled(grid: BoundedGrid, superlink: SuperLink) -> None:
    message = reply(weights(), "c" * 64)
    superlink.take(message)
    assert list(grid.pull_messages(["a" * 64])) == []
    assert superlink.pulled == [] and superlink.confirmed == [message.metadata.message_id]


def test_what_nobody_waits_for_any_more_is_let_go(grid: BoundedGrid, superlink: SuperLink) -> None:
    message = reply(weights())
    answers = superlink.take(message)
    superlink.withheld = set(superlink.objects)
    assert list(grid.pull_messages([answers])) == []
    assert list(grid.pull_messages(["d" * 64])) == []
    assert superlink.confirmed == [message.metadata.message_id]


def test_the_limit_is_told_to_a_process_that_asks(tiny_plan: StudyPlan, tmp_path: Path) -> None:
    save_plan(tiny_plan, tmp_path / "plan.toml")
    command = python_module("fedsynth_server.coordinator.bounded_grid", str(tmp_path / "plan.toml"))
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    limit = reply_limit(tiny_plan)
    assert asked.stdout.split() == [str(limit.objects), str(limit.bytes)]


def test_every_reply_of_the_plan_is_within_its_limit(tiny_plan: StudyPlan) -> None:
    from fedsynth.models.gene_autoencoder import make_autoencoder
    from fedsynth.models.images import make_generator

    limit = reply_limit(tiny_plan)
    for state in (make_generator(tiny_plan).state_dict(), make_autoencoder(tiny_plan).state_dict()):
        objects = get_all_nested_objects(reply(RecordDict({"weights": to_record(state)})))
        assert len(objects) <= limit.objects / 2
        assert sum(len(each.deflate()) for each in objects.values()) <= limit.bytes / 2
