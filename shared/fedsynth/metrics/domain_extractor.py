"""The feature network behind FID, KID, precision and recall: small, of the domain, trained on public data only.

Published FID uses an Inception network trained on photographs. This one works offline and sees what matters in a
slice of the brain, so its distances can be compared with each other, **not with published FID**. Whoever evaluates
names it (`DomainExtractor.name`), because another extractor gives other numbers.

In training, half of the slices show one sequence only, the others being zero. So the network also has features of a
single sequence (`alone`), and a fault in one sequence is not diluted by those that are right.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

SIZE = 64
NUM_FEATURES = 64


class DomainExtractor(nn.Module):
    """Convolutional network from a slice to `NUM_FEATURES` features, each of variance 1 over its training slices.

    Args:
        channels: image channels of a slice.
        num_targets: what it is trained to predict.
        provenance: which public data it was trained on, for `name`.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, channels: int, num_targets: int, provenance: str) -> None:
        super().__init__()
        self.channels, self.num_features, self.provenance = channels, NUM_FEATURES, provenance
        layers: list[nn.Module] = []
        for inside, outside in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, NUM_FEATURES))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, num_targets))
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("sd", torch.ones(NUM_FEATURES))

    @property
    def name(self) -> str:
        """Provenance and the first digits of the SHA-256 of the weights: equal names give comparable numbers."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        weights = digest.hexdigest()[:12]
        return f"domain CNN, {self.num_features} features, trained on {self.provenance} (weights {weights})"

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) of slices (N, C, H, W) in [0, 1]; other sizes than 64 x 64 are resampled."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        return (self.trunk(images) - self.mean) / self.sd

    def logits(self, images: Tensor) -> Tensor:
        """Predicted targets (N, T) as logits."""
        return self.head(self(images) * self.sd + self.mean)


def alone(images: NDArray[np.floating], channel: int) -> NDArray[np.floating]:
    """Slices (N, C, H, W) with every channel but one set to zero, as the network saw half of its training slices."""
    single = np.zeros_like(images)
    single[:, channel] = images[:, channel]
    return single


@torch.no_grad()
def extract(extractor: DomainExtractor, images: NDArray[np.floating], chunk: int = 256) -> NDArray[np.float64]:
    """Features (N, D) of slices (N, C, H, W) in [0, 1].

    Raises:
        ValueError: the slices have another number of channels than the extractor.
    """
    if images.shape[1] != extractor.channels:
        raise ValueError(f"the extractor takes {extractor.channels} channels, the slices have {images.shape[1]}")
    extractor.eval()
    parts = [
        extractor(torch.from_numpy(images[i : i + chunk].astype(np.float32))) for i in range(0, len(images), chunk)
    ]
    return torch.cat(parts).double().numpy() if parts else np.zeros((0, extractor.num_features))


def train_extractor(
    images: NDArray[np.floating],
    targets: NDArray[np.floating],
    generator: torch.Generator,
    provenance: str = "a public cohort",
    steps: int = 400,
    batch: int = 64,
) -> DomainExtractor:
    """Train an extractor, without privacy, so on **public** data only.

    Args:
        images: (N, C, H, W) public slices in [0, 1].
        targets: (N, T) in [0, 1], e.g. presence of tumour and normalised morphology; NaN where unknown.
        generator: source of initial weights and batches.
        provenance: which public data this is; it becomes part of the extractor's name.
        steps: Adam steps.
        batch: slices in each.

    Raises:
        ValueError: no slices, or targets outside [0, 1].
    """
    known = np.isfinite(targets)
    if not len(images) or len(images) != len(targets):
        raise ValueError(f"images and targets must be as many and at least one, not {len(images)} and {len(targets)}")
    if not known.any() or targets[known].min() < 0 or targets[known].max() > 1:
        raise ValueError("targets must lie in [0, 1], with at least one known")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        extractor = DomainExtractor(images.shape[1], targets.shape[1], provenance)
    truth = torch.from_numpy(np.where(known, targets, 0.0)).float()
    weight = torch.from_numpy(known).float()
    optimizer = torch.optim.Adam(extractor.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        slices = torch.from_numpy(images[rows.numpy()].astype(np.float32))
        shown = _shown(batch, images.shape[1], generator)
        # Cross-entropy with a target between 0 and 1 is smallest at the target, so it serves presence and extent alike.
        loss = functional.binary_cross_entropy_with_logits(extractor.logits(slices * shown), truth[rows], weight[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    sample = torch.randperm(len(images), generator=generator)[:2048].numpy()
    features = torch.from_numpy(extract(extractor, images[sample])).float()
    extractor.mean.copy_(features.mean(dim=0))
    extractor.sd.copy_(features.std(dim=0, correction=0).clamp_min(1e-6))
    return extractor.eval().requires_grad_(False)


def _shown(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """(batch, C, 1, 1): 1 for the channels that a slice shows, which in half of the slices is a single one."""
    single = functional.one_hot(torch.randint(channels, (batch,), generator=generator), channels).float()
    every = torch.rand(batch, 1, generator=generator) < 0.5
    return torch.where(every, torch.ones_like(single), single)[..., None, None]
