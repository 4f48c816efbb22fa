"""Learning rates over the steps of a module's training, from a whole to a share of it."""

from __future__ import annotations

import math

import torch

from fedsynth.plan import Schedule, TrainingPlan


def rate_factor(schedule: Schedule, progress: float, final: float) -> float:
    """What a learning rate is multiplied by.

    Args:
        schedule: ``"linear"``; ``"cosine"`` (Loshchilov and Hutter 2017, without restarts); ``"exponential"``;
            ``"step"``: 1, the square root of `final`, and `final`, for a third of the training each; ``"constant"``.
        progress: share of all steps that are done, in [0, 1].
        final: the factor at the end, in (0, 1].

    Returns:
        1 at the start.
    """
    if schedule == "linear":
        return 1 - progress * (1 - final)
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "exponential":
        return float(final**progress)
    if schedule == "step":
        return float(final ** (min(int(3 * progress), 2) / 2))
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, training: TrainingPlan, step: int) -> None:
    """Set `optimizer` to what `rate` is at `step` (from 0, over all rounds) of the module's training."""
    factor = rate_factor(training.schedule, step / max(training.steps, 1), training.final_learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate * factor
