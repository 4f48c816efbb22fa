"""Rates of attacks: intervals that hold what they promise, and bounds that no honest mechanism is refuted by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from fedsynth.attacks.rates import (
    epsilon_bound,
    largest_area,
    largest_epsilon_bound,
    largest_true_positive_rate,
    operating_point,
    proportion,
    roc_area,
)
from fedsynth.metrics.measurable import NotMeasurable

REPEATS = 300


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@given(st.integers(0, 60), st.integers(1, 60))
def test_a_proportion_has_the_interval_of_clopper_and_pearson(count: int, more: int) -> None:
    found = proportion(count, count + more)
    expected = binomtest(count, count + more).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_the_area_s_interval_holds_the_true_area_in_95_of_100_cohorts(rng: np.random.Generator, shift: float) -> None:
    truth = norm.cdf(shift / np.sqrt(2))
    found = [roc_area(rng.normal(size=60) + shift, rng.normal(size=24)) for _ in range(REPEATS)]
    assert np.mean([rate.low <= truth <= rate.high for rate in found]) > 0.91
    assert np.mean([rate.value for rate in found]) == pytest.approx(truth, abs=0.01)


def test_a_perfect_attack_has_area_1_and_an_interval_that_is_not_empty() -> None:
    found = roc_area(np.arange(20.0) + 20, np.arange(20.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.95


def test_an_attack_that_says_the_same_of_everybody_has_area_a_half() -> None:
    found = roc_area(np.zeros(50), np.zeros(40))
    assert found.value == 0.5
    assert found.low < 0.45 < 0.55 < found.high


def test_with_144_non_members_a_thousandth_cannot_be_had(rng: np.random.Generator) -> None:
    point = operating_point(rng.normal(size=500) + 5, rng.normal(size=144), 0.001)
    assert point.asked == 0.001
    assert point.reached.value == 0.0
    assert point.reached.high == pytest.approx(0.0253, abs=1e-4)
    assert point.true_positive_rate.value > 0.9


def test_with_many_non_members_the_rate_that_was_asked_for_is_reached(rng: np.random.Generator) -> None:
    point = operating_point(rng.normal(size=5000) + 1, rng.normal(size=5000), 0.01)
    assert point.reached.value == 0.01
    assert point.true_positive_rate.value == pytest.approx(norm.sf(norm.isf(0.01) - 1), abs=0.03)


def test_ties_accuse_no_more_than_was_allowed() -> None:
    others = np.repeat([0.0, 1.0], 500)
    point = operating_point(np.ones(100), others, 0.01)
    assert point.reached.value == 0.0
    assert point.true_positive_rate.value == 0.0


def test_a_chance_attack_proves_nothing(rng: np.random.Generator) -> None:
    bounds = [epsilon_bound(rng.normal(size=150), rng.normal(size=150), 1e-5, rng) for _ in range(REPEATS)]
    assert np.mean(np.array(bounds) > 0) <= 0.05


def test_a_perfect_attack_proves_as_much_as_so_many_patients_can(rng: np.random.Generator) -> None:
    found = epsilon_bound(np.ones(400), np.zeros(400), 1e-5, rng)
    assert found == pytest.approx(largest_epsilon_bound(400, 400, 1e-5))
    assert found > 3.9
    # Few non-members are no obstacle: acquitting them without a mistake proves as much.
    assert largest_epsilon_bound(576, 144, 1e-5) > largest_epsilon_bound(144, 144, 1e-5)


def randomised_response(rng: np.random.Generator, epsilon: float, n: int) -> tuple[NDArray[np.float64], ...]:
    """Answers that say the truth with the probability that epsilon allows."""
    true = np.exp(epsilon) / (1 + np.exp(epsilon))
    return (rng.random(n) < true).astype(float), (rng.random(n) > true).astype(float)


def test_the_bound_exceeds_the_true_epsilon_in_at_most_5_of_100_runs(rng: np.random.Generator) -> None:
    bounds = [epsilon_bound(*randomised_response(rng, 1.0, 300), 0.0, rng) for _ in range(REPEATS)]
    assert np.mean(np.array(bounds) > 1.0) <= 0.05
    assert np.mean(bounds) > 0.5


def test_the_bound_of_a_gaussian_mechanism_stays_below_its_epsilon(rng: np.random.Generator) -> None:
    from fedsynth.dp.accounting import gaussian_epsilon

    bounds = [epsilon_bound(rng.normal(size=400) + 1, rng.normal(size=400), 1e-5, rng) for _ in range(REPEATS)]
    assert max(bounds) < gaussian_epsilon(1.0, 1e-5)
    assert np.mean(bounds) > 0.7


def test_what_delta_excuses_is_not_held_against_epsilon(rng: np.random.Generator) -> None:
    members = np.concatenate([np.full(60, 9.0), rng.normal(size=940)])  # 6 % of the members are given away
    others = rng.normal(size=1000)
    assert epsilon_bound(members, others, 0.0, rng) > 1.0
    assert epsilon_bound(members, others, 0.2, rng) == 0.0


def test_who_is_surely_no_member_counts_as_well(rng: np.random.Generator) -> None:
    members = np.full(500, 1.0)
    others = np.concatenate([np.zeros(250), np.full(250, 1.0)])  # half of the others are acquitted without a mistake
    assert epsilon_bound(members, others, 0.0, rng) > 2.0


def test_privacy_bounds_every_point_and_the_area_of_the_curve() -> None:
    assert largest_true_positive_rate(1.0, 0.0, 0.01) == pytest.approx(np.e * 0.01)
    assert largest_true_positive_rate(1.0, 1e-5, 0.0) == pytest.approx(1e-5)
    assert largest_true_positive_rate(1e5, 1e-5, 0.01) == 1.0
    rates = np.linspace(0, 1, 100_001)
    for epsilon, delta in ((0.0, 0.1), (1.0, 1e-5), (2.0, 0.05)):
        curve = [largest_true_positive_rate(epsilon, delta, rate) for rate in rates]
        assert largest_area(epsilon, delta) == pytest.approx(np.mean(curve), abs=1e-4)


@pytest.mark.parametrize("members", [np.zeros(9), np.full(20, np.nan)])
def test_too_few_or_broken_scores_are_no_result(members: NDArray[np.float64]) -> None:
    with pytest.raises(NotMeasurable):
        roc_area(members, np.zeros(50))


def test_bounds_of_many_attacks_hold_together(rng: np.random.Generator) -> None:
    """Twenty independent attacks that are each as good as epsilon 1 allows: all claims stand in 95 of 100 studies."""
    refuted = [
        any(epsilon_bound(*randomised_response(rng, 1.0, 300), 0.0, rng, 20) > 1.0 for _ in range(20))
        for _ in range(40)
    ]
    assert np.mean(refuted) <= 0.05


def test_a_perfect_attack_among_many_proves_less() -> None:
    assert 0 < largest_epsilon_bound(400, 400, 1e-5, 24) < largest_epsilon_bound(400, 400, 1e-5)
    assert largest_epsilon_bound(400, 400, 1e-5, 24) == pytest.approx(
        epsilon_bound(np.ones(400), np.zeros(400), 1e-5, np.random.default_rng(1), 24)
    )
