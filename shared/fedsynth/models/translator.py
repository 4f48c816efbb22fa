"""The networks that translate slices between two domains without pairs (CycleGAN, Zhu, Park, Isola, Efros 2017).

Two generators and two discriminators of eight layers each: a layer is a convolution with its normalisation and activation.
The normalisation is of each map of each slice by itself and has no parameters (Ulyanov, Vedaldi, Lempitsky 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsynth.domains import section_of
from fedsynth.plan import StudyPlan


class _Residual(nn.Module):
    """Two layers beside a straight way (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, s, s) -> the same shape."""
        return x + self.layers(x)


class Translator(nn.Module):
    """A slice of one domain -> the slice that it would be in the other, in [-1, 1].

    Eight layers at every image size: one of 7 x 7, one that halves the size, two residual blocks of two layers, a
    transposed one back to the full size, and one of 7 x 7. A pixel comes from what lies within 17 pixels of it, and from
    each map's mean and spread over the slice.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 7, padding=3),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.InstanceNorm2d(2 * width),
            nn.ReLU(),
            _Residual(2 * width),
            _Residual(2 * width),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 7, padding=3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, s, s) in [-1, 1] -> the same shape and range."""
        return torch.tanh(self.layers(x))


class DomainDiscriminator(nn.Module):
    """A slice -> score that it is a real one of the domain: the mean over scores of patches (Isola et al. 2017).

    Eight layers at every image size, of which the first, third and fifth halve it: there are (s / 8)^2 patches.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            halves = i in (0, 2, 4)
            layers.append(nn.Conv2d(a, b, 4, stride=2, padding=1) if halves else nn.Conv2d(a, b, 3, padding=1))
            if i > 0:
                layers.append(nn.InstanceNorm2d(b))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, s, s) in [-1, 1] -> scores (B,)."""
        patches: Tensor = self.layers(x)
        return patches.mean(dim=(1, 2, 3))


def domain_channels(plan: StudyPlan) -> int:
    """Image channels of a slice of either domain: one sequence, or all of them; the mask is no part of it.

    Raises:
        ValueError: the plan has no section translation.
    """
    return len(plan.image.sequences) if section_of(plan).domains == "tumour" else 1


def make_translators(plan: StudyPlan) -> nn.ModuleDict:
    """The two generators, with fresh weights: ``"to_target"``, which takes the source, and ``"to_source"``.

    Raises:
        ValueError: the plan has no section translation.
    """
    channels, width = domain_channels(plan), section_of(plan).width
    return nn.ModuleDict({name: Translator(channels, width) for name in ("to_target", "to_source")})


def make_domain_discriminators(plan: StudyPlan) -> nn.ModuleDict:
    """The discriminators of the two domains, ``"source"`` and ``"target"``, with fresh weights; they stay at a site.

    Raises:
        ValueError: the plan has no section translation.
    """
    channels, width = domain_channels(plan), section_of(plan).width
    return nn.ModuleDict({name: DomainDiscriminator(channels, width) for name in ("source", "target")})
