"""The report's numbers, readings and charts: rounding to the safe side, and no reading that the numbers do not carry."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsynth.evaluation.values import Figure
from fedsynth.plan import ACTIVITIES
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Series, line_chart, place_chart, ticks
from fedsynth_server.release.report_training import MODULE_TITLES

FINITE = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


def figure(**values: float | str | tuple[float, float] | None) -> Figure:
    defaults = {"metric": "AUC", "better": "higher", "synthetic": 0.7, "real": 0.9, "floor": 0.5}
    return Figure.model_validate(defaults | values)


@given(st.floats(min_value=1e-6, max_value=1e4))
def test_epsilon_is_never_printed_smaller_than_it_is(value: float) -> None:
    printed = float(wording.epsilon(value).replace(",", ""))
    assert printed >= value - 1e-8
    assert printed - value < 0.01 + 1e-8


def test_epsilon_without_bound_is_infinite() -> None:
    assert wording.epsilon(math.inf) == "∞"


@given(FINITE)
def test_number_keeps_three_significant_digits(value: float) -> None:
    text = wording.number(value).replace("−", "-").replace(",", "")
    text = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace(" × 10", "e")
    assert float(text) == pytest.approx(value, rel=5.01e-3, abs=1e-300)


@given(st.floats(min_value=1e-3, max_value=30), st.floats(min_value=1e-12, max_value=1e-3))
def test_attacker_bound_is_at_least_guessing_and_grows_with_epsilon(value: float, delta: float) -> None:
    def bound(of: float) -> float:
        return float((wording.attacker_accuracy(of, delta) or "100 %").removesuffix(" %"))

    assert 50 < bound(value) <= 100
    assert bound(value) >= 100 * (math.exp(value) + delta) / (math.exp(value) + 1) - 1e-6
    assert bound(value + 1) >= bound(value)


def test_attacker_bound_and_odds_by_hand() -> None:
    assert wording.attacker_accuracy(1.0, 1e-5) == "73.2 %"  # e / (e + 1) = 0.73106
    assert wording.odds_factor(1.0) == "2.72"  # 2.71828 rounded up
    assert wording.odds_factor(8.0) == "2,990"  # 2980.96 rounded up


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.001, "less than 1 %"), (0.624, "62 %"), (0.999, "more than 99 %")]
)
def test_percent_does_not_round_something_to_nothing_or_all(share: float, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("better", "synthetic", "real", "floor", "place", "verdict"),
    [
        ("higher", 0.8, 0.9, 0.5, 0.75, "ceiling"),
        ("lower", 80.0, 10.0, 90.0, 0.125, "between"),
        ("higher", 0.4, 0.9, 0.5, -0.25, "floor"),
        ("lower", 5.0, 10.0, 90.0, 1.0625, "ceiling"),
        ("higher", 0.5, 0.9, 0.5, 0.0, "floor"),
    ],
)
def test_place_follows_the_direction_of_the_measure(
    better: str, synthetic: float, real: float, floor: float, place: float, verdict: str
) -> None:
    read = wording.reading(figure(better=better, synthetic=synthetic, real=real, floor=floor))
    assert read.place == pytest.approx(place)
    assert read.verdict == verdict


def test_interval_that_reaches_the_floor_takes_the_verdict_back() -> None:
    assert wording.reading(figure(synthetic=0.8)).verdict == "ceiling"
    assert wording.reading(figure(synthetic=0.8, interval=(0.49, 0.95))).verdict == "floor"


def test_public_only_is_beaten_only_by_the_whole_interval() -> None:
    assert wording.reading(figure(public_only=0.6)).beats_public_only is True
    assert wording.reading(figure(public_only=0.6, interval=(0.58, 0.8))).beats_public_only is False
    assert wording.reading(figure(public_only=0.71)).beats_public_only is False
    assert wording.reading(figure()).beats_public_only is None


def test_nothing_is_read_from_what_is_missing_or_upside_down() -> None:
    assert wording.reading(figure(synthetic=None)).sentences == ()
    assert wording.reading(figure(real=None)).sentences == ("Cannot be placed: no ceiling.",)
    assert wording.reading(figure(real=None, floor=None)).sentences == ("Cannot be placed: no floor and no ceiling.",)
    assert wording.reading(figure(real=0.4)).place is None


def test_digits_follow_the_width_of_the_interval() -> None:
    assert wording.decimals(figure(interval=(0.652, 0.804))) == 3
    assert wording.decimals(figure(interval=(30.0, 46.0))) == 1
    assert wording.decimals(figure(interval=(1000.0, 1600.0))) == 0
    assert wording.decimals(figure(interval=(0.7, 0.7))) is None
    assert wording.decimals(figure()) is None


@given(FINITE, FINITE, st.integers(min_value=1, max_value=8))
def test_ticks_cover_the_range_in_even_steps(one: float, other: float, about: int) -> None:
    low, high = min(one, other), max(one, other)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        return
    marks = ticks(low, high, about)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step and marks[-1] >= high - 1e-6 * step
    assert len(marks) <= 3 * about + 3
    assert all(later - earlier == pytest.approx(step, rel=1e-4) for earlier, later in pairwise(marks))


def drawn(*values: float) -> ElementTree.Element:
    points = tuple((float(at), value) for at, value in enumerate(values, start=1))
    return ElementTree.fromstring(line_chart([Series("a <site>", 0, points)], "loss & more", "chart-1"))


def test_chart_is_well_formed_whatever_its_names() -> None:
    svg = drawn(1.0, 2.0, 3.0)
    assert svg.findtext("title") == "loss & more by round"
    assert svg.findtext("desc") == "a <site>: from 1 in round 1 to 3 in round 3"


def test_missing_round_breaks_the_line() -> None:
    assert len(drawn(1.0, 2.0, math.nan, 4.0, 3.0).findall("polyline")) == 2
    assert len(drawn(1.0, math.nan, 4.0).findall("polyline")) == 0
    assert len(drawn(1.0, math.nan, 4.0).findall("circle")) == 2


@pytest.mark.parametrize("values", [(2.0,), (2.0, 2.0), (0.0, 0.0), (-3.0, 5.0), (1e-9, 3e-9), (1e6, 1e6 + 1)])
def test_every_drawn_point_lies_inside_the_chart(values: tuple[float, ...]) -> None:
    svg = drawn(*values)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    circles = svg.findall("circle")
    assert len(circles) == len(values)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_higher_values_are_drawn_higher() -> None:
    low, high = drawn(1.0, 2.0).findall("circle")
    assert float(high.attrib["cy"]) < float(low.attrib["cy"])


def test_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite value"):
        drawn(math.nan, math.inf)


def test_place_beyond_the_ends_is_shown_as_an_arrow() -> None:
    assert "<circle" in place_chart(0.5, None, None, "p")
    assert "<circle" not in place_chart(7.0, None, (6.0, 8.0), "p")
    across = [float(x) for x in re.findall(r'x[12]="([\d.-]+)"', place_chart(-40.0, 9.0, (-90.0, 3.0), "p"))]
    assert across and all(0 <= x <= 150 for x in across)


def test_whatever_sites_are_asked_for_has_a_title() -> None:
    """An audit and a privacy statement may name any of them, and a page without the title cannot be written."""
    assert set(MODULE_TITLES) == set(ACTIVITIES)
