"""Membership inference from a release: how near a patient is to the synthetic ones, or how much denser they are there.

Every function scores patients, given as points, by how much they look like members; larger means "member". Points are made
by `fedsynth.attacks.descriptions`; whatever metric they have is Euclidean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from fedsynth.metrics.measurable import require_finite, require_rows

Points = NDArray[np.floating]

MIN_SYNTHETIC, MIN_REFERENCE = 10, 20
_AT_ONCE = 4_000_000  # distances in memory
_TINY = 1e-9


def nearest_neighbour(attacked: Points, synthetic: Points) -> NDArray[np.float64]:
    """Minus the distance (N,) to the nearest synthetic patient: GAN-Leaks' full black-box attack (Chen et al., 2020).

    Raises:
        NotMeasurable: too few synthetic patients, or values that are not finite.
    """
    _check(attacked, synthetic)
    return -nearest(attacked, synthetic)[0]


def monte_carlo(attacked: Points, synthetic: Points) -> NDArray[np.float64]:
    """How many synthetic patients lie near, the nearer ones counting more: Hilprecht et al. (2019).

    Near is who is within the median, over all attacked patients, of the distance to the nearest synthetic one (their
    median heuristic); each counts by minus the logarithm of distance over that radius.

    Raises:
        NotMeasurable: too few synthetic patients, or values that are not finite.
    """
    _check(attacked, synthetic)
    radius = max(float(np.median(nearest(attacked, synthetic)[0])), _TINY)
    scores = np.zeros(len(attacked))
    for rows, distances in _distances(attacked, synthetic):
        closeness = -np.log(np.maximum(distances, _TINY * radius) / radius)
        scores[rows] = np.maximum(closeness, 0.0).sum(axis=1) / len(synthetic)
    return scores


def calibrated(attacked: Points, synthetic: Points, reference: Points) -> NDArray[np.float64]:
    """How much nearer the nearest synthetic patient is than the nearest of a reference set: GAN-Leaks, calibrated.

    Chen et al. (2020) take the reference from a generator that was not trained on the attacked patients. Patients in a
    dense part of the population are near to everything; the difference takes that out.

    Raises:
        NotMeasurable: too few synthetic or reference patients, or values that are not finite.
    """
    _check(attacked, synthetic)
    _check_reference(reference)
    return nearest(attacked, reference)[0] - nearest(attacked, synthetic)[0]


def density_ratio(attacked: Points, synthetic: Points, reference: Points, components: int = 8) -> NDArray[np.float64]:
    """Logarithm of the density of synthetic over that of reference patients: DOMIAS (van Breugel et al., 2023).

    A generator that overfits is denser at its training patients than the population is. Densities are kernel estimates
    with Scott's bandwidth in the leading principal components of both sets together.

    Raises:
        NotMeasurable: too few synthetic or reference patients, or values that are not finite.
    """
    _check(attacked, synthetic)
    _check_reference(reference)
    both = np.concatenate([synthetic, reference]).astype(np.float64)
    middle = both.mean(axis=0)
    # The singular vectors of a matrix with few rows come from the small Gram matrix, whatever the number of columns.
    chosen = both[np.linspace(0, len(both) - 1, min(len(both), 1000)).astype(int)] - middle
    values, vectors = np.linalg.eigh(chosen @ chosen.T)
    kept = np.argsort(values)[::-1][:components]
    kept = kept[values[kept] > values.max() * _TINY]
    axes = chosen.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    spread = ((both - middle) @ axes).std(axis=0)

    def projected(set_of: Points) -> NDArray[np.float64]:
        return np.asarray((set_of.astype(np.float64) - middle) @ axes / spread)

    at = projected(attacked)
    return _log_density(at, projected(synthetic)) - _log_density(at, projected(reference))


def nearest(points: Points, among: Points) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N,) distance to the nearest of `among` (M, D), and its row; N * M distances are never in memory at once."""
    least, which = np.zeros(len(points)), np.zeros(len(points), dtype=np.int64)
    for rows, distances in _distances(points, among):
        which[rows] = distances.argmin(axis=1)
        least[rows] = distances.min(axis=1)
    return least, which


def _distances(points: Points, among: Points) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Some rows at a time, their Euclidean distances (rows, M)."""
    others = among.astype(np.float64)
    squares = np.square(others).sum(axis=1)
    step = max(1, _AT_ONCE // max(len(among), 1))
    for start in range(0, len(points), step):
        rows = slice(start, min(start + step, len(points)))
        some = points[rows].astype(np.float64)
        squared = np.square(some).sum(axis=1)[:, None] + squares - 2 * some @ others.T
        yield rows, np.sqrt(np.maximum(squared, 0.0))


def _log_density(at: Points, sample: Points) -> NDArray[np.float64]:
    """Logarithm of a Gaussian kernel density, up to a constant, with Scott's bandwidth for each coordinate."""
    n, dimensions = sample.shape
    bandwidth = np.maximum(sample.std(axis=0), 1e-3) * n ** (-1 / (dimensions + 4))
    found = np.zeros(len(at))
    for rows, distances in _distances(at / bandwidth, sample / bandwidth):
        found[rows] = logsumexp(-0.5 * np.square(distances), axis=1)
    return found - np.log(n) - np.log(bandwidth).sum()


def _check(attacked: Points, synthetic: Points) -> None:
    require_rows("synthetic patients", synthetic, MIN_SYNTHETIC)
    require_finite("attacked patients", attacked)
    require_finite("synthetic patients", synthetic)


def _check_reference(reference: Points) -> None:
    require_rows("reference patients", reference, MIN_REFERENCE)
    require_finite("reference patients", reference)
