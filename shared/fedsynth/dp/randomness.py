"""Where the randomness of the privacy mechanism comes from.

The guarantee rests on noise and on Poisson draws that nobody can predict. `SystemRandomness` expands fresh 256-bit
keys from the operating system with ChaCha20; `SeededRandomness` repeats itself and makes a run *not private*.

Caveat, stated in every privacy statement: samples are float32 and made by the Box-Muller transform in float64, so the
floating-point attack of Mironov (CCS 2012) is made harder but not excluded by proof.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20


class Randomness(Protocol):
    """A stream of random numbers for mechanisms."""

    private: bool
    description: str

    def uniform(self, count: int) -> torch.Tensor:
        """`count` float64 values in [0, 1)."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """Independent float32 Gaussian values of standard deviation `std`."""


class SystemRandomness:
    """ChaCha20 key streams, each under its own key from the operating system; no two calls share a stream."""

    private = True
    description = "ChaCha20 keyed with 256 bits from the operating system; Box-Muller in float64, rounded to float32"

    def uniform(self, count: int) -> torch.Tensor:
        """`count` float64 values in [0, 1), multiples of 2**-53."""
        # A key a call: the block counter has 32 bits, so one long stream would end (and a random nonce, whose first
        # four bytes are the counter's start, could make it end at any time).
        stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        words = np.frombuffer(stream.update(bytes(8 * count)), dtype=np.uint64)
        return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """Independent float32 Gaussian values of standard deviation `std` (Box-Muller, both outputs used)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(half)))  # log1p(-u): u may be 0, never 1
        angle = 2.0 * math.pi * self.uniform(half)
        values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]
        return (values * std).to(torch.float32).reshape(shape)


class SeededRandomness:
    """A reproducible stream. Whoever knows the seed can subtract the noise: a run that uses it is not private."""

    private = False
    description = "SEEDED generator: reproducible, NOT PRIVATE"

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, count: int) -> torch.Tensor:
        """`count` float64 values in [0, 1)."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """Independent float32 Gaussian values of standard deviation `std`."""
        return torch.randn(tuple(shape), generator=self._generator) * std


def poisson_draw(patients: int, sample_rate: float, randomness: Randomness) -> torch.Tensor:
    """Indices (int64) of the patients that one step draws: each independently with probability `sample_rate`.

    The draw may be empty; the step then still adds noise and is still charged.
    """
    return torch.nonzero(randomness.uniform(patients) < sample_rate).flatten()
