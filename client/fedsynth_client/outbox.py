"""Results on the site's disk: replies that may leave, and local state that may not.

Both are written before the ledger calls a task released, so that after a crash a task either has its one stored result
or has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsynth.errors import JobFailed, Refused
from fedsynth.files import DISK_FULL, sha256_file, write_atomic
from fedsynth_client.ledger import Ledger, Task

if TYPE_CHECKING:
    # What only asks whether the outbox agrees with the ledger, such as a node's supervisor, does without torch.
    from fedsynth.records import State
    from fedsynth_client.training.block import BlockResult

_ROUNDS_OF_STATE_KEPT = 2


@dataclass(frozen=True)
class Outbox:
    """Stored results of the site in `folder`."""

    folder: Path

    def store(self, task: Task, result: BlockResult) -> str:
        """Write local state and reply of `task`; returns the SHA-256 (hex) of the reply's file.

        Raises:
            JobFailed: ``disk_full`` or ``disk_error``; nothing is called released then, and the charge stands.
        """
        from safetensors.torch import save

        try:
            for path in (self._reply(task), self._state(task)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if result.local:
                write_atomic(self._state(task), save(result.local))
            write_atomic(
                self._reply(task), save(result.weights, {key: repr(float(v)) for key, v in result.progress.items()})
            )
            return sha256_file(self._reply(task))
        except OSError as error:
            full = error.errno in DISK_FULL
            raise JobFailed(
                "disk_full" if full else "disk_error",
                f"The result of {task.module} round {task.round} could not be stored below {self.folder}: "
                f"{error.strerror}.",
                "Free space and run the round again: it goes on under the charge that was already made.",
            ) from None

    def reply(self, task: Task, sha256: str) -> tuple[State, dict[str, float]]:
        """The stored weights and progress of `task`.

        Raises:
            JobFailed: ``reply_lost``: the file is missing or not the one that was released.
        """
        path = self._reply(task)
        if not path.is_file() or sha256_file(path) != sha256:
            raise JobFailed(
                "reply_lost",
                f"The stored reply of {task.module} round {task.round} is missing or altered.",
                "Its charge stands and it cannot be made again; the study must go on without it.",
            )
        state, metadata = _load(path)
        # Sorted, since the file's metadata come in another order at each reading: what is sent again is the same bytes.
        return state, {key: float(value) for key, value in sorted(metadata.items())}

    def local_state(self, task: Task) -> State:
        """Local state that `task` left; empty when there is none."""
        path = self._state(task)
        return _load(path)[0] if path.is_file() else {}

    def stored(self) -> set[str]:
        """``<study>/<module>-<round>`` of every stored reply."""
        return {f"{path.parent.name}/{path.stem}" for path in self.folder.glob("outbox/*/[!.]*.safetensors")}

    def prune(self, task: Task) -> None:
        """Remove local state of rounds too old to be needed after `task`."""
        for old in range(1, task.round - _ROUNDS_OF_STATE_KEPT + 1):
            self._state(Task(task.study, task.module, old)).unlink(missing_ok=True)

    def _reply(self, task: Task) -> Path:
        return self.folder / "outbox" / f"{_name(task)}.safetensors"

    def _state(self, task: Task) -> Path:
        return self.folder / "state" / f"{_name(task)}.safetensors"


def check_ledger_is_whole(ledger: Ledger, outbox: Outbox) -> str:
    """Refuse to go on with a ledger that has forgotten a charge whose result lies in the outbox.

    A chain cannot show that its end was cut off; this shows a ledger that was removed, or restored from an older copy.

    Returns:
        What was found, in a sentence.

    Raises:
        Refused: ``ledger_incomplete``.
    """
    entries = ledger.entries()
    charged = {
        _name(Task(entry.body["study"], entry.body["module"], entry.body["round"]))
        for entry in entries
        if entry.kind == "charge"
    }
    forgotten = outbox.stored() - charged
    if forgotten:
        raise Refused(
            "ledger_incomplete",
            f"The outbox holds {len(forgotten)} results that the ledger has not charged: the ledger was replaced, cut off "
            "or restored from an older copy.",
            "Restore the newest ledger. Nothing can be trained until then.",
        )
    return f"ledger: {len(entries)} entries, chain intact"


def _name(task: Task) -> str:
    return f"{task.study}/{task.module}-{task.round:04d}"


def _load(path: Path) -> tuple[State, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, dict(tensors.metadata() or {})  # noqa: SIM118
