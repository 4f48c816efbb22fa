"""The in-process grid behaves as Flower's does where it matters: bytes on the wire, errors with their text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsynth_simulations.grid import InProcessGrid

app = ClientApp()


@app.train("echo")
def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@app.train("fail")
def fail(message: Message, context: Context) -> Message:
    raise ValueError(f"text of {context.node_config['site-folder']}")


def test_what_arrives_is_a_copy_and_the_wiretap_sees_both_ways(tmp_path: Path) -> None:
    tapped: list[tuple[str, int]] = []
    grid = InProcessGrid(app, {3: tmp_path}, wiretap=lambda direction, node, _data: tapped.append((direction, node)))
    sent = RecordDict({"weights": ArrayRecord({"w": Array(np.arange(4, dtype=np.float32))})})
    (reply,) = grid.send_and_receive([Message(sent, dst_node_id=3, message_type="train.echo")])
    assert np.array_equal(reply.content.array_records["weights"]["w"].numpy(), np.arange(4))
    assert reply.content.array_records["weights"] is not sent.array_records["weights"]
    assert tapped == [("to site", 3), ("to coordinator", 3)]


def test_a_reply_is_handed_out_once_and_names_its_question(tmp_path: Path) -> None:
    grid = InProcessGrid(app, {3: tmp_path, 4: tmp_path})
    ids = grid.push_messages([Message(RecordDict(), dst_node_id=node, message_type="train.echo") for node in (3, 4)])
    replies = grid.pull_messages(ids)
    assert [(r.metadata.reply_to_message_id, r.metadata.src_node_id) for r in replies] == [(ids[0], 3), (ids[1], 4)]
    assert grid.pull_messages(ids) == []


def test_the_text_of_an_exception_travels_as_it_does_in_flower(tmp_path: Path) -> None:
    """Otherwise no test over this grid could see a handler that lets a text out."""
    tapped: list[bytes] = []
    grid = InProcessGrid(app, {3: tmp_path}, wiretap=lambda _direction, _node, data: tapped.append(data))
    (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=3, message_type="train.fail")])
    assert reply.has_error()
    assert f"text of {tmp_path}" in str(reply.error.reason)
    assert any(f"text of {tmp_path}".encode() in data for data in tapped)
