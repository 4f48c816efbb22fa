"""What mechanisms cost, against Opacus, the exact curve of the Gaussian mechanism, and direct numerical composition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from fedsynth.dp import accounting
from fedsynth.dp.accounting import (
    Demand,
    Mechanism,
    allocate,
    allocation_report,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    mechanisms,
    merged,
    noise_multiplier,
)

DELTA = 1e-5

# Opacus' PRV accountant at sample rate 1, and its remark that a bound at the largest order is loose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order"),
]

any_mechanism = st.builds(
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
    # Every order gives an upper bound; ours and Opacus' differ in a few, none of which is the best one by far.
    assert epsilon(history, DELTA) == pytest.approx(opacus.get_epsilon(DELTA), rel=2e-3)


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.95, 1.0])
def test_divergences_agree_with_opacus_at_every_order(rate: float, sigma: float) -> None:
    theirs = np.asarray(
        compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[float(a) for a in accounting._ORDERS])
    )
    known = np.isfinite(theirs)  # Opacus' binomials overflow at orders of about 1,000.
    assert known[accounting._ORDERS <= 512].all()
    assert accounting._rdp_of_one_step(rate, sigma)[known] == pytest.approx(theirs[known], rel=1e-6, abs=1e-11)


@pytest.mark.parametrize(("rate", "sigma"), [(1e-4, 0.5), (0.001, 0.3), (0.25, 30.0), (0.5, 0.21)])
@pytest.mark.parametrize("order", [1.1, 2.5, 5.9])
def test_fractional_orders_agree_with_adaptive_quadrature(rate: float, sigma: float, order: float) -> None:
    def excess(z: float) -> float:
        power = order * math.log1p(rate * math.expm1((2 * z - 1) / (2 * sigma**2)))
        log_density = norm.logpdf(z, 0, sigma)
        if power > 1:
            return float(np.exp(power + log_density) - np.exp(log_density))
        return float(np.expm1(power) * np.exp(log_density))

    points = np.linspace(-10 * sigma, order + 10 * sigma, 60)
    moment = math.fsum(
        quad(excess, left, right, epsabs=0, epsrel=1e-11)[0] for left, right in itertools.pairwise(points)
    )
    found = accounting._rdp_of_one_step(rate, sigma)[list(accounting._ORDERS).index(order)]
    assert found == pytest.approx(math.log1p(moment) / (order - 1), rel=1e-7, abs=1e-13)


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


class Composed:
    """The losses of all steps added up on a grid, each rounded up: deltas from above, near exact; one direction each."""

    mesh = 4e-4
    size = 2**17

    def __init__(self, history: list[Mechanism], removal: bool) -> None:
        whole = np.ones(self.size // 2 + 1, dtype=np.complex128)
        for m in history:
            q, sigma = m.sample_rate, m.noise_multiplier
            z = np.linspace(-10 * sigma, 1 + 10 * sigma, 60_001)
            without, with_patient = norm.pdf(z, 0, sigma), (1 - q) * norm.pdf(z, 0, sigma) + q * norm.pdf(z, 1, sigma)
            loss = np.log(with_patient / without) * (1 if removal else -1)
            mass = (with_patient if removal else without) * (z[1] - z[0])
            cell = np.ceil(loss / self.mesh).astype(np.int64) % self.size
            whole *= np.fft.rfft(np.bincount(cell, weights=mass, minlength=self.size)) ** m.steps
        self._mass = np.fft.irfft(whole, self.size)
        index = np.arange(self.size)
        self._losses = np.where(index < self.size // 2, index, index - self.size) * self.mesh

    def delta(self, eps: float) -> float:
        above = self._losses > eps
        return float(np.sum(self._mass[above] * -np.expm1(eps - self._losses[above])))


@pytest.mark.parametrize(
    "history",
    [
        [Mechanism(0.25, 1.5, 10), Mechanism(0.05, 0.8, 5)],
        [Mechanism(0.128, 3.0, 30), Mechanism(0.25, 3.0, 20), Mechanism(1.0, 2.0, 1)],
        [Mechanism(0.05, 3.0, 40), Mechanism(1.0, 1.5, 1), Mechanism(1.0, 3.0, 2)],
    ],
)
def test_prv_agrees_with_direct_composition_and_removal_is_the_worse_direction(history: list[Mechanism]) -> None:
    found = epsilon(history, DELTA, "prv")
    removal, addition = Composed(history, removal=True), Composed(history, removal=False)
    # Rounding up moves the direct sum by at most a mesh a step; PRV's answer lies at most its own error above the truth.
    assert removal.delta(found + sum(m.steps for m in history) * Composed.mesh) <= DELTA
    assert removal.delta(found - 0.03) > DELTA
    for eps in np.linspace(0.1, found, 8):
        assert addition.delta(eps) <= removal.delta(eps) + 1e-9


def test_the_gaussian_mechanism_has_its_exact_curve() -> None:
    for mu in (0.1, 0.5, 1.0, 3.0):
        found = gaussian_epsilon(1 / mu, DELTA)
        assert found == pytest.approx(exact_gaussian_epsilon(mu, DELTA), abs=1e-8)
        assert gaussian_delta(1 / mu, found) == pytest.approx(DELTA, rel=1e-6)
    # Balle and Wang (2018) close figure 1's gap: below epsilon 1 the classical sigma is too large.
    classical = math.sqrt(2 * math.log(1.25 / DELTA)) / 0.5
    assert gaussian_epsilon(classical, DELTA) < 0.5
    assert gaussian_epsilon(1e6, DELTA) == 0.0
    assert 4e5 < gaussian_epsilon(1e-3, DELTA) < 1e6


@pytest.mark.parametrize("sigma", [0.5, 1.5, 6.0])
def test_a_one_shot_release_is_a_gaussian_mechanism(sigma: float) -> None:
    one = [Mechanism(1.0, sigma, 1)]
    assert epsilon(one, DELTA, "prv") == pytest.approx(gaussian_epsilon(sigma, DELTA), abs=1e-9)
    assert gaussian_epsilon(sigma, DELTA) < epsilon(one, DELTA) < 1.2 * gaussian_epsilon(sigma, DELTA)
    assert accounting._rdp_of_one_step(1.0, sigma) == pytest.approx(accounting._ORDERS / (2 * sigma**2), rel=1e-12)


@examples
@given(history=st.lists(any_mechanism, min_size=1, max_size=6))
def test_merging_changes_no_divergence(history: list[Mechanism]) -> None:
    fewer = merged([*history, *history])
    assert len(fewer) <= len({(m.sample_rate, m.noise_multiplier) for m in history})
    assert sum(m.sample_rate == 1 for m in fewer) <= 1
    assert epsilon(fewer, DELTA) == pytest.approx(epsilon([*history, *history], DELTA), rel=1e-9)


def test_prv_composes_five_different_mechanisms_in_any_grouping() -> None:
    history = [
        Mechanism(1.0, 3.5, 1),
        Mechanism(1.0, 2.0, 1),
        *[Mechanism(0.128, 8.7, 30)] * 10,
        *[Mechanism(0.1, 12.4, 30)] * 10,
        *[Mechanism(0.128, 8.5, 50)] * 20,
    ]
    tight, loose = epsilon(history, DELTA, "prv"), epsilon(history, DELTA)
    assert 0.85 * loose < tight < loose
    assert epsilon(list(reversed(history)), DELTA, "prv") == pytest.approx(tight, rel=1e-6)


def test_prv_is_never_above_rdp_and_answers_where_its_grid_ends() -> None:
    ruin = [Mechanism(0.5, 0.3, 1000)]  # Opacus alone would ask for gigabytes here
    assert epsilon(ruin, DELTA, "prv") == epsilon(ruin, DELTA) > 1000
    tiny = [Mechanism(0.01, 100.0, 10)]  # Opacus alone says 0.01, its error
    assert 0 < epsilon(tiny, DELTA, "prv") <= epsilon(tiny, DELTA) < 0.01


def test_a_delta_that_prv_cannot_resolve_is_refused() -> None:
    history = [Mechanism(0.1, 2.0, 10)]
    with pytest.raises(ValueError, match="too small for the PRV accountant"):
        epsilon(history, 1e-13, "prv")
    assert math.isfinite(epsilon(history, 1e-13))


def test_without_delta_no_epsilon_is_finite() -> None:
    assert epsilon([Mechanism(0.1, 2.0, 10)], 0.0) == epsilon([Mechanism(1.0, 2.0, 1)], 0.0, "prv") == math.inf
    assert epsilon([], 0.0) == 0.0


@pytest.mark.parametrize("delta", [1.0, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must be in"):
        epsilon([Mechanism(0.1, 2.0, 10)], delta)


@examples
@given(mechanism=any_mechanism, more=st.integers(1, 1000))
def test_more_steps_cost_more(mechanism: Mechanism, more: int) -> None:
    longer = Mechanism(mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps + more)
    assert epsilon([longer], DELTA) >= epsilon([mechanism], DELTA) >= 0


@examples
@given(mechanism=any_mechanism, factor=st.floats(1.05, 4.0))
def test_more_noise_costs_less(mechanism: Mechanism, factor: float) -> None:
    noisier = Mechanism(mechanism.sample_rate, mechanism.noise_multiplier * factor, mechanism.steps)
    assert epsilon([noisier], DELTA) <= epsilon([mechanism], DELTA)


@examples
@given(mechanism=any_mechanism, factor=st.floats(1.05, 5.0))
def test_drawing_more_often_costs_more(mechanism: Mechanism, factor: float) -> None:
    rate = min(mechanism.sample_rate * factor, 1.0)
    often = Mechanism(rate, mechanism.noise_multiplier, mechanism.steps)
    assert epsilon([often], DELTA) >= epsilon([mechanism], DELTA) - 1e-9


@examples
@given(history=st.lists(any_mechanism, min_size=1, max_size=4), data=st.data())
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
@given(history=st.lists(any_mechanism, min_size=2, max_size=4))
def test_the_whole_costs_at_most_the_sum_and_at_least_each_part(history: list[Mechanism]) -> None:
    parts = [epsilon([m], DELTA) for m in history]
    total = epsilon(history, DELTA)
    assert max(parts) - 1e-9 <= total <= sum(parts) + 1e-9


@examples
@given(mechanism=any_mechanism)
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


STUDY = {
    "moments": Demand(1.0, 1, 0.15),
    "embedding": Demand(1.0, 1, 0.3),
    "autoencoder": Demand(0.128, 300, 0.15),
    "radiogenomics": Demand(0.2, 300, 0.1),
    "gan": Demand(0.128, 1000, 0.3),
}


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0, 10.0, 30.0])
def test_one_shots_and_many_steps_share_as_asked(target: float) -> None:
    found = allocate(STUDY, target, 2e-4)
    assert 0.998 * target <= epsilon(mechanisms(STUDY, found), 2e-4) <= target
    report = allocation_report(STUDY, found, target, 2e-4)
    gained = [part.epsilon_alone / part.demand.share for part in report.modules.values()]
    assert max(gained) < 1.15 * min(gained)  # epsilons alone stand to each other as the shares do
    assert report.epsilon_summed > 1.4 * report.epsilon
    for name, part in report.modules.items():
        assert part.noise_multiplier == found[name] < part.noise_multiplier_split


def test_prv_allocates_less_noise_and_keeps_to_the_target() -> None:
    demands = {"embedding": Demand(1.0, 1, 0.4), "gan": Demand(0.128, 500, 0.6)}
    loose, tight = allocate(demands, 3.0, DELTA), allocate(demands, 3.0, DELTA, "prv")
    assert all(0.8 * loose[name] < tight[name] < loose[name] for name in demands)
    assert 0.99 * 3.0 <= epsilon(mechanisms(demands, tight), DELTA, "prv") <= 3.0


def test_alone_a_one_shot_gets_the_exact_noise_under_prv() -> None:
    sigma = allocate({"embedding": Demand(1.0, 1, 1.0)}, 10.0, DELTA, "prv")["embedding"]
    assert gaussian_epsilon(sigma, DELTA) <= 10.0 < gaussian_epsilon(sigma - 2e-3, DELTA)


def test_nothing_asked_is_nothing_allocated() -> None:
    assert allocate({}, 1.0, DELTA) == {}
    with pytest.raises(ValueError, match="share must be positive"):
        Demand(0.1, 10, 0.0)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [
        (0.0, 1.0, 1),
        (-0.1, 1.0, 1),
        (1.0001, 1.0, 1),
        (math.nan, 1.0, 1),
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
