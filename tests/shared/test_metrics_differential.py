"""Differential expression, its recovery, and intervals by leaving patients out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from fedsynth.metrics.bootstrap import bootstrap_interval
from fedsynth.metrics.coexpression import coexpression
from fedsynth.metrics.differential_expression import (
    Differences,
    concordance_at_top,
    differential_expression,
    effect_agreement,
    recovery,
)
from fedsynth.metrics.leave_out import leave_out_interval
from fedsynth.metrics.measurable import NotMeasurable

TWO = np.array([0, 1])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def profiles(n: int, rng: np.random.Generator, genes: int = 60, moved: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The first `moved` genes differ between two classes, half of them up and half down."""
    labels = rng.integers(2, size=n)
    shift = np.r_[np.tile([1.0, -1.0], moved // 2), np.zeros(genes - moved)]
    return rng.normal(size=(n, genes)) + labels[:, None] * shift, labels


def test_two_classes_are_compared_once_by_welchs_test(rng: np.random.Generator) -> None:
    genes, labels = profiles(200, rng)
    found = differential_expression(genes, labels, TWO)
    assert found.effects.shape == found.called.shape == (1, 60)
    p = ttest_ind(genes[labels == 1], genes[labels == 0], equal_var=False).pvalue
    # Benjamini and Hochberg by hand: all genes up to the last one below its line.
    order = np.argsort(p)
    below = np.flatnonzero(p[order] <= 0.05 * np.arange(1, 61) / 60)
    called = np.zeros(60, dtype=bool)
    called[order[: below[-1] + 1]] = True
    assert np.array_equal(found.called[0] != 0, called)
    assert found.called[0, :4].tolist() == [1, -1, 1, -1]
    difference = genes[labels == 1].mean(axis=0) - genes[labels == 0].mean(axis=0)
    spread = np.sqrt((genes[labels == 1].var(axis=0, ddof=1) + genes[labels == 0].var(axis=0, ddof=1)) / 2)
    assert found.effects[0] == pytest.approx(difference / spread)


def test_the_share_of_false_calls_is_what_was_asked_for(rng: np.random.Generator) -> None:
    shares = []
    for _ in range(60):
        found = differential_expression(*profiles(120, rng), TWO).called[0]
        shares.append((found[20:] != 0).sum() / max((found != 0).sum(), 1))
    assert np.mean(shares) < 0.05


def test_more_classes_are_each_compared_with_the_others(rng: np.random.Generator) -> None:
    labels = rng.integers(4, size=300)
    genes = rng.normal(size=(300, 5))
    genes[labels == 2, 1] += 2
    found = differential_expression(genes, labels, np.array([0, 2, 3]))
    assert found.called.shape == (3, 5)
    assert found.called[:, 1].tolist() == [-1, 1, -1]
    assert np.array_equal(
        found.effects, differential_expression(genes[labels != 1], labels[labels != 1], np.array([0, 2, 3])).effects
    )


def test_recovery_counts_direction_and_what_was_not_called() -> None:
    truth = Differences(np.array([[2.0, -2, 1, 0.1, 0]]), np.array([[1, -1, 1, 0, 0]], dtype=np.int8))
    found = Differences(np.array([[1.0, 1, 0.1, 0, -3]]), np.array([[1, 1, 0, 0, -1]], dtype=np.int8))
    assert recovery(truth, found) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert recovery(truth, truth) == (1, 0)
    nothing = Differences(np.zeros((1, 5)), np.zeros((1, 5), dtype=np.int8))
    assert np.isnan(recovery(nothing, found)[0])
    assert effect_agreement(truth, truth) == pytest.approx(1) and effect_agreement(truth, nothing) == 0
    assert concordance_at_top(truth, found, np.array([1, 2, 5])).tolist() == [0, 0.5, 0.4]
    with pytest.raises(NotMeasurable):
        effect_agreement(nothing, truth)


def test_a_table_that_ignores_the_label_recovers_nothing_and_another_sample_does(rng: np.random.Generator) -> None:
    reference = differential_expression(*profiles(300, rng), TWO)
    again = differential_expression(*profiles(300, rng), TWO)
    genes, labels = profiles(300, rng)
    ignored = differential_expression(genes, rng.permutation(labels), TWO)
    assert recovery(reference, again)[0] > 0.8 and effect_agreement(reference, again) > 0.5
    assert recovery(reference, ignored)[0] < 0.1 and abs(effect_agreement(reference, ignored)) < 0.4


def test_constant_genes_are_never_called_and_gaps_have_reasons(rng: np.random.Generator) -> None:
    genes, labels = profiles(40, rng)
    genes[:, 0] = np.where(labels == 1, 1.0, 0.0)
    genes[:, 1] = 3.0
    found = differential_expression(genes, labels, TWO)
    assert found.called[0, :2].tolist() == [0, 0] and np.isfinite(found.effects).all()
    with pytest.raises(NotMeasurable, match="a class has 0 patients"):
        differential_expression(genes, np.zeros(40, dtype=int), TWO)
    with pytest.raises(NotMeasurable, match="one class"):
        differential_expression(genes, labels, TWO[:1])
    genes[0, 0] = np.nan
    with pytest.raises(NotMeasurable, match="finite"):
        differential_expression(genes, labels, TWO)


def test_leaving_out_agrees_with_the_textbook_for_a_mean_and_covers_it(rng: np.random.Generator) -> None:
    covered = 0
    for _ in range(200):
        values = rng.normal(size=100)
        interval = leave_out_interval(lambda rows, values=values: float(values[rows].mean()), 100, rng)
        assert interval is not None
        covered += interval[0] <= 0 <= interval[1]
    assert 180 <= covered <= 199
    half = 1.96 * values.std() / 10
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half, rel=0.5)


def test_leaving_out_holds_the_estimate_where_the_bootstrap_does_not(rng: np.random.Generator) -> None:
    mixing = rng.normal(size=(3, 40))
    real, fake = (rng.normal(size=(60, 3)) @ mixing + 2 * rng.normal(size=(60, 40)) for _ in range(2))

    def agreement(rows: np.ndarray) -> float:
        return coexpression(real[rows], fake)[0]

    value = agreement(np.arange(60))
    left, drawn = leave_out_interval(agreement, 60, rng), bootstrap_interval(agreement, 60, rng, resamples=200)
    assert left is not None and left[0] < value < left[1]
    assert drawn is not None and value - drawn[0] > 2 * (drawn[1] - value)


def test_leaving_out_says_nothing_of_too_few_or_unmeasurable_patients(rng: np.random.Generator) -> None:
    def never(rows: np.ndarray) -> float:
        raise NotMeasurable("never")

    assert leave_out_interval(lambda rows: 1.0, 2, rng) is None
    assert leave_out_interval(lambda rows: 1.0, 0, rng) is None
    assert leave_out_interval(never, 50, rng) is None
