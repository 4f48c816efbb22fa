"""The runner of every system that makes single images: train the columns, draw from each, measure, show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsynth.plan import Count, Section
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.experiments.bench import REAL, Bench, Measure, Measured
from fedsynth_simulations.experiments.data import ImageData, load_images
from fedsynth_simulations.experiments.drawing import Drawn, draw, even_labels
from fedsynth_simulations.experiments.measures import classes, fidelity, masks, sequences
from fedsynth_simulations.experiments.rendering import NOT_PRIVATE, write_grid
from fedsynth_simulations.experiments.run import Experiment, Findings
from fedsynth_simulations.experiments.search import Search, searched
from fedsynth_simulations.experiments.training import Trained, train_column
from fedsynth_simulations.experiments.values import Cell, Picture, Row, Table

MeasureName = Literal[
    "frechet",
    "ssim",
    "discriminator",
    "losses",
    "downstream",
    "downstream-both",
    "scores",
    "label",
    "segmentation",
    "consistency",
]
_MEASURES: Mapping[MeasureName, Measure] = {
    "frechet": fidelity.frechet,
    "ssim": fidelity.ssim,
    "discriminator": fidelity.discriminator,
    "losses": fidelity.losses,
    "downstream": classes.downstream,
    "downstream-both": classes.downstream_both,
    "scores": classes.scores,
    "label": classes.label_fidelity,
    "segmentation": masks.segmentation,
    "consistency": sequences.consistency,
}
_GRID_COLUMNS = 8
SECTIONS = frozenset({"image", "gan", "privacy", "aggregation"})  # of the plan, that a specification may set


class Minority(Section):
    """A class of which only a `share` of the training slices is kept, to be filled up with synthetic ones."""

    name: str
    share: Annotated[float, Field(gt=0, le=1)]


class Options(Section):
    """Of the runner.

    Attributes:
        measures: what is measured, in this order.
        drawn: synthetic slices of each column that measures look at.
        snapshots: after how many rounds, evenly spread, the generator is looked at as well.
        classifier_steps, unet_steps: of the networks that measure.
        shown: synthetic slices of each column in its picture.
        minority: makes a class rare, and measures what synthetic slices of it are good for.
        search: looks for settings on public simulated slices before the columns train with the best.
    """

    measures: list[MeasureName] = Field(default=["frechet", "ssim", "losses"])
    drawn: Count = 600
    snapshots: Annotated[int, Field(ge=0)] = 0
    classifier_steps: Count = 300
    unet_steps: Count = 300
    shown: Count = 24
    minority: Minority | None = None
    search: Search | None = None


class ColumnOptions(Section):
    """Columns have none."""


def run(experiment: Experiment) -> Findings:
    """Run an experiment of images."""
    options = Options.model_validate(experiment.spec.options)
    data = load_images(experiment, experiment.spec.plan.get("image", {}))
    minority = options.minority
    if minority is not None:
        if experiment.quick:  # simulated data have classes of their own
            minority = minority.model_copy(update={"name": data.label.classes[0]})
        data = with_rare_class(data, minority)
    findings = Measured()
    if options.search is not None:
        experiment, findings = searched(experiment, options.search)
    trained = {
        column.name: train_column(experiment, column, data, options.snapshots) for column in experiment.spec.columns
    }
    drawn = {name: _drawn(experiment, each, options.drawn) for name, each in trained.items()}
    bench = Bench(experiment, data, trained, drawn, options.classifier_steps, options.unet_steps)
    found = [_MEASURES[name](bench) for name in options.measures]
    if minority is not None:
        found.append(classes.minority(bench, minority.name))
    rows = [row for measured in found for row in measured.rows]
    main = Table(title="Result", columns=[*trained, REAL], rows=[*rows, *_costs(experiment, trained)])
    return Findings(
        data.description,
        [main, *(table for measured in (findings, *found) for table in measured.tables)],
        [curve for measured in (findings, *found) for curve in measured.curves],
        _pictures(experiment, drawn, options.shown, data.has_masks),
        [
            f"The column '{REAL}' has real training {data.unit}s in place of synthetic ones: what can be reached.",
            "Noise comes from a seeded stream of the scale that the charge states, so that the run can be repeated.",
            *(note for measured in (findings, *found) for note in measured.notes),
        ],
        experiment.spec,
    )


def with_rare_class(data: ImageData, minority: Minority) -> ImageData:
    """`data` with only a share of the training patients of one class, the first ones of each site.

    Raises:
        ValueError: there is no such class.
    """
    rare = data.label.classes.index(minority.name)

    def thinned(site: Patients) -> Patients:
        of_class = np.flatnonzero(site.labels == rare)
        dropped = of_class[max(round(minority.share * len(of_class)), 1) :]
        kept = np.setdiff1d(np.arange(len(site)), dropped)
        return Patients(site.images[kept], site.masks[kept], site.genes[kept], site.morphology[kept], site.labels[kept])

    said = f" Only {minority.share:.0%} of the training {data.unit}s of {minority.name} are used."
    sites = {name: thinned(site) for name, site in data.sites.items()}
    return ImageData(sites, data.test, data.image, data.label, data.unit, data.description + said)


def _drawn(experiment: Experiment, trained: Trained, count: int) -> Drawn:
    return draw(trained.plan, trained.generator, even_labels(trained.plan, count), experiment.spec.seed)


def _costs(experiment: Experiment, trained: Mapping[str, Trained]) -> list[Row]:
    spent = {
        name: Cell(value=each.epsilon) if np.isfinite(each.epsilon) else Cell(value=None, note="infinite, not private")
        for name, each in trained.items()
    }
    steps = {name: Cell(value=float(each.plan.gan.steps)) for name, each in trained.items()}
    seconds = {name: Cell(value=each.seconds) for name, each in trained.items()}
    return [
        experiment.row("epsilon", "Epsilon spent (delta as in the plan)", spent),
        experiment.row("steps", "Steps at a site", steps),
        experiment.row("seconds", "Seconds of training", seconds),
    ]


def _pictures(experiment: Experiment, drawn: Mapping[str, Drawn], shown: int, masks: bool) -> list[Picture]:
    """A grid of each column's slices; of several sequences, a row for each, and one for the mask where the data have any."""
    pictures = []
    for column in experiment.spec.columns:
        chosen = drawn[column.name].take(np.argsort(drawn[column.name].labels[:shown], kind="stable"))
        file = f"samples-{column.slug}.png"
        write_grid(experiment.out / file, _planes(chosen, masks), _GRID_COLUMNS)
        mark = "" if column.private or NOT_PRIVATE in column.name else f", {NOT_PRIVATE}"
        pictures.append(
            Picture(file=file, caption=f"Synthetic slices, {column.name}{mark}, in the order of their classes.")
        )
    return pictures


def _planes(drawn: Drawn, masks: bool) -> NDArray[np.float32]:
    channels = drawn.channels.shape[1] - (not masks)
    rows = []
    for start in range(0, len(drawn), _GRID_COLUMNS):
        part = drawn.channels[start : start + _GRID_COLUMNS, :channels]
        lacking = np.zeros((_GRID_COLUMNS - len(part), *part.shape[1:]), dtype=np.float32)
        rows.append(np.concatenate([part, lacking]).transpose(1, 0, 2, 3).reshape(-1, *part.shape[2:]))
    return np.concatenate(rows)
