"""How far a study's checkpoint is, read from its header: no weights, and none of what is needed to hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedsynth.errors import UsageError
from fedsynth.plan import Activity, Module, StudyPlan

FILE = "checkpoint.safetensors"
_LARGEST_HEADER = 100 * 2**20  # as the format allows


@dataclass(frozen=True)
class Progress:
    """What is done.

    Attributes:
        study: digest of the plan that the checkpoint is of.
        rounds: completed rounds by module.
        fitted: statistics whose fit is done.
        heads: by site, the newest entry of its ledger that the coordinator has a receipt of.
        evaluated: whether the sites' evaluation is done.
    """

    study: str
    rounds: dict[Module, int]
    fitted: frozenset[Module]
    heads: dict[str, str]
    evaluated: bool = False

    def finished(self, plan: StudyPlan) -> bool:
        """Whether nothing of `plan` is left to do."""
        statistics = {module for module in ("moments", "embedding") if module in plan.modules}
        done = all(self.rounds.get(module, 0) >= plan.training(module).rounds for module in plan.modules)
        return done and statistics <= self.fitted and (plan.site_evaluation is None or self.evaluated)

    def summary(self, plan: StudyPlan) -> str:
        """One line for a person, e.g. ``moments 1/1, gan 3/8``."""
        return ", ".join(f"{each} {self._done(each)}/{plan.rounds(each)}" for each in plan.activities)

    def _done(self, activity: Activity) -> int:
        return int(self.evaluated) if activity == "evaluation" else self.rounds.get(activity, 0)


def read_progress(folder: Path) -> Progress | None:
    """Progress of the checkpoint in `folder`; None when there is none.

    Raises:
        UsageError: ``checkpoint_unreadable``.
    """
    path = folder / FILE
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _LARGEST_HEADER:
                raise ValueError("no header of that size")
            state = json.loads(json.loads(stream.read(size))["__metadata__"]["state"])
        evaluated = state.get("evaluated")  # a checkpoint of an earlier version has no such entry
        held_out = {} if evaluated is None else evaluated["receipts"]
        receipts = {
            site: [*by_module.values(), *([held_out[site]] if site in held_out else [])]
            for site, by_module in state["receipts"].items()
        }
        newest = {site: max(own, key=lambda each: each["order"])["head"] for site, own in receipts.items() if own}
        return Progress(state["study"], state["rounds"], frozenset(state["fits"]), newest, evaluated is not None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            "checkpoint_unreadable", f"{path} is not an intact checkpoint.", "Restore it from a copy."
        ) from None


def progress_of(folder: Path, plan: StudyPlan) -> Progress | None:
    """Progress of `plan` in `folder`; None when nothing is done yet.

    Raises:
        UsageError: ``checkpoint_unreadable`` or ``checkpoint_of_other_study``.
    """
    progress = read_progress(folder)
    if progress is not None and progress.study != plan.digest:
        raise UsageError(
            "checkpoint_of_other_study",
            f"The checkpoint in {folder} belongs to a study of digest {progress.study[:12]}, not to this plan "
            f"({plan.digest[:12]}).",
            "Use another folder for another plan.",
        )
    return progress
