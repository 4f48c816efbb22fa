"""Can a classifier tell real from synthetic profiles? (Classifier two-sample test, Lopez-Paz and Oquab, 2017.)"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from fedsynth.metrics.measurable import require_finite, require_rows
from fedsynth.metrics.roc_auc import roc_auc

MIN_PROFILES = 10
COMPONENTS = 20


def discriminative_auc(real: NDArray[np.floating], fake: NDArray[np.floating], rng: np.random.Generator) -> float:
    """Cross-validated area of a logistic regression that tells the two sets apart: 0.5 cannot, 1 always can.

    The regression sees the leading principal components and their squares, so that a difference in spread or
    co-expression counts as well as a shift. Components and scales are fitted inside each training fold.

    Args:
        real: (N, G) expression.
        fake: (M, G) expression.
        rng: source of the five folds.

    Raises:
        NotMeasurable: fewer than `MIN_PROFILES` profiles in a set, or values that are not finite.
    """
    for what, values in (("real profiles", real), ("compared profiles", fake)):
        require_rows(what, values, MIN_PROFILES)
        require_finite(what, values)
    profiles = np.concatenate([real, fake]).astype(np.float64)
    is_fake = np.arange(len(profiles)) >= len(real)
    seed = int(rng.integers(2**31))
    areas = []
    for training, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(profiles, is_fake):
        rotation = PCA(min(COMPONENTS, profiles.shape[1], len(training) // 4), random_state=seed).fit(
            profiles[training]
        )
        seen, unseen = (_with_squares(rotation.transform(profiles[rows])) for rows in (training, test))
        scaler = StandardScaler().fit(seen)
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
        model.fit(scaler.transform(seen), is_fake[training])
        areas.append(roc_auc(model.decision_function(scaler.transform(unseen)), is_fake[test]))
    return float(np.mean(areas))


def _with_squares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([values, np.square(values)], axis=1)
