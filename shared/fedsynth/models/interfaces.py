"""What networks that make or judge images have in common, whatever their architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fedsynth.models.growth import Stage


class ImageGenerator(nn.Module, ABC):
    """(z, condition) -> image channels and mask channel, all in [-1, 1].

    Attributes:
        latent_dim: length of z.
    """

    latent_dim: int

    @abstractmethod
    def forward(self, z: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """z (B, latent_dim), condition (B, c) -> (B, channels, s, s), s the plan's size or that of the stage.

        Raises:
            ValueError: a stage of a network that does not grow.
        """


class ImageDiscriminator(nn.Module, ABC):
    """(image and mask channels, condition) -> score, the larger the more the patient's slice seems real."""

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """x (B, channels, s, s) in [-1, 1], condition (B, c) -> scores (B,), without a sigmoid.

        Raises:
            ValueError: a stage of a network that does not grow.
        """

    @abstractmethod
    def features(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> list[Tensor]:
        """The feature maps (B, ...) that lead to the score, from the image inwards (Salimans et al. 2016)."""


def refuse_stage(stage: Stage | None) -> None:
    """For networks that do not grow.

    Raises:
        ValueError: there is a stage.
    """
    if stage is not None:
        raise ValueError("this network does not grow: it has no stages")
