"""A wiretap that writes down what the coordinator sees of a study: input of the attacks on its training."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fedsynth.attacks.transcript import Transcript
from fedsynth.plan import ACTIVITIES, MODULES, Module
from fedsynth.records import WEIGHTS, State


class TranscriptTap:
    """A `fedsynth_simulations.grid.Wiretap` that stores the arrays of tasks and replies in a folder.

    A reply does not say what it answers, so the task that went to the same node before it does: the grid delivers one
    message after another. Refusals and errors carry no arrays and are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.transcript = Transcript(folder)
        self._asked: dict[int, tuple[Module, int, str]] = {}

    def __call__(self, direction: str, node: int, content: bytes) -> None:
        """Look at a message."""
        if direction == "to site":
            self._task(node, _parsed(content))
        elif node in self._asked:
            module, number, site = self._asked.pop(node)
            # What a SuperNode sends of an exception is text and no record; a task that raised has no arrays to store.
            if not content.startswith(b"<class"):
                self._reply(module, number, site, _parsed(content))

    def _task(self, node: int, content: RecordDict) -> None:
        task = content.config_records.get("task")
        if task is None:
            self._asked.pop(node, None)
            return
        module, number, site = task["module"], task["round"], task["site"]
        if module not in ACTIVITIES or not isinstance(number, int) or not isinstance(site, str):
            raise ValueError("a task of the coordinator that no plan has")
        if module not in MODULES:  # an evaluation, which nobody was trained in
            self._asked.pop(node, None)
            return
        self._asked[node] = (module, number, site)
        weights = {name: _state(arrays) for name, arrays in content.array_records.items()}
        self.transcript.write_sent(module, number, weights)

    def _reply(self, module: Module, number: int, site: str, content: RecordDict) -> None:
        if WEIGHTS[module] in content.array_records:
            self.transcript.write_reply(module, number, site, _state(content.array_records[WEIGHTS[module]]))


def _parsed(content: bytes) -> RecordDict:
    return recorddict_from_proto(RecordDictProto.FromString(content))


def _state(arrays: ArrayRecord) -> State:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
