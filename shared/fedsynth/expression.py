"""Mapping gene-expression profiles to the study's scale by public references alone.

A profile is ranked within itself; the rank is replaced by the plan's reference quantile function at that rank
(quantile normalisation to a fixed target, Bolstad et al. 2003), then centred and scaled gene by gene by constants of
the plan. No statistic over a site's patients enters, so nothing of a site is revealed by the mapping.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedsynth.plan import GenePlan


def coverage(values: NDArray[np.floating]) -> float:
    """Share of the panel's genes that have a value: `values` (G,) in the plan's order, NaN where a gene is missing."""
    return float(np.isfinite(values).mean())


def to_panel_scale(values: NDArray[np.floating], genes: GenePlan) -> NDArray[np.float32]:
    """Map one profile to the plan's normalised scale.

    Args:
        values: (G,) in the order of ``genes.panel``, on any scale that keeps the order of genes within the sample; NaN
            where a gene is missing.
        genes: the panel and its public references.

    Returns:
        (G,) float32 within ±``genes.clip``. Equal values share the mean of their ranks. A missing gene becomes 0, the
        public centre; ranks are taken among the genes present.

    Raises:
        ValueError: the profile has another length than the panel, or fewer than two genes have a value.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(genes.panel),):
        raise ValueError(f"expected a profile of {len(genes.panel)} genes, got an array of shape {values.shape}")
    present = np.isfinite(values)
    count = int(present.sum())
    if count < 2:
        raise ValueError("a profile needs at least two genes with a value to be ranked")
    reference = np.asarray(genes.reference_quantiles)
    position = (rankdata(values[present], method="average") - 0.5) / count
    mapped = np.interp(position, np.linspace(0.0, 1.0, len(reference)), reference)
    result = np.zeros(len(values))
    result[present] = (mapped - np.asarray(genes.center)[present]) / np.asarray(genes.scale)[present]
    return np.clip(result, -genes.clip, genes.clip).astype(np.float32)
