"""Radiogenomic association map: which genes go with which morphology (Gevaert et al., 2014), and how two maps agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.measurable import NotMeasurable, require_rows

MIN_PATIENTS = 8


def association_map(genes: NDArray[np.floating], morphology: NDArray[np.floating]) -> NDArray[np.float64]:
    """(G, F) Pearson correlation of every gene with every feature.

    Args:
        genes: (N, G) expression, finite.
        morphology: (N, F); a feature's NaN entries are left out.

    Returns:
        NaN where a gene or feature does not vary, or fewer than `MIN_PATIENTS` patients have the feature.

    Raises:
        NotMeasurable: fewer than `MIN_PATIENTS` patients.
    """
    require_rows("patients with genes and morphology", genes, MIN_PATIENTS)
    result = np.full((genes.shape[1], morphology.shape[1]), np.nan)
    for column, feature in enumerate(morphology.T):
        known = np.isfinite(feature)
        if known.sum() >= MIN_PATIENTS:
            result[:, column] = _standardised(genes[known]).T @ _standardised(feature[known][:, None])[:, 0]
    return result


def map_agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Pearson correlation over the entries known in both maps: 1 for the same pattern, about 0 for unrelated ones.

    Raises:
        NotMeasurable: fewer than three common entries, or a map that is constant.
    """
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3 or np.ptp(first[known]) == 0 or np.ptp(second[known]) == 0:
        raise NotMeasurable("genes or morphology do not vary, so that there is no pattern of associations")
    return float(np.corrcoef(first[known], second[known])[0, 1])


def _standardised(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Columns centred and of norm 1, so that inner products are correlations; NaN for a constant column."""
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    norm = np.sqrt(np.square(centred).sum(axis=0))
    varies = norm > 1e-6 * np.sqrt(len(values))
    return np.divide(centred, norm, out=np.full_like(centred, np.nan), where=varies)
