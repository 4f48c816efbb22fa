"""What sampled Gaussian mechanisms cost together: pure functions over histories.

A one-shot release (every patient takes part) is a mechanism of sample rate 1. Two accountants compose any history, and
both give upper bounds, PRV for the direction of removal; neighbouring cohorts differ by adding or removing one patient.

RDP: the sampled Gaussian's moments by Mironov, Talwar, Zhang (2019), who prove that removing a patient is the worse of
both directions; conversion to (epsilon, delta) by Balle et al. (2020), theorem 21. The same formulas as in Opacus, over
more orders and in arrays instead of loops, since a plan's allocation takes hundreds of them.
PRV: Opacus' numerical composition after Gopi, Lee, Wutschitz (2021), for the direction of removal; that addition costs
less under composition is checked numerically (in the tests), not proven.
The Gaussian mechanism alone has an exact answer: Balle and Wang (2018), theorem 8.

A mechanism without noise, of a study without privacy, bounds nothing: whatever holds one costs an infinite epsilon.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp

Accountant = Literal["rdp", "prv"]
Floats = NDArray[np.float64]

# Any order gives an upper bound. Tenths matter where epsilon is large, orders above Opacus' 63 where it is small.
_FRACTIONAL_ORDERS: Floats = np.asarray(
    [*(tenth / 10 for tenth in range(11, 60) if tenth % 10), *(6.5, 7.5, 8.5, 9.5, 10.5)]
)
_WHOLE_ORDERS = (*range(2, 64), 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)
_ORDERS: Floats = np.concatenate([_FRACTIONAL_ORDERS, np.asarray(_WHOLE_ORDERS, dtype=np.float64)])
_LEAST_NOISE_OF_FRACTIONAL_ORDERS = 0.2

_LARGEST_NOISE = 1e4
_LEAST_NOISE = 1e-3

PRV_LEAST_DELTA = 1e-10
"""The smallest delta that the PRV accountant takes."""

# Opacus' PRV grid holds exp(loss), which overflows at 709, and sums probabilities in double precision. A grid of so
# many points takes about 0.7 GB at the peak.
_PRV_LARGEST_EPSILON = 300.0
_PRV_POINTS = 2**21


@dataclass(frozen=True)
class Mechanism:
    """`steps` Poisson-sampled Gaussian releases; a one-shot statistic is one step at sample rate 1.

    Attributes:
        sample_rate: probability with which a patient is drawn, in (0, 1].
        noise_multiplier: standard deviation of the noise over the clipping norm; 0 is no noise, and no privacy.
        steps: number of releases.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], not {self.sample_rate}")
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be 0 or more, not {self.noise_multiplier}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


def epsilon(history: Sequence[Mechanism], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon at `delta` of all mechanisms of `history` composed; 0 for an empty history.

    One mechanism without noise makes it infinite by either accountant, however few patients it drew.

    Args:
        history: mechanisms in any order, of any sample rates and noise multipliers.
        delta: in [0, 1). At 0 the epsilon of Gaussian noise is infinite.
        accountant: ``"rdp"`` (fractions of a millisecond) or ``"prv"`` (tighter; a tenth of a second to seconds). Both
            bound epsilon from above, so PRV answers with the smaller of the two, and with RDP's alone where its grid
            cannot hold the losses (epsilon in the hundreds).

    Raises:
        ValueError: `delta` is not in [0, 1), or too small for PRV's floating-point numbers (below `PRV_LEAST_DELTA`).
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), not {delta}")
    if not history:
        return 0.0
    if delta == 0 or any(m.noise_multiplier == 0 for m in history):
        return math.inf
    bound = _rdp_epsilon(history, delta)
    if accountant == "rdp":
        return bound
    composed = merged(history)
    if all(m.sample_rate == 1 for m in composed):
        return min(bound, gaussian_epsilon(composed[0].noise_multiplier, delta))
    return min(bound, _prv_epsilon(tuple(composed), delta, bound))


def merged(history: Sequence[Mechanism]) -> list[Mechanism]:
    """The same history in as few mechanisms as possible.

    Equal blocks become one with the sum of their steps. Releases at sample rate 1 are Gaussian mechanisms: any number of
    them is exactly one release whose precision 1 / sigma^2 is the sum of theirs (infinite where one has no noise).

    >>> merged([Mechanism(0.1, 2.0, 5), Mechanism(1.0, 2.0, 4), Mechanism(0.1, 2.0, 5)])
    [Mechanism(sample_rate=1.0, noise_multiplier=1.0, steps=1), Mechanism(sample_rate=0.1, noise_multiplier=2.0, steps=10)]
    """
    steps: Counter[tuple[float, float]] = Counter()
    for m in history:
        steps[m.sample_rate, m.noise_multiplier] += m.steps
    precision = math.fsum(
        count / sigma**2 if sigma else math.inf for (rate, sigma), count in steps.items() if rate == 1
    )
    one_shot = [Mechanism(1.0, precision**-0.5, 1)] if precision else []
    return one_shot + [Mechanism(rate, sigma, count) for (rate, sigma), count in steps.items() if rate < 1]


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Delta at `epsilon` of one release of sensitivity 1 with noise `sigma`: Balle and Wang (2018), theorem 8, exact.

    Without noise it is 1: the release tells for sure.
    """
    if sigma == 0:
        return 1.0
    shift = epsilon * sigma
    half = 1 / (2 * sigma)
    return float(np.exp(log_ndtr(half - shift)) - np.exp(epsilon + log_ndtr(-half - shift)))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon at `delta` of one release of sensitivity 1 with noise `sigma`, to 1e-10: the inverse of `gaussian_delta`.

    `k` such releases are one with noise ``sigma / sqrt(k)``. Infinite without noise.
    """
    if sigma == 0:
        return math.inf
    if gaussian_delta(sigma, 0.0) <= delta:
        return 0.0
    # The loss is Gaussian with mean 1 / (2 sigma^2) and sd 1 / sigma; its tail at this bound is below delta.
    above = 1 / (2 * sigma**2) + math.sqrt(2 * math.log(1 / delta)) / sigma
    return float(brentq(lambda eps: gaussian_delta(sigma, eps) - delta, 0.0, above, xtol=1e-11, rtol=1e-12))


def _rdp_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    total = np.sum([m.steps * _rdp_of_one_step(m.sample_rate, m.noise_multiplier) for m in history], axis=0)
    by_order = total + np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)
    return max(float(by_order.min()), 0.0)


@lru_cache(maxsize=8192)
def _rdp_of_one_step(sample_rate: float, noise_multiplier: float) -> Floats:
    """Renyi divergences of one release at `_ORDERS`."""
    if sample_rate == 1:
        return _ORDERS / (2 * noise_multiplier**2)
    moments = np.concatenate(
        [_log_moments_fractional(sample_rate, noise_multiplier), _log_moments_whole(sample_rate, noise_multiplier)]
    )
    # Rounding may leave -1e-16 where the divergence is next to nothing; a divergence is never negative.
    return np.maximum(moments, 0.0) / (_ORDERS - 1)


# One flat array over i = 0..alpha for all whole orders alpha, one after the other.
_DRAWN: Floats = np.concatenate([np.arange(alpha + 1, dtype=np.float64) for alpha in _WHOLE_ORDERS])
_NOT_DRAWN: Floats = np.concatenate([np.arange(alpha, -1, -1, dtype=np.float64) for alpha in _WHOLE_ORDERS])
_STARTS = np.concatenate([[0], np.cumsum(np.asarray(_WHOLE_ORDERS) + 1)[:-1]])
_LENGTHS = np.asarray(_WHOLE_ORDERS) + 1
_LOG_BINOMIAL: Floats = gammaln(_DRAWN + _NOT_DRAWN + 1) - gammaln(_DRAWN + 1) - gammaln(_NOT_DRAWN + 1)
_PAIRS: Floats = _DRAWN * (_DRAWN - 1) / 2


def _log_moments_whole(q: float, sigma: float) -> Floats:
    """log A_alpha of Mironov et al. (2019), section 3.3, for whole orders: a finite sum of positive terms."""
    terms = _LOG_BINOMIAL + _DRAWN * math.log(q) + _NOT_DRAWN * math.log1p(-q) + _PAIRS / sigma**2
    largest = np.maximum.reduceat(terms, _STARTS)
    sums = np.add.reduceat(np.exp(terms - np.repeat(largest, _LENGTHS)), _STARTS)
    found: Floats = largest + np.log(sums)
    return found


def _log_moments_fractional(q: float, sigma: float) -> Floats:
    """log A_alpha, the mean of ((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^alpha over z ~ N(0, sigma^2), by quadrature.

    The integrand is analytic in a strip of half-width pi sigma^2 about the real line and falls like a Gaussian, so that
    the trapezoidal rule errs by a factor of about exp(-2 pi * width / spacing), below 1e-16 here. With less noise than
    `_LEAST_NOISE_OF_FRACTIONAL_ORDERS` the grid would grow without end: these orders then say nothing (infinity).
    """
    if sigma < _LEAST_NOISE_OF_FRACTIONAL_ORDERS:
        return np.full(len(_FRACTIONAL_ORDERS), math.inf)
    spacing = min(sigma / 6, sigma**2 / 2)
    z = np.arange(-12 * sigma, _FRACTIONAL_ORDERS[-1] + 12 * sigma, spacing)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    density = -0.5 * (z / sigma) ** 2 + math.log(spacing / (sigma * math.sqrt(2 * math.pi)))
    found: Floats = logsumexp(np.outer(_FRACTIONAL_ORDERS, ratio) + density, axis=1)
    return found


@lru_cache(maxsize=256)
def _prv_epsilon(history: tuple[Mechanism, ...], delta: float, bound: float) -> float:
    """PRV epsilon of a `merged` history whose RDP epsilon is `bound`; infinite where the grid cannot hold the losses.

    Opacus' discretisation and composition, on a grid sized here: its `PRVAccountant` sums RDP moments in Python loops to
    find the same span, adds a fixed 0.01 to epsilon at any cost in memory, and takes sizes that are slow to transform.
    """
    # Importing any part of Opacus imports all of torch and takes seconds, which nobody who composes by RDP should wait.
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    if delta < PRV_LEAST_DELTA:
        raise ValueError(f"delta {delta:g} is too small for the PRV accountant (least: {PRV_LEAST_DELTA:g}); use rdp")
    if bound > _PRV_LARGEST_EPSILON:
        return math.inf
    delta_error = delta / 1000
    half, mesh, error = _prv_grid(history, delta_error, bound)
    grid = Domain(t_min=-(half - 1) * mesh, t_max=half * mesh, size=2 * half)
    # At sample rate 1 Opacus takes the logarithm of 1 - q = 0, and the minus infinity does no harm.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        try:
            single = [
                discretize(
                    TruncatedPrivacyRandomVariable(
                        PoissonSubsampledGaussianPRV(m.sample_rate, m.noise_multiplier), grid.t_min, grid.t_max
                    ),
                    grid,
                )
                for m in history
            ]
            composed = compose_heterogeneous(single, [m.steps for m in history])
            _, _, found = composed.compute_epsilon(delta, delta_error, error)
        except RuntimeError as cause:
            terms = ", ".join(f"({m.sample_rate:g}, {m.noise_multiplier:g}, {m.steps})" for m in history)
            raise ValueError(
                f"the PRV accountant cannot compose (sample_rate, noise_multiplier, steps) {terms}: {cause} Use rdp."
            ) from cause
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"the PRV accountant gives epsilon {found} at delta {delta:g}; use rdp")
    return float(found)


def _prv_grid(history: Sequence[Mechanism], delta_error: float, bound: float) -> tuple[int, float, float]:
    """Half the number of points of the grid of losses, its mesh, and the error of discretisation.

    The error is added to epsilon (Gopi et al. 2021, remark 5.6). It is 0.01, Opacus' own, for epsilons from 1 to 5, and
    relative elsewhere: fixed, it would cost gigabytes where epsilon is large and be most of the answer where epsilon is
    small. Where the grid would still exceed `_PRV_POINTS`, the error grows instead of the grid.
    """
    steps = sum(m.steps for m in history)
    singles = [_rdp_epsilon([replace(m, steps=1)], delta_error / (8 * steps)) for m in history]
    span = max(_rdp_epsilon(history, delta_error / 4), *singles) + 3
    mesh_of_error_1 = 1 / math.sqrt(steps * math.log(12 / delta_error) / 2)
    wanted = max(5e-4, min(0.01 * bound, 0.01), 0.002 * bound)
    error = max(wanted, 2 * span / (_PRV_POINTS * mesh_of_error_1))
    mesh = error * mesh_of_error_1
    # Even, with zero just below the middle, as Opacus' convolutions ask for; and twice a size that transforms quickly.
    half = next_fast_len(math.ceil(span / mesh) + 1, real=True)
    return half, mesh, error


def noise_multiplier(
    sample_rate: float, steps: int, target_epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> float:
    """Smallest noise multiplier (to 1e-3, rounded up) with which `steps` steps cost at most `target_epsilon`.

    A finite target gets at least 1e-3, an infinite one 0: no noise.

    Raises:
        ValueError: no noise multiplier up to 10,000 suffices, or the target is not above 0.
    """
    if not target_epsilon > 0:
        raise ValueError(f"target_epsilon must be positive, not {target_epsilon}")
    if target_epsilon == math.inf:
        return 0.0

    def cost(sigma: float) -> float:
        return epsilon([Mechanism(sample_rate, sigma, steps)], delta, accountant)

    if accountant == "prv":  # RDP's answer suffices for PRV, whose epsilons are too slow to search far and wide.
        enough = noise_multiplier(sample_rate, steps, target_epsilon, delta)
    else:
        enough = 0.5
        while cost(enough) > target_epsilon:
            enough *= 2
            if enough > _LARGEST_NOISE:
                raise ValueError(f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached with {steps} steps")
    sigma = _round_up(_least(cost, target_epsilon, enough))
    while cost(sigma) > target_epsilon:  # PRV's grid moves with its input, by less than a step of the rounding.
        sigma = _round_up(sigma + 1e-3)
    return sigma


@dataclass(frozen=True)
class Demand:
    """What a module asks of the budget: its sampling, its steps, and its share against the other modules.

    A one-shot statistic has sample rate 1 and one step. The shares weigh epsilons: after the allocation the modules'
    epsilons, each alone, stand to each other as their shares do (within a few per cent; `docs/accounting.md`).
    """

    sample_rate: float
    steps: int
    share: float

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"share must be positive, not {self.share}")


def allocate(
    demands: Mapping[str, Demand], target_epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> dict[str, float]:
    """Noise multipliers with which all modules *together* cost at most `target_epsilon`.

    Each module first gets the noise multiplier at which it alone costs its share (by RDP); since composed mechanisms cost
    less than the sum of their epsilons, all are then scaled by one common factor until the composition meets the target.

    Returns:
        A noise multiplier for each key of `demands`, rounded up to 1e-3; 0 for all where the target is infinite.

    Raises:
        ValueError: the target cannot be reached with noise multipliers up to 10,000, or is not above 0.
    """
    if not demands:
        return {}
    if target_epsilon == math.inf:
        return dict.fromkeys(demands, 0.0)
    alone = {
        name: noise_multiplier(d.sample_rate, d.steps, target_epsilon * d.share, delta) for name, d in demands.items()
    }

    def cost(factor: float, by: Accountant) -> float:
        return epsilon([Mechanism(d.sample_rate, alone[n] * factor, d.steps) for n, d in demands.items()], delta, by)

    enough = 1.0
    while cost(enough, "rdp") > target_epsilon:  # only where the shares add up to more than 1
        enough *= 1.1
    factor = _least(lambda f: cost(f, "rdp"), target_epsilon, enough)
    if accountant == "prv":
        factor = _least(lambda f: cost(f, "prv"), target_epsilon, factor)
    while True:
        found = {name: _round_up(sigma * factor) for name, sigma in alone.items()}
        if epsilon(mechanisms(demands, found), delta, accountant) <= target_epsilon:
            return found
        factor *= 1.0001  # PRV's grid moves with its input


def mechanisms(demands: Mapping[str, Demand], noise_multipliers: Mapping[str, float]) -> list[Mechanism]:
    """What all of `demands` run when noised so: one mechanism each, in their order."""
    return [Mechanism(d.sample_rate, noise_multipliers[name], d.steps) for name, d in demands.items()]


@dataclass(frozen=True)
class Allocated:
    """One module's part of an allocation.

    Attributes:
        demand: what the module asked for.
        noise_multiplier: what it gets.
        epsilon_alone: what the module alone costs with it.
        noise_multiplier_split: what it would need if epsilon were split instead, each module paying its share alone.
    """

    demand: Demand
    noise_multiplier: float
    epsilon_alone: float
    noise_multiplier_split: float


@dataclass(frozen=True)
class AllocationReport:
    """What joint accounting gains over adding up.

    Attributes:
        modules: in the order of the demands.
        epsilon: all modules composed.
        epsilon_summed: what adding up the modules' epsilons would claim for the same noise.
        target_epsilon: what was asked for.
        delta: at which all epsilons hold.
        accountant: by which they were computed.
    """

    modules: dict[str, Allocated]
    epsilon: float
    epsilon_summed: float
    target_epsilon: float
    delta: float
    accountant: Accountant


def allocation_report(
    demands: Mapping[str, Demand],
    noise_multipliers: Mapping[str, float],
    target_epsilon: float,
    delta: float,
    accountant: Accountant = "rdp",
) -> AllocationReport:
    """Compare noise multipliers, as `allocate` found them, with what adding up epsilons would say."""
    total = sum(d.share for d in demands.values())
    modules = {
        name: Allocated(
            d,
            noise_multipliers[name],
            epsilon([Mechanism(d.sample_rate, noise_multipliers[name], d.steps)], delta, accountant),
            noise_multiplier(d.sample_rate, d.steps, target_epsilon * d.share / total, delta, accountant),
        )
        for name, d in demands.items()
    }
    return AllocationReport(
        modules,
        epsilon(mechanisms(demands, noise_multipliers), delta, accountant),
        sum(each.epsilon_alone for each in modules.values()),
        target_epsilon,
        delta,
        accountant,
    )


def _least(cost: Callable[[float], float], target: float, enough: float) -> float:
    """The least x, to a relative 1e-4 and never below it, whose falling `cost` is at most `target`.

    Args:
        cost: of x > 0, falling.
        target: positive.
        enough: an x with ``cost(x) <= target``. The bracket goes down from there in short steps: far from the target one
            PRV epsilon takes seconds.
    """
    low, high = 0.8 * enough, enough
    while cost(low) <= target:
        if low < _LEAST_NOISE:
            return low
        low, high = 0.8 * low, low

    # Cost against noise is close to a power law, so in logarithms the secant hits at once.
    def excess(log_x: float) -> float:
        return math.log(max(cost(math.exp(log_x)), 1e-12) / target)

    found = math.exp(float(brentq(excess, math.log(low), math.log(high), xtol=5e-5, rtol=1e-12)))
    while cost(found) > target:
        found *= 1 + 2e-5
    return min(found, high)


def _round_up(sigma: float) -> float:
    # A rounded decimal is the same number on every platform and in every file, so both sides compute equal charges.
    return round(float(np.ceil(sigma * 1000 - 1e-9)) / 1000, 3)
