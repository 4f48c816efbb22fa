"""Networks that grow from 8 x 8 pixels to the full size: PGGAN (Karras et al. 2018) and, with self-attention and spectral
normalisation, Enhanced-GAN.

What differs from PGGAN: both networks are conditional, by the code beside z, the tumour map as a channel of every
resolution, and a projection in the discriminator (Miyato and Koyama 2018); images pass a tanh; and there is no minibatch
standard deviation, which mixes samples, so that no patient's gradient could be clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu

from fedsynth.models.condition import TumourMap
from fedsynth.models.growth import Stage, blended, enlarged, last_level
from fedsynth.models.interfaces import ImageDiscriminator, ImageGenerator
from fedsynth.models.layers import (
    Equalised,
    PixelNorm,
    SelfAttention,
    equalised,
    equalised_linear,
    spectrally_normalised,
)
from fedsynth.plan import SMALLEST_IMAGE

_START = 4  # pixels of the first and the last feature map
_WIDEST = 8  # times the width at full size


def _widths(size: int, width: int) -> list[int]:
    """Channels of each level, from 8 x 8 pixels on: doubled at each halving of the size, as far as `_WIDEST`."""
    last = last_level(size)
    return [width * min(2 ** (last - level), _WIDEST) for level in range(last + 1)]


def _full(stage: Stage | None, last: int) -> Stage:
    """The stage, or that of the full size.

    Raises:
        ValueError: it is beyond the full size.
    """
    if stage is None:
        return Stage(last)
    if stage.level > last:
        raise ValueError(f"the network has levels 0 to {last}, and none {stage.level}")
    return stage


def _idle(stage: Stage, last: int, ends: str) -> list[str]:
    """Submodules of either network that a stage does not use; `ends` are its layers from or to images."""
    used = {stage.level} if stage.alpha == 1 else {stage.level - 1, stage.level}
    blocks = [f"blocks.{level}" for level in range(stage.level + 1, last + 1)]
    return [
        *blocks,
        *(f"{ends}.{level}" for level in range(last + 1) if level not in used),
        *(["attention"] if stage.level < last else []),
    ]


def _halved(x: Tensor) -> Tensor:
    return avg_pool2d(x, 2)


class _Up(nn.Module):
    """A level of the generator: twice the pixels, then convolutions, each with a rectifier and pixel normalisation."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        inputs = [widths[0] + 1, *widths[1:-1]]  # one more for the tumour map
        self.convolutions = nn.ModuleList(
            equalised(nn.Conv2d(a, b, 3, padding=1)) for a, b in zip(inputs, widths[1:], strict=True)
        )
        self.norm = PixelNorm()

    def forward(self, x: Tensor, tumour: Tensor) -> Tensor:
        """x (B, a, s, s), tumour (B, 1, size, size) -> (B, b, 2 s, 2 s)."""
        size = 2 * x.shape[-1]
        x = torch.cat([enlarged(x, size), avg_pool2d(tumour, tumour.shape[-1] // size)], dim=1)
        for convolution in self.convolutions:
            x = self.norm(leaky_relu(convolution(x), 0.2))
        return x


class ProgressiveGenerator(ImageGenerator):
    """(z, condition) -> image channels and mask channel, all in [-1, 1].

    Without a stage it makes images of full size, which are noise as long as the last resolutions have not trained: what
    an unfinished study is looked at by is its own stage, `fedsynth.models.growth.enlarged`.

    Args:
        attention: self-attention on what enters the last resolution.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        condition_dim: int,
        channels: int,
        size: int,
        width: int,
        tumour_map: TumourMap,
        attention: bool,
    ) -> None:
        super().__init__()
        widths = _widths(size, width)
        self.latent_dim = latent_dim
        self.tumour_map = tumour_map
        self.last = last_level(size)
        self.norm = PixelNorm()
        self.start = equalised(nn.Linear(latent_dim + condition_dim, widths[0] * _START**2))
        self.blocks = nn.ModuleList(
            _Up(*((w, w) if level == 0 else (widths[level - 1], w, w))) for level, w in enumerate(widths)
        )
        self.to_images = nn.ModuleList(equalised_linear(nn.Conv2d(w, channels, 1)) for w in widths)
        self.attention = SelfAttention(widths[-2], size // 2, equalised_linear) if attention else nn.Identity()

    def forward(self, z: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """z (B, latent_dim), condition (B, c) -> (B, channels, s, s), s the full size or that of the stage."""
        stage = _full(stage, self.last)
        x = self.start(torch.cat([self.norm(z), condition], dim=1)).reshape(len(z), -1, _START, _START)
        x = older = self.norm(leaky_relu(x, 0.2))
        tumour = self.tumour_map(condition)
        for level in range(stage.level + 1):
            older = x
            x = self.blocks[level](self.attention(x) if level == self.last else x, tumour)
        images = torch.tanh(self.to_images[stage.level](x))
        if stage.alpha == 1:
            return images
        return blended(enlarged(torch.tanh(self.to_images[stage.level - 1](older)), stage.size), images, stage.alpha)

    def idle(self, stage: Stage | None) -> list[str]:
        """Names of the submodules that a stage does not use."""
        return _idle(_full(stage, self.last), self.last, "to_images")


class ProgressiveDiscriminator(ImageDiscriminator):
    """(image and mask channels, condition) -> score that the patient's slice is real.

    It sees the condition's tumour map as one more channel.

    Args:
        attention: self-attention on what leaves the last (the largest) resolution.
        spectral_norm: normalise every weight by its largest singular value, in place of equalised learning rate.
    """

    def __init__(
        self,
        *,
        condition_dim: int,
        channels: int,
        size: int,
        width: int,
        tumour_map: TumourMap,
        attention: bool,
        spectral_norm: bool,
    ) -> None:
        super().__init__()
        widths = _widths(size, width)
        dress = spectrally_normalised if spectral_norm else equalised
        straight = spectrally_normalised if spectral_norm else equalised_linear
        self.tumour_map = tumour_map
        self.last = last_level(size)
        self.from_images = nn.ModuleList(dress(nn.Conv2d(channels + 1, w, 1)) for w in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                dress(nn.Conv2d(w, w, 3, padding=1)),
                nn.LeakyReLU(0.2),
                *([dress(nn.Conv2d(w, widths[level - 1], 3, padding=1)), nn.LeakyReLU(0.2)] if level else []),
            )
            for level, w in enumerate(widths)
        )
        self.attention = SelfAttention(widths[-2], size // 2, straight) if attention else nn.Identity()
        features = widths[0] * _START**2
        self.score = straight(nn.Linear(features, 1))
        projection = nn.Linear(condition_dim, features, bias=False)
        # With this gain the two terms of a score start at one scale.
        self.projection = spectrally_normalised(projection) if spectral_norm else Equalised(projection, features**-0.5)

    def forward(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """x (B, channels, s, s) in [-1, 1], condition (B, c) -> scores (B,), s the full size or that of the stage."""
        features = _halved(self.features(x, condition, stage)[-1]).flatten(1)
        return self.score(features)[:, 0] + (self.projection(condition) * features).sum(1)

    def features(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> list[Tensor]:
        """One map (B, C, s, s) a level: what the level below it takes, blended while a level fades in.

        From half the stage's resolution down to 8 x 8, and what the smallest level makes of that, of 8 x 8 as well.
        """
        stage = _full(stage, self.last)
        tumour = self.tumour_map(condition)
        found = []
        maps = self._entered(x, tumour, stage.level)
        for level in reversed(range(stage.level + 1)):
            maps = self.blocks[level](maps)
            if level:
                maps = _halved(maps)
            if level == self.last:
                maps = self.attention(maps)
            if level == stage.level and stage.alpha < 1:
                maps = blended(self._entered(_halved(x), tumour, level - 1), maps, stage.alpha)
            found.append(maps)
        return found

    def _entered(self, x: Tensor, tumour: Tensor, level: int) -> Tensor:
        place = avg_pool2d(tumour, tumour.shape[-1] // (SMALLEST_IMAGE * 2**level))
        return leaky_relu(self.from_images[level](torch.cat([x, place], dim=1)), 0.2)

    def idle(self, stage: Stage | None) -> list[str]:
        """Names of the submodules that a stage does not use."""
        return _idle(_full(stage, self.last), self.last, "from_images")
