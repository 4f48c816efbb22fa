"""What would travel in a study, computed from its plan alone: nothing is trained, spent or sent.

The same functions that build and check real messages give the templates, so what is listed is what would leave: record by
record, with names, shapes, types and bytes.
"""

from __future__ import annotations

from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from pydantic import BaseModel

from fedsynth.engines import embedding, moments
from fedsynth.evaluation.site_scores import ROW_SIZE, evaluators_template
from fedsynth.marks import marks
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Activity, StudyPlan
from fedsynth.profiles import profile_template
from fedsynth.records import (
    EVALUATORS,
    MESSAGE_TYPES,
    PUBLIC,
    WEIGHTS,
    State,
    progress_of,
    progress_record,
    task_record,
    task_weights,
    to_record,
)
from fedsynth.translation import translator_template
from fedsynth_client.training.statistic import TOTAL

_DIGEST = "0" * 64


class Array(BaseModel):
    """One array of a record."""

    name: str
    shape: list[int]
    dtype: str
    bytes: int


class Record(BaseModel):
    """One record of a message: arrays, or named values."""

    name: str
    kind: Literal["arrays", "numbers", "settings"]
    bytes: int
    arrays: list[Array] = []
    values: list[str] = []


class Exchange(BaseModel):
    """One round of one module, or an evaluation: what arrives and what leaves, and how many rounds there are."""

    module: str
    message_type: str
    rounds: int
    arrives: list[Record]
    leaves: list[Record]

    @property
    def bytes_leaving(self) -> int:
        """Bytes that leave in one round."""
        return sum(record.bytes for record in self.leaves)


class DryRun(BaseModel):
    """Everything that would travel between this site and the coordinator in one study.

    An answer that had to be sent again is the same bytes again. In place of an answer a refusal may leave: one record that
    holds one code. `marks` says in words why the study protects nobody; it is empty where it is private.
    """

    study: str
    site: str
    marks: list[str]
    exchanges: list[Exchange]
    messages_leaving: int
    bytes_leaving: int


def dry_run(plan: StudyPlan, site: str) -> DryRun:
    """What would travel if `plan` ran to its end at `site`."""
    exchanges = [_exchange(plan, activity, site) for activity in plan.activities]
    return DryRun(
        study=plan.digest,
        site=site,
        marks=marks(plan.privacy),
        exchanges=exchanges,
        messages_leaving=sum(each.rounds for each in exchanges),
        bytes_leaving=sum(each.rounds * each.bytes_leaving for each in exchanges),
    )


def task_bytes(plan: StudyPlan, module: Activity) -> int:
    """Bytes of the records of one task of `module`."""
    return sum(record.bytes for record in _arrives(plan, module, plan.sites[0].name))


def incoming(plan: StudyPlan, module: Activity) -> dict[str, State]:
    """Templates of the weights that a task of `module` carries, by record; the values mean nothing."""
    return {name: _template(plan, name) for name in task_weights(plan, module)}


def outgoing(plan: StudyPlan, module: Activity) -> State:
    """Template of the weights that a reply of `module` carries; the values mean nothing."""
    if module == "moments":
        return {TOTAL: torch.zeros(moments.row_size(plan))}
    if module == "embedding":
        return {TOTAL: torch.zeros(embedding.row_size(plan))}
    if module == "evaluation":
        return {TOTAL: torch.zeros(ROW_SIZE)}
    return _template(plan, WEIGHTS[module])


def _template(plan: StudyPlan, record: str) -> State:
    if record == PUBLIC["moments"]:
        return moments.public_template(plan)
    if record == PUBLIC["embedding"]:
        return embedding.public_template(plan)
    if record == WEIGHTS["gan"]:
        return dict(make_generator(plan).state_dict())
    if record == EVALUATORS:
        return evaluators_template(plan)
    if record == "discriminator":
        return dict(make_companion(plan).state_dict())
    if record == WEIGHTS["autoencoder"]:
        return dict(make_autoencoder(plan).state_dict())
    if record == WEIGHTS["translation"]:
        return translator_template(plan)
    if record == WEIGHTS["radiogenomics"]:
        return dict(make_radiogenomic_dnn(plan).state_dict())
    return profile_template(plan)[record]


def _exchange(plan: StudyPlan, module: Activity, site: str) -> Exchange:
    return Exchange(
        module=module,
        message_type=MESSAGE_TYPES[module],
        rounds=plan.rounds(module),
        arrives=_arrives(plan, module, site),
        leaves=_leaves(plan, module),
    )


def _arrives(plan: StudyPlan, module: Activity, site: str) -> list[Record]:
    weights = {name: to_record(state) for name, state in incoming(plan, module).items()}
    return _described({"task": task_record(plan.digest, module, 1, site, _DIGEST), **weights})


def _leaves(plan: StudyPlan, module: Activity) -> list[Record]:
    # The values are stand-ins of the type that `fedsynth.records` demands; each takes as many bytes whatever it is.
    receipt = ConfigRecord({"head": _DIGEST, "epsilon": 0.0, "epsilon_lifetime": 0.0, "steps": 0, "private": True})
    return _described(
        {
            WEIGHTS[module]: to_record(outgoing(plan, module)),
            "progress": progress_record(dict.fromkeys(sorted(progress_of(plan, module)), 0.0)),
            "receipt": receipt,
        }
    )


def _described(records: dict[str, ArrayRecord | ConfigRecord | MetricRecord]) -> list[Record]:
    return [_record(name, record) for name, record in records.items()]


def _record(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> Record:
    if isinstance(record, ArrayRecord):
        arrays = [
            Array(name=key, shape=list(array.shape), dtype=array.dtype, bytes=len(array.data))
            for key, array in record.items()
        ]
        return Record(name=name, kind="arrays", bytes=record.count_bytes(), arrays=arrays)
    kind: Literal["numbers", "settings"] = "numbers" if isinstance(record, MetricRecord) else "settings"
    return Record(name=name, kind=kind, bytes=record.count_bytes(), values=sorted(map(str, record)))


def render(planned: DryRun, plan_name: str) -> str:
    """The dry run as a person reads it."""
    lines = [
        f"Study {plan_name} ({planned.study}) at site {planned.site}. Nothing was trained, spent or sent.",
        *planned.marks,
        f"In all {planned.messages_leaving} answers of together {_size(planned.bytes_leaving)} would leave.",
    ]
    for each in planned.exchanges:
        often = "once" if each.rounds == 1 else f"in each of {each.rounds} rounds"
        lines.append(f"\n{each.module} ({each.message_type}), {often}:")
        for direction, records in (("arrives", each.arrives), ("leaves", each.leaves)):
            for record in records:
                lines.append(f"  {direction:<8}{record.name}: {_contents(record)}, {_size(record.bytes)}")
                if direction == "leaves":
                    lines += [
                        f"            {a.name}  {a.dtype}{tuple(a.shape)}, {_size(a.bytes)}" for a in record.arrays
                    ]
    lines.append("\nIn place of an answer a refusal may leave: one code of lower-case words, such as budget_exceeded.")
    lines.append("Asked for its name, the site answers with the name in its policy.")
    return "\n".join(lines)


def _contents(record: Record) -> str:
    if record.kind == "arrays":
        return f"{len(record.arrays)} arrays"
    return ", ".join(record.values) or "no values"


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count / 2**20:.2f} MiB"
