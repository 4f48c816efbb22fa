"""Calibration and ROC curves against values that are known, and against an overconfident classifier."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_curve

from fedsynth.metrics import calibration as calibration_module
from fedsynth.metrics.calibration import (
    brier_score,
    calibration_error_by_chance,
    expected_calibration_error,
    reliability,
)
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.roc_auc import roc_auc, roc_points


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_reliability_agrees_with_scikit_learn_where_predictions_differ(rng: np.random.Generator) -> None:
    predicted = rng.random(1500)
    outcomes = rng.random(1500) < predicted
    found = reliability(predicted, outcomes)
    observed, mean = calibration_curve(outcomes, predicted, n_bins=15, strategy="quantile")
    assert found.observed == pytest.approx(observed) and found.predicted == pytest.approx(mean)
    assert found.counts.tolist() == [100] * 15
    assert brier_score(predicted, outcomes) == pytest.approx(brier_score_loss(outcomes, predicted))
    assert doctest.testmod(calibration_module).failed == 0


def test_overconfidence_is_exposed_though_the_ranking_is_the_same(rng: np.random.Generator) -> None:
    honest = expit(rng.normal(scale=1.5, size=4000))
    outcomes = rng.random(4000) < honest
    overconfident = expit(5 * logit(honest))
    assert roc_auc(overconfident, outcomes) == roc_auc(honest, outcomes)
    by_chance = calibration_error_by_chance(honest, rng)
    assert expected_calibration_error(honest, outcomes) < 2 * by_chance < 0.05
    assert expected_calibration_error(overconfident, outcomes) > 0.1
    assert brier_score(overconfident, outcomes) > brier_score(honest, outcomes) + 0.02


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=15, max_size=60))
def test_the_order_of_the_cases_does_not_matter_and_the_error_is_a_share(cases: list[tuple[float, bool]]) -> None:
    predicted, outcomes = (np.array(part) for part in zip(*cases, strict=True))
    error = expected_calibration_error(predicted, outcomes)
    assert 0 <= error <= 1
    assert expected_calibration_error(predicted[::-1], outcomes[::-1]) == pytest.approx(error)
    assert reliability(predicted, outcomes).counts.sum() == len(cases)


def test_equal_predictions_are_one_bin_and_the_worst_answer_costs_one() -> None:
    outcomes = np.arange(40) < 30
    assert expected_calibration_error(np.full(40, 0.75), outcomes) == 0
    assert expected_calibration_error((~outcomes).astype(float), outcomes) == 1
    assert brier_score((~outcomes).astype(float), outcomes) == 1


def test_what_is_no_probability_is_refused() -> None:
    outcomes = np.arange(20) < 10
    with pytest.raises(NotMeasurable, match="finite"):
        expected_calibration_error(np.full(20, np.nan), outcomes)
    with pytest.raises(NotMeasurable, match="at least 15"):
        expected_calibration_error(np.full(3, 0.5), outcomes[:3])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        brier_score(np.full(20, 1.5), outcomes)
    with pytest.raises(ValueError, match="bool"):
        brier_score(np.full(20, 0.5), outcomes.astype(int))


def test_the_roc_curve_lies_on_scikit_learns_and_starts_at_the_origin(rng: np.random.Generator) -> None:
    truth = rng.random(400) < 0.3
    scores = rng.normal(size=400) + truth
    points = roc_points(scores, truth)
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    false, true, _ = roc_curve(truth, scores)
    assert np.interp(points[50][0], false, true) == pytest.approx(points[50][1])
    x, y = np.array(points).T
    assert np.trapezoid(y, x) == pytest.approx(roc_auc(scores, truth), abs=0.005)
    with pytest.raises(NotMeasurable):
        roc_points(scores, np.ones(400, dtype=bool))
