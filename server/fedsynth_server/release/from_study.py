"""From a finished study's folder to a release."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import ValidationError

from fedsynth.errors import Refused, UsageError
from fedsynth.evaluation.values import Evaluation
from fedsynth.plan import load_plan
from fedsynth_server.checkpoint import load_state
from fedsynth_server.outcome import study_outcome
from fedsynth_server.release.make import make_release
from fedsynth_server.statement import privacy_statement
from fedsynth_server.synthesis import synthesise


def release_study(folder: Path, out: Path, key: Path, patients: int, evaluation: Path | None) -> Path:
    """Draw `patients` from the study in `folder` and write the release `out`, signed with `key`.

    Raises:
        Refused: ``study_not_started``, ``study_not_finished``, or what `make_release` refuses.
        UsageError: ``evaluation_unreadable``.
    """
    plan = load_plan(folder / "plan.toml")
    state = load_state(folder, plan)
    if state is None:
        raise Refused("study_not_started", f"{folder} holds no checkpoint.", "Run the study first.")
    statement = privacy_statement(plan, state)
    measured = _read_evaluation(evaluation) if evaluation else None
    generator = torch.Generator()
    generator.seed()
    cohort = synthesise(plan, state, patients, generator)
    released = datetime.now(UTC).replace(microsecond=0)
    return make_release(
        out,
        plan,
        cohort,
        statement,
        measured,
        state.curves_by_name(),
        key,
        released,
        outcome=study_outcome(plan, state),
    )


def _read_evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UsageError("evaluation_unreadable", f"{path} is no evaluation ({type(error).__name__}).") from None
