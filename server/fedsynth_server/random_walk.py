"""How noise alone moves the weights of a network, and what stands out of it.

Adam divides each parameter's mean gradient by the root of its mean square, so a gradient of pure noise, whatever its size,
moves every parameter by a random walk in steps of about the learning rate: entries of the change of a weight matrix are
then independent with a known variance. Such a matrix (m, k) of standard deviation s has no singular value above
``s (sqrt m + sqrt k)`` but for small fluctuations (Bai and Yin 1993). What is learnt moves many weights together, along few
directions, and shows as singular values beyond that edge long before it shows in the length of the change. How much of
such a direction is what was learnt, and how much was turned away by noise, follows from how far beyond the edge it lies
(Benaych-Georges and Nadakuditi 2012).

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
_TOLERANCE = 0.1  # for what the approximation leaves out
_RARE = 3.3  # quantile of the Tracy-Widom law (order 1) that noise exceeds once in a thousand matrices


@dataclass(frozen=True)
class Movement:
    """What the change of a network's weight matrices holds.

    Attributes:
        largest: singular value over the edge of noise, the largest of all matrices.
        signal: share of the clearest direction (squared cosines of both singular vectors with the true ones) that is no
            noise; 0 when no direction stands out.
    """

    largest: float
    signal: float


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
    largest = signal = 0.0
    for name, start in before.items():
        if start.ndim != 2:
            continue
        rows, columns = start.shape
        value = float(torch.linalg.matrix_norm((after[name] - start).double(), ord=2)) / noise_sd
        edge = math.sqrt(rows) + math.sqrt(columns)
        largest = max(largest, value / edge)
        if value > max(_largest_of_noise(rows, columns), (1 + _TOLERANCE) * edge):
            signal = max(signal, _share_of_signal(value, rows, columns))
    return Movement(largest, signal)


def _share_of_signal(value: float, rows: int, columns: int) -> float:
    """Product of the squared cosines between singular vectors seen at `value`, above the edge of unit noise, and true ones.

    A direction of strength theta is seen at ``sqrt((theta^2 + m) (theta^2 + k)) / theta``, which is solved for theta^2.
    """
    excess = value**2 - rows - columns
    strength = (excess + math.sqrt(excess**2 - 4 * rows * columns)) / 2
    # Both shares are 1 minus what noise adds; Benaych-Georges and Nadakuditi, section 3.1, without their normalisation.
    left = 1 - rows * (columns + strength) / (strength * (strength + rows))
    right = 1 - columns * (rows + strength) / (strength * (strength + columns))
    return left * right


def _largest_of_noise(rows: int, columns: int) -> float:
    """What the largest singular value of a matrix of independent standard normal numbers seldom exceeds (Johnstone 2001)."""
    first, second = math.sqrt(max(rows - 1, 0.5)), math.sqrt(columns)
    centre, spread = (first + second) ** 2, (first + second) * (1 / first + 1 / second) ** (1 / 3)
    return math.sqrt(centre + _RARE * spread)
