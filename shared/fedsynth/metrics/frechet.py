"""Fréchet distance between Gaussian fits of two feature sets (Heusel et al., NeurIPS 2017, "FID").

Agrees with torchmetrics and with `scipy.linalg.sqrtm` to 1e-6 of its value. Symmetric eigenvalues are used in place of
theirs, since these stay accurate for covariances without full rank (more features than samples) and take seconds, not
minutes, for the 2,048 features of a large network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.jackknife import deal
from fedsynth.metrics.measurable import require_finite, require_rows

Array = NDArray[np.float64]

FOLDS = 20


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of `count` samples."""

    mean: Array
    covariance: Array
    count: int


def moments(features: NDArray[np.floating]) -> Moments:
    """Moments of features (N, D), N at least 2, in float64."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(real: NDArray[np.floating], fake: NDArray[np.floating], any_rank: bool = False) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between features of two sets.

    Biased upwards for few samples: compare only values computed from equal numbers of samples.

    Args:
        real: (N, D) features, N > D so that the covariance has full rank.
        fake: (M, D) features, M > D.
        any_rank: let N and M be as small as 2, for wide features: the value is then dominated by its bias, which two
            columns of equal size share.

    Raises:
        NotMeasurable: too few samples, or features that are not finite.
    """
    _check(real, fake, any_rank)
    return frechet_of_moments(moments(real), moments(fake))


def frechet_of_moments(real: Moments, fake: Moments) -> float:
    """The distance of two Gaussians; rounding below 0 is cut off."""
    shift = real.mean - fake.mean
    root = _root(real.covariance)
    values = np.linalg.eigvalsh(root @ fake.covariance @ root)
    between = 2 * np.sqrt(np.clip(values, 0, None)).sum()
    return max(0.0, float(shift @ shift + np.trace(real.covariance) + np.trace(fake.covariance) - between))


def frechet_folds(
    real: NDArray[np.floating],
    fake: NDArray[np.floating],
    real_patients: NDArray[np.integer],
    fake_patients: NDArray[np.integer],
    any_rank: bool = False,
    folds: int = FOLDS,
) -> tuple[Array, Array]:
    """The distance without each fold of the real patients, and without each fold of the fake patients.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        real_patients: (N,) number of each sample's patient.
        fake_patients: (M,) likewise.
        any_rank: as in `frechet_distance`.
        folds: how many groups the patients of each set are dealt into; fewer where there are fewer patients.

    Returns:
        Two arrays of distances for `fedsynth.metrics.jackknife`.

    Raises:
        NotMeasurable: as `frechet_distance`, of what is left of a set.
    """
    _check(real, fake, any_rank)
    whole_real, whole_fake = moments(real), moments(fake)
    without_real = [
        frechet_of_moments(_rest(real[kept], fake, any_rank), whole_fake) for kept in _kept(real_patients, folds)
    ]
    without_fake = [
        frechet_of_moments(whole_real, _rest(fake[kept], real, any_rank)) for kept in _kept(fake_patients, folds)
    ]
    return np.array(without_real), np.array(without_fake)


def _kept(patients: NDArray[np.integer], folds: int) -> list[NDArray[np.bool_]]:
    dealt = deal(patients, folds)
    return [dealt != fold for fold in range(int(dealt.max()) + 1)]


def _rest(kept: NDArray[np.floating], other: NDArray[np.floating], any_rank: bool) -> Moments:
    _check(kept, other, any_rank)
    return moments(kept)


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _check(real: NDArray[np.floating], fake: NDArray[np.floating], any_rank: bool) -> None:
    for what, values in (("real samples", real), ("compared samples", fake)):
        require_rows(what, values, 2 if any_rank else real.shape[1] + 1)
        require_finite(what, values)
