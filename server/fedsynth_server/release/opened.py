"""A release that a recipient has opened: what it says it is, and its tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedsynth.errors import Refused
from fedsynth.plan import StudyPlan, load_plan
from fedsynth.selection import Selected, selected_in, sequences_of
from fedsynth.statement import PrivacyStatement
from fedsynth_server.release.index import ReleaseIndex
from fedsynth_server.release.tables import PARTICIPANTS

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Release:
    """A release whose files are known to be as they were signed."""

    folder: Path
    index: ReleaseIndex
    plan: StudyPlan
    statement: PrivacyStatement
    selected: Selected | None = None

    @property
    def sequences(self) -> tuple[str, ...]:
        """The MR sequences of its images."""
        return sequences_of(self.plan, self.selected)

    @property
    def has_bids(self) -> bool:
        """Whether it says that it holds a BIDS tree."""
        return "bids" in self.index.formats

    @property
    def has_dicom(self) -> bool:
        """Whether it says that it holds a DICOM tree."""
        return "dicom" in self.index.formats

    @property
    def has_gate(self) -> bool:
        """Whether it was made since there is a gate."""
        return self.index.schema_version >= 2

    @cached_property
    def participants(self) -> list[str]:
        """Ids in the order of the participants table."""
        return [row[0] for row in read_tsv(self.folder / PARTICIPANTS)[1]]


def open_release(folder: Path) -> Release:
    """Read what a release says it is.

    Raises:
        Refused: ``release_unreadable``; or the errors of `load_plan`.
    """
    index, plan = _read_model(folder / "release.json", ReleaseIndex), load_plan(folder / "plan.toml")
    statement = _read_model(folder / "privacy.json", PrivacyStatement)
    return Release(folder, index, plan, statement, selected_in(folder, plan))


def read_tsv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a tab-separated table.

    Raises:
        Refused: ``table_malformed``, when it is empty or its rows differ in length.
    """
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    if lines == [[""]] or any(len(line) != len(lines[0]) for line in lines):
        raise Refused("table_malformed", f"{path.name} is empty or has rows of different length.")
    return lines[0], lines[1:]


def _read_model(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise Refused("release_unreadable", f"{path.name} is missing.") from None
    except ValidationError as error:
        keys = sorted({".".join(map(str, fault["loc"])) or "file" for fault in error.errors(include_url=False)})
        raise Refused("release_unreadable", f"{path.name} is not valid at {', '.join(keys)}.") from None
