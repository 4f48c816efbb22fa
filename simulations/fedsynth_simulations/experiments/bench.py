"""What a measure is given: trained columns, slices drawn from each, and real slices to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedsynth.metrics.bootstrap import bootstrap_interval
from fedsynth_simulations.benchmarking.slices import SIZE, train_class_network
from fedsynth_simulations.experiments.data import ImageData, flat
from fedsynth_simulations.experiments.drawing import Drawn
from fedsynth_simulations.experiments.run import Experiment
from fedsynth_simulations.experiments.training import Trained
from fedsynth_simulations.experiments.values import Cell, Curves, Row, Table

REAL = "real"  # the column in which real training data stand where synthetic ones do


@dataclass(frozen=True)
class RealSlices:
    """Real slices: images (M, C, H, W) in [0, 1], masks (M, H, W), classes (M,), and whose each is (M,)."""

    images: NDArray[np.float32]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    owners: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.integer]) -> RealSlices:
        """The slices `rows`."""
        return RealSlices(self.images[rows], self.masks[rows], self.labels[rows], self.owners[rows])


@dataclass(frozen=True)
class Bench:
    """Everything that a measure may look at.

    Attributes:
        experiment: the run.
        data: real images.
        trained: by column.
        drawn: synthetic slices by column, as many of each class.
        classifier_steps, unet_steps: of the networks that measure.
    """

    experiment: Experiment
    data: ImageData
    trained: Mapping[str, Trained]
    drawn: Mapping[str, Drawn]
    classifier_steps: int
    unet_steps: int

    @cached_property
    def train(self) -> RealSlices:
        """All sites' training slices."""
        images, masks, labels = flat(self.data.train)
        return RealSlices(images, masks, labels, _owners(len(self.data.train), len(labels)))

    @cached_property
    def test(self) -> RealSlices:
        """The test slices."""
        images, masks, labels = flat(self.data.test)
        return RealSlices(images, masks, labels, _owners(len(self.data.test), len(labels)))

    @cached_property
    def classifier(self) -> nn.Module:
        """A class network trained on the real training slices at 32 x 32 pixels."""
        return self.class_network(self.train.images, self.train.labels)

    def class_network(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> nn.Module:
        """A class network trained on slices whose class is known."""
        known = labels >= 0
        seed, classes = self.experiment.spec.seed, len(self.data.label.classes)
        return train_class_network(at_32(images[known]), labels[known], seed, classes, self.classifier_steps)

    def rng(self, purpose: int) -> np.random.Generator:
        """A random stream of its own for each purpose."""
        return np.random.default_rng([self.experiment.spec.seed, purpose])


@dataclass(frozen=True)
class Measured:
    """What a measure found: rows of the main table, tables and curves of its own, remarks."""

    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Measure = Callable[[Bench], Measured]


def at_32(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Slices (N, C, H, W) at the 32 x 32 pixels of the class network, smoothed before they are made smaller."""
    if images.shape[-1] == SIZE:
        return images
    resized = functional.interpolate(torch.from_numpy(images), (SIZE, SIZE), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.numpy())


def with_interval(
    statistic: Callable[[NDArray[np.int64]], float], owners: NDArray[np.int64], rng: np.random.Generator, note: str = ""
) -> Cell:
    """A cell of `statistic` (of rows) with its bootstrap interval over owners, who are drawn whole."""
    members = [np.flatnonzero(owners == owner) for owner in np.unique(owners)]
    interval = bootstrap_interval(
        lambda chosen: statistic(np.concatenate([members[i] for i in chosen])), len(members), rng
    )
    return Cell(value=float(statistic(np.arange(len(owners)))), interval=interval, note=note)


def share_cell(true: NDArray[np.bool_], owners: NDArray[np.int64], rng: np.random.Generator) -> Cell:
    """The share of rows that are true, with its bootstrap interval over owners."""
    return with_interval(lambda rows: float(true[rows].mean()), owners, rng)


def mean_cell(values: NDArray[np.floating], rng: np.random.Generator) -> Cell:
    """A mean with its bootstrap interval."""
    return with_interval(lambda rows: float(values[rows].mean()), np.arange(len(values)), rng)


def _owners(patients: int, slices: int) -> NDArray[np.int64]:
    return np.arange(patients).repeat(slices // max(patients, 1))
