"""A statistic is released once, with the noise that was charged for it, whatever the rows of the patients hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth_client.training.statistic import TOTAL, release_statistic

D = 40


class NoNoise:
    """Draws everybody, adds nothing: what is left is the sum before the noise."""

    private = False
    description = "none"

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


def released(rows: Tensor, max_norm: float = 1.0) -> Tensor:
    """The sum before the noise, in float64."""
    return release_statistic(rows, Mechanism(1.0, 1.0, 1), max_norm, NoNoise()).weights[TOTAL].double()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    patients=st.integers(0, 30),
    scale=st.sampled_from([1e-6, 0.1, 1.0, 50.0, 1e20]),
    max_norm=st.sampled_from([0.5, 1.0]),
)
def test_a_patient_more_or_less_moves_the_sum_by_at_most_the_clip(
    seed: int, patients: int, scale: float, max_norm: float
) -> None:
    rows = torch.randn(patients + 1, D, generator=torch.Generator().manual_seed(seed)) * scale
    difference = released(rows, max_norm) - released(rows[:-1], max_norm)
    assert float(difference.norm()) <= max_norm + 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_counts_as_nothing(value: float) -> None:
    rows = torch.full((3, D), 0.1)
    rows[1, 5] = value
    assert torch.allclose(released(rows), torch.full((D,), 0.2, dtype=torch.float64))


def test_rows_below_the_clip_are_summed_as_they_are() -> None:
    rows = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) / 100
    # Each row is rounded towards 0 by less than a step of the grid, a millionth of the noise's deviation.
    assert torch.allclose(released(rows), rows.double().sum(0), atol=50 * 2.0**-20)


@pytest.mark.parametrize(("sigma", "max_norm"), [(0.7, 1.0), (3.0, 1.0), (2.0, 0.5)])
def test_the_noise_has_the_deviation_that_was_charged_even_without_patients(sigma: float, max_norm: float) -> None:
    empty = torch.zeros(0, 20_000)
    noise = release_statistic(empty, Mechanism(1.0, sigma, 1), max_norm, SystemRandomness()).weights[TOTAL].double()
    # The standard deviation of 20,000 Gaussian values is known to 0.5 %; five of these are allowed.
    assert float(noise.std()) == pytest.approx(sigma * max_norm, rel=0.025)
    assert abs(float(noise.mean())) < 5 * sigma * max_norm / 20_000**0.5


@pytest.mark.parametrize("sigma", [0.03, 0.7, 24.0])
def test_the_last_bits_of_the_result_do_not_tell_those_of_the_rows(sigma: float) -> None:
    """Whatever the rows, the result lies on one public grid: neighbouring cohorts can give the same values."""
    rows = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(2)) / 200
    step = 2.0 ** (math.ceil(math.log2(sigma)) - 20)
    for cohort in (rows, rows[:2], rows[:0]):
        total = release_statistic(cohort, Mechanism(1.0, sigma, 1), 1.0, SystemRandomness()).weights[TOTAL].double()
        assert torch.equal((total / step).round(), total / step)


def test_the_order_of_patients_does_not_show() -> None:
    rows = torch.randn(300, D, generator=torch.Generator().manual_seed(4))
    mechanism = Mechanism(1.0, 1.0, 1)
    totals = [
        release_statistic(each, mechanism, 1.0, SeededRandomness(3)).weights[TOTAL] for each in (rows, rows.flip(0))
    ]
    assert torch.equal(*totals)


def test_everybody_is_drawn_and_no_two_releases_share_their_noise() -> None:
    rows = torch.full((200, D), 0.01)
    first, second = (
        release_statistic(rows, Mechanism(1.0, 0.01, 1), 1.0, SystemRandomness()).weights[TOTAL] for _ in range(2)
    )
    assert torch.allclose(first, torch.full((D,), 2.0), atol=0.06)
    assert not torch.equal(first, second)


def test_a_seeded_release_repeats_itself() -> None:
    rows, mechanism = torch.full((5, D), 0.01), Mechanism(1.0, 1.0, 1)
    totals = [release_statistic(rows, mechanism, 1.0, SeededRandomness(3)).weights[TOTAL] for _ in range(2)]
    assert torch.equal(*totals)


def test_nothing_but_the_sum_is_in_the_result() -> None:
    result = release_statistic(torch.zeros(7, D), Mechanism(1.0, 1.0, 1), 1.0, SystemRandomness())
    assert set(result.weights) == {TOTAL}
    assert result.weights[TOTAL].shape == (D,)
    assert result.weights[TOTAL].dtype == torch.float32
    assert not result.progress
    assert not result.local


def test_a_second_release_under_one_charge_is_refused() -> None:
    with pytest.raises(ValueError, match="released once"):
        release_statistic(torch.zeros(7, D), Mechanism(1.0, 1.0, 2), 1.0, SystemRandomness())
