"""Public weights of the private moments: directions of expression, and the scales of coordinates and morphology.

No private data takes part: profiles and morphology come from a public or simulated population.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from fedsynth.engines.moments import SHAPE_POINTS
from fedsynth.records import State

_LEAST_SCALE = 1e-3


def public_moments_weights(
    profiles: NDArray[np.floating],
    morphology: NDArray[np.floating],
    components: int,
    labels: NDArray[np.int64] | None = None,
    classes: int = 2,
) -> State:
    """Principal directions of public profiles and the public mean and standard deviation of each feature.

    Directions are about 0, the public centre of the plan's scale, not about the mean of `profiles`: it is from there
    that the moments are taken.

    Args:
        profiles: (N, G) on the plan's scale.
        morphology: (M, F) in [0, 1], NaN where not measured; of the same or of other people.
        components: r, at most N and G.
        labels: (M,) class codes of the people of `morphology`; without them nothing is believed of the classes.
        classes: number of classes K.

    Returns:
        As `fedsynth.engines.moments.public_template` describes.

    Raises:
        ValueError: more components than profiles or genes, or a feature that was measured in fewer than two people.
    """
    if not 0 < components <= min(profiles.shape):
        raise ValueError(f"expected 1 to {min(profiles.shape)} components, got {components}")
    if (np.isfinite(morphology).sum(axis=0) < 2).any():
        raise ValueError("every feature has to be measured in at least two people of the public population")
    # Signs of singular vectors are arbitrary and may differ between machines; the largest entry is made positive.
    _, _, directions = np.linalg.svd(profiles.astype(np.float64), full_matrices=False)
    basis = directions[:components].T
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(components)])
    return weights_of_basis(basis, profiles, morphology, labels, classes)


def weights_of_basis(
    basis: NDArray[np.floating],
    profiles: NDArray[np.floating],
    morphology: NDArray[np.floating],
    labels: NDArray[np.int64] | None = None,
    classes: int = 2,
) -> State:
    """The weights of a given orthonormal `basis` (G, r), its scales from public profiles and morphology as above."""
    coordinates = profiles.astype(np.float64) @ basis
    genes_scale = np.sqrt(np.square(coordinates).mean(axis=0))
    centre, spread = np.nanmean(morphology, axis=0), np.maximum(np.nanstd(morphology, axis=0), _LEAST_SCALE)
    by_class = np.zeros((classes, morphology.shape[1]))
    if labels is not None:
        standard = (morphology - centre) / spread
        by_class = np.stack([np.nanmean(standard[labels == label], axis=0) for label in range(classes)])
    return {
        "basis": torch.from_numpy(np.ascontiguousarray(basis, dtype=np.float32)),
        "genes_scale": torch.from_numpy(np.maximum(genes_scale, _LEAST_SCALE).astype(np.float32)),
        "morphology_centre": torch.from_numpy(centre.astype(np.float32)),
        "morphology_scale": torch.from_numpy(spread.astype(np.float32)),
        "morphology_shape": torch.from_numpy(_shapes(morphology)),
        "morphology_by_class": torch.from_numpy(by_class.astype(np.float32)),
    }


def _shapes(morphology: NDArray[np.floating]) -> NDArray[np.float32]:
    """(F, SHAPE_POINTS) standardised quantile function of each feature; a feature that never varies has that of a normal."""
    probabilities = (np.arange(SHAPE_POINTS) + 0.5) / SHAPE_POINTS
    shapes = np.nanquantile(morphology.astype(np.float64), probabilities, axis=0).T
    constant = shapes.std(axis=1) < _LEAST_SCALE
    shapes[constant] = norm.ppf(probabilities)
    shapes -= shapes.mean(axis=1, keepdims=True)
    return (shapes / shapes.std(axis=1, keepdims=True)).astype(np.float32)
