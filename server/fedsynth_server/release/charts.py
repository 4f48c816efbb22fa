"""The report's charts as inline SVG: text stays text, colours come from the page's style sheet (light, dark, print).

Series are told apart by colour and by dash, so they survive a grey printer; every chart has a title and a description.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

from fedsynth_server.release.wording import number

SERIES_COLOURS = 6  # .series-0 ... .series-5 in the style sheet; further series repeat them with a dash.

_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 30.0
_FEW_POINTS = 12


@dataclass(frozen=True)
class Series:
    """One line of a chart: (round, value) points in the order of rounds; a value that is not finite breaks the line."""

    name: str
    index: int
    points: tuple[tuple[float, float], ...]

    @property
    def css(self) -> str:
        """Its classes in the style sheet."""
        return f"series-{self.index % SERIES_COLOURS}" + (" dashed" if self.index >= SERIES_COLOURS else "")


@dataclass(frozen=True)
class Mark:
    """A value beside that of a `span_chart`: its class in the style sheet, and what it is."""

    value: float
    css: Literal["chance", "claim", "real", "reach"]
    title: str


def line_chart(series: Sequence[Series], quantity: str, identifier: str) -> Markup:
    """A quantity by round, one line a series.

    Args:
        series: at least one, with at least one finite value among them.
        quantity: what is drawn, for the accessible title.
        identifier: unique in the page; letters, digits and hyphens.

    Raises:
        ValueError: no series has a finite value.
    """
    return _chart(series, f"{quantity} by round", "round", "", identifier, rounds=True)


def xy_chart(series: Sequence[Series], title: str, x: str, y: str, identifier: str) -> Markup:
    """Lines over a quantity that is not counted in rounds, e.g. an ROC curve.

    Args:
        series: at least one, with at least one finite value among them.
        title: what is drawn.
        x, y: the axes, with units.
        identifier: unique in the page; letters, digits and hyphens.

    Raises:
        ValueError: no series has a finite value.
    """
    return _chart(series, title, x, y, identifier, rounds=False)


def _chart(series: Sequence[Series], title: str, x_name: str, y_name: str, identifier: str, rounds: bool) -> Markup:
    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    if not finite:
        raise ValueError(f"there is no finite value of {title!r} to draw")
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    if 0 < y_low < 0.4 * y_high:
        y_low = 0.0  # Zero is near: show it, so that a height reads as a ratio.
    if y_low == y_high:
        margin = abs(y_low) / 2 or 1.0
        y_low, y_high = y_low - margin, y_high + margin
    y_ticks = ticks(y_low, y_high, 4)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    top = _TOP + (14.0 if y_name else 0.0)

    def across(x: float) -> float:
        return (
            (_LEFT + _WIDTH - _RIGHT) / 2 if x_low == x_high else _LEFT + (x - x_low) / (x_high - x_low) * _plot_width()
        )

    def down(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * (_HEIGHT - top - _BOTTOM)

    at = x_name if rounds else "at"
    parts = [_head(identifier, title, _description(series, "in round" if rounds else "at"))]
    if y_name:
        parts.append(_text("start", 4, 11, y_name))
    for tick in y_ticks:
        y = down(tick)
        parts.append(_line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text("end", _LEFT - 6, y + 3.5, number(tick)))
    for tick in (tick for tick in ticks(x_low, x_high, 5) if x_low <= tick <= x_high):
        if not rounds or tick == round(tick):
            parts.append(_text("middle", across(tick), _HEIGHT - _BOTTOM + 14, number(tick, 7 if rounds else 3)))
    parts.append(_text("middle", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 3, x_name))
    for one in series:
        for run in _runs(one.points):
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in run)
            if len(run) > 1:
                parts.append(Markup('<polyline class="line {}" points="{}"/>').format(one.css, path))
            marked = run if len(one.points) <= _FEW_POINTS else run[-1:] if rounds else []
            for x, y in marked:
                parts.append(
                    Markup('<circle class="point {}" cx="{}" cy="{}" r="2.4"><title>{}</title></circle>').format(
                        one.css,
                        f"{across(x):.1f}",
                        f"{down(y):.1f}",
                        f"{one.name}, {at} {number(x, 7 if rounds else 3)}: {number(y)}",
                    )
                )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def span_chart(
    value: float,
    interval: tuple[float, float] | None,
    scale: tuple[float, float],
    marks: Sequence[Mark],
    title: str,
    identifier: str,
) -> Markup:
    """A value with its interval on a scale, beside what it is to be compared with.

    Args:
        value: drawn as a dot.
        interval: drawn as a bar.
        scale: the values at the left and the right end; what lies outside is drawn at the end.
        marks: other values on the same scale.
        title: the numbers in words, for those who cannot see the chart.
        identifier: unique in the page; letters, digits and hyphens.
    """
    low, high = scale
    left, right, middle = 8.0, 142.0, 10.0

    def across(of: float) -> float:
        share = 0.5 if high == low else (of - low) / (high - low)
        return left + min(1.0, max(0.0, share)) * (right - left)

    parts = [
        Markup(
            '<svg class="place" viewBox="0 0 150 20" role="img" aria-labelledby="{}-t"><title id="{}-t">{}</title>'
        ).format(identifier, identifier, title),
        _line("track", left, middle, right, middle),
    ]
    if interval is not None:
        parts.append(_line("spread", across(interval[0]), middle, across(interval[1]), middle))
    for mark in marks:
        x = across(mark.value)
        if mark.css == "real":
            points = f"{x - 4:.1f},{middle} {x:.1f},{middle - 4} {x + 4:.1f},{middle} {x:.1f},{middle + 4}"
            shape = Markup('<polygon class="{}" points="{}"><title>{}</title></polygon>').format(
                mark.css, points, mark.title
            )
        else:
            half = 5 if mark.css == "reach" else 8
            shape = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"><title>{}</title></line>').format(
                mark.css, f"{x:.1f}", f"{middle - half:.0f}", f"{x:.1f}", f"{middle + half:.0f}", mark.title
            )
        parts.append(shape)
    parts.append(Markup('<circle class="here" cx="{}" cy="{}" r="4.5"/>').format(f"{across(value):.1f}", middle))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def place_chart(
    place: float, public_only: float | None, interval: tuple[float, float] | None, identifier: str
) -> Markup:
    """Where a figure lies between its floor (left, 0) and its ceiling (right, 1).

    Args:
        place: of the synthetic value, 0 at the floor and 1 at the ceiling; outside [0, 1] too.
        public_only: place of the public-only generator.
        interval: place of the ends of the synthetic value's interval.
        identifier: unique in the page; letters, digits and hyphens.
    """
    width, middle, left, right = 150.0, 10.0, 25.0, 125.0  # A quarter of the way beyond either end is drawn.

    def across(value: float) -> float:
        return left + min(1.23, max(-0.23, value)) * (right - left)

    parts = [
        Markup(
            '<svg class="place" viewBox="0 0 {} 20" role="img" aria-labelledby="{}-t"><title id="{}-t">{}</title>'
        ).format(
            f"{width:.0f}", identifier, identifier, f"{100 * place:.0f} % of the way from the floor to the ceiling"
        ),
        _line("track", left, middle, right, middle),
        _line("track", left, middle - 5, left, middle + 5),
        _line("track", right, middle - 5, right, middle + 5),
    ]
    if interval is not None:
        low, high = sorted(interval)
        parts.append(_line("spread", across(low), middle, across(high), middle))
    if public_only is not None:
        x = across(public_only)
        diamond = f"{x - 4:.1f},{middle} {x:.1f},{middle - 4} {x + 4:.1f},{middle} {x:.1f},{middle + 4}"
        parts.append(Markup('<polygon class="public" points="{}"><title>public only</title></polygon>').format(diamond))
    if -0.23 <= place <= 1.23:
        parts.append(Markup('<circle class="here" cx="{}" cy="{}" r="4.5"/>').format(f"{across(place):.1f}", middle))
    else:
        parts.append(_arrow(across(place), middle, 1 if place > 0 else -1))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high] in `about` steps.

    >>> ticks(0.0, 1.0, 4), ticks(3.0, 3.0, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [3.0])
    """
    if low == high:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda candidate: abs(math.log(candidate / raw)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12 - math.floor(math.log10(step))) for count in range(first, last + 1)]


def _plot_width() -> float:
    return _WIDTH - _LEFT - _RIGHT


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches of finite values between values that are not."""
    breaks = [-1, *(place for place, (_, y) in enumerate(points) if not math.isfinite(y)), len(points)]
    return [list(points[start + 1 : stop]) for start, stop in pairwise(breaks) if stop > start + 1]


def _description(series: Sequence[Series], at: str) -> str:
    ends = []
    for one in series:
        finite = [(x, y) for x, y in one.points if math.isfinite(y)]
        if finite:
            (first, start), (last, end) = finite[0], finite[-1]
            span = f"from {number(start)} {at} {number(first, 7)} to {number(end)} {at} {number(last, 7)}"
            ends.append(f"{one.name}: {span}")
    return "; ".join(ends)


def _head(identifier: str, title: str, description: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d"><title id="{}-t">{}</title>'
        '<desc id="{}-d">{}</desc>'
    ).format(f"{_WIDTH:.0f}", f"{_HEIGHT:.0f}", identifier, identifier, identifier, title, identifier, description)


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        css, *(f"{value:.1f}" for value in (x1, y1, x2, y2))
    )


def _text(anchor: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text text-anchor="{}" x="{}" y="{}">{}</text>').format(anchor, f"{x:.1f}", f"{y:.1f}", escape(text))


def _arrow(x: float, y: float, direction: int) -> Markup:
    tip, base = x + 5 * direction, x - 3 * direction
    return Markup('<polygon class="here" points="{}"/>').format(
        f"{tip:.1f},{y} {base:.1f},{y - 5:.1f} {base:.1f},{y + 5:.1f}"
    )
