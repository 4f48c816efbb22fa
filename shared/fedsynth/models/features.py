"""A small public network that describes a slice, and what is read off it: the features of a private mean embedding.

The network is trained on public data only (`fedsynth_simulations.feature_network`). No layer mixes samples, and none
normalises a slice by its own intensities, since the brightness of tissues is what scanners differ in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 48)
HIDDEN = 48
_BINS = 8
_GRID = 8  # pixels a side of the picture that is itself a feature


class FeatureNetwork(nn.Module):
    """Image channels (without the mask) -> a description of the slice and a coarse map of the tumour.

    Args:
        channels: image channels C.
        targets: numbers that the network is trained to predict.
    """

    def __init__(self, channels: int, targets: int) -> None:
        super().__init__()
        self.channels = channels
        first, second, third = WIDTHS
        self.down1 = nn.Conv2d(channels, first, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.down3 = nn.Conv2d(second, third, 4, stride=2, padding=1)
        self.hidden = nn.Linear(2 * third, HIDDEN)
        self.describe = nn.Linear(HIDDEN, targets)
        self.locate = nn.Conv2d(second + third, 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) in [-1, 1] -> logits (B, T) of the targets and (B, H / 4, W / 4) of the tumour in a patch."""
        _, _, hidden, tumour = self.activations(images)
        return self.describe(hidden), tumour

    def activations(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fine (B, 16, H/2, W/2) and middle (B, 32, H/4, W/4) maps, hidden description (B, 48), tumour logits."""
        fine = functional.silu(self.down1(images))
        middle = functional.silu(self.down2(fine))
        coarse = functional.silu(self.down3(middle))
        hidden = functional.silu(self.hidden(torch.cat([coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3))], dim=1)))
        above = functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        return fine, middle, hidden, self.locate(torch.cat([middle, above], dim=1))[:, 0]


def describe_slices(network: FeatureNetwork, slices: Tensor) -> Tensor:
    """What is measured in each slice, before any centring: (B, M), differentiable in the slices.

    Four kinds of features: the network's (of the whole plane, and inside the mask), how well the mask channel fits the
    tumour that the network sees, the intensities inside and outside the mask (moments and soft histograms, mean square
    differences between neighbours for noise and sharpness), and the slice itself on a coarse grid.

    Args:
        network: the public network.
        slices: (B, C + 1, H, W) in [-1, 1]: image channels and mask channel.
    """
    images, mask = slices[:, :-1], (slices[:, -1:] + 1) / 2
    fine, middle, hidden, logits = network.activations(images)
    patches = functional.adaptive_avg_pool2d(mask, middle.shape[-1])
    seen = torch.sigmoid(logits)[:, None]
    area = mask.mean(dim=(2, 3))
    fit = [(seen * patches).mean(dim=(2, 3)), seen.mean(dim=(2, 3)), area, (mask * (1 - mask)).mean(dim=(2, 3))]
    unit = (images + 1) / 2
    return torch.cat(
        [
            fine.mean(dim=(2, 3)),
            middle.mean(dim=(2, 3)),
            hidden,
            (middle * patches).mean(dim=(2, 3)),
            *fit,
            *_intensities(unit, mask),
            functional.adaptive_avg_pool2d(slices, _GRID).flatten(1),
        ],
        dim=1,
    )


def _intensities(unit: Tensor, mask: Tensor) -> list[Tensor]:
    """Statistics of images (B, C, H, W) in [0, 1] over the plane, and the same inside the mask."""
    centres = torch.linspace(0, 1, _BINS, dtype=unit.dtype)
    found = []
    for c in range(unit.shape[1]):
        channel = unit[:, c : c + 1]
        bins = torch.exp(-0.5 * ((channel - centres[None, :, None, None]) * (_BINS - 1)) ** 2)
        found += [bins.mean(dim=(2, 3)), (bins * mask).mean(dim=(2, 3))]
        found += [(channel * unit[:, d : d + 1]).mean(dim=(2, 3)) for d in range(c, unit.shape[1])]
        for step in (1, 2):
            across = (channel[..., step:] - channel[..., :-step]) ** 2
            found.append(across.mean(dim=(2, 3)))
            found.append((across * mask[..., step:]).mean(dim=(2, 3)))
    return found


def features_size(channels: int) -> int:
    """M of `describe_slices` for C image channels."""
    first, second, _ = WIDTHS
    pairs = channels * (channels + 1) // 2
    return first + 2 * second + HIDDEN + 4 + channels * (2 * _BINS + 4) + pairs + (channels + 1) * _GRID**2


def make_feature_network(state: dict[str, Tensor]) -> FeatureNetwork:
    """The network whose weights `state` holds, frozen."""
    network = FeatureNetwork(state["down1.weight"].shape[1], state["describe.weight"].shape[0])
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
