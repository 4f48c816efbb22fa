"""The bound from one run with canaries: its formula, its coverage, and what makes it wrong."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedsynth.auditing.one_run import (
    Look,
    count_correct,
    cut,
    epsilon_bound,
    guess,
    outcome,
    p_value,
    planned_guesses,
    reachable,
)


def theorem(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of Steinke, Nasr and Jagielski (2023), term by term in exact fractions."""
    q = Fraction(math.exp(epsilon)) / (1 + Fraction(math.exp(epsilon)))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = sum(mass[v:], Fraction(0))
    most = max((sum(mass[v - i : v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(0))
    return float(min(tail + 2 * m * Fraction(delta) * most, Fraction(1)))


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_the_p_value_is_the_theorem_s(epsilon: float, delta: float) -> None:
    for m, r in ((40, 40), (60, 25), (10, 0)):
        for v in range(0, r + 1, 5):
            assert p_value(m, r, v, epsilon, delta) == pytest.approx(theorem(m, r, v, epsilon, delta), rel=1e-9)


def test_without_delta_it_is_the_tail_of_a_binomial() -> None:
    for v in (0, 3, 60, 100):
        assert p_value(1000, 100, v, 1.0, 0.0) == pytest.approx(float(binom.sf(v - 1, 100, math.e / (1 + math.e))))


def test_right_guesses_alone_can_be_worked_out_by_hand() -> None:
    """r right guesses of r refute epsilon where (e^epsilon / (1 + e^epsilon))^r < 0.05."""
    for r in (10, 100, 5000):
        right = 0.05 ** (1 / r)
        assert epsilon_bound(r, r, r, 0.0) == pytest.approx(math.log(right / (1 - right)), abs=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    r=st.integers(1, 300),
    wrong=st.integers(0, 300),
    more=st.integers(0, 500),
    delta=st.sampled_from([0.0, 1e-6, 1e-4]),
)
def test_the_bound_grows_with_right_guesses_and_falls_with_delta_and_with_canaries(
    r: int, wrong: int, more: int, delta: float
) -> None:
    v = max(r - wrong, 0)
    bound = epsilon_bound(r + more, r, v, delta)
    assert epsilon_bound(r + more, r, min(v + 1, r), delta) >= bound
    assert epsilon_bound(r + more, r, v, delta + 1e-4) <= bound
    assert epsilon_bound(r + more + 50, r, v, delta) <= bound
    assert epsilon_bound(r + more, r, v, delta, 0.99) <= bound
    assert bound <= reachable([r], r + more, delta) + 1e-9
    assert bound == 0 or p_value(r + more, r, v, bound, delta) < 0.05


def randomised_response(rng: np.random.Generator, members: np.ndarray, epsilon: float) -> np.ndarray:
    """Scores of canaries each of whose memberships is told rightly with probability e^epsilon / (1 + e^epsilon)."""
    truthful = rng.random(len(members)) < 1 / (1 + math.exp(-epsilon))
    return np.where(truthful, members, ~members).astype(float)


def share_too_large(run: object, epsilon: float, repeats: int = 1500) -> float:
    rng = np.random.default_rng(5)
    assert callable(run)
    return float(np.mean([run(rng) > epsilon for _ in range(repeats)]))


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_of_randomised_response_at_most_one_bound_in_twenty_is_too_large_and_most_are_near(epsilon: float) -> None:
    m, bounds = 500, []

    def run(rng: np.random.Generator) -> float:
        members = rng.random(m) < 0.5
        found = outcome([Look(randomised_response(rng, members, epsilon), m)], members, 0.0)
        bounds.append(found.bound)
        return found.bound

    share = share_too_large(run, epsilon)
    assert share <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1500)
    assert share > 0.015, "a bound that is hardly ever too large is looser than it has to be"
    assert np.median(bounds) > 0.7 * epsilon - 0.1


def test_a_mechanism_that_fails_with_probability_delta_is_covered() -> None:
    """Each canary is revealed with probability delta, and else answered for by randomised response."""
    m, epsilon, delta = 300, 1.0, 0.01

    def run(rng: np.random.Generator) -> float:
        members = rng.random(m) < 0.5
        scores = randomised_response(rng, members, epsilon)
        revealed = rng.random(m) < delta
        scores[revealed] = np.where(members[revealed], 2.0, -1.0)
        return outcome([Look(scores, m)], members, delta).bound

    assert share_too_large(run, epsilon) <= 0.05


def test_a_mechanism_that_gives_everything_away_once_in_twenty_five_runs_is_covered() -> None:
    """(0, 0.04)-private: nearly always noise, sometimes all memberships at once."""

    def run(rng: np.random.Generator) -> float:
        members = rng.random(200) < 0.5
        scores = members.astype(float) if rng.random() < 0.04 else rng.random(200)
        return outcome([Look(scores, 200)], members, 0.04).bound

    assert share_too_large(run, 0.0) <= 0.05


def test_looking_at_many_numbers_of_guesses_without_saying_so_gives_bounds_that_are_too_large() -> None:
    m, epsilon = 400, 1.0
    numbers = list(range(10, 401, 10))

    def scores_of(rng: np.random.Generator, members: np.ndarray) -> np.ndarray:
        told = randomised_response(rng, members, epsilon)
        return np.where(told > 0.5, 1.0, -1.0) * (1 + rng.random(m))

    def best_afterwards(rng: np.random.Generator) -> float:
        members = rng.random(m) < 0.5
        scores = scores_of(rng, members)
        return max(epsilon_bound(m, r, count_correct(guess(scores, r), members), 0.0) for r in numbers)

    def fixed_before(rng: np.random.Generator) -> float:
        members = rng.random(m) < 0.5
        scores = scores_of(rng, members)
        return outcome([Look(scores, r) for r in numbers], members, 0.0).bound

    assert share_too_large(best_afterwards, epsilon, 300) > 0.1
    assert share_too_large(fixed_before, epsilon, 300) <= 0.05


def test_several_looks_share_the_chance_of_error() -> None:
    members = np.arange(100) < 50
    scores = members + 0.1 * np.arange(100) / 100
    one, two = outcome([Look(scores, 100)], members, 0.0), outcome([Look(scores, 100), Look(-scores, 50)], members, 0.0)
    assert one.bound == one.reachable == epsilon_bound(100, 100, 100, 0.0)
    assert two.bound == epsilon_bound(100, 100, 100, 0.0, 0.975) < one.bound
    assert (two.guesses, two.correct, two.looks) == (100, 100, 2)


def test_guesses_are_the_scores_farthest_from_the_cut() -> None:
    scores = np.array([0.0, 0.4, 5.0, 5.3, 4.0, 0.1])
    assert 1 < cut(scores) < 4
    assert guess(scores, 6).tolist() == [-1, -1, 1, 1, 1, -1]
    assert guess(scores, 2).tolist() == [0, 0, 1, 1, 0, 0]
    assert guess(scores, 4).tolist() == [-1, 0, 1, 1, 1, 0]
    assert guess(scores, 0).tolist() == [0] * 6


def test_groups_of_unequal_size_are_told_apart() -> None:
    members = np.arange(300) < 20
    scores = np.where(members, 1.0, 0.0) + 0.01 * np.random.default_rng(0).standard_normal(300)
    assert count_correct(guess(scores, 300), members) == 300


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct"):
        p_value(10, 5, 6, 1.0, 0.0)
    with pytest.raises(ValueError, match="not possible"):
        guess(np.zeros(3), 4)
    with pytest.raises(ValueError, match="not finite"):
        guess(np.array([0.0, math.nan]), 1)
    with pytest.raises(ValueError, match="at least one look"):
        outcome([], np.zeros(3, dtype=bool), 0.0)
    with pytest.raises(ValueError, match="confidence"):
        epsilon_bound(3, 3, 3, 0.0, 1.0)


def test_the_number_of_guesses_follows_from_public_numbers_and_is_near_the_best() -> None:
    m, sigma, delta = 2000, 0.8, 1e-5
    planned = planned_guesses(m, 1.0, sigma, 1, delta)
    assert planned == planned_guesses(m, 1.0, sigma, 1, delta)
    assert planned[-1] == m
    rng = np.random.default_rng(3)
    members = rng.random(m) < 0.5
    scores = members + sigma * rng.standard_normal(m)

    def bound(r: int) -> float:
        return epsilon_bound(m, r, count_correct(guess(scores, r), members), delta, 0.975)

    assert bound(planned[0]) > 2 * bound(m)
    assert bound(planned[0]) > 0.8 * max(bound(r) for r in range(20, m, 20))
