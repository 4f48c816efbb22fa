"""The two small networks that measure utility: is there a tumour in this slice, and where.

Both are trained for a fixed number of steps with fixed settings. Nothing is chosen by a score, least of all on the
patients that are tested on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedsynth.progress import track

LEARNING_RATE = 2e-3


class SliceClassifier(nn.Module):
    """Convolutional network from slices (N, C, H, W) to one logit each (N,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU())
        self.head = nn.Linear(128, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,). The maximum over the plane is pooled beside the mean, for small tumours."""
        trunk = self.trunk(images)
        return self.head(torch.cat([trunk.mean(dim=(2, 3)), trunk.amax(dim=(2, 3))], dim=1))[:, 0]


class SmallUNet(nn.Module):
    """U-Net (Ronneberger et al., 2015) of three levels; the first works on 2 x 2 pixel patches, for two slow cores."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.split, self.join = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.down1 = _block(4 * channels, width)
        self.down2 = _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.up2 = _block(6 * width, 2 * width)
        self.up1 = _block(3 * width, width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, H, W) of slices (N, C, H, W); H and W are multiples of 8."""
        fine = self.down1(self.split(images))
        middle = self.down2(functional.max_pool2d(fine, 2))
        coarse = self.bottom(functional.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([middle, functional.interpolate(coarse, scale_factor=2)], dim=1))
        fine = self.up1(torch.cat([fine, functional.interpolate(middle, scale_factor=2)], dim=1))
        return self.join(self.head(fine))[:, 0]


def _block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1),
        nn.GroupNorm(4, outside),
        nn.SiLU(),
        nn.Conv2d(outside, outside, 3, padding=1),
        nn.GroupNorm(4, outside),
        nn.SiLU(),
    )


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus one minus the soft Dice of the batch (Milletari et al., 2016)."""
    probability = torch.sigmoid(logits)
    dice = (2 * (probability * masks).sum() + 1) / (probability.sum() + masks.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, masks) + 1 - dice


def fit(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    images: NDArray[np.float32],
    targets: NDArray[np.float32],
    rng: np.random.Generator,
    steps: int,
    batch: int,
    description: str,
) -> nn.Module:
    """Train a network on slices and targets for a fixed number of steps and return it, ready to predict.

    Args:
        build: makes the untrained network; its initial weights follow from `rng`.
        loss: of logits and targets.
        images: (N, C, H, W) training slices.
        targets: (N, ...) one a slice, as `loss` wants them.
        rng: source of initial weights, batches and mirror images.
        steps: Adam steps.
        batch: slices in each, drawn with replacement; half are mirrored left to right.
        description: for the progress line.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        network = build().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in track(range(steps), description, total=steps):
        rows = rng.integers(len(images), size=batch)
        slices, truth = torch.from_numpy(images[rows]), torch.from_numpy(targets[rows])
        mirrored = torch.from_numpy(rng.random(batch) < 0.5)
        slices[mirrored] = slices[mirrored].flip(-1)
        if truth.ndim > 1:
            truth[mirrored] = truth[mirrored].flip(-1)
        value = loss(network(slices), truth)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: NDArray[np.float32], chunk: int = 128) -> NDArray[np.float32]:
    """Logits of slices (N, C, H, W), in chunks."""
    parts = [network(torch.from_numpy(images[i : i + chunk])) for i in range(0, len(images), chunk)]
    return torch.cat(parts).numpy()
