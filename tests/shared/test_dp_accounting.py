"""What mechanisms cost, against published figures, Opacus, and the exact curve of the Gaussian mechanism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedsynth.dp.accounting import Demand, Mechanism, allocate, epsilon, noise_multiplier

DELTA = 1e-5

# Opacus' PRV accountant at sample rate 1, and its remark that a bound at the largest order is loose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order"),
]

mechanisms = st.builds(
    Mechanism,
    sample_rate=st.sampled_from([0.002, 0.01, 0.05, 1.0]),
    noise_multiplier=st.floats(0.6, 30.0).map(lambda sigma: round(sigma, 3)),
    steps=st.integers(1, 2000),
)
examples = settings(max_examples=25, deadline=None)


def exact_gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism of sensitivity over noise `mu` (Balle and Wang 2018, theorem 8)."""

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0.0, 500.0))


def test_the_published_epsilon_of_dpgan_on_mnist_is_reproduced() -> None:
    # Bie et al.: MNIST, 60,000 images, batch 512, noise multiplier 2.0, 174,000 discriminator steps for epsilon 10.
    assert 10.07 <= epsilon([Mechanism(512 / 60_000, 2.0, 174_000)], DELTA) <= 10.08 * 1.01


def test_an_empty_history_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([], DELTA, "prv") == 0


@pytest.mark.parametrize(
    "history",
    [
        [Mechanism(0.01, 1.1, 1000)],
        [Mechanism(0.05, 2.0, 300), Mechanism(0.02, 1.5, 500), Mechanism(0.01, 4.0, 2000)],
    ],
)
def test_rdp_agrees_with_opacus(history: list[Mechanism]) -> None:
    opacus = RDPAccountant()
    opacus.history = [(m.noise_multiplier, m.sample_rate, m.steps) for m in history]
    # Every order gives an upper bound: fewer orders than Opacus' may cost a little more, never less.
    reference = opacus.get_epsilon(DELTA)
    assert reference * (1 - 1e-9) <= epsilon(history, DELTA) <= reference * 1.01


def test_prv_agrees_with_opacus_and_is_tighter_than_rdp() -> None:
    history = [Mechanism(0.05, 2.0, 300), Mechanism(0.02, 1.5, 500)]
    opacus = PRVAccountant()
    for m in history:
        for _ in range(m.steps):
            opacus.step(noise_multiplier=m.noise_multiplier, sample_rate=m.sample_rate)
    tight = epsilon(history, DELTA, "prv")
    assert tight == pytest.approx(opacus.get_epsilon(DELTA), rel=1e-6)
    assert 0.8 * epsilon(history, DELTA) < tight < epsilon(history, DELTA)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 10), (20.0, 100), (300.0, 50)])
def test_full_batches_cost_what_the_gaussian_mechanism_costs(sigma: float, steps: int) -> None:
    full = [Mechanism(1.0, sigma, steps)]
    alpha = np.concatenate([np.linspace(1.01, 64, 20_000), np.linspace(64, 1024, 20_000)])
    rdp = steps * alpha / (2 * sigma**2)
    best = float((rdp + np.log1p(-1 / alpha) - np.log(DELTA * alpha) / (alpha - 1)).min())
    assert best - 1e-9 <= epsilon(full, DELTA) <= best * 1.02
    # Composed Gaussian releases are one Gaussian release: its exact curve is below RDP and matched by PRV.
    exact = exact_gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    assert exact < epsilon(full, DELTA) < 1.35 * exact
    assert exact - 1e-6 <= epsilon(full, DELTA, "prv") <= exact + 0.03


@examples
@given(mechanism=mechanisms, more=st.integers(1, 1000))
def test_more_steps_cost_more(mechanism: Mechanism, more: int) -> None:
    longer = Mechanism(mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps + more)
    assert epsilon([longer], DELTA) >= epsilon([mechanism], DELTA) >= 0


@examples
@given(mechanism=mechanisms, factor=st.floats(1.05, 4.0))
def test_more_noise_costs_less(mechanism: Mechanism, factor: float) -> None:
    noisier = Mechanism(mechanism.sample_rate, mechanism.noise_multiplier * factor, mechanism.steps)
    assert epsilon([noisier], DELTA) <= epsilon([mechanism], DELTA)


@examples
@given(mechanism=mechanisms, factor=st.floats(1.05, 5.0))
def test_drawing_more_often_costs_more(mechanism: Mechanism, factor: float) -> None:
    rate = min(mechanism.sample_rate * factor, 1.0)
    often = Mechanism(rate, mechanism.noise_multiplier, mechanism.steps)
    assert epsilon([often], DELTA) >= epsilon([mechanism], DELTA) - 1e-9


@examples
@given(history=st.lists(mechanisms, min_size=1, max_size=4), data=st.data())
def test_composition_knows_no_order_and_does_not_care_how_steps_are_grouped(
    history: list[Mechanism], data: st.DataObject
) -> None:
    total = epsilon(history, DELTA)
    assert epsilon(data.draw(st.permutations(history)), DELTA) == pytest.approx(total, rel=1e-9)
    first = history[0]
    if first.steps > 1:
        cut = data.draw(st.integers(1, first.steps - 1))
        split = [Mechanism(first.sample_rate, first.noise_multiplier, n) for n in (cut, first.steps - cut)]
        assert epsilon([*split, *history[1:]], DELTA) == pytest.approx(total, rel=1e-9)


@examples
@given(history=st.lists(mechanisms, min_size=2, max_size=4))
def test_the_whole_costs_at_most_the_sum_and_at_least_each_part(history: list[Mechanism]) -> None:
    parts = [epsilon([m], DELTA) for m in history]
    total = epsilon(history, DELTA)
    assert max(parts) - 1e-9 <= total <= sum(parts) + 1e-9


@examples
@given(mechanism=mechanisms)
def test_a_smaller_delta_costs_more(mechanism: Mechanism) -> None:
    assert epsilon([mechanism], 1e-7) >= epsilon([mechanism], 1e-5) >= epsilon([mechanism], 1e-3)


@pytest.mark.parametrize(
    ("rate", "steps", "target"), [(0.02, 500, 1.0), (0.02, 500, 8.0), (0.01, 2000, 0.1), (1.0, 30, 3.0)]
)
def test_the_noise_multiplier_is_the_smallest_that_suffices(rate: float, steps: int, target: float) -> None:
    sigma = noise_multiplier(rate, steps, target, DELTA)
    assert math.isfinite(sigma)
    assert round(sigma, 3) == sigma
    assert epsilon([Mechanism(rate, sigma, steps)], DELTA) <= target
    assert epsilon([Mechanism(rate, sigma - 2e-3, steps)], DELTA) > target


def test_an_epsilon_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        noise_multiplier(1.0, 10**9, 0.01, DELTA)


@pytest.mark.parametrize("target", [0.1, 1.0, 10.0])
def test_the_allocation_spends_the_budget_and_not_more(target: float) -> None:
    demands = {"a": Demand(0.05, 160, 0.3), "b": Demand(0.02, 300, 0.3), "c": Demand(0.01, 1000, 0.4)}
    found = allocate(demands, target, DELTA)
    spent = epsilon([Mechanism(d.sample_rate, found[name], d.steps) for name, d in demands.items()], DELTA)
    assert 0.98 * target <= spent <= target


def test_a_larger_share_gets_less_noise() -> None:
    found = allocate({"small": Demand(0.02, 200, 0.2), "large": Demand(0.02, 200, 0.8)}, 4.0, DELTA)
    assert found["large"] < found["small"]


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [
        (0.0, 1.0, 1),
        (-0.1, 1.0, 1),
        (1.0001, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.1, 0.0, 1),
        (0.1, -1.0, 1),
        (0.1, math.nan, 1),
        (0.1, 1.0, 0),
        (0.1, 1.0, -5),
    ],
)
def test_what_is_no_mechanism_is_refused(rate: float, sigma: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Mechanism(rate, sigma, steps)


@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.3])
def test_next_to_no_noise_costs_next_to_everything(sigma: float) -> None:
    assert epsilon([Mechanism(0.5, sigma, 100)], DELTA) > 50
