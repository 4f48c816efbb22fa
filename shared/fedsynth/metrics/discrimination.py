"""Can a classifier tell real from synthetic profiles? (Classifier two-sample test, Lopez-Paz and Oquab, 2017.)"""

from __future__ import annotations

from dataclasses import dataclass

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
FOLDS = 5


@dataclass(frozen=True)
class Discrimination:
    """What a cross-validated discriminator says of patients that it was not trained on.

    Attributes:
        scores: (N + M,) larger means more likely of the second set.
        is_fake: (N + M,) whether they are of the second set.
        fold: (N + M,) in which fold each was left out; scores of different folds are not comparable.
    """

    scores: NDArray[np.float64]
    is_fake: NDArray[np.bool_]
    fold: NDArray[np.int64]

    def area(self, rows: NDArray[np.integer]) -> float:
        """Mean over folds of the area on some patients: 0.5 cannot tell them apart, 1 always can.

        Raises:
            NotMeasurable: a fold holds patients of one set only.
        """
        scores, is_fake, fold = self.scores[rows], self.is_fake[rows], self.fold[rows]
        return float(np.mean([roc_auc(scores[fold == one], is_fake[fold == one]) for one in range(FOLDS)]))


def discriminative_auc(real: NDArray[np.floating], fake: NDArray[np.floating], rng: np.random.Generator) -> float:
    """`Discrimination.area` of all patients; arguments and errors as `discriminate`."""
    found = discriminate(real, fake, rng)
    return found.area(np.arange(len(found.scores)))


def discriminate(real: NDArray[np.floating], fake: NDArray[np.floating], rng: np.random.Generator) -> Discrimination:
    """Cross-validated scores of a logistic regression that tells the two sets apart.

    The regression sees the leading principal components and their squares, so that a difference in spread or
    co-expression counts as well as a shift. Components and scales are fitted inside each training fold.

    Args:
        real: (N, G) expression.
        fake: (M, G) expression.
        rng: source of the folds.

    Raises:
        NotMeasurable: fewer than `MIN_PROFILES` profiles in a set, or values that are not finite.
    """
    for what, values in (("real profiles", real), ("compared profiles", fake)):
        require_rows(what, values, MIN_PROFILES)
        require_finite(what, values)
    profiles = np.concatenate([real, fake]).astype(np.float64)
    is_fake = np.arange(len(profiles)) >= len(real)
    seed = int(rng.integers(2**31))
    scores, fold = np.zeros(len(profiles)), np.zeros(len(profiles), dtype=np.int64)
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(profiles, is_fake)
    for number, (training, test) in enumerate(splits):
        rotation = PCA(min(COMPONENTS, profiles.shape[1], len(training) // 4), random_state=seed).fit(
            profiles[training]
        )
        seen, unseen = (_with_squares(rotation.transform(profiles[rows])) for rows in (training, test))
        scaler = StandardScaler().fit(seen)
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
        model.fit(scaler.transform(seen), is_fake[training])
        scores[test], fold[test] = model.decision_function(scaler.transform(unseen)), number
    return Discrimination(scores, is_fake, fold)


def _with_squares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([values, np.square(values)], axis=1)
