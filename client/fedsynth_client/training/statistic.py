"""A statistic that a site releases once: the sum of one row a patient, plus Gaussian noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth_client.training.block import BlockResult

TOTAL = "total"

# Bits of the standard deviation of the noise below which nothing is kept. Box-Muller values stay below 9 standard
# deviations, so their 24 float32 bits reach down to here.
_BITS = 20


def release_statistic(rows: Tensor, mechanism: Mechanism, max_norm: float, randomness: Randomness) -> BlockResult:
    """Release the noisy sum of `rows` (N, D), one row a patient.

    Whatever an engine promises of its rows, each is clipped to `max_norm` here, and one with a value that is not finite
    counts as 0: adding or removing a patient changes the sum by at most `max_norm`. The noise has standard deviation
    ``noise_multiplier * max_norm`` in each of the D coordinates (Dwork and Roth 2014, appendix A). The number of
    patients is not part of the result.

    Rows and noise are both rounded to multiples of one public grid, and added without error. Otherwise the last bits of
    the result, finer than those of a large noise value, would be those of the patients' sum (Mironov 2012). Rows are
    rounded towards 0, which lengthens none.

    Without noise, in a study without privacy, the sum is released as it is: there is nothing that a grid could protect. Rows
    are clipped all the same, which shortens none that an engine promises: the coordinator refuses larger sums.

    Args:
        rows: (N, D) finite or not, N may be 0.
        mechanism: one release; its sample rate is 1, its noise multiplier 0 where there is no privacy.
        max_norm: Euclidean norm to which a row is clipped.
        randomness: source of the noise.

    Raises:
        ValueError: the mechanism has more than one step.
    """
    if mechanism.steps != 1:
        raise ValueError(f"a statistic is released once, not {mechanism.steps} times")
    drawn = rows[poisson_draw(len(rows), mechanism.sample_rate, randomness)].double()
    usable = drawn[torch.isfinite(drawn).all(dim=1)]
    norms = usable.norm(dim=1, keepdim=True)
    clipped = usable * (max_norm / norms.clamp(min=max_norm))
    std = mechanism.noise_multiplier * max_norm
    if std == 0:
        return BlockResult({TOTAL: clipped.sum(dim=0).to(torch.float32)}, {}, {})
    noise = randomness.normal((rows.shape[1],), std).double()
    grid = 2.0 ** (math.ceil(math.log2(std)) - _BITS)
    total = ((clipped / grid).trunc().sum(dim=0) + (noise / grid).round()) * grid
    return BlockResult({TOTAL: total.to(torch.float32)}, {}, {})
