"""Layers of the growing networks. None of them lets one sample see another, so each patient's gradient is its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.nn.utils.parametrizations import spectral_norm

Weighted = nn.Linear | nn.Conv2d
# What is done to each layer of a network: equalised learning rate, or spectral normalisation.
Dress = Callable[[Weighted], nn.Module]
_Layer = TypeVar("_Layer", bound=Weighted)

RELU_GAIN = math.sqrt(2)  # keeps variance behind a rectifier (He et al. 2015)
_KEYS = 32  # pixels a side: 1,024 keys


class PixelNorm(nn.Module):
    """Each pixel's features to a mean square of 1 (Karras et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Scale(nn.Module):
    """x times one learned number. A layer of its own, so that its gradient by patient has an exact rule.

    Args:
        start: the number's first value.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape."""
        return x * self.weight


class Equalised(nn.Module):
    """A layer of weights N(0, 1) whose input is scaled, so that all layers learn at one rate (Karras et al. 2018).

    The constant stands before the layer, which is then an ordinary one: its gradients by patient are those of any layer.
    """

    def __init__(self, layer: Weighted, gain: float) -> None:
        super().__init__()
        self.layer = layer
        self.gain = gain / math.sqrt(layer.weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of its scaled input."""
        return self.layer(x * self.gain)


def equalised(layer: Weighted) -> nn.Module:
    """The layer with equalised learning rate, before a rectifier."""
    return Equalised(layer, RELU_GAIN)


def equalised_linear(layer: Weighted) -> nn.Module:
    """The layer with equalised learning rate, with no rectifier after it."""
    return Equalised(layer, 1.0)


def spectrally_normalised(layer: _Layer) -> _Layer:
    """The same layer with its weight divided by its largest singular value (Miyato et al. 2018); the raw weight trains.

    Without equalised learning rate, whose constant would be one more bound on the slope.
    """
    spectral_norm(layer)
    return layer


class SelfAttention(nn.Module):
    """Every pixel looks at all pixels of its own image (Zhang et al. 2019, SAGAN): x + gamma * attention(x).

    f, g and h are 1 x 1 convolutions, gamma is learned and starts at 0, where the layer is the identity. Keys and values
    are max-pooled to half the size, as in BigGAN (Brock et al. 2019), and to 32 x 32 at most: what every pixel of a
    128 x 128 map thinks of every other would take 1 GB an image, of 32 x 32 keys 64 MB.

    Args:
        channels: of its input and output.
        size: pixels a side of its input.
        dress: what is done to f, g and h.
        keys: pixels a side that pooled keys and values have at most.
    """

    def __init__(self, channels: int, size: int, dress: Dress, keys: int = _KEYS) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.f = dress(nn.Conv2d(channels, inner, 1))
        self.g = dress(nn.Conv2d(channels, inner, 1))
        self.h = dress(nn.Conv2d(channels, channels, 1))
        self.gamma = Scale(0.0)
        self._pool = max(size // keys, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, size, size) -> the same shape."""
        keys, queries, values = self._pooled(self.f(x)), self.g(x).flatten(2), self._pooled(self.h(x))
        looks = torch.softmax(queries.transpose(1, 2) @ keys, dim=2)  # (B, pixels, keys)
        return x + self.gamma((values @ looks.transpose(1, 2)).reshape(x.shape))

    def _pooled(self, maps: Tensor) -> Tensor:
        return max_pool2d(maps, self._pool).flatten(2)
