"""Conditional DCGAN (Radford, Metz, Chintala 2016) over image channels plus one mask channel.

The discriminator scores with a projection on the condition (Miyato and Koyama 2018) and normalises by groups, since a
layer that mixes samples has no per-patient gradient. The generator modulates each stage by the condition (FiLM, Perez et
al. 2018) and also normalises by groups, so that it has no running statistics to average over sites.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsynth.models.condition import TumourMap

_START = 4  # pixels of the first feature map


def _stages(size: int) -> int:
    return (size // _START).bit_length() - 1


class Generator(nn.Module):
    """(z, condition) -> image channels and mask channel, all in [-1, 1].

    Every stage sees the condition's tumour map beside its features.
    """

    def __init__(
        self, *, latent_dim: int, condition_dim: int, channels: int, size: int, width: int, tumour_map: TumourMap
    ) -> None:
        super().__init__()
        stages = _stages(size)
        widths = [width * 2**i for i in reversed(range(stages))]
        self.latent_dim = latent_dim
        self.tumour_map = tumour_map
        self.start = nn.Linear(latent_dim + condition_dim, widths[0] * _START**2)
        self.norms = nn.ModuleList(nn.GroupNorm(min(8, w), w, affine=False) for w in widths)
        self.modulations = nn.ModuleList(nn.Linear(latent_dim + condition_dim, 2 * w) for w in widths)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a + 1, b, 4, stride=2, padding=1)
            for a, b in zip(widths, [*widths[1:], width], strict=True)
        )
        self.last = nn.Conv2d(width + 1, channels, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """z (B, latent_dim), condition (B, c) -> (B, channels, size, size)."""
        code = torch.cat([z, condition], dim=1)
        x = self.start(code).reshape(len(z), -1, _START, _START)
        tumour = self.tumour_map(condition)
        for norm, modulation, up in zip(self.norms, self.modulations, self.ups, strict=True):
            scale, shift = modulation(code)[:, :, None, None].chunk(2, dim=1)
            place = nn.functional.adaptive_avg_pool2d(tumour, x.shape[-1])
            x = up(torch.cat([torch.relu(norm(x) * (1 + scale) + shift), place], dim=1))
        return torch.tanh(self.last(torch.cat([torch.relu(x), tumour], dim=1)))


class Discriminator(nn.Module):
    """(image and mask channels, condition) -> logit that the patient's slice is real.

    It sees the condition's tumour map as one more channel.
    """

    def __init__(self, *, condition_dim: int, channels: int, size: int, width: int, tumour_map: TumourMap) -> None:
        super().__init__()
        self.tumour_map = tumour_map
        widths = [width * 2**i for i in range(_stages(size))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([channels + 1, *widths], widths, strict=False)):
            layers.append(nn.Conv2d(a, b, 4, stride=2, padding=1))
            if i > 0:
                layers.append(nn.GroupNorm(min(8, b), b))
            layers.append(nn.LeakyReLU(0.2))
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * _START**2
        self.score = nn.Linear(features, 1)
        self.projection = nn.Linear(condition_dim, features, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, channels, size, size) in [-1, 1], condition (B, c) -> logits (B,)."""
        features = self.trunk(torch.cat([x, self.tumour_map(condition)], dim=1))
        alignment = (self.projection(condition) * features).mean(1)
        return self.score(features)[:, 0] + alignment


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw convolution weights from N(0, 0.02), as DCGAN does, and linear weights from N(0, 1 / fan-in); biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            std = module.in_features**-0.5 if isinstance(module, nn.Linear) else 0.02
            with torch.no_grad():
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
