"""Improved precision and recall for generative models (Kynkäänniemi et al., NeurIPS 2019).

Agrees with `prdc.compute_prdc` and with a brute-force computation, sample by sample.
"""

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
    precise, recalled = manifold_members(real, fake, neighbours)
    return float(precise.mean()), float(recalled.mean())


def manifold_members(
    real: NDArray[np.floating], fake: NDArray[np.floating], neighbours: int = 3
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which fakes (M,) lie in the real manifold, and which reals (N,) lie in the fake manifold; see `precision_recall`."""
    real_radii = neighbour_radii("real samples", real, neighbours)
    fake_radii = neighbour_radii("compared samples", fake, neighbours)
    precise, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)
    for rows, between in distances(real, fake):
        precise |= (between <= real_radii[rows, None]).any(axis=0)
        recalled[rows] = (between <= fake_radii[None, :]).any(axis=1)
    return precise, recalled
