"""How well scores tell members from others: area, true positive rates, and what they prove of epsilon, with intervals.

All functions take the scores of members (patients that were trained on) and of non-members; larger means "member". The
intervals hold the chance of which patients were scored. They take the patients as independent draws, given the one
training run that they all stem from; the chance of that run's noise is not in them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm, rankdata

from fedsynth.attacks.values import OperatingPoint, Rate
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.roc_auc import roc_auc

Scores = NDArray[np.floating]

ASKED = (0.001, 0.01)
MIN_PATIENTS = 10
_THRESHOLDS = 200  # tried on the first half of the patients
_TAIL = 0.025  # by which each of the two rates behind a bound of epsilon may err
_Z = float(norm.ppf(0.975))


def proportion(count: int, of: int) -> Rate:
    """A share with its 95 % interval of Clopper and Pearson (1934).

    >>> proportion(0, 144).high
    0.02529...

    Raises:
        NotMeasurable: of nobody.
    """
    if of < 1:
        raise NotMeasurable("a share of nobody")
    return Rate(value=count / of, low=float(_lower(count, of, 0.025)), high=float(_upper(count, of, 0.025)))


def roc_area(members: Scores, others: Scores) -> Rate:
    """Area under the ROC curve with its 95 % interval.

    The variance is that of DeLong et al. (1988), the interval symmetric on the logit scale, as Pepe (2003) advises. Where
    nobody is out of order that variance is 0, and the interval is method 5 of Newcombe (2006) instead, which is not
    empty there.

    Raises:
        NotMeasurable: too few scores, or scores that are not finite.
    """
    _check(members, others)
    m, n = len(members), len(others)
    area = roc_auc(np.concatenate([members, others]), np.repeat([True, False], [m, n]))
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[:m] - rankdata(members)) / n  # share of others below each member
    below = 1 - (ranks[m:] - rankdata(others)) / m
    deviation = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    if deviation == 0 or area in (0.0, 1.0):
        low, high = _newcombe(area, m, n)
    else:
        middle, half = math.log(area / (1 - area)), _Z * deviation / (area * (1 - area))
        low, high = (1 / (1 + math.exp(-limit)) for limit in (middle - half, middle + half))
    return Rate(value=area, low=low, high=high)


def operating_point(members: Scores, others: Scores, asked: float) -> OperatingPoint:
    """True positive rate at the largest false positive rate that is not above `asked` and can be had.

    Accused is who scores above the (k + 1)-th highest non-member, k being as many as `asked` allows; so ties never accuse
    more. The interval of the reached rate is that of such a threshold's true rate, which is unsure for few non-members:
    with 144 it may be 2.5 % where not one of them was accused.

    Raises:
        NotMeasurable: too few scores, or scores that are not finite.
    """
    _check(members, others)
    allowed = math.floor(asked * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return OperatingPoint(
        asked=asked,
        reached=proportion(int((others > threshold).sum()), len(others)),
        true_positive_rate=proportion(int((members > threshold).sum()), len(members)),
    )


def epsilon_bound(members: Scores, others: Scores, delta: float, rng: np.random.Generator, attacks: int = 1) -> float:
    """What the scores alone prove at least of epsilon; 0 when nothing. All bounds of `attacks` hold together at 95 %.

    Under (epsilon, delta)-differential privacy no rule accuses members at a rate above ``exp(epsilon) FPR + delta``, nor
    acquits others at a rate above ``exp(epsilon) FNR + delta`` (Kairouz et al., 2015). The threshold, and which of both is
    used, are chosen on one random half of the patients; on the other half the two rates get one-sided bounds of Clopper
    and Pearson at 97.5 % each, as Jagielski et al. (2020) and Nasr et al. (2021) do over many training runs. Here there is
    one run and the patients stand for the repetitions. That needs scores that were made without knowing who else is a
    member: whoever knows that knows the noise of the run, and the bound would be of that noise alone. Where several attacks
    are made the chance of error is shared equally among them (Bonferroni): nobody can override that a claim was refuted.

    Args:
        members: scores of members.
        others: scores of non-members.
        delta: at which epsilon is claimed.
        rng: splits the patients.
        attacks: how many are made in all.

    Raises:
        NotMeasurable: too few scores, or scores that are not finite.
    """
    _check(members, others)
    tail = _TAIL / attacks
    chosen_in, tested_in = np.array_split(rng.permutation(members), 2)
    chosen_out, tested_out = np.array_split(rng.permutation(others), 2)
    levels = np.unique(np.concatenate([chosen_in, chosen_out]))
    if len(levels) > _THRESHOLDS:
        levels = np.quantile(levels, np.linspace(0, 1, _THRESHOLDS))
    best = int(np.argmax(_proven(chosen_in, chosen_out, levels, delta, tail)))
    threshold, direction = levels[best % len(levels)], best // len(levels)
    return max(0.0, float(_proven(tested_in, tested_out, np.array([threshold]), delta, tail)[direction]))


def largest_epsilon_bound(members: int, others: int, delta: float, attacks: int = 1) -> float:
    """What `epsilon_bound` gives for a perfect attack on so many patients: more cannot be proven with them.

    Raises:
        NotMeasurable: too few patients.
    """
    halves = np.ones(members // 2), np.zeros(others // 2)
    if min(map(len, halves)) < 1:
        raise NotMeasurable("too few patients for a bound")
    return max(0.0, float(_proven(*halves, np.array([0.5]), delta, _TAIL / attacks).max()))


def largest_true_positive_rate(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The most that (epsilon, delta)-differential privacy lets any attack find (Kairouz et al., 2015)."""
    if math.isinf(epsilon):  # without privacy nothing is ruled out, whatever delta
        return 1.0
    rate = false_positive_rate
    # Written so that a large epsilon does not overflow.
    first = 1.0 if rate > 0 and epsilon + math.log(rate) > 0 else rate * math.exp(min(epsilon, 700.0)) + delta
    return min(1.0, first, 1 - math.exp(-epsilon) * (1 - delta - rate))


def largest_area(epsilon: float, delta: float) -> float:
    """Area under the curve of `largest_true_positive_rate`: the most that any attack's can be on average.

    >>> round(largest_area(1.0, 0.0), 4)  # exp(1) / (1 + exp(1))
    0.7311
    """
    if math.isinf(epsilon):
        return 1.0
    # The curve goes from (0, delta) to (corner, 1 - corner) to (1 - delta, 1), each time in a straight line.
    corner = (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))
    return 1 - corner * (1 - delta)


def _proven(
    members: Scores, others: Scores, thresholds: NDArray[np.floating], delta: float, tail: float
) -> NDArray[np.float64]:
    """(2 T,) bounds of epsilon by accusing who scores above each of T thresholds, and by acquitting the rest."""
    m, n = len(members), len(others)
    found = m - np.searchsorted(np.sort(members), thresholds, side="right")
    false = n - np.searchsorted(np.sort(others), thresholds, side="right")
    accused = _log_ratio(_lower(found, m, tail) - delta, _upper(false, n, tail))
    acquitted = _log_ratio(_lower(n - false, n, tail) - delta, _upper(m - found, m, tail))
    return np.concatenate([accused, acquitted])


def _log_ratio(true: NDArray[np.float64], false: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(true, 1e-300)) - np.log(false)


def _lower(count: int | NDArray[np.integer], of: int, tail: float) -> NDArray[np.float64]:
    """Clopper-Pearson: the share below which the true one lies with a probability of at most `tail`."""
    counts = np.asarray(count, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bound = beta.ppf(tail, counts, of - counts + 1)
    return np.where(counts == 0, 0.0, bound)


def _upper(count: int | NDArray[np.integer], of: int, tail: float) -> NDArray[np.float64]:
    counts = np.asarray(count, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bound = beta.ppf(1 - tail, counts + 1, of - counts)
    return np.where(counts == of, 1.0, bound)


def _newcombe(area: float, m: int, n: int) -> tuple[float, float]:
    """Where `area` is at the edge of what an area of x would give, with Hanley and McNeil's variance at x."""
    x = np.linspace(0.0, 1.0, 20001)
    more = (m + n) / 2 - 1
    variance = x * (1 - x) * (1 + more * (1 - x) / (2 - x) + more * x / (1 + x)) / (m * n)
    possible = x[np.abs(x - area) <= _Z * np.sqrt(variance) + 1e-12]
    return float(possible.min()), float(possible.max())


def _check(members: Scores, others: Scores) -> None:
    require_rows("members", members, MIN_PATIENTS)
    require_rows("non-members", others, MIN_PATIENTS)
    require_finite("scores", members)
    require_finite("scores", others)
