"""A score on patients that can be taken again on any of them: what intervals and groups are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns, figure
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.bootstrap import Rows, bootstrap_interval
from fedsynth.metrics.leave_out import leave_out_interval
from fedsynth.metrics.measurable import NotMeasurable

A = TypeVar("A")

LEAST_IN_GROUP = 8

Resampling = Literal["bootstrap", "leave-out", "none"]
"""How an interval is found: for means and areas the bootstrap, for correlations of many pairs leaving patients out."""


@dataclass(frozen=True)
class Tested:
    """A score of some patients.

    Attributes:
        score: of those with the given row numbers.
        patients: how many there are.
        resampling: how the interval over them is found.
        bounds: what the score can be; an interval does not go beyond.
    """

    score: Callable[[Rows], float]
    patients: int
    resampling: Resampling = "bootstrap"
    bounds: tuple[float, float] = (-np.inf, np.inf)

    @property
    def value(self) -> float:
        """The score of all patients."""
        return self.score(np.arange(self.patients))

    def interval(self, rng: np.random.Generator) -> tuple[float, float] | None:
        """95 % interval over which patients these are; None where it has no value."""
        if self.resampling == "none" or not self.patients:
            return None
        resample = bootstrap_interval if self.resampling == "bootstrap" else leave_out_interval
        found = resample(self.score, self.patients, rng)
        return None if found is None else (max(found[0], self.bounds[0]), min(found[1], self.bounds[1]))

    def of(self, rows: Rows) -> Tested:
        """The score of some of the patients."""
        return replace(self, score=lambda some: self.score(rows[some]), patients=len(rows))


def tested_figure(
    metric: str,
    better: Literal["higher", "lower"],
    columns: Columns[Tested],
    note: str,
    rng: np.random.Generator,
    groups: Sequence[Group] = (),
) -> Figure:
    """A row of the report with the interval of the synthetic column."""
    of_synthetic = columns.synthetic
    between = None if isinstance(of_synthetic, NotMeasurable) else of_synthetic.interval(rng)
    row = figure(metric, better, columns.map(lambda tested: tested.value), note, between)
    return row.model_copy(update={"groups": list(groups)})


def groups_of(
    by: Literal["class", "site"],
    names: Sequence[str],
    codes: NDArray[np.integer],
    columns: Columns[Tested],
    rng: np.random.Generator,
) -> list[Group]:
    """The score of each group of the tested patients, beside that of the real column.

    Args:
        by: what the groups are.
        names: of the groups, in the order of their codes.
        codes: (N,) each tested patient's group; patients of other codes are in none.
        columns: scores of these N patients.
        rng: source of the intervals.

    Returns:
        One a name of `present`, without a number where it has fewer than `LEAST_IN_GROUP` patients.
    """
    return [_group(by, name, rows, columns, rng) for name, rows in present(names, codes)]


def present(names: Sequence[str], codes: NDArray[np.integer]) -> list[tuple[str, Rows]]:
    """The groups that any of the patients are in, with their row numbers; nothing where all are in one."""
    found = [(name, np.flatnonzero(codes == code)) for code, name in enumerate(names)]
    found = [(name, rows) for name, rows in found if len(rows)]
    return found if len(found) > 1 else []


def _group(
    by: Literal["class", "site"], name: str, rows: Rows, columns: Columns[Tested], rng: np.random.Generator
) -> Group:
    if len(rows) < LEAST_IN_GROUP:
        few = f"{len(rows)} patients, at least {LEAST_IN_GROUP} are needed"
        return Group(by=by, name=name, n=len(rows), synthetic=None, note=few)
    row = tested_figure(name, "higher", columns.map(lambda tested: tested.of(rows)), "", rng)
    return Group(
        by=by, name=name, n=len(rows), synthetic=row.synthetic, interval=row.interval, real=row.real, note=row.note
    )


def value_of(value: A | NotMeasurable) -> A:
    """`value`, or its reason raised."""
    if isinstance(value, NotMeasurable):
        raise value
    return value
