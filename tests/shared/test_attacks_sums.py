"""Matched filters on released sums: as strong as the noise allows, and no stronger."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from fedsynth.attacks.rates import epsilon_bound, largest_area, roc_area
from fedsynth.attacks.sums import filter_with_the_population_known, filter_with_the_rest_known
from fedsynth.dp.accounting import gaussian_epsilon
from fedsynth.metrics.measurable import NotMeasurable

DIMENSIONS, PATIENTS = 80, 40
DELTA = 1e-5


def unit_rows(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Rows of norm 1 with a direction that all share."""
    rows = rng.normal(size=(n, DIMENSIONS)) + 1.0
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def noisy_sums(sigma: float, repeats: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of members and others by the best filter, over many releases."""
    rng = np.random.default_rng(seed)
    inside, outside = [], []
    for _ in range(repeats):
        members, others = unit_rows(PATIENTS, rng), unit_rows(PATIENTS, rng)
        total = members.sum(axis=0) + sigma * rng.normal(size=DIMENSIONS)
        found = filter_with_the_rest_known(total, members, others)
        inside.append(found[0])
        outside.append(found[1])
    return np.concatenate(inside), np.concatenate(outside)


def test_without_noise_everybody_is_found() -> None:
    members, others = noisy_sums(1e-4, 1, 1)
    assert roc_area(members, others).value == 1.0


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_the_filter_is_as_good_as_theory_says_and_stays_within_epsilon(sigma: float) -> None:
    """For rows of norm 1 members' scores are N(1/2, s^2), others' N(-1/2, s^2)."""
    members, others = noisy_sums(sigma, 60, 2)
    area = roc_area(members, others)
    assert area.value == pytest.approx(norm.cdf(1 / (sigma * math.sqrt(2))), abs=0.03)
    epsilon = gaussian_epsilon(sigma, DELTA)
    assert area.value < largest_area(epsilon, DELTA)
    assert epsilon_bound(members, others, DELTA, np.random.default_rng(3)) < epsilon


def test_a_sum_with_less_noise_than_claimed_is_caught() -> None:
    members, others = noisy_sums(0.2, 20, 4)
    assert epsilon_bound(members, others, DELTA, np.random.default_rng(5)) > gaussian_epsilon(2.0, DELTA)


def test_knowing_the_population_is_enough_where_there_is_no_noise() -> None:
    rng = np.random.default_rng(6)
    members, others, sample = unit_rows(PATIENTS, rng), unit_rows(200, rng), unit_rows(100, rng)
    found = filter_with_the_population_known(members.sum(axis=0), members, others, sample, PATIENTS, 1e-3)
    assert roc_area(*found).low > 0.65
    drowned = members.sum(axis=0) + 20 * rng.normal(size=DIMENSIONS)
    found = filter_with_the_population_known(drowned, members, others, sample, PATIENTS, 20.0)
    assert roc_area(*found).value == pytest.approx(0.5, abs=0.12)


def test_a_population_of_a_handful_is_no_result() -> None:
    rng = np.random.default_rng(7)
    rows = unit_rows(30, rng)
    with pytest.raises(NotMeasurable):
        filter_with_the_population_known(rows.sum(axis=0), rows, rows, rows[:3], 30, 1.0)


def test_knowing_the_rest_is_knowing_the_noise_and_would_refute_an_honest_epsilon() -> None:
    """Why no bound of epsilon is drawn from this filter: rows that are alike, each run exactly private."""
    rng = np.random.default_rng(8)
    sigma = 3.75
    common = np.zeros(DIMENSIONS)
    common[0] = 0.99

    def alike(n: int) -> NDArray[np.float64]:
        return common + 0.1 * unit_rows(n, rng)

    members, others = alike(500), alike(150)
    total = members.sum(axis=0) + sigma * rng.normal(size=DIMENSIONS)
    scores = filter_with_the_rest_known(total, members, others)
    assert gaussian_epsilon(sigma, DELTA) < 1.0 < epsilon_bound(*scores, DELTA, rng)
