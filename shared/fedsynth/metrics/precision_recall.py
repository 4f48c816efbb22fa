"""Improved precision and recall for generative models (Kynkäänniemi et al., NeurIPS 2019)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.metrics.neighbours import distances, neighbour_radii


def precision_recall(
    real: NDArray[np.floating], fake: NDArray[np.floating], neighbours: int = 3
) -> tuple[float, float]:
    """Share of fakes inside the real manifold, and share of reals inside the fake manifold.

    A set's manifold is the union of the balls around its samples that reach to their k-th nearest neighbour. Precision
    falls when fakes look wrong; recall falls when the generator misses kinds of real samples (mode collapse: about 0).

    Args:
        real: (N, D) features.
        fake: (M, D) features; take M = N, both shares depend on the sizes.
        neighbours: k.

    Raises:
        NotMeasurable: k or fewer samples, or features that are not finite.
    """
    real_radii = neighbour_radii("real samples", real, neighbours)
    fake_radii = neighbour_radii("compared samples", fake, neighbours)
    between = distances(real, fake)
    precision = (between <= real_radii[:, None]).any(axis=0).mean()
    recall = (between <= fake_radii[None, :]).any(axis=1).mean()
    return float(precision), float(recall)
