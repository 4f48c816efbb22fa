"""A measurement made four times: on the synthetic data, the real ceiling, the floor, and the public-only generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Generic, Literal, TypeVar

import numpy as np

from fedsynth.evaluation.values import Figure
from fedsynth.metrics.bootstrap import Rows, bootstrap_interval
from fedsynth.metrics.measurable import NotMeasurable

A = TypeVar("A")
B = TypeVar("B")

NOT_ASKED = NotMeasurable("")


@dataclass(frozen=True)
class Columns(Generic[A]):
    """One value a column of the report, or the reason why there is none (`NOT_ASKED`: an empty column by design)."""

    synthetic: A | NotMeasurable
    real: A | NotMeasurable = NOT_ASKED
    floor: A | NotMeasurable = NOT_ASKED
    public_only: A | NotMeasurable = NOT_ASKED

    def map(self, function: Callable[[A], B]) -> Columns[B]:
        """`function` of every value; where it is not measurable, and where the value already was not, the reason."""
        return Columns(*(_apply(function, getattr(self, field.name)) for field in fields(self)))


def attempt(function: Callable[[], A]) -> A | NotMeasurable:
    """The value of `function`, or the reason why it has none."""
    try:
        return function()
    except NotMeasurable as reason:
        return reason


def beside_floor(columns: Columns[A], function: Callable[[A], B], floor: Callable[[A], B]) -> Columns[B]:
    """`function` of every column, and in the floor's place `floor` of the real column."""
    values = replace(columns, floor=NOT_ASKED).map(function)
    return replace(values, floor=_apply(floor, columns.real))


def interval(
    values: Columns[A], statistic: Callable[[A, Rows], float], n_patients: int, rng: np.random.Generator
) -> tuple[float, float] | None:
    """95 % bootstrap interval over patients of a statistic of the synthetic column; None where it has no value."""
    synthetic = values.synthetic
    if isinstance(synthetic, NotMeasurable):
        return None
    return bootstrap_interval(lambda rows: statistic(synthetic, rows), n_patients, rng)


def figure(
    metric: str,
    better: Literal["higher", "lower", "none"],
    values: Columns[float],
    note: str,
    interval: tuple[float, float] | None = None,
) -> Figure:
    """A row of the report: numbers where there are any, None and the reason in the note where there are none.

    An interval without width is left out: where all patients score alike, e.g. at an area of 1, drawing them anew has
    nothing to vary and would claim certainty.
    """
    reasons: dict[str, list[str]] = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if isinstance(value, NotMeasurable):
            if str(value):
                reasons.setdefault(str(value), []).append(field.name.replace("_", "-"))
        elif not np.isfinite(value):
            raise ValueError(f"{metric}, {field.name}: a metric returned {value} where it should have said why")
    if isinstance(values.synthetic, NotMeasurable) or (interval is not None and interval[0] == interval[1]):
        interval = None
    gaps = [f"Not measured ({', '.join(names)}): {reason}." for reason, names in reasons.items()]
    return Figure(
        metric=metric,
        better=better,
        synthetic=_number(values.synthetic),
        interval=interval,
        real=_number(values.real),
        floor=_number(values.floor),
        public_only=_number(values.public_only),
        note=" ".join([note, *gaps]).strip(),
    )


def _apply(function: Callable[[A], B], value: A | NotMeasurable) -> B | NotMeasurable:
    return value if isinstance(value, NotMeasurable) else attempt(lambda: function(value))


def _number(value: float | NotMeasurable) -> float | None:
    return None if isinstance(value, NotMeasurable) else float(value)
