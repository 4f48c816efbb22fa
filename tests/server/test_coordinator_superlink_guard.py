"""What SuperLink lets nodes push: replies of their own, no larger than a reply can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.linkstate_models import MessageIns
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import insert

from fedsynth.deployment.unpacking import object_ids
from fedsynth_server.coordinator.superlink import Guard, displace_false_claims, install, main

NODE, SUPERLINK = 77, 1


def pushed(children: int = 3, **metadata: Any) -> PushMessagesRequest:
    """A reply of `NODE` made of so many objects beside the message, as a SuperNode announces it."""
    known: dict[str, Any] = {
        "message_id": "m",
        "src_node_id": NODE,
        "dst_node_id": SUPERLINK,
        "reply_to_message_id": "task",
        **metadata,
    }
    tree = ObjectTree(object_id="m", children=[ObjectTree(object_id=f"o{i}") for i in range(children)])
    message = Message(metadata=Metadata(**known))
    return PushMessagesRequest(node=Node(node_id=NODE), messages_list=[message], message_object_trees=[tree])


def take_messages(request: PushMessagesRequest, state: Any) -> PushMessagesResponse:
    return PushMessagesResponse(session_id="taken")


def take_object(request: PushObjectRequest, state: Any) -> PushObjectResponse:
    return PushObjectResponse(stored=True)


def refused(request: PushMessagesRequest) -> bool:
    try:
        Guard(objects=10, bytes=100).push_messages(request, None, take_messages)
    except HTTPException as error:
        assert (error.status_code, error.detail) == (403, "not allowed")
        return True
    return False


def test_a_reply_of_its_own_is_taken() -> None:
    assert not refused(pushed()) and not refused(pushed(children=9))


@pytest.mark.parametrize(
    "metadata",
    [
        {"src_node_id": 78},  # another site's
        {"src_node_id": SUPERLINK},  # in the coordinator's name
        {"src_node_id": SUPERLINK, "dst_node_id": 78, "reply_to_message_id": ""},  # a task for another site
        {"dst_node_id": 78},
        {"reply_to_message_id": ""},
        {"message_id": "other"},
    ],
)
def test_what_is_no_reply_of_its_own_is_refused(metadata: dict[str, Any]) -> None:
    assert refused(pushed(**metadata))


def test_a_reply_of_too_many_objects_is_refused() -> None:
    assert refused(pushed(children=10))
    deep = ObjectTree(object_id="x")
    for _ in range(50):
        deep = ObjectTree(object_id="x", children=[deep])
    nested = pushed(children=0)
    nested.message_object_trees[0].children.append(deep)
    assert refused(nested)


@pytest.mark.parametrize("count", [0, 2])
def test_other_than_one_message_is_refused(count: int) -> None:
    request = pushed()
    one = request.messages_list[0]
    del request.messages_list[:]
    request.messages_list.extend([one] * count)
    assert refused(request)


def test_the_bytes_of_a_reply_are_counted_together() -> None:
    guard = Guard(objects=10, bytes=100)

    def push(session: str, size: int) -> bool:
        request = PushObjectRequest(node=Node(node_id=NODE), session_id=session, object_content=bytes(size))
        try:
            return guard.push_object(request, None, take_object).stored
        except HTTPException as error:
            assert error.status_code == 403
            return False

    assert push("one", 60) and push("one", 40)
    assert not push("one", 1)
    assert push("two", 100) and not push("three", 101)
    assert not push("", 1)  # Flower would look for a reply that it fits to, and count for none


def test_what_is_sent_again_over_a_bad_line_counts_once() -> None:
    guard, kept = Guard(objects=10, bytes=100), set[str]()

    def flower(request: PushObjectRequest, state: Any) -> PushObjectResponse:
        new = request.object_id not in kept
        kept.add(request.object_id)
        return PushObjectResponse(stored=new)

    def push(name: str) -> bool:
        request = PushObjectRequest(node=Node(node_id=NODE), session_id="one", object_id=name, object_content=bytes(50))
        return guard.push_object(request, None, flower).stored

    assert push("a") and not push("a") and not push("a")
    assert push("b")
    with pytest.raises(HTTPException):
        push("c")


def test_flowers_own_calls_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_handlers, "push_messages", take_messages)
    monkeypatch.setattr(fleet_handlers, "push_object", take_object)
    flowers = SqlObjectStore.preregister
    monkeypatch.setattr(SqlObjectStore, "preregister", flowers)
    install(Guard(objects=10, bytes=100))
    assert SqlObjectStore.preregister is not flowers
    assert fleet_handlers.push_messages(request=pushed(), state=None).session_id == "taken"
    with pytest.raises(HTTPException):
        fleet_handlers.push_messages(request=pushed(src_node_id=78), state=None)
    with pytest.raises(HTTPException):
        fleet_handlers.push_object(request=PushObjectRequest(session_id=""), state=None)


EMPTY = MetricRecord({})  # the same object in the replies of all sites
RIGHT = RecordDict({"progress": EMPTY, "receipt": ConfigRecord({"head": "ab"})})
FALSE = ObjectTree(
    object_id="b" * 64,
    children=[ObjectTree(object_id=EMPTY.object_id, children=[ObjectTree(object_id="a" * 64)])],
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqlObjectStore:
    """SuperLink's objects, guarded."""
    for name in ("push_messages", "push_object"):
        monkeypatch.setattr(fleet_handlers, name, getattr(fleet_handlers, name))
    monkeypatch.setattr(SqlObjectStore, "preregister", SqlObjectStore.preregister)
    made = SqlObjectStore(str(tmp_path / "state.sqlite"))
    made.initialize()
    SqlLinkState(str(tmp_path / "state.sqlite"), Mock(), made).initialize()
    install(Guard(objects=10, bytes=100))
    return made


def whole(store: SqlObjectStore) -> bool:
    """Whether the store knows what `RIGHT` is made of, and nothing else of it."""
    return set(object_ids(store.get_object_tree(RIGHT.object_id))) == set(object_ids(get_object_tree(RIGHT)))


@pytest.mark.parametrize("with_content", [False, True])
def test_a_false_announcement_shuts_nobody_out(store: SqlObjectStore, with_content: bool) -> None:
    store.preregister(1, FALSE)
    if with_content:  # Flower compares content and id, not content and announced children
        store.put(EMPTY.object_id, EMPTY.deflate())
    missing = store.preregister(1, get_object_tree(RIGHT))
    assert EMPTY.object_id in missing
    assert whole(store)
    assert FALSE.object_id not in store and "a" * 64 not in store


def test_content_decides_between_announcements(store: SqlObjectStore) -> None:
    store.preregister(1, get_object_tree(RIGHT))
    store.put(EMPTY.object_id, EMPTY.deflate())
    with pytest.raises(ValueError, match="different children"):
        store.preregister(1, FALSE)
    assert whole(store)


def test_a_reply_displaces_no_task(store: SqlObjectStore) -> None:
    store.preregister(1, get_object_tree(RIGHT))
    with store.session() as session:
        session.execute(insert(MessageIns).values(message_id=RIGHT.object_id))
    displace_false_claims(store, FALSE)
    assert RIGHT.object_id in store


@pytest.mark.parametrize("arguments", [[], ["10"], ["ten", "100"], ["10", "-1"]])
def test_without_limits_it_does_not_start(arguments: list[str]) -> None:
    assert main(arguments) == 2
