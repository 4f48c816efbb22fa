"""The 1,508 real slices as a federated task: sites, test set, public slices, and the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from fedsynth.evaluation.networks import fit, predict
from fedsynth.metrics.roc_auc import macro_auc
from fedsynth_simulations.benchmarking.cohorts import load_public
from fedsynth_simulations.cohort.public import PublicCohort
from fedsynth_simulations.extractor import extractor_task

SIZE = 32
CLASSES = ("glioma", "meningioma", "pituitary")
# Where, as shares of a class in the order of its numbers, sites and test set lie.
_RANGES: dict[str, tuple[float, float]] = {"a": (0.0, 0.27), "b": (0.27, 0.53), "test": (0.53, 0.73), "c": (0.73, 1.0)}
_PUBLIC_PATIENTS = 300


@dataclass(frozen=True)
class Slices:
    """Grey slices (N, H, H) float32 in [0, 1] and their classes (N,)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)  # hashed by identity: what is made of its public slices is kept
class Task:
    """Sites, test set and public slices (N, 32, 32) with their targets."""

    sites: dict[str, Slices]
    test: Slices
    public: NDArray[np.float32]
    targets: NDArray[np.float32]

    @property
    def train(self) -> Slices:
        """All sites' slices."""
        parts = list(self.sites.values())
        return Slices(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))


def load_parts(data: Path, size: int = SIZE) -> dict[str, Slices]:
    """The sites ``a``, ``b``, ``c`` and the ``test`` set at `size` pixels, by contiguous ranges of each class's numbers."""
    parts: dict[str, list[Slices]] = {name: [] for name in _RANGES}
    for code, name in enumerate(CLASSES):
        paths = sorted((data / name).glob("*.png"), key=lambda path: int(path.stem))
        images = np.stack([_prepared(path, size) for path in paths])
        for part, (low, high) in _RANGES.items():
            chosen = images[round(low * len(paths)) : round(high * len(paths))]
            parts[part].append(Slices(chosen, np.full(len(chosen), code, dtype=np.int64)))
    return {
        part: Slices(np.concatenate([p.images for p in found]), np.concatenate([p.labels for p in found]))
        for part, found in parts.items()
    }


def load_task(data: Path, cohorts: Path) -> Task:
    merged = load_parts(data)
    public = load_public(cohorts, _PUBLIC_PATIENTS, 64)
    cohort = PublicCohort(public.images, public.masks, public.morphology.astype(np.float64), public.labels)
    slices, targets = extractor_task(cohort)
    t1c = slices[:, 1].reshape(len(slices), SIZE, 64 // SIZE, SIZE, 64 // SIZE).mean(axis=(2, 4))
    return Task({name: merged[name] for name in ("a", "b", "c")}, merged["test"], scaled(t1c), targets)


def _prepared(path: Path, size: int) -> NDArray[np.float32]:
    """(size, size): block means, scaled by the slice's own brightest pixels; no statistic over slices."""
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"), dtype=np.float32)
    factor = len(grey) // size
    return scaled(grey.reshape(size, factor, size, factor).mean(axis=(1, 3))[None])[0]


def scaled(slices: NDArray[np.floating]) -> NDArray[np.float32]:
    bright = np.quantile(slices, 0.99, axis=(1, 2), keepdims=True)
    return np.clip(slices / np.maximum(bright, 1e-3), 0, 1).astype(np.float32)


class ClassNetwork(nn.Module):
    """Slices (N, C, 32, 32) -> class logits (N, K); the yardstick."""

    def __init__(self, channels: int = 1, classes: int = len(CLASSES)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((channels, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(8, outside), nn.SiLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.layers(images)


def train_class_network(
    images: NDArray[np.float32], labels: NDArray[np.int64], seed: int, classes: int = len(CLASSES), steps: int = 300
) -> nn.Module:
    """A class network of slices (N, C, 32, 32), trained for a fixed number of steps."""
    # `fit` seeds the weights; dropout draws from torch's global stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fit(
            lambda: ClassNetwork(images.shape[1], classes),
            functional.cross_entropy,
            images,
            labels,  # type: ignore[arg-type]  # `fit` hands targets to the loss as they are
            np.random.default_rng([seed, 9]),
            steps,
            64,
            "Training a class network",
        )


def classify(train: Slices, test: Slices, seed: int) -> dict[str, float | None]:
    logits = predict(train_class_network(train.images[:, None], train.labels, seed), test.images[:, None])
    return {
        "accuracy": round(float((logits.argmax(axis=1) == test.labels).mean()), 4),
        "auc": round(macro_auc(logits, test.labels), 4),
    }
