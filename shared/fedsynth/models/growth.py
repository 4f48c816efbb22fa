"""Progressive growing (Karras, Aila, Laine, Lehtinen 2018): at which resolution a step trains, and on which parameters.

A growing network holds the layers of all resolutions from the start, so what travels keeps its names and shapes and a site's
ledger its history. At each stage only a part of them is used. The rest must neither train nor be noised, nor be counted in
the norm of a patient's gradient: `active_parameters` says which part it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from fedsynth.plan import SMALLEST_IMAGE, StudyPlan


@dataclass(frozen=True)
class Stage:
    """Where growth stands.

    Attributes:
        level: 0 at 8 x 8 pixels, one more at each doubling.
        alpha: weight of the newest resolution, in (0, 1]; the next smaller one has the rest. 1 at level 0.

    Raises:
        ValueError: a value is outside its range.
    """

    level: int
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.level < 0 or not 0 < self.alpha <= 1 or (self.level == 0 and self.alpha != 1):
            raise ValueError(f"there is no stage of level {self.level} and alpha {self.alpha}")

    @property
    def size(self) -> int:
        """Pixels a side of what networks make and see at this stage."""
        return SMALLEST_IMAGE * 2**self.level


@runtime_checkable
class Growing(Protocol):
    """A network of one part a resolution."""

    def idle(self, stage: Stage | None) -> list[str]:
        """Names of the submodules that a stage does not use; None is the full size."""


def last_level(size: int) -> int:
    """The level whose images have `size` pixels a side."""
    return (size // SMALLEST_IMAGE).bit_length() - 1


def stage_at(plan: StudyPlan, step: int) -> Stage | None:
    """The stage of a private step of the module ``gan``, counted over all rounds from 0.

    A resolution trains for as many rounds as `plan.gan.growth` says. Over the first `plan.gan.fade_in` (a share, rounded)
    of its steps alpha rises evenly to 1, from above 0; the smallest resolution has nothing to be blended with. A step
    beyond the plan's last is at full size.

    Returns:
        The stage, or None: nothing grows in this plan.

    Raises:
        ValueError: `step` is negative.
    """
    if step < 0:
        raise ValueError(f"there is no step {step}")
    if not plan.gan.growth:
        return None
    lengths = [rounds * plan.gan.steps_per_round for rounds in plan.gan.growth]
    for level, (length, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
        if step < end:
            faded = round(plan.gan.fade_in * length) if level else 0
            done = step - (end - length) + 1
            return Stage(level, done / faded if done < faded else 1.0)
    return Stage(len(lengths) - 1)


def at_stage(images: Tensor, stage: Stage | None, size: int) -> Tensor:
    """Real images as a stage's discriminator sees them, each by itself.

    Averaged down to the stage's resolution; while it fades in, blended with the next smaller one, as what the generator
    makes is.

    Args:
        images: (B, C, size, size).
        stage: None leaves them as they are.
        size: of the plan's images.

    Returns:
        (B, C, s, s), s being the stage's resolution.
    """
    if stage is None:
        return images
    shown = images if stage.size == size else avg_pool2d(images, size // stage.size)
    return shown if stage.alpha == 1 else blended(enlarged(avg_pool2d(shown, 2), stage.size), shown, stage.alpha)


def enlarged(images: Tensor, size: int) -> Tensor:
    """Images (B, C, s, s) with each pixel as a square of pixels, (B, C, size, size): how early stages are looked at."""
    return images if images.shape[-1] == size else interpolate(images, scale_factor=size // images.shape[-1])


def blended(older: Tensor, newer: Tensor, alpha: float) -> Tensor:
    """What fades out and what fades in, of one shape; alpha 1 is the newer."""
    return (1 - alpha) * older + alpha * newer


def active_parameters(model: nn.Module, stage: Stage | None) -> list[str]:
    """Names of the parameters that a stage uses, in the model's order; all of those of a network that does not grow.

    Only these train, are noised and count in a patient's norm. Of a network without growth in its plan (`stage` None),
    what only smaller resolutions use is never active.
    """
    idle = tuple(f"{name}." for name in model.idle(stage)) if isinstance(model, Growing) else ()
    return [name for name, _ in model.named_parameters() if not name.startswith(idle)]
