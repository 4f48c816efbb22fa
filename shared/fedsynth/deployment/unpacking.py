"""How large a Flower message would become, found before it is unpacked.

A message arrives as objects that name each other: records, arrays, and the chunks that arrays are made of. All of them come
from the other side, so all of them are looked at before Flower makes a message of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flwr.app.message import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)

from fedsynth.errors import Refused

_ARRAY, _CHUNK = Array.__qualname__, ArrayChunk.__qualname__
# Everything of a message that is not an array's data: names of records and arrays, and the task or receipt itself.
_LARGEST_LISTS = 16 * 2**20


def object_ids(tree: ObjectTree) -> list[str]:
    """Ids of the objects that a message is said to be made of, each once, children before parents."""
    return list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))


def unpacked_bytes(contents: Mapping[str, bytes]) -> int:
    """Bytes that the arrays among `contents` (object id -> packed object) would have.

    An array names its chunks by place and may name one many times, so that few bytes could unpack to any number.

    Raises:
        Refused: ``message_malformed``: an array is made of something else than chunks, or what is no chunk is larger than
            any record's list of names.
    """
    heads = {key: get_object_head_values_from_object_content(value) for key, value in contents.items()}
    if sum(len(contents[key]) for key, head in heads.items() if head[0] != _CHUNK) > _LARGEST_LISTS:
        raise Refused("message_malformed", "The message holds lists of names or values larger than any task's.")
    total = 0
    for key, (kind, children, _) in heads.items():
        if kind != _ARRAY:
            continue
        if any(heads[child][0] != _CHUNK for child in children):
            raise Refused("message_malformed", "An array is made of something else than chunks.")
        places = json.loads(get_object_body(contents[key], Array))["arraychunk_ids"]
        total += sum(len(contents[children[place]]) for place in places)
    return total
