"""How noise alone moves the weights of a network, and what stands out of it.

Adam divides each parameter's mean gradient by the root of its mean square, so a gradient of pure noise, whatever its size,
moves every parameter by a random walk in steps of about the learning rate: entries of the change of a weight matrix are
then independent with a known variance. Such a matrix (m, k) of standard deviation s has no singular value above
``s (sqrt m + sqrt k)`` but for small fluctuations (Bai and Yin 1993). What is learnt moves many weights together, along few
directions, and shows as singular values beyond that edge long before it shows in the length of the change. A direction of
strength theta is seen at ``sqrt((theta^2 + s^2 m) (theta^2 + s^2 k)) / theta`` (Benaych-Georges and Nadakuditi 2012), which
is solved for theta here.

This is an approximation: sizes of gradients are taken to stay alike over a round, and noise of sampling patients counts
as signal where it has a direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedsynth.records import State

_MOMENTUM = 0.9  # of Adam, as the sites train networks of profiles
_TOLERANCE, _SMALL_MATRIX = 0.1, 2.0


@dataclass(frozen=True)
class Movement:
    """What the change of a network's weight matrices holds.

    Attributes:
        largest: singular value over the edge of noise, the largest of all matrices.
        noise_norm: expected norm of the noise.
        signal_norm: of the directions that stand out; 0 when none does.
    """

    largest: float
    noise_norm: float
    signal_norm: float


def walk(steps: int) -> float:
    """Mean squared length of Adam's walk over `steps` steps on independent noise, in squared learning rates.

    The gradient of step s enters the updates of steps t >= s with the weights (1 - b) b^(t - s) / (1 - b^t), b the momentum;
    divided by the gradients' own root mean square they add up to c_s, and the noise of different steps is independent:
    sum of c_s^2. From few steps the root mean square is known badly, which makes the walk shorter by up to a tenth.

    >>> walk(1), 51 < walk(40) < 52
    (1.0, True)
    """
    shares = [
        sum((1 - _MOMENTUM) * _MOMENTUM ** (t - s) / (1 - _MOMENTUM**t) for t in range(s, steps + 1))
        for s in range(1, steps + 1)
    ]
    return sum(share**2 for share in shares)


def movement(before: Mapping[str, torch.Tensor], after: State, noise_sd: float) -> Movement:
    """Compare the change of all weight matrices with noise of standard deviation `noise_sd` in every entry."""
    largest = signal = entries = 0.0
    for name, start in before.items():
        if start.ndim != 2:
            continue
        rows, columns = start.shape
        values = torch.linalg.svdvals((after[name] - start).double()) / noise_sd
        edge = math.sqrt(rows) + math.sqrt(columns)
        # The largest singular value of noise varies about the edge by min(m, k)^(-2/3) of it (Johnstone 2001).
        beyond = values[values > edge * (1 + max(_TOLERANCE, _SMALL_MATRIX * min(rows, columns) ** (-2 / 3)))]
        largest = max(largest, float(values[0]) / edge)
        excess = beyond**2 - rows - columns
        signal += float(((excess + (excess**2 - 4 * rows * columns).sqrt()) / 2).sum())
        entries += start.numel()
    return Movement(largest, noise_sd * math.sqrt(entries), noise_sd * math.sqrt(signal))
