"""Calibration of a binary classifier: do events that it calls 70 % likely happen in 70 % of cases?

Expected calibration error (Naeini, Cooper and Hauskrecht, AAAI 2015) of the probability of the positive class, over bins of
equal mass (Nixon et al., CVPR workshops 2019, who show that bins of equal width are ruled by where predictions crowd); the
score of Brier (1950); and what the error would be by chance alone (consistency resampling: Bröcker and Smith, 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import require_finite, require_rows

BINS = 15

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram of a classifier, one entry a bin, in rising order of `predicted`.

    Attributes:
        predicted: mean predicted probability of the bin's cases.
        observed: share of them that are positive.
        counts: how many they are.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    counts: NDArray[np.int64]


def reliability(probabilities: Floats, outcomes: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Predicted and observed frequency in at most `bins` bins of equal mass.

    Equal predictions fall into one bin, so that the result does not depend on the order of the cases; with many of them
    there are fewer bins.

    Args:
        probabilities: (N,) of the positive class.
        outcomes: (N,) whether the case is positive.
        bins: most bins.

    Raises:
        NotMeasurable: fewer cases than bins, or probabilities that are not finite.
        ValueError: probabilities outside [0, 1].
    """
    _check(probabilities, outcomes)
    require_rows("predictions", probabilities, bins)
    edges = np.unique(np.quantile(probabilities, np.arange(1, bins) / bins))
    _, place = np.unique(np.searchsorted(edges, probabilities, side="right"), return_inverse=True)
    counts = np.bincount(place)
    predicted = np.bincount(place, weights=probabilities) / counts
    observed = np.bincount(place, weights=outcomes.astype(np.float64)) / counts
    return Reliability(predicted, observed, counts)


def expected_calibration_error(probabilities: Floats, outcomes: NDArray[np.bool_], bins: int = BINS) -> float:
    """Mean over cases of ``|predicted - observed|`` of their bin of `reliability`, in [0, 1]: 0 is calibrated.

    Chance alone lifts it above 0; `calibration_error_by_chance` says by how much. Errors as `reliability`.

    >>> expected_calibration_error(np.full(20, 0.9), np.arange(20) < 10)
    0.4
    """
    found = reliability(probabilities, outcomes, bins)
    return float(np.average(np.abs(found.predicted - found.observed), weights=found.counts))


def calibration_error_by_chance(
    probabilities: Floats, rng: np.random.Generator, bins: int = BINS, draws: int = 20
) -> float:
    """Mean `expected_calibration_error` when every prediction is exactly right: outcomes drawn from `probabilities`."""
    outcomes = (rng.random(len(probabilities)) < probabilities for _ in range(draws))
    return float(np.mean([expected_calibration_error(probabilities, drawn, bins) for drawn in outcomes]))


def brier_score(probabilities: Floats, outcomes: NDArray[np.bool_]) -> float:
    """Mean squared difference of probability and outcome (0 or 1): sharpness and calibration in one, 0 is best.

    Raises:
        NotMeasurable: no cases, or probabilities that are not finite.
        ValueError: probabilities outside [0, 1].
    """
    _check(probabilities, outcomes)
    require_rows("predictions", probabilities, 1)
    return float(np.square(probabilities.astype(np.float64) - outcomes).mean())


def _check(probabilities: Floats, outcomes: NDArray[np.bool_]) -> None:
    require_finite("probabilities", probabilities)
    if probabilities.shape != outcomes.shape or probabilities.ndim != 1:
        raise ValueError(f"expected as many probabilities as outcomes, got {probabilities.shape}, {outcomes.shape}")
    if len(probabilities) and (probabilities.min() < 0 or probabilities.max() > 1):
        raise ValueError("probabilities must lie in [0, 1]")
    if outcomes.dtype != np.bool_:
        raise ValueError(f"outcomes must be bool, not {outcomes.dtype}")
