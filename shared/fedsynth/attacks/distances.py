"""Nearest-neighbour distances from synthetic to real patients: a sanity check, no test of privacy."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.attacks.rates import MIN_PATIENTS, proportion
from fedsynth.attacks.release import nearest
from fedsynth.attacks.values import Distances
from fedsynth.metrics.measurable import require_rows

NOTE = (
    "A sanity check only: releases that pass it can still give patients away. If synthetic patients are no nearer to "
    "training than to held-out patients, about half of them are nearer to training. The interval holds the chance of which "
    "synthetic patients were drawn, not of which real ones were compared; where all synthetic patients look alike, the "
    "latter is the larger."
)


def sanity_distances(
    of: Literal["images", "genes"],
    training: NDArray[np.floating],
    held_out: NDArray[np.floating],
    synthetic: NDArray[np.floating],
    rng: np.random.Generator,
) -> Distances:
    """Distances of synthetic patients to the nearest of equally many training and held-out patients, given as points.

    Raises:
        NotMeasurable: too few patients.
    """
    require_rows("training patients", training, MIN_PATIENTS)
    require_rows("held-out patients", held_out, MIN_PATIENTS)
    require_rows("synthetic patients", synthetic, MIN_PATIENTS)
    count = min(len(training), len(held_out))
    to_training, to_held_out = (
        nearest(synthetic, real[rng.permutation(len(real))[:count]])[0] for real in (training, held_out)
    )
    return Distances(
        of=of,
        training=_quantiles(to_training),
        holdout=_quantiles(to_held_out),
        nearer=proportion(int((to_training < to_held_out).sum()), len(synthetic)),
        note=f"{NOTE} Compared with {count} patients of each kind.",
    )


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
