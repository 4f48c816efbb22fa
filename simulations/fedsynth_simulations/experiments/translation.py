"""The runner of the dual GAN: translate between two domains without pairs, and hold the translations against the truth.

Two sequences of one held-out patient are pairs that training never had, so a translation can be measured there. Of tumours
and of sites there is no such truth: a classifier of the two domains, trained on real slices, says what it takes a
translated slice for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.networks import predict
from fedsynth.metrics.nearest_image import psnr
from fedsynth.metrics.roc_auc import roc_auc
from fedsynth.metrics.ssim_diversity import similarity
from fedsynth.plan import Count, Section
from fedsynth.translation import TO_SOURCE, TO_TARGET
from fedsynth_server.forecast import HARD, HOPELESS, noise_to_signal
from fedsynth_simulations.benchmarking.slices import train_class_network
from fedsynth_simulations.experiments.bench import at_32, with_interval
from fedsynth_simulations.experiments.data import ImageData, load_images, simulated_images
from fedsynth_simulations.experiments.rendering import NOT_PRIVATE, write_grid
from fedsynth_simulations.experiments.run import Experiment, Findings
from fedsynth_simulations.experiments.translating import (
    ColumnOptions,
    Planes,
    Task,
    Translators,
    make_task,
    planes,
    train_task,
)
from fedsynth_simulations.experiments.values import Cell, Curves, Line, Picture, Row, Table

__all__ = ["ColumnOptions", "Options", "run"]

COPY, MATCHED, UNTOUCHED = "copy of the source", "histogram of the target", "untouched"
_NOISE = f"Noise over signal, by the forecast (up to {HARD:g} it learns, above {HOPELESS:g} it drowns)"
_QUANTILES = np.linspace(0, 1, 257)
_PRIVATE_FOLDER = "of-real-patients"
SECTIONS = frozenset({"image", "translation"})  # of the plan, that a specification may set


class Options(Section):
    """Of the runner.

    Attributes:
        shown: held-out slices in each picture.
        classifier_steps: of the network that tells two domains apart.
        scale: of simulated data, how many times as many patients as show that all works: privacy needs many.
    """

    shown: Count = 8
    classifier_steps: Count = 200
    scale: Count = 1


def run(experiment: Experiment) -> Findings:
    """Run an experiment of translation."""
    options = Options.model_validate(experiment.spec.options)
    data = _data(experiment, options)
    # All of them before the first trains: a column that cannot be is told at once.
    tasks = [(column, make_task(experiment, column, data)) for column in experiment.spec.columns]
    trained = {column.name: train_task(experiment, column, task, data) for column, task in tasks}
    tables = []
    for key in dict.fromkeys(each.task.key for each in trained.values()):
        own = {name: each for name, each in trained.items() if each.task.key == key}
        kind = next(iter(own.values())).task.kind
        tables.append(
            _against_truth(experiment, own, data) if kind == "sequences" else _by_classifier(experiment, own, options)
        )
    curves = Curves(
        title="Cycle of held-out slices by round",
        x_label="round",
        y_label="mean absolute error",
        lines=[
            Line(name=name, x=[float(i + 1) for i in range(len(each.cycle))], y=each.cycle)
            for name, each in trained.items()
        ],
    )
    pictures, notes = _pictures(experiment, trained, data, options.shown)
    return Findings(data.description, tables, [curves], pictures, [*_NOTES, *notes])


def _data(experiment: Experiment, options: Options) -> ImageData:
    image = experiment.spec.plan.get("image", {})
    if experiment.spec.data == "simulated":
        return simulated_images(image, experiment.spec.seed, options.scale)
    return load_images(experiment, image)


_NOTES = [
    "Noise comes from a seeded stream of the scale that the charge states, so that the run can be repeated.",
    "Held-out slices that show next to nothing (air above and below the head) are left out. Intervals are over patients.",
]


def _against_truth(experiment: Experiment, trained: Mapping[str, Translators], data: ImageData) -> Table:
    """Translated slices against the target sequence of the same patient and place."""
    task = next(iter(trained.values())).task
    source = planes(task.test[0])
    truth = _at(task, source)
    found = {name: each.translate(source.images) for name, each in trained.items()}
    train = [planes(domain).images for domain in task.train]
    found |= {COPY: source.images, MATCHED: _matched(source.images, train[0], train[1])}
    tumour = data.test.masks[source.owners, source.places] > 0
    rng = np.random.default_rng([experiment.spec.seed, 21])
    ssim = {name: similarity(image, truth)[:, 0] for name, image in found.items()}
    noise = {name: psnr(((image - truth) ** 2).mean(axis=(1, 2, 3))) for name, image in found.items()}
    error = {name: np.abs(image - truth).mean(axis=(1, 2, 3)) for name, image in found.items()}
    rows = [
        experiment.row("ssim", f"SSIM to the true {task.target} (higher is better)", _cells(ssim, source.owners, rng)),
        experiment.row("psnr", "PSNR in dB (higher is better)", _cells(noise, source.owners, rng)),
        experiment.row("error", "Mean absolute error (lower is better)", _cells(error, source.owners, rng)),
    ]
    shows = tumour.any(axis=(1, 2))
    if shows.any():
        inside = {
            name: np.array(
                [np.abs(i - t)[0, m].mean() for i, t, m in zip(image[shows], truth[shows], tumour[shows], strict=True)]
            )
            for name, image in found.items()
        }
        what = "Mean absolute error inside the tumour (lower is better)"
        rows.append(experiment.row("error-tumour", what, _cells(inside, source.owners[shows], rng)))
    return _table(experiment, trained, [COPY, MATCHED], rows, rng)


def _by_classifier(experiment: Experiment, trained: Mapping[str, Translators], options: Options) -> Table:
    """What a classifier of the two domains takes held-out slices for, untouched and translated."""
    task = next(iter(trained.values())).task
    train = [planes(domain) for domain in task.train]
    images = np.concatenate([each.images for each in train])
    labels = np.repeat([0, 1], [len(each.images) for each in train])
    network = train_class_network(at_32(images), labels, experiment.spec.seed, 2, options.classifier_steps)
    rng = np.random.default_rng([experiment.spec.seed, 22])

    def scores(slices: NDArray[np.float32]) -> NDArray[np.float64]:
        logits = predict(network, at_32(slices))
        return np.asarray(logits[:, 1] - logits[:, 0], dtype=np.float64)

    source, target = (planes(domain) for domain in task.test)
    untouched = scores(source.images), scores(target.images)
    forth = {UNTOUCHED: untouched[0]} | {
        n: scores(each.translate(source.images, TO_TARGET)) for n, each in trained.items()
    }
    back = {UNTOUCHED: untouched[1]} | {
        n: scores(each.translate(target.images, TO_SOURCE)) for n, each in trained.items()
    }
    changed = {
        name: np.abs(each.translate(source.images) - source.images).mean(axis=(1, 2, 3))
        for name, each in trained.items()
    }
    taken = f"Share of held-out slices of {task.source} taken for {task.target} (translated: higher is better)"
    kept = f"Share of held-out slices of {task.target} taken for {task.target} (translated back: lower is better)"
    area = roc_auc(np.concatenate(untouched), np.repeat([False, True], [len(each) for each in untouched]))
    note = f"The classifier's own area under the ROC curve on these slices, untouched, is {area:.2f}"
    if task.kind == "sites":
        counts = [len(np.unique(each.owners)) for each in (source, target)]
        note += (
            f". Held out are {counts[0]} patients of {task.source} and {counts[1]} of {task.target}, who train nothing "
        )
        note += "in this table, in place of those of the other tables: so few that the intervals are too narrow"
    rows = [
        experiment.row("taken", taken, _cells({n: s > 0 for n, s in forth.items()}, source.owners, rng), note),
        experiment.row("kept", kept, _cells({n: s > 0 for n, s in back.items()}, target.owners, rng)),
        experiment.row("changed", "Mean absolute change of a source slice", _cells(changed, source.owners, rng)),
    ]
    return _table(experiment, trained, [UNTOUCHED], rows, rng)


def _table(
    experiment: Experiment,
    trained: Mapping[str, Translators],
    baselines: Sequence[str],
    rows: list[Row],
    rng: np.random.Generator,
) -> Table:
    """The rows of one table, and those that every table has."""
    task = next(iter(trained.values())).task
    there = {name: (each, planes(each.task.test[0])) for name, each in trained.items()}
    errors = {
        name: np.abs(each.translate(each.translate(source.images), TO_SOURCE) - source.images).mean(axis=(1, 2, 3))
        for name, (each, source) in there.items()
    }
    cycle = _cells(errors, next(iter(there.values()))[1].owners, rng)
    spent = {
        name: Cell(value=each.epsilon) if np.isfinite(each.epsilon) else Cell(value=None, note="infinite, not private")
        for name, each in trained.items()
    }
    drowned = {
        name: Cell(value=max(noise_to_signal(each.task.plan, site, "translation") for site in each.task.sites))
        for name, each in trained.items()
        if np.isfinite(each.epsilon)
    }
    steps = {name: Cell(value=float(each.task.plan.training("translation").steps)) for name, each in trained.items()}
    seconds = {name: Cell(value=each.seconds) for name, each in trained.items()}
    return Table(
        title=f"{task.source} to {task.target}",
        columns=[*trained, *baselines],
        rows=[
            *rows,
            experiment.row("cycle", "Cycle: mean absolute error there and back (lower is better)", cycle),
            experiment.row("epsilon", "Epsilon spent (delta as in the plan)", spent),
            *([experiment.row("noise", _NOISE, drowned)] if drowned else []),
            experiment.row("steps", "Steps at a site", steps),
            experiment.row("seconds", "Seconds of training", seconds),
        ],
    )


def _cells(
    values: Mapping[str, NDArray[np.generic]], owners: NDArray[np.int64], rng: np.random.Generator
) -> dict[str, Cell]:
    """Means over slices, with intervals over patients."""

    def cell(each: NDArray[np.generic]) -> Cell:
        return with_interval(lambda chosen: float(each[chosen].astype(np.float64).mean()), owners, rng)

    return {name: cell(each) for name, each in values.items()}


def _at(task: Task, of: Planes) -> NDArray[np.float32]:
    """The target domain's slices (M, C, H, W) in [0, 1] of the same patients at the same places."""
    slices = task.test[1].slices[of.owners, :, of.places].float()
    return np.asarray(((slices + 1) / 2).numpy())


def _matched(
    images: NDArray[np.float32], source: NDArray[np.float32], target: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Images whose intensities are moved to the target's distribution in training: all that needs no network."""
    return np.interp(images, np.quantile(source, _QUANTILES), np.quantile(target, _QUANTILES)).astype(np.float32)


def _pictures(
    experiment: Experiment, trained: Mapping[str, Translators], data: ImageData, shown: int
) -> tuple[list[Picture], list[str]]:
    """A grid a column: held-out slices, their translations, and (of sequences) the truth.

    A translated slice is made from a real one. Where the data are of patients, the grids are for whoever runs the
    experiment under the data's licence, and are no part of the result.
    """
    simulated = experiment.spec.data == "simulated"
    folder = experiment.out if simulated else experiment.out / _PRIVATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for column in experiment.spec.columns:
        each = trained[column.name]
        source = planes(each.task.test[0])
        rows = np.linspace(0, len(source.images) - 1, shown).round().astype(int)
        chosen = Planes(source.images[rows], source.owners[rows], source.places[rows])
        parts = [chosen.images, each.translate(chosen.images)]
        if each.task.kind == "sequences":
            parts.append(_at(each.task, chosen))
        channels = parts[0].shape[1]
        grid = np.concatenate([part[:, channel] for channel in range(channels) for part in parts])
        file = f"translated-{column.slug}.png"
        write_grid(folder / file, grid, shown)
        what = f"{each.task.source}, translated to {each.task.target}"
        what += f", and the true {each.task.target}" if each.task.kind == "sequences" else ""
        mark = "" if column.private or NOT_PRIVATE in column.name else f", {NOT_PRIVATE}"
        pictures.append(Picture(file=file, caption=f"Held-out simulated slices, {column.name}{mark}. Rows: {what}."))
    if simulated:
        return pictures, []
    return [], [
        f"Pictures of held-out patients and their translations lie in {_PRIVATE_FOLDER}/ of the run: they are derived from "
        "real patients' images, under the licence of the data, and are no part of the result."
    ]
