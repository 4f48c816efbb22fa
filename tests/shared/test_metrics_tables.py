"""Metrics of scores, masks, tables and predictions against values that are known."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_percentage_error as sklearn_mape
from sklearn.metrics import r2_score, roc_auc_score

from fedsynth.metrics import roc_auc as roc_auc_module
from fedsynth.metrics.association import association_map, map_agreement
from fedsynth.metrics.bootstrap import bootstrap_interval
from fedsynth.metrics.coexpression import coexpression
from fedsynth.metrics.dice import dice_by_patient
from fedsynth.metrics.discrimination import discriminative_auc
from fedsynth.metrics.marginals import mean_wasserstein, sd_ratios, spread_error
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.regression import mae_by_feature, mean_absolute_error, mean_absolute_percentage_error, mean_r2
from fedsynth.metrics.roc_auc import macro_auc, roc_auc
from fedsynth.morphology import normalise


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_auc_agrees_with_scikit_learn_ties_included(rng: np.random.Generator) -> None:
    scores, truth = rng.integers(5, size=300).astype(float), rng.random(300) < 0.3
    assert roc_auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert doctest.testmod(roc_auc_module).failed == 0


def test_auc_of_permuted_labels_is_a_half(rng: np.random.Generator) -> None:
    truth = rng.random(5000) < 0.4
    assert roc_auc(rng.permutation(truth).astype(float), truth) == pytest.approx(0.5, abs=0.03)


def test_macro_auc_averages_one_against_rest(rng: np.random.Generator) -> None:
    labels = rng.integers(3, size=200)
    scores = rng.dirichlet(np.ones(3), size=200)
    expected = roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert macro_auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_not_measurable() -> None:
    with pytest.raises(NotMeasurable, match="one of the two classes"):
        roc_auc(np.arange(3.0), np.ones(3, dtype=bool))
    with pytest.raises(NotMeasurable):
        macro_auc(np.ones((3, 2)), np.zeros(3, dtype=int))


def test_dice_of_perfect_disjoint_half_and_empty() -> None:
    truth = np.zeros((4, 2, 4, 4), dtype=bool)
    predicted = truth.copy()
    truth[:3, 0, :2] = True
    predicted[0, 0, :2] = True
    predicted[1, 1] = True
    predicted[2, 0, :1] = True
    assert np.allclose(dice_by_patient(predicted, truth), [1, 0, 2 / 3, np.nan], equal_nan=True)


def test_bootstrap_covers_the_mean_at_the_textbook_width(rng: np.random.Generator) -> None:
    values = rng.normal(size=400)
    interval = bootstrap_interval(lambda rows: float(values[rows].mean()), 400, rng, resamples=2000)
    assert interval is not None
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_bootstrap_gives_no_interval_when_resamples_often_have_no_value(rng: np.random.Generator) -> None:
    truth = np.array([True, False, False])
    assert bootstrap_interval(lambda rows: roc_auc(np.arange(3.0)[rows], truth[rows]), 3, rng) is None


def test_errors_leave_out_what_was_not_measured() -> None:
    truth = np.array([[0.2, np.nan, np.nan], [0.4, 0.5, np.nan]])
    predicted = np.array([[0.3, 0.9, 0.1], [0.4, 0.7, 0.1]])
    assert np.allclose(mae_by_feature(predicted, truth), [0.05, 0.2, np.nan], equal_nan=True)
    assert mean_absolute_error(predicted, truth) == pytest.approx(0.125)
    with pytest.raises(NotMeasurable):
        mean_absolute_error(predicted, np.full_like(truth, np.nan))
    with pytest.raises(NotMeasurable, match="finite"):
        mean_absolute_error(truth, predicted)


def test_mape_is_of_physical_units_and_leaves_out_zeros() -> None:
    names = ["volume", "oedema_fraction"]
    truth = np.array([[10.0, 0.0], [100.0, 0.5]])
    predicted = np.array([[20.0, 0.3], [50.0, 0.4]])
    expected = 100 * np.mean([sklearn_mape(truth[:, 0], predicted[:, 0]), 0.2])
    measured = mean_absolute_percentage_error(normalise(predicted, names), normalise(truth, names), names)
    assert measured == pytest.approx(expected, rel=1e-4)


def test_r2_agrees_with_scikit_learn_and_ignores_constant_features(rng: np.random.Generator) -> None:
    truth, predicted = rng.random((50, 2)), rng.random((50, 2))
    assert mean_r2(predicted, truth) == pytest.approx(r2_score(truth, predicted))
    constant = np.full((50, 1), 0.3)
    assert mean_r2(np.hstack([predicted, constant + 0.1]), np.hstack([truth, constant])) == pytest.approx(
        r2_score(truth, predicted)
    )


def test_association_map_is_the_matrix_of_correlations(rng: np.random.Generator) -> None:
    genes, morphology = rng.normal(size=(40, 6)), rng.random((40, 3))
    expected = np.corrcoef(genes, morphology, rowvar=False)[:6, 6:]
    assert np.allclose(association_map(genes, morphology), expected)
    morphology[:5, 1] = np.nan
    assert np.allclose(association_map(genes, morphology)[:, 1], np.corrcoef(genes[5:].T, morphology[5:, 1])[:-1, -1])
    morphology[:, 2] = 0.4
    assert np.isnan(association_map(genes, morphology)[:, 2]).all()


def test_map_agreement_finds_the_link_and_loses_it_when_pairs_are_broken(rng: np.random.Generator) -> None:
    genes = rng.normal(size=(400, 30))
    morphology = genes @ rng.normal(size=(30, 4)) + rng.normal(size=(400, 4))
    first = association_map(genes[:200], morphology[:200])
    assert map_agreement(first, association_map(genes[200:], morphology[200:])) > 0.8
    broken = association_map(genes[200:], rng.permutation(morphology[200:]))
    assert abs(map_agreement(first, broken)) < 0.4
    with pytest.raises(NotMeasurable):
        map_agreement(first, np.zeros_like(first))


def test_wasserstein_of_a_shift_is_the_shift_and_spread_is_a_ratio(rng: np.random.Generator) -> None:
    real = rng.normal(size=(300, 5))
    assert mean_wasserstein(real, real) == 0
    assert mean_wasserstein(real, real + 0.7) == pytest.approx(0.7)
    assert np.allclose(sd_ratios(real, real / 2), 0.5)
    assert spread_error(real, real / 2) == pytest.approx(1)
    assert spread_error(real, real * 2) == pytest.approx(1)
    assert spread_error(real, np.zeros_like(real)) == pytest.approx(10)
    with pytest.raises(NotMeasurable):
        sd_ratios(np.zeros((4, 2)), real[:, :2])


def test_coexpression_is_kept_by_copies_and_lost_by_shuffled_genes(rng: np.random.Generator) -> None:
    real = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 20)) + 0.3 * rng.normal(size=(300, 20))
    assert coexpression(real, real) == pytest.approx((1, 0))
    assert coexpression(real, 3 * real + 1) == pytest.approx((1, 0))
    agreement, error = coexpression(real, rng.permuted(real, axis=0))
    assert abs(agreement) < 0.3 and error > 0.3
    with pytest.raises(NotMeasurable, match="vary"):
        coexpression(real, np.ones_like(real))


def test_a_discriminator_sees_shift_spread_and_lost_coexpression_but_not_equal_laws(rng: np.random.Generator) -> None:
    mixing = rng.normal(size=(4, 30))

    def draw(n: int) -> np.ndarray:
        return rng.normal(size=(n, 4)) @ mixing + 0.5 * rng.normal(size=(n, 30))

    real = draw(300)
    assert discriminative_auc(real, draw(300), rng) == pytest.approx(0.5, abs=0.08)
    assert discriminative_auc(real, draw(300) + 1, rng) > 0.8
    assert discriminative_auc(real, 0.3 * draw(300), rng) > 0.8
    assert discriminative_auc(real, rng.permuted(draw(300), axis=0), rng) > 0.8
    with pytest.raises(NotMeasurable):
        discriminative_auc(real, draw(5), rng)
