"""Errors of predicted morphology on patients where it was measured; entries that were not measured are left out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import NotMeasurable, require_finite
from fedsynth.morphology import denormalise, features

LEAST_SPREAD = 0.02  # of the public range


def mae_by_feature(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> NDArray[np.float64]:
    """(F,) mean absolute error of each feature over the patients (N, F) in whom it was measured; NaN for none."""
    require_finite("predictions", predicted)
    known = np.isfinite(truth)
    error = np.where(known, np.abs(predicted - truth), 0.0).sum(axis=0, dtype=np.float64)
    return np.divide(error, known.sum(axis=0), out=np.full(truth.shape[1], np.nan), where=known.any(axis=0))


def mean_absolute_error(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Mean of `mae_by_feature` over the features that were measured at all.

    Raises:
        NotMeasurable: nothing was measured, or predictions are not finite.
    """
    return _mean(mae_by_feature(predicted, truth))


def mean_absolute_percentage_error(
    predicted: NDArray[np.floating], truth: NDArray[np.floating], names: list[str]
) -> float:
    """Mean over features of the mean of ``|predicted - truth| / truth`` in physical units, in per cent.

    A relative error has no meaning at 0, so for features whose public range starts at 0 the entries below a twentieth
    of the range are left out.

    Args:
        predicted: (N, F) normalised to [0, 1] by `fedsynth.morphology.normalise`.
        truth: (N, F) likewise, NaN where not measured.
        names: the F features.

    Raises:
        NotMeasurable: no entry is left, or predictions are not finite.
    """
    require_finite("predictions", predicted)
    smallest = np.array([f.low if f.low > 0 else 0.05 * f.high for f in features(names)])
    true, guess = denormalise(truth, names).astype(np.float64), denormalise(predicted, names).astype(np.float64)
    known = np.isfinite(true) & (true >= smallest * (1 - 1e-6))
    relative = np.where(known, np.abs(guess - true) / np.where(known, true, 1.0), 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return 100 * _mean(np.divide(relative, count, out=np.full(len(names), np.nan), where=count > 0))


def mean_r2(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Mean over features of the share of variance explained, 1 - SSE / SST; negative when worse than the mean.

    Features whose standard deviation over the patients is below `LEAST_SPREAD` are left out: there is nothing to explain.

    Raises:
        NotMeasurable: no feature varies over at least two patients, or predictions are not finite.
    """
    require_finite("predictions", predicted)
    values = []
    for guess, true in zip(predicted.T, truth.T, strict=True):
        known = np.isfinite(true)
        if known.sum() >= 2 and true[known].std() >= LEAST_SPREAD:
            values.append(1 - np.square(guess[known] - true[known]).mean() / true[known].var())
    return _mean(np.array(values))


def _mean(by_feature: NDArray[np.floating]) -> float:
    known = by_feature[np.isfinite(by_feature)]
    if not len(known):
        raise NotMeasurable("no morphology feature was measured in enough patients")
    return float(known.mean())
