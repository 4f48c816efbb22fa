"""Noise and draws: distribution, independence, and what is marked as not private."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from fedsynth.dp.randomness import Randomness, SeededRandomness, SystemRandomness, poisson_draw

COUNT = 200_000
# Bounds are some six standard errors: a right implementation fails about once in 10**8 runs.
STANDARD_ERRORS = 6.0


@pytest.fixture(params=["system", "seeded"])
def randomness(request: pytest.FixtureRequest) -> Randomness:
    return SystemRandomness() if request.param == "system" else SeededRandomness(11)


def test_only_the_system_source_is_private() -> None:
    assert SystemRandomness().private
    seeded = SeededRandomness(1)
    assert not seeded.private
    assert "NOT PRIVATE" in seeded.description


def test_normal_values_have_the_moments_of_a_gaussian(randomness: Randomness) -> None:
    std = 2.5
    values = randomness.normal((COUNT,), std).double() / std
    error = STANDARD_ERRORS / math.sqrt(COUNT)
    assert abs(float(values.mean())) < error
    assert abs(float(values.pow(2).mean()) - 1) < error * math.sqrt(2)
    assert abs(float(values.pow(3).mean())) < error * math.sqrt(15)
    assert abs(float(values.pow(4).mean()) - 3) < error * math.sqrt(96)


def test_normal_values_pass_a_kolmogorov_smirnov_test(randomness: Randomness) -> None:
    values = randomness.normal((COUNT,), 1.0).numpy()
    # P(D * sqrt(n) > 3) is about 2 exp(-18), 3e-8.
    assert stats.kstest(values, "norm").statistic * math.sqrt(COUNT) < 3.0


def test_the_two_halves_of_box_muller_are_uncorrelated_in_value_and_size() -> None:
    first, second = SystemRandomness().normal((2, COUNT), 1.0).double()
    for a, b in ((first, second), (first.pow(2) - 1, second.pow(2) - 1)):
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < STANDARD_ERRORS / math.sqrt(COUNT) * 2


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 3), ()])
def test_every_shape_is_filled(shape: tuple[int, ...]) -> None:
    values = SystemRandomness().normal(shape, 1.0)
    assert tuple(values.shape) == shape
    assert values.dtype == torch.float32
    assert bool(values.isfinite().all())
    assert len(set(values.flatten().tolist())) == values.numel()


def test_uniform_values_lie_in_the_half_open_unit_interval(randomness: Randomness) -> None:
    values = randomness.uniform(COUNT)
    assert values.dtype == torch.float64
    assert 0 <= float(values.min()) < 1e-3
    assert 1 - 1e-3 < float(values.max()) < 1
    assert stats.kstest(values.numpy(), "uniform").statistic * math.sqrt(COUNT) < 3.0


def test_no_two_sources_and_no_two_calls_share_a_stream() -> None:
    a, b = SystemRandomness(), SystemRandomness()
    drawn = [a.uniform(64), a.uniform(64), b.uniform(64), b.uniform(64)]
    for x, y in pairwise([*drawn, drawn[0]]):
        assert not set(x.tolist()) & set(y.tolist())


def test_a_seed_repeats_itself() -> None:
    torch.testing.assert_close(SeededRandomness(3).normal((9,), 1.0), SeededRandomness(3).normal((9,), 1.0))
    assert not torch.equal(SeededRandomness(3).normal((9,), 1.0), SeededRandomness(4).normal((9,), 1.0))


def test_poisson_sampling_draws_each_patient_independently_at_the_rate(randomness: Randomness) -> None:
    patients, rate, steps = 50, 0.2, 4000
    drawn = torch.zeros(steps, patients, dtype=torch.float64)
    for step in range(steps):
        rows = poisson_draw(patients, rate, randomness)
        assert rows.dtype == torch.int64
        assert len(set(rows.tolist())) == len(rows)
        drawn[step, rows] = 1
    rates = drawn.mean(0)
    error = math.sqrt(rate * (1 - rate) / steps)
    assert float((rates - rate).abs().max()) < STANDARD_ERRORS * error
    # The batch size varies as a binomial does: neither fixed, nor patients drawn together.
    sizes = drawn.sum(1)
    binomial = patients * rate * (1 - rate)
    assert float(sizes.var()) == pytest.approx(binomial, rel=STANDARD_ERRORS * math.sqrt(2 / steps))
    correlations = torch.corrcoef(drawn.T) - torch.eye(patients, dtype=torch.float64)
    assert float(correlations.abs().max()) < (STANDARD_ERRORS + 1) / math.sqrt(steps)


def test_a_draw_may_be_empty_and_may_be_everyone() -> None:
    assert len(poisson_draw(20, 1e-12, SystemRandomness())) == 0
    assert len(poisson_draw(0, 0.5, SystemRandomness())) == 0
    assert poisson_draw(20, 1.0, SystemRandomness()).tolist() == list(range(20))
