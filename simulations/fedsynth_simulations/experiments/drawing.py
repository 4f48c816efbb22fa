"""Drawing slices from trained generators, in memory and from the folder of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.models.growth import Stage
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth_simulations.experiments.rendering import write_grid
from fedsynth_simulations.experiments.training import code, trained_in

_CHUNK = 64


@dataclass(frozen=True)
class Drawn:
    """Synthetic slices.

    Attributes:
        channels: (N, C + 1, H, W) in [0, 1]: sequences, and the mask as it was drawn.
        labels: (N,) classes that they were drawn for.
        places: (N,) slice positions that they were drawn for.
    """

    channels: NDArray[np.float32]
    labels: NDArray[np.int64]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> NDArray[np.float32]:
        """(N, C, H, W) in [0, 1]: the sequences."""
        return self.channels[:, :-1]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W) true where the mask channel is above its middle."""
        return self.channels[:, -1] > 0.5

    def take(self, rows: NDArray[np.integer]) -> Drawn:
        """The slices `rows`."""
        return Drawn(self.channels[rows], self.labels[rows], self.places[rows])


def draw(plan: StudyPlan, state: State, labels: NDArray[np.integer], seed: int, stage: Stage | None = None) -> Drawn:
    """A slice for each of `labels` (N,), its position random; `stage` is that of a generator which has not grown up."""
    draws = torch.Generator().manual_seed(seed)
    model = make_generator(plan)
    model.load_state_dict(state)
    model.eval()
    classes = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    places = torch.randint(plan.image.slices, (len(classes),), generator=draws)
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(classes)).split(_CHUNK):
            z = torch.randn(len(rows), plan.gan.latent_dim, generator=draws)
            where = code(plan, classes[rows], places[rows])
            parts.append(model(z, where) if stage is None else model(z, where, stage))
    values = ((torch.cat(parts) + 1) / 2).clamp(0, 1).numpy()
    return Drawn(values, classes.numpy(), places.numpy())


def even_labels(plan: StudyPlan, count: int) -> NDArray[np.int64]:
    """`count` classes in turn."""
    return np.arange(count) % len(plan.label.classes)


def draw_from_run(run: Path, column: str, label: str, count: int, seed: int, out: Path) -> None:
    """Write `count` synthetic slices, drawn with a generator that a run has saved, as one PNG.

    Raises:
        UsageError: ``result_missing``, ``column_unknown``, ``label_unknown``.
    """
    trained = trained_in(run, column)
    plan = trained.plan
    if label and label not in plan.label.classes:
        raise UsageError("label_unknown", f"There is no class {label!r}.", f"Known: {', '.join(plan.label.classes)}.")
    labels = np.full(count, plan.label.classes.index(label)) if label else np.sort(even_labels(plan, count))
    planes = draw(plan, trained.generator, labels, seed).images[:, 0]
    write_grid(out, planes, math.ceil(math.sqrt(count)))
