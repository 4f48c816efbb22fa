"""What sampled Gaussian mechanisms cost together: pure functions over histories, computed by Opacus' accountants.

RDP of the sampled Gaussian: Mironov, Talwar, Zhang (2019). Conversion to (epsilon, delta): Balle et al. (2020), as in
Opacus. PRV: Gopi, Lee, Wutschitz (2021). Neighbouring cohorts differ by adding or removing one patient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.optimize import brentq

Accountant = Literal["rdp", "prv"]

# Opacus' default orders end at 63, which is too low for the optimum at small epsilon. Fractional orders cost thirty times
# what whole ones do; these give an epsilon at most 1 % larger, never a smaller one, since any order gives an upper bound.
_ORDERS: tuple[float, ...] = (
    *(1.25, 1.5, 1.75, 2.5, 3.5, 4.5, 5.5),
    *range(2, 64),
    *(64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024),
)
_LARGEST_NOISE = 1e4


@dataclass(frozen=True)
class Mechanism:
    """`steps` Poisson-sampled Gaussian releases.

    Attributes:
        sample_rate: probability with which a patient is drawn, in (0, 1].
        noise_multiplier: standard deviation of the noise over the clipping norm.
        steps: number of releases.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], not {self.sample_rate}")
        if not self.noise_multiplier > 0:
            raise ValueError(f"noise_multiplier must be positive, not {self.noise_multiplier}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@lru_cache(maxsize=4096)
def _rdp_of_one_step(sample_rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    return np.asarray(
        opacus_rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS),
        dtype=np.float64,
    )


def epsilon(history: Sequence[Mechanism], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon at `delta` of all mechanisms of `history` composed; 0 for an empty history.

    Args:
        history: mechanisms in any order, of any sample rates and noise multipliers.
        delta: in (0, 1).
        accountant: ``"rdp"`` (fast) or ``"prv"`` (tighter; seconds).
    """
    if not history:
        return 0.0
    if accountant == "rdp":
        total = np.sum([m.steps * _rdp_of_one_step(m.sample_rate, m.noise_multiplier) for m in history], axis=0)
        with warnings.catch_warnings():
            # The optimum may lie at the largest order when epsilon is tiny: an upper bound all the same.
            warnings.filterwarnings("ignore", message="Optimal order is the")
            value, _ = opacus_rdp.get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)
        return max(float(value), 0.0)
    prv = PRVAccountant()
    prv.history = [(m.noise_multiplier, m.sample_rate, m.steps) for m in history]
    return float(prv.get_epsilon(delta=delta))


def noise_multiplier(
    sample_rate: float, steps: int, target_epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> float:
    """Smallest noise multiplier (to 1e-3, rounded up) with which `steps` steps cost at most `target_epsilon`.

    Raises:
        ValueError: no noise multiplier up to 10,000 suffices.
    """

    def cost(sigma: float) -> float:
        return epsilon([Mechanism(sample_rate, sigma, steps)], delta, accountant)

    low, high = 0.25, 0.5
    while cost(high) > target_epsilon:
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise ValueError(f"epsilon {target_epsilon} at delta {delta} cannot be reached with {steps} steps")
    return _least(cost, target_epsilon, low, high)


@dataclass(frozen=True)
class Demand:
    """What a module asks of the budget: its sampling, its steps, and the share of epsilon it would get alone."""

    sample_rate: float
    steps: int
    share: float


def allocate(
    demands: Mapping[str, Demand], target_epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> dict[str, float]:
    """Noise multipliers with which all modules *together* cost at most `target_epsilon`.

    Each module first gets the noise multiplier at which it alone costs its share; since composed mechanisms cost less
    than the sum of their epsilons, all are then scaled down by one common factor until the composition meets the target.

    Returns:
        A noise multiplier for each key of `demands`, rounded up to 1e-3.
    """
    alone = {
        name: noise_multiplier(d.sample_rate, d.steps, target_epsilon * d.share, delta, accountant)
        for name, d in demands.items()
    }

    def scaled(factor: float) -> dict[str, float]:
        return {name: _round_up(sigma * factor) for name, sigma in alone.items()}

    def cost(factor: float) -> float:
        history = [Mechanism(d.sample_rate, scaled(factor)[name], d.steps) for name, d in demands.items()]
        return epsilon(history, delta, accountant)

    high = 1.0
    while cost(high) > target_epsilon:
        high *= 1.1
    # The bracket is halved, not opened wide: far below the target PRV needs gigabytes and minutes for one epsilon.
    low = high / 2
    while low > 0.01 and cost(low) <= target_epsilon:
        low, high = low / 2, low
    return scaled(_least(cost, target_epsilon, low, high))


def _least(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least value in [low, high], to 1e-3 and rounded up, whose falling `cost` is at most `target`."""
    if cost(low) <= target:
        return low
    found = _round_up(float(brentq(lambda x: cost(x) - target, low, high, xtol=2e-4, rtol=1e-6)))
    while cost(found) > target:
        found = _round_up(found + 1e-3)
    return min(found, high)


def _round_up(sigma: float) -> float:
    # A rounded decimal is the same number on every platform and in every file, so both sides compute equal charges.
    return round(float(np.ceil(sigma * 1000 - 1e-9)) / 1000, 3)
