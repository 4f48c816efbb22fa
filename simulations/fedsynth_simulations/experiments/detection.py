"""The runner of real-versus-synthetic detection: how well detectors recognise the slices of other runs' generators.

Detectors are those of an evaluation (`fedsynth.evaluation.detection`). A detector that was trained on one generator is also
asked for the slices of the others: against misuse, whoever looks at a suspicious slice does not know what made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsynth.errors import UsageError
from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.detection import detection, network_detector
from fedsynth.evaluation.samples import Volumes
from fedsynth.metrics.roc_auc import roc_auc
from fedsynth.plan import Count, Section
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.experiments.bench import REAL, with_interval
from fedsynth_simulations.experiments.data import ImageData, load_images
from fedsynth_simulations.experiments.drawing import draw, even_labels
from fedsynth_simulations.experiments.run import Experiment, Findings
from fedsynth_simulations.experiments.spec import Column
from fedsynth_simulations.experiments.training import Trained, trained_in
from fedsynth_simulations.experiments.values import Cell, Table

SECTIONS: frozenset[str] = frozenset()  # of the plan, that a specification may set: the generators are trained already


class Options(Section):
    """Of the runner: `drawn` synthetic slices of each generator, half of them to learn from."""

    drawn: Annotated[Count, Field(ge=16)] = 600


class ColumnOptions(Section):
    """The `column` of the run in the folder called `run` beside this run's, whose generator is looked at."""

    run: str
    column: str


def run(experiment: Experiment) -> Findings:
    """Train detectors on the slices of other runs' generators and test them on fresh ones and on test slices."""
    options = Options.model_validate(experiment.spec.options)
    found = {column.name: _trained(experiment, column) for column in experiment.spec.columns}
    data: dict[str, ImageData] = {}
    for name, trained in found.items():
        image = trained.plan.image
        data[name] = load_images(experiment, {"size": image.size, "slices": image.slices, "sequences": image.sequences})
    volumes = {name: _volumes(trained, options.drawn, experiment.spec.seed) for name, trained in found.items()}
    own = _own(experiment, volumes, data)
    sizes = {trained.plan.image.size for trained in found.values()}
    others = [_others(experiment, volumes, data)] if len(sizes) == 1 else []
    return Findings(
        next(iter(data.values())).description,
        [own, *others],
        notes=[
            "A detector is a guard against passing synthetic slices off as real only for generators that it was trained "
            "on: the second table says what it makes of others."
            if others
            else "The generators draw at different sizes, so no detector was asked for another generator's slices.",
            "Resampling, compression or blurring may carry a slice past a detector. Files of a release say in their headers "
            "that they are synthetic.",
        ],
    )


def _trained(experiment: Experiment, column: Column) -> Trained:
    chosen = ColumnOptions.model_validate(column.options)
    folder = experiment.out.parent / chosen.run
    try:
        trained = trained_in(folder, chosen.column, experiment.spec.data)
    except UsageError as error:
        raise UsageError(
            error.code,
            error.message,
            f"Run `fedsynth experiment run {chosen.run} --out {folder}` first: its generators are looked at.",
        ) from None
    if trained.plan.privacy.epsilon != column.epsilon:
        raise UsageError(
            "experiment_invalid",
            f"The column {column.name!r} says epsilon {column.epsilon:g}; the run's has {trained.plan.privacy.epsilon:g}.",
        )
    return trained


def _volumes(trained: Trained, count: int, seed: int) -> Volumes:
    """Each synthetic slice as a patient of one plane, classes mixed."""
    drawn = draw(trained.plan, trained.generator, even_labels(trained.plan, count), seed + 1)
    return Volumes(drawn.images[:, :, None], drawn.masks[:, None], drawn.labels, np.full(len(drawn), -1))


def _real(patients: Patients) -> Volumes:
    """Each real slice likewise: detectors see single slices, whatever the unit of privacy is."""
    n, channels, slices, height, width = patients.images.shape
    images = patients.images.transpose(0, 2, 1, 3, 4).reshape(n * slices, channels, 1, height, width)
    masks = patients.masks.reshape(n * slices, 1, height, width) > 0
    return Volumes(
        images.astype(np.float32), masks, patients.labels.repeat(slices), np.zeros(n * slices, dtype=np.int64)
    )


def _own(experiment: Experiment, volumes: dict[str, Volumes], data: dict[str, ImageData]) -> Table:
    cells: dict[str, dict[str, Cell]] = {"network": {}, "frequencies": {}}
    for name, synthetic in volumes.items():
        rng = np.random.default_rng([experiment.spec.seed, 30])
        section = detection(Columns(synthetic, _real(data[name].train)), _real(data[name].test), rng)
        for kind, figure in zip(cells, section.figures, strict=True):
            cells[kind][name] = Cell(
                value=figure.synthetic, interval=figure.interval, note="" if figure.synthetic else figure.note
            )
            cells[kind].setdefault(REAL, Cell(value=figure.real))
    row = experiment.row
    return Table(
        title="AUC of detectors, synthetic slices told from real ones",
        columns=[*volumes, REAL],
        rows=[
            row(
                "network",
                "A small convolutional network (0.5: cannot tell; 1: tells every one)",
                cells["network"],
                "Column real: real training slices told from test slices, which sites and chance alone can do",
            ),
            row("frequencies", "Logistic regression on the radial power spectrum", cells["frequencies"]),
        ],
    )


def _others(experiment: Experiment, volumes: dict[str, Volumes], data: dict[str, ImageData]) -> Table:
    rows = []
    for name, synthetic in volumes.items():
        rng = np.random.default_rng([experiment.spec.seed, 31])
        real, test = _real(data[name].train), _real(data[name].test)
        half = len(synthetic) // 2
        others = real.take(rng.permutation(len(real))[:half])
        images = np.concatenate([synthetic.images[:half, :, 0], others.images[:, :, 0]]).astype(np.float32)
        targets = np.concatenate([np.ones(half), np.zeros(len(others))]).astype(np.float32)
        detect = network_detector(rng)(images, targets)
        reals = detect(test.images[:, :, 0])
        cells = {}
        for other, asked in volumes.items():
            fakes = detect(asked.images[half:, :, 0])
            scores, truth = np.concatenate([fakes, reals]), np.arange(len(fakes) + len(reals)) < len(fakes)
            cells[other] = with_interval(
                _area(scores, truth), np.arange(len(scores)), np.random.default_rng([experiment.spec.seed, 32])
            )
        rows.append(experiment.row(f"across-{name}", f"Network trained on: {name}", cells))
    return Table(title="AUC of a detector on the slices of each generator", columns=list(volumes), rows=rows)


def _area(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> Callable[[NDArray[np.int64]], float]:
    return lambda rows: roc_auc(scores[rows], truth[rows])
