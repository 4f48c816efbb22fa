"""Conditional DCGAN (Radford, Metz, Chintala 2016) over image channels plus one mask channel.

The discriminator scores with a projection on the condition (Miyato and Koyama 2018) and normalises by groups, since a
layer that mixes samples has no per-patient gradient. The generator modulates each stage by the condition (FiLM, Perez et
al. 2018) and also normalises by groups, so that it has no running statistics to average over sites.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fedsynth.models.condition import TumourMap
from fedsynth.models.growth import Stage
from fedsynth.models.interfaces import ImageDiscriminator, ImageGenerator, refuse_stage
from fedsynth.models.layers import Equalised, Weighted, spectrally_normalised

_START = 4  # pixels of the first feature map


def halvings(size: int) -> int:
    """How often `size` pixels a side are halved down to 4."""
    return (size // _START).bit_length() - 1


class Generator(ImageGenerator):
    """(z, condition) -> image channels and mask channel, all in [-1, 1].

    Every stage sees the condition's tumour map beside its features.
    """

    def __init__(
        self, *, latent_dim: int, condition_dim: int, channels: int, size: int, width: int, tumour_map: TumourMap
    ) -> None:
        super().__init__()
        stages = halvings(size)
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

    def forward(self, z: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """z (B, latent_dim), condition (B, c) -> (B, channels, size, size)."""
        refuse_stage(stage)
        code = torch.cat([z, condition], dim=1)
        x = self.start(code).reshape(len(z), -1, _START, _START)
        tumour = self.tumour_map(condition)
        for norm, modulation, up in zip(self.norms, self.modulations, self.ups, strict=True):
            scale, shift = modulation(code)[:, :, None, None].chunk(2, dim=1)
            place = nn.functional.adaptive_avg_pool2d(tumour, x.shape[-1])
            x = up(torch.cat([torch.relu(norm(x) * (1 + scale) + shift), place], dim=1))
        return torch.tanh(self.last(torch.cat([torch.relu(x), tumour], dim=1)))


class Discriminator(ImageDiscriminator):
    """(image and mask channels, condition) -> logit that the patient's slice is real.

    It sees the condition's tumour map as one more channel.

    Args:
        norm: of feature maps, from the second layer on. ``"batch"`` is the DCGAN's own and mixes samples: private training
            refuses it.
        spectral_norm: normalise every weight by its largest singular value (Miyato et al. 2018), in place of `norm`, which
            would undo it: what a norm returns does not depend on the scale of the weights before it. The projection is
            then an inner product, as Miyato and Koyama have it.

    Raises:
        ValueError: batch and spectral normalisation together.
    """

    def __init__(
        self,
        *,
        condition_dim: int,
        channels: int,
        size: int,
        width: int,
        tumour_map: TumourMap,
        norm: Literal["group", "batch"] = "group",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if norm == "batch" and spectral_norm:
            raise ValueError("batch normalisation would undo spectral normalisation")
        self.tumour_map = tumour_map
        self._spectral_norm = spectral_norm

        widths = [width * 2**i for i in range(halvings(size))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([channels + 1, *widths], widths, strict=False)):
            layers.append(nn.Conv2d(a, b, 4, stride=2, padding=1))
            if i > 0 and not spectral_norm:
                layers.append(nn.BatchNorm2d(b) if norm == "batch" else nn.GroupNorm(min(8, b), b))
            layers.append(nn.LeakyReLU(0.2))
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * _START**2
        self.score = nn.Linear(features, 1)
        self.projection = nn.Linear(condition_dim, features, bias=False)
        if spectral_norm:
            for layer in list(self.modules()):
                if isinstance(layer, Weighted):
                    spectrally_normalised(layer)

    def forward(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> Tensor:
        """x (B, channels, size, size) in [-1, 1], condition (B, c) -> logits (B,)."""
        refuse_stage(stage)
        features = self.trunk(torch.cat([x, self.tumour_map(condition)], dim=1))
        aligned = self.projection(condition) * features
        return self.score(features)[:, 0] + (aligned.sum(1) if self._spectral_norm else aligned.mean(1))

    def features(self, x: Tensor, condition: Tensor, stage: Stage | None = None) -> list[Tensor]:
        """One map (B, C, s, s) a layer, behind its rectifier, from half of `size` down to 4 x 4."""
        refuse_stage(stage)
        found = []
        maps = torch.cat([x, self.tumour_map(condition)], dim=1)
        for layer in list(self.trunk)[:-1]:
            maps = layer(maps)
            if isinstance(layer, nn.LeakyReLU):
                found.append(maps)
        return found


_POWER_ITERATIONS = 15  # as many as torch makes at the start


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw fresh weights: convolutions' from N(0, 0.02), as DCGAN does, linear layers' from N(0, 1 / fan-in); biases zero.

    Behind equalised learning rate they are N(0, 1), since the constant is before the layer. Behind spectral normalisation
    it is the raw weights that are drawn, and the vectors of the power iteration are drawn anew.
    """
    unit = {id(module.layer) for module in model.modules() if isinstance(module, Equalised)}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            std = module.in_features**-0.5 if isinstance(module, nn.Linear) else 0.02
            if parametrize.is_parametrized(module, "weight"):
                _draw_behind_spectral_norm(module, std, generator)
            else:
                module.weight.normal_(0.0, 1.0 if id(module) in unit else std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()


def _draw_behind_spectral_norm(layer: nn.Module, std: float, generator: torch.Generator) -> None:
    chain = layer.get_submodule("parametrizations.weight")
    assert isinstance(chain, parametrize.ParametrizationList)
    norm, raw = chain[0], chain.original
    assert isinstance(norm, _SpectralNorm) and isinstance(raw, nn.Parameter)
    raw.normal_(0.0, std, generator=generator)
    matrix = norm._reshape_weight_to_matrix(raw)
    norm._u.copy_(nn.functional.normalize(torch.randn(matrix.shape[0], generator=generator), dim=0))
    norm._v.copy_(nn.functional.normalize(torch.randn(matrix.shape[1], generator=generator), dim=0))
    norm._power_method(matrix, _POWER_ITERATIONS)
