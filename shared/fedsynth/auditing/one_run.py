"""The lower bound on epsilon from one run with canaries (Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv 2305.08846).

Each of m canaries is in the data or not, by a fair coin of its own. Who has seen the run guesses r of these coins and
abstains from the rest; v guesses are right. Their theorem 5.2: if the run is (epsilon, delta)-private, then

    P[v or more right] <= P[W >= v] + 2 m delta max_{i >= 1} P[v > W >= v - i] / i

with W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), the number of right answers of randomised response. An epsilon for which
the right side is below 1 - confidence is refuted.

The theorem asks that the number of guesses be fixed before the run. Here several numbers may be looked at, if they were
fixed before (`Look`), and the chance of error is shared equally among them (Bonferroni): the largest bound then holds at
the stated confidence. To take the best of many numbers afterwards without that is a mistake that makes bounds too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_LARGEST_EPSILON = 100.0
_DRAWS = 40  # simulated runs from which the number of guesses is chosen


@dataclass(frozen=True)
class Look:
    """A way to guess that was fixed before the run.

    Attributes:
        scores: (m,) one a canary, larger where membership is likelier.
        guesses: r, how many memberships are guessed from them.
    """

    scores: Floats
    guesses: int


@dataclass(frozen=True)
class Outcome:
    """What a run with canaries gave.

    Attributes:
        guesses: r, of the look that gave the largest bound.
        correct: v, how many of these were right.
        bound: the largest epsilon that is refuted, at the confidence asked for, all looks taken into account.
        reachable: the largest bound that any look could have given.
        looks: how many ways to guess were fixed beforehand.
    """

    guesses: int
    correct: int
    bound: float
    reachable: float
    looks: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on the chance that an (epsilon, delta)-private run lets `correct` or more of the guesses be right.

    Args:
        canaries: m, all whose membership was drawn.
        guesses: r <= m.
        correct: v <= r.
        epsilon: at least 0.
        delta: in [0, 1].

    Raises:
        ValueError: numbers that cannot be.

    >>> p_value(10, 10, 10, 0.0, 0.0) == 0.5**10
    True
    """
    if not (0 <= correct <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            f"expected 0 <= correct <= guesses <= canaries, epsilon >= 0 and delta in [0, 1], "
            f"got {correct}, {guesses}, {canaries}, {epsilon} and {delta}"
        )
    right = float(expit(epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P[v > W >= v - i], i = 1 ... v
    return min(tail + 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max()), 1.0)


@lru_cache(maxsize=4096)
def epsilon_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon (to 1e-6, never rounded up) that is refuted with `confidence`; 0 where none is.

    A run that is not (epsilon, delta)-private is not so for a smaller epsilon either, so any refuted epsilon is a bound.

    >>> round(epsilon_bound(100, 100, 100, 0.0), 2)
    3.49
    >>> epsilon_bound(100, 100, 50, 0.0)
    0.0
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    low, high = 0.0, _LARGEST_EPSILON
    if guesses == 0 or not refuted(0.0):
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guess(scores: Floats, guesses: int) -> NDArray[np.int8]:
    """Guess the memberships of which the scores say most.

    The scores are cut in two groups (see `cut`). The `guesses` scores farthest from the cut are guessed: in above it, out
    below. A guess may depend in any way on what was released, which is all that the scores know.

    Args:
        scores: (m,) larger where membership is likelier.
        guesses: r, at most m.

    Returns:
        (m,) 1 for in, -1 for out, 0 where the auditor abstains; r of them are not 0.

    Raises:
        ValueError: more guesses than scores, or a score that is not finite.
    """
    if not 0 <= guesses <= len(scores):
        raise ValueError(f"{guesses} guesses from {len(scores)} scores are not possible")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    distance = scores - cut(scores)
    chosen = np.argsort(-np.abs(distance), kind="stable")[:guesses]
    guessed = np.zeros(len(scores), dtype=np.int8)
    guessed[chosen] = np.where(distance[chosen] > 0, 1, -1)
    return guessed


def cut(scores: Floats) -> float:
    """Where to cut scores (m,) in two groups: as many standard deviations of the lower group above its mean as of the
    upper group below its own.

    The groups are those that vary least within (Otsu 1979). Of a mechanism without noise the lower one, of canaries that
    were out, hardly varies, while the upper one does by how often a canary was drawn.

    >>> cut(np.array([0.0, 0.0, 4.0, 6.0])), cut(np.array([-1.0, 1.0, 9.0, 11.0]))
    (0.0, 5.0)
    """
    if len(scores) < 2:
        return float(scores.sum())
    ordered = np.sort(scores)
    count = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    best = int(np.argmax(count * (len(ordered) - count) * (high - low) ** 2))
    below, above = ordered[: best + 1], ordered[best + 1 :]
    spread = below.std() + above.std()
    share = below.std() / spread if spread > 0 else 0.5
    return float(below.mean() + share * (above.mean() - below.mean()))


def count_correct(guessed: NDArray[np.int8], members: Flags) -> int:
    """How many of the guesses (m,), see `guess`, agree with the coins (m,)."""
    return int(((guessed == 1) & members).sum() + ((guessed == -1) & ~members).sum())


def outcome(looks: Sequence[Look], members: Flags, delta: float, confidence: float = 0.95) -> Outcome:
    """The bound from the looks that were fixed before the run.

    Args:
        looks: a bound is made for each, at confidence ``1 - (1 - confidence) / len(looks)``; the largest is returned.
        members: (m,) the coins.
        delta: of the claim.
        confidence: that no bound is above the true epsilon.

    Raises:
        ValueError: no look, or more guesses than canaries.
    """
    if not looks:
        raise ValueError("at least one look must be fixed beforehand")
    count, each = len(members), 1 - (1 - confidence) / len(looks)
    found = []
    for look in looks:
        correct = count_correct(guess(look.scores, look.guesses), members)
        found.append((epsilon_bound(count, look.guesses, correct, delta, each), look.guesses, correct))
    bound, guesses, correct = max(found)
    return Outcome(
        guesses, correct, bound, reachable([look.guesses for look in looks], count, delta, confidence), len(looks)
    )


def reachable(guesses: Sequence[int], canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The largest bound that these numbers of guesses, fixed before the run, can give: all are right.

    >>> reachable([10], 10, 0.0) < reachable([1000], 1000, 0.0)
    True
    """
    each = 1 - (1 - confidence) / len(guesses)
    return max(epsilon_bound(canaries, count, count, delta, each) for count in guesses)


def planned_guesses(
    canaries: int, sample_rate: float, noise_multiplier: float, steps: int, delta: float, confidence: float = 0.95
) -> tuple[int, ...]:
    """Two numbers of guesses, chosen before the run from public numbers alone.

    All canaries: if the mechanism is badly broken, nothing refutes more. And the number that gives the largest median
    bound when the mechanism does what it claims: seen by an auditor to whom a canary's score is the number of times that
    it was drawn plus the noise of all steps. That is simulated here, from a fixed seed and without the run.
    """
    rng = np.random.default_rng(0)
    each = 1 - (1 - confidence) / 2
    members = rng.random((_DRAWS, canaries)) < 0.5
    times = rng.binomial(steps, sample_rate, members.shape)
    scores = members * times + noise_multiplier * math.sqrt(steps) * rng.standard_normal(members.shape)
    candidates = sorted({max(2 * round(canaries / 2 ** (k / 2) / 2), 2) for k in range(1, 17)})
    medians = []
    for guesses in candidates:
        correct = int(np.median([count_correct(guess(s, guesses), b) for s, b in zip(scores, members, strict=True)]))
        medians.append(epsilon_bound(canaries, guesses, correct, delta, each))
    best = candidates[int(np.argmax(medians))]
    return (best, canaries) if best < canaries else (canaries,)
