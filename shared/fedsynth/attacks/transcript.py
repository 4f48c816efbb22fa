"""What a coordinator saw of a study's training: the weights that it sent out, and every reply of every site.

A transcript is a folder of safetensors files::

    sent/<module>-<round>.safetensors            what all sites were sent in the round: "<record>/<array>"
    replies/<site>/<module>-<round>.safetensors  what the site sent back: "<array>"

Nothing in it is more than what the coordinator gets anyway; rounds have four digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedsynth.errors import UsageError
from fedsynth.files import write_atomic
from fedsynth.plan import MODULES, Module
from fedsynth.records import State


@dataclass(frozen=True)
class Transcript:
    """A transcript on disk; arrays are read when they are asked for."""

    folder: Path

    def rounds(self, module: Module, site: str) -> list[int]:
        """The rounds of `module` in which `site` replied, in order."""
        return sorted(
            int(path.stem.rpartition("-")[2])
            for path in (self.folder / "replies" / site).glob(f"{module}-*.safetensors")
        )

    @property
    def sites(self) -> list[str]:
        """The sites of which there are replies."""
        return sorted(path.name for path in (self.folder / "replies").glob("*") if path.is_dir())

    @property
    def modules(self) -> list[Module]:
        """The modules of which there are replies, in the order in which a study runs them."""
        return [module for module in MODULES if any(self.rounds(module, site) for site in self.sites)]

    def sent(self, module: Module, number: int) -> dict[str, State]:
        """The weights that the sites were sent, by record.

        Raises:
            UsageError: ``transcript_unreadable``.
        """
        found: dict[str, State] = {}
        for name, tensor in _read(self._sent(module, number)).items():
            record, _, key = name.partition("/")
            found.setdefault(record, {})[key] = tensor
        return found

    def reply(self, module: Module, number: int, site: str) -> State:
        """The weights, or the noisy sum, that a site sent back.

        Raises:
            UsageError: ``transcript_unreadable``.
        """
        return _read(self._reply(module, number, site))

    def write_sent(self, module: Module, number: int, weights: Mapping[str, State]) -> None:
        """Store what is sent in a round; the second and later sites are sent the same, so it is stored once."""
        path = self._sent(module, number)
        if not path.is_file():
            _write(
                path, {f"{record}/{key}": tensor for record, state in weights.items() for key, tensor in state.items()}
            )

    def write_reply(self, module: Module, number: int, site: str, weights: State) -> None:
        """Store a reply."""
        _write(self._reply(module, number, site), weights)

    def _sent(self, module: Module, number: int) -> Path:
        return self.folder / "sent" / f"{module}-{number:04d}.safetensors"

    def _reply(self, module: Module, number: int, site: str) -> Path:
        return self.folder / "replies" / site / f"{module}-{number:04d}.safetensors"


def _read(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            "transcript_unreadable", f"{path.name} of the transcript cannot be read ({type(error).__name__})."
        ) from None


def _write(path: Path, state: State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in state.items()}))
