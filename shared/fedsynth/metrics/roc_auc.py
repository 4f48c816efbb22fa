"""Area under the ROC curve (Hanley and McNeil, 1982) as the Mann-Whitney statistic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from fedsynth.metrics.measurable import NotMeasurable, require_finite


def roc_auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Probability that a random positive scores above a random negative, ties counted half.

    Args:
        scores: (N,) larger means more likely positive.
        positive: (N,) truth.

    Raises:
        NotMeasurable: only one class is present, or scores are not finite.

    >>> roc_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    require_finite("scores", scores)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        raise NotMeasurable("only one of the two classes is present")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def macro_auc(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean over the classes present in `labels` of the one-against-rest area.

    Args:
        scores: (N, K) a score a class.
        labels: (N,) class codes 0 ... K - 1.

    Raises:
        NotMeasurable: only one class is present, or scores are not finite.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise NotMeasurable("only one of the classes is present")
    return float(np.mean([roc_auc(scores[:, code], labels == code) for code in present]))


def roc_points(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], points: int = 101
) -> list[tuple[float, float]]:
    """The ROC curve as (false, true positive rate), closer together where false positives are rare.

    Args:
        scores: (N,) larger means more likely positive.
        positive: (N,) truth.
        points: how many.

    Raises:
        NotMeasurable: only one class is present, or scores are not finite.
    """
    require_finite("scores", scores)
    if positive.all() or not positive.any():
        raise NotMeasurable("only one of the two classes is present")
    false, true, _ = roc_curve(positive, scores)
    at = np.square(np.linspace(0.0, 1.0, points))
    # The first point is where nothing is called positive; `interp` would take the last of several at no false positives.
    return [(0.0, 0.0), *zip(at.tolist(), np.interp(at, false, true).tolist(), strict=True)]
