"""The evidence that lies in a release or a candidate: limits, audit, attacks, evaluations, countersignatures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedsynth.attacks.values import Attacks
from fedsynth.auditing.values import Audit
from fedsynth.countersignature import Countersignature, read_from, write_into
from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.evaluation.site_values import FILE as SITE_EVALUATION
from fedsynth.evaluation.site_values import SiteEvaluation
from fedsynth.evaluation.values import Evaluation
from fedsynth.limits import FILE as LIMITS
from fedsynth.limits import Limits, limits_toml, load_limits
from fedsynth.plan import StudyPlan
from fedsynth_server.release.jsonfile import dump

Model = TypeVar("Model", bound=BaseModel)

ATTACKS, AUDIT, EVALUATION = "attacks.json", "audit.json", "evaluation.json"


@dataclass(frozen=True)
class Evidence:
    """What was found out about synthetic patients, and who agrees to their release; None for what was not done.

    Attributes:
        countersignatures: by site.
    """

    limits: Limits
    audit: Audit | None
    attacks: Attacks | None
    evaluation: Evaluation | None
    site_evaluation: SiteEvaluation | None
    countersignatures: dict[str, Countersignature]


def write_evidence(
    folder: Path,
    plan: StudyPlan,
    *,
    audit: Audit | None = None,
    attacks: Attacks | None = None,
    evaluation: Evaluation | None = None,
    site_evaluation: SiteEvaluation | None = None,
    countersignatures: Iterable[Countersignature] = (),
) -> None:
    """Put what is given into `folder`, in place of what was there."""
    given = {AUDIT: audit, ATTACKS: attacks, EVALUATION: evaluation, SITE_EVALUATION: site_evaluation}
    for name, value in given.items():
        if value is not None:
            dump(folder / name, value.model_dump(mode="json"))
    for countersignature in countersignatures:
        write_into(folder, countersignature, plan)


def write_limits(folder: Path, limits: Limits) -> None:
    """Put `limits` into `folder`."""
    (folder / LIMITS).write_text(limits_toml(limits), encoding="utf-8")


def read_evidence(folder: Path) -> Evidence:
    """What lies in `folder`.

    Raises:
        Refused: ``evidence_unreadable``, ``countersignature_invalid``.
    """
    try:
        limits = load_limits(folder / LIMITS)
    except UsageError as error:
        raise Refused("evidence_unreadable", error.message.replace(str(folder / LIMITS), LIMITS), error.hint) from None
    return Evidence(
        limits,
        _present(folder / AUDIT, Audit),
        _present(folder / ATTACKS, Attacks),
        _present(folder / EVALUATION, Evaluation),
        _present(folder / SITE_EVALUATION, SiteEvaluation),
        read_from(folder),
    )


def load_evidence(path: Path, model: type[Model], what: str) -> Model:
    """Read a file that a command was given.

    Raises:
        UsageError: ``<what>_unreadable``.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"{what}_unreadable", f"{path} is no {what} ({type(error).__name__}).") from None


def _present(path: Path, model: type[Model]) -> Model | None:
    if not path.is_file():
        return None
    try:
        return load_evidence(path, model, "evidence")
    except FedsynthError as error:
        raise Refused("evidence_unreadable", error.message.replace(str(path), path.name)) from None
