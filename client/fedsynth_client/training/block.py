"""What every block of private steps has in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.dp.randomness import Randomness
from fedsynth.records import State


@dataclass(frozen=True)
class BlockResult:
    """Outcome of one block.

    Attributes:
        weights: what is released: the module's new weights.
        progress: quantities that are post-processing of noisy states and synthetic data (closed list in
            `fedsynth.records.PROGRESS`).
        local: state that stays at the site for the next block (a discriminator and optimiser moments).
    """

    weights: State
    progress: dict[str, float]
    local: State


def update_norm(before: State, after: State) -> float:
    """Euclidean norm of the change of the weights."""
    return float(torch.sqrt(sum((after[name] - before[name]).double().pow(2).sum() for name in before)))  # type: ignore[arg-type]


def detached(state: dict[str, Tensor]) -> State:
    """A copy of a state dict that shares no memory with the model."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def public_generator(randomness: Randomness) -> torch.Generator:
    """A torch generator for draws that need no secrecy but must differ between runs, seeded from `randomness`."""
    return torch.Generator().manual_seed(int(randomness.uniform(1).item() * 2**53))
