"""Scores of a classifier's posteriors: Inception, Mode and AM score.

All three see a slice only through which class it looks like. Whoever reports them names the classifier: with another
one they are other numbers, and with K classes the Inception score lies between 1 and K, the Mode score between 0 and K.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

Array = NDArray[np.float64]

_SUM_TOLERANCE = 1e-4
_TINY = 1e-12  # of a probability, in logarithms: a class that never occurs would else be infinitely far away


def inception_score(posteriors: NDArray[np.floating]) -> float:
    """exp(mean KL(p(y|x) || p(y))) over all samples (Salimans et al., NeurIPS 2016): clear *and* varied is high.

    Agrees with `torchmetrics.image.inception.InceptionScore` with one split to 1e-5.

    Args:
        posteriors: (N, K), rows sum to 1.

    Raises:
        NotMeasurable: no samples, or values that are not finite.
        ValueError: rows that are no probabilities.
    """
    _check("samples", posteriors)
    return float(np.exp(entropy(posteriors.mean(axis=0)) - entropy(posteriors).mean()))


def mode_score(posteriors: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Inception score times exp(-KL(p(y) || p_real(y))): falls when classes occur more or less often than among reals.

    Che et al. (ICLR 2017) introduced the score; the form is that of Xu et al. (arXiv 1806.07755). Read literally, the
    first paper's formula subtracts KL(p(y) || p_real(y)) from mean KL(p(y|x) || p_real(y)), which is the logarithm of the
    Inception score and does not depend on the reals (Zhou et al., ICLR 2018).

    Args:
        posteriors: (N, K) of the compared samples.
        reference: (K,) class distribution of real samples: the mean of their posteriors.
    """
    return float(inception_score(posteriors) * np.exp(-divergence(posteriors.mean(axis=0), reference)))


def am_score(posteriors: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """KL(p_real(y) || p(y)) + mean entropy of p(y|x) (Zhou et al., ICLR 2018): 0 is best, a missing class costs most.

    Args:
        posteriors: (N, K) of the compared samples.
        reference: (K,) class distribution of real samples: the mean of their posteriors.
    """
    _check("samples", posteriors)
    return float(divergence(reference, posteriors.mean(axis=0)) + entropy(posteriors).mean())


def entropy(probabilities: NDArray[np.floating]) -> Array:
    """Entropy in nats along the last axis."""
    p = np.asarray(probabilities, dtype=np.float64)
    return np.asarray(-(p * np.log(np.clip(p, _TINY, None))).sum(axis=-1))


def divergence(p: NDArray[np.floating], q: NDArray[np.floating]) -> float:
    """Kullback-Leibler divergence KL(p || q) in nats, of two distributions (K,)."""
    first = np.asarray(p, dtype=np.float64)
    ratio = np.log(np.clip(first, _TINY, None)) - np.log(np.clip(np.asarray(q, dtype=np.float64), _TINY, None))
    return float((first * ratio).sum())


def _check(what: str, posteriors: NDArray[np.floating]) -> None:
    require_rows(what, posteriors, 1)
    require_finite("posteriors", posteriors)
    if posteriors.shape[1] < 2:
        raise NotMeasurable("there is a single class")
    if posteriors.min() < 0 or np.abs(posteriors.sum(axis=1) - 1).max() > _SUM_TOLERANCE:
        raise ValueError("posteriors must be probabilities that sum to 1 in each row")
