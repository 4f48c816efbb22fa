"""The report's quality tables: figures beside ceiling and floor, their parts by class, sequence and site, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedsynth.evaluation.values import Curve, Evaluation, Figure, Group
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Mark, Series, place_chart, span_chart, xy_chart

_ARROWS = {"higher": "↑", "lower": "↓", "none": "="}
_DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", "none": "to be compared with real data"}
# In the name of a measure whose model saw real patients in training: no evidence of what the release alone is good for.
_LEARNED_ON_REAL = "trained on real"
_PARTS = {"class": "By class", "sequence": "By sequence", "site": "By site"}


@dataclass(frozen=True)
class GroupView:
    """One part of the patients or of the image, every cell as text."""

    name: str
    patients: int
    measured: bool
    synthetic: str
    interval: str
    real: str
    note: str
    chart: Markup


@dataclass(frozen=True)
class PartsView:
    """A figure's groups of one kind."""

    title: str
    groups: list[GroupView]


@dataclass(frozen=True)
class FigureView:
    """One row of a quality table, every cell as text."""

    figure: Figure
    arrow: str
    direction: str
    synthetic: str
    interval: str
    public_only: str
    real: str
    floor: str
    reading: wording.Reading
    chart: Markup
    parts: list[PartsView]


@dataclass(frozen=True)
class CurveView:
    """A chart with its legend."""

    curve: Curve
    legend: list[Series]
    chart: Markup


@dataclass(frozen=True)
class SectionView:
    """One quality table."""

    id: str
    title: str
    explanation: str
    figures: list[FigureView]
    curves: list[CurveView]
    has_public_only: bool
    has_parts: bool
    extractors: list[str]


@dataclass(frozen=True)
class Summary:
    """How many figures lie where.

    Attributes:
        placed: those with a floor and a better ceiling; the sum of `near_ceiling`, `near_floor` and `at_floor`.
        near_ceiling: at least half-way from the floor to the ceiling.
        near_floor: less than half-way.
        at_floor: at the floor, below it, or with an interval that reaches it.
        unplaced: measured, but without a floor or a ceiling that is better.
        unmeasured: no value.
        compared, better_than_public: those with a public-only value, and those better than it.
    """

    placed: int
    near_ceiling: int
    near_floor: int
    at_floor: int
    unplaced: int
    unmeasured: int
    compared: int
    better_than_public: int


def quality(evaluation: Evaluation) -> list[SectionView]:
    """All sections as the template needs them."""
    return [
        SectionView(
            id=section.id,
            title=section.title,
            explanation=section.explanation,
            figures=[_figure(figure, f"{section.id}-{place}") for place, figure in enumerate(section.figures)],
            curves=[_curve(curve, f"{section.id}-curve-{place}") for place, curve in enumerate(section.curves)],
            has_public_only=any(figure.public_only is not None for figure in section.figures),
            has_parts=any(figure.groups for figure in section.figures),
            extractors=sorted({figure.extractor for figure in section.figures if figure.extractor}),
        )
        for section in evaluation.sections
    ]


def summary(evaluation: Evaluation) -> Summary:
    """Counts over all figures."""
    figures = [figure for section in evaluation.sections for figure in section.figures]
    measured = [figure for figure in figures if figure.synthetic is not None]
    readings = [wording.reading(figure) for figure in measured]
    at_floor = sum(reading.verdict == "floor" for reading in readings)
    near_ceiling = sum(reading.verdict == "ceiling" for reading in readings)
    placed = sum(reading.verdict != "open" for reading in readings)
    against_public = [reading.beats_public_only for reading in readings if reading.beats_public_only is not None]
    return Summary(
        placed=placed,
        near_ceiling=near_ceiling,
        near_floor=placed - near_ceiling - at_floor,
        at_floor=at_floor,
        unplaced=len(readings) - placed,
        unmeasured=len(figures) - len(measured),
        compared=len(against_public),
        better_than_public=sum(against_public),
    )


def usefulness(evaluation: Evaluation, at_most: int = 4) -> list[str]:
    """What models that learned from the release alone reached on real patients, one sentence a measure."""
    figures = [
        figure
        for section in evaluation.sections
        if section.id == "utility"
        for figure in section.figures
        if figure.synthetic is not None and figure.better == "higher" and _LEARNED_ON_REAL not in figure.metric
    ]
    return [wording.beside(figure) for figure in figures[:at_most]]


def _figure(figure: Figure, identifier: str) -> FigureView:
    places = wording.decimals(figure)

    def cell(value: float | None) -> str:
        if value is None:
            return "–"
        return wording.number(value) if places is None else wording.fixed(value, places)

    interval = "" if figure.interval is None else f"{cell(figure.interval[0])} to {cell(figure.interval[1])}"
    read = wording.reading(figure)
    return FigureView(
        figure=figure,
        arrow=_ARROWS[figure.better],
        direction=_DIRECTIONS[figure.better],
        synthetic=cell(figure.synthetic),
        interval=interval,
        public_only=cell(figure.public_only),
        real=cell(figure.real),
        floor=cell(figure.floor),
        reading=read,
        chart=_place_chart(figure, read.place, identifier),
        parts=[
            PartsView(
                title, _groups(figure, [group for group in figure.groups if group.by == by], f"{identifier}-{by}")
            )
            for by, title in _PARTS.items()
            if any(group.by == by for group in figure.groups)
        ],
    )


def _groups(figure: Figure, groups: Sequence[Group], identifier: str) -> list[GroupView]:
    ends = [
        value
        for group in groups
        for value in (group.synthetic, group.real, *(group.interval or ()))
        if value is not None
    ]
    scale = (min(ends), max(ends)) if ends else (0.0, 1.0)
    views = []
    for place, group in enumerate(groups):
        chart = Markup("")
        if group.synthetic is not None:
            marks = () if group.real is None else (Mark(group.real, "real", f"real {wording.number(group.real)}"),)
            title = f"{group.name}: {wording.number(group.synthetic)}"
            chart = span_chart(group.synthetic, group.interval, scale, marks, title, f"{identifier}-{place}")
        interval = "" if group.interval is None else " to ".join(map(wording.number, group.interval))
        views.append(
            GroupView(
                name=group.name,
                patients=group.n,
                measured=group.synthetic is not None,
                synthetic="–" if group.synthetic is None else wording.number(group.synthetic),
                interval=interval,
                real="–" if group.real is None else wording.number(group.real),
                note=group.note,
                chart=chart,
            )
        )
    return views


def _curve(curve: Curve, identifier: str) -> CurveView:
    series = [Series(line.name, place, tuple(line.points)) for place, line in enumerate(curve.lines)]
    drawn = [one for one in series if any(math.isfinite(y) for _, y in one.points)]
    chart = xy_chart(drawn, curve.title, curve.x, curve.y, identifier) if drawn else Markup("")
    return CurveView(curve, drawn, chart)


def _place_chart(figure: Figure, place: float | None, identifier: str) -> Markup:
    if place is None or figure.floor is None or figure.real is None:
        return Markup("")
    floor, span = figure.floor, figure.real - figure.floor
    interval = None
    if figure.interval is not None:
        interval = ((figure.interval[0] - floor) / span, (figure.interval[1] - floor) / span)
    public_only = None if figure.public_only is None else (figure.public_only - floor) / span
    return place_chart(place, public_only, interval, identifier)
