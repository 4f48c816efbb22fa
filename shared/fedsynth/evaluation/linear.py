"""Linear models with fixed settings: class from features, morphology from genes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

MIN_TRAINING = 8
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def class_scores(
    features: NDArray[np.floating], labels: NDArray[np.int64], test: NDArray[np.floating], classes: int
) -> NDArray[np.float64]:
    """Class probabilities (M, `classes`) of `test` (M, D) by a logistic regression trained on `features` (N, D).

    Rows labelled -1 (unknown) are left out; classes that training lacks get probability 0.

    Raises:
        NotMeasurable: fewer than `MIN_TRAINING` labelled rows, or one class only, to train on.
    """
    known = labels >= 0
    require_rows("labelled patients to train on", features[known], MIN_TRAINING)
    require_finite("training features", features)
    if len(np.unique(labels[known])) < 2:
        raise NotMeasurable("only one class to train on")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    model.fit(features[known].astype(np.float64), labels[known])
    scores = np.zeros((len(test), classes))
    scores[:, model.classes_] = model.predict_proba(test.astype(np.float64))
    return scores


def ridge_predictions(
    genes: NDArray[np.floating], morphology: NDArray[np.floating], test: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Morphology (M, F) of the profiles `test` (M, G) by ridge regression on pairs (N, G), (N, F), held to [0, 1].

    The penalty is chosen for each feature by leave-one-out error on the training pairs. A feature that is known in too
    few training pairs is predicted by the middle of its public range.

    Raises:
        NotMeasurable: fewer than `MIN_TRAINING` pairs, or genes that are not finite.
    """
    require_rows("pairs of genes and morphology to train on", genes, MIN_TRAINING)
    require_finite("training genes", genes)
    predicted = np.full((len(test), morphology.shape[1]), 0.5)
    known = np.isfinite(morphology)
    for rows in np.unique(known.T, axis=0):  # features known in the same patients are fitted together
        columns = np.flatnonzero((rows == known.T).all(axis=1))
        if rows.sum() >= MIN_TRAINING:
            model = RidgeCV(PENALTIES, alpha_per_target=len(columns) > 1)
            # One target wants a vector: with a column of one, scikit-learn gives one penalty of another shape.
            targets = morphology[np.ix_(rows, columns)].astype(np.float64)
            model.fit(genes[rows].astype(np.float64), targets if len(columns) > 1 else targets[:, 0])
            predicted[:, columns] = model.predict(test.astype(np.float64)).reshape(len(test), -1)
    return np.clip(predicted, 0.0, 1.0)
