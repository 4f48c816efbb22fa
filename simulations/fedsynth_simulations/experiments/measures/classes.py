"""What a class network makes of synthetic slices: accuracy of one trained on them, AM and Mode scores, rare classes."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from fedsynth.evaluation.networks import predict
from fedsynth.metrics.class_scores import am_score, mode_score
from fedsynth.models.growth import stage_at
from fedsynth_simulations.experiments.bench import REAL, Bench, Measured, at_32, share_cell, with_interval
from fedsynth_simulations.experiments.drawing import draw, even_labels
from fedsynth_simulations.experiments.training import Trained
from fedsynth_simulations.experiments.values import Cell, Curves, Line, Table

_PER_SNAPSHOT = 300


def downstream(bench: Bench) -> Measured:
    """Accuracy on test slices of a class network trained on synthetic slices."""
    alone = {REAL: _of_real(bench)}
    for column, drawn in bench.drawn.items():
        alone[column] = _accuracy(bench, drawn.images, drawn.labels)
    shares = np.bincount(bench.test.labels[bench.test.labels >= 0])
    row = bench.experiment.row
    return Measured(
        [
            row(
                "downstream",
                "Accuracy, trained on synthetic slices, tested on real ones",
                alone,
                f"Always the commonest class: {shares.max() / shares.sum():.3f}",
            ),
        ]
    )


def downstream_both(bench: Bench) -> Measured:
    """Accuracy on test slices of a class network trained on real and synthetic slices together."""
    both = {REAL: _of_real(bench)}
    images, labels = _real(bench)
    for column, drawn in bench.drawn.items():
        both[column] = _accuracy(bench, np.concatenate([images, drawn.images]), np.concatenate([labels, drawn.labels]))
    return Measured([bench.experiment.row("downstream-both", "Accuracy, trained on real and synthetic slices", both)])


def _of_real(bench: Bench) -> Cell:
    right = predict(bench.classifier, at_32(bench.test.images)).argmax(axis=1) == bench.test.labels
    return share_cell(right, bench.test.owners, bench.rng(5))


def _real(bench: Bench) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return bench.train.images, bench.train.labels


def _accuracy(bench: Bench, images: NDArray[np.float32], labels: NDArray[np.int64]) -> Cell:
    right = _predicted(bench, images, labels) == bench.test.labels
    return share_cell(right, bench.test.owners, bench.rng(5))


def _predicted(bench: Bench, images: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    network = bench.class_network(images, labels)
    return np.asarray(predict(network, at_32(bench.test.images)).argmax(axis=1))


def scores(bench: Bench) -> Measured:
    """AM and Mode score of the finished generators; by resolution and by step where snapshots were kept."""
    reference = _posteriors(bench, bench.train.images).mean(axis=0)
    classes = len(reference)
    am = {REAL: _am(_posteriors(bench, bench.test.images), reference, bench)}
    mode = {REAL: _mode(_posteriors(bench, bench.test.images), reference, bench)}
    for column, drawn in bench.drawn.items():
        found = _posteriors(bench, drawn.images)
        am[column], mode[column] = _am(found, reference, bench), _mode(found, reference, bench)
    row = bench.experiment.row
    note = f"Classifier of {classes} classes trained on the real training slices; it reaches {_test_accuracy(bench):.2f} on "
    note += f"test slices. With {classes} classes the Mode score lies between 0 and {classes}. Column real: test slices"
    by_step, by_resolution = _over_time(bench, reference)
    return Measured(
        [
            row("am", "AM score (lower is better)", am, note),
            row("mode", "Mode score (higher is better)", mode, note),
        ],
        by_resolution,
        by_step,
    )


def _posteriors(bench: Bench, images: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(softmax(predict(bench.classifier, at_32(images)).astype(np.float64), axis=1))


def _am(found: NDArray[np.float64], reference: NDArray[np.float64], bench: Bench) -> Cell:
    return with_interval(lambda rows: am_score(found[rows], reference), np.arange(len(found)), bench.rng(6))


def _mode(found: NDArray[np.float64], reference: NDArray[np.float64], bench: Bench) -> Cell:
    return with_interval(lambda rows: mode_score(found[rows], reference), np.arange(len(found)), bench.rng(6))


def _test_accuracy(bench: Bench) -> float:
    known = bench.test.labels >= 0
    logits = predict(bench.classifier, at_32(bench.test.images[known]))
    return float((logits.argmax(axis=1) == bench.test.labels[known]).mean())


def _over_time(bench: Bench, reference: NDArray[np.float64]) -> tuple[list[Curves], list[Table]]:
    lines: dict[str, list[Line]] = {"AM score": [], "Mode score": []}
    cells: dict[str, dict[int, dict[str, Cell]]] = {"AM score (lower)": {}, "Mode score (higher)": {}}
    for column, trained in bench.trained.items():
        steps, am, mode = [], [], []
        for number in sorted(trained.snapshots):
            found = _posteriors(bench, _drawn_at(bench, trained, number))
            steps.append(float(number * trained.plan.gan.steps_per_round))
            am.append(am_score(found, reference))
            mode.append(mode_score(found, reference))
            size = _ended(trained, number)
            if size is not None:
                cells["AM score (lower)"].setdefault(size, {})[column] = _am(found, reference, bench)
                cells["Mode score (higher)"].setdefault(size, {})[column] = _mode(found, reference, bench)
        if steps:
            lines["AM score"].append(Line(name=column, x=steps, y=am))
            lines["Mode score"].append(Line(name=column, x=steps, y=mode))
    row = bench.experiment.row
    rows = [
        row(f"{name.split()[0].lower()}-{size}", f"{name} at {size} x {size}", found)
        for name, by_size in cells.items()
        for size, found in sorted(by_size.items())
    ]
    tables = [Table(title="By resolution", columns=list(bench.trained), rows=rows)] if rows else []
    curves = [
        Curves(title=f"{name} by step", x_label="private steps", y_label=name, lines=found)
        for name, found in lines.items()
        if found
    ]
    return curves, tables


def _drawn_at(bench: Bench, trained: Trained, number: int) -> NDArray[np.float32]:
    plan = trained.plan
    stage = stage_at(plan, number * plan.gan.steps_per_round - 1)
    labels = even_labels(plan, _PER_SNAPSHOT)
    return draw(plan, trained.snapshots[number], labels, bench.experiment.spec.seed, stage).images


def _ended(trained: Trained, number: int) -> int | None:
    """The resolution that ends with round `number`, where one does."""
    ends = list(accumulate(trained.plan.gan.growth))
    return 8 * 2 ** ends.index(number) if number in ends else None


def minority(bench: Bench, name: str) -> Measured:
    """Recall of a rare class, and balanced accuracy, with and without synthetic slices that fill it up.

    Three ways of filling up: not at all; copies of real slices; synthetic slices of the rare class alone.
    """
    rare = bench.data.label.classes.index(name)
    images, labels = _real(bench)
    counts = np.bincount(labels[labels >= 0], minlength=len(bench.data.label.classes))
    lacking = int(counts.max() - counts[rare])
    rng = bench.rng(7)
    copies = rng.choice(np.flatnonzero(labels == rare), size=lacking)
    fillings = {
        REAL: (images, labels),
        "copies of real slices": (np.concatenate([images, images[copies]]), np.concatenate([labels, labels[copies]])),
    }
    for column, trained in bench.trained.items():
        made = draw(trained.plan, trained.generator, np.full(lacking, rare), bench.experiment.spec.seed + 1)
        fillings[column] = (np.concatenate([images, made.images]), np.concatenate([labels, made.labels]))
    recall, balanced = {}, {}
    truth = bench.test.labels
    for column, (shown, known) in fillings.items():
        right = _predicted(bench, shown, known) == truth
        mine = truth == rare
        recall[column] = share_cell(right[mine], bench.test.owners[mine], bench.rng(8))
        balanced[column] = _balanced(right, truth, bench)
    row = bench.experiment.row
    return Measured(
        tables=[
            Table(
                title=f"Classifier on imbalanced slices: {counts[rare]} of {name}, {counts.max()} of the commonest class",
                columns=list(fillings),
                rows=[
                    row("minority", f"Recall of {name}", recall),
                    row("balanced", "Balanced accuracy of all classes", balanced),
                ],
            )
        ]
    )


def _balanced(right: NDArray[np.bool_], truth: NDArray[np.int64], bench: Bench) -> Cell:
    present = np.unique(truth[truth >= 0])

    def mean_recall(rows: NDArray[np.int64]) -> float:
        shares = [right[rows[truth[rows] == k]] for k in present]
        return float(np.mean([share.mean() for share in shares if len(share)]))

    return with_interval(mean_recall, bench.test.owners, bench.rng(8))


def label_fidelity(bench: Bench) -> Measured:
    """Share of synthetic slices that a class network of real slices takes for the class they were drawn for."""
    cells = {}
    for column, drawn in bench.drawn.items():
        right = predict(bench.classifier, at_32(drawn.images)).argmax(axis=1) == drawn.labels
        cells[column] = share_cell(right, np.arange(len(right)), bench.rng(9))
    cells[REAL] = Cell(value=_test_accuracy(bench), note="test slices")
    row = bench.experiment.row(
        "label",
        "Share of slices that look like the class they were drawn for",
        cells,
        "Guessing: 1 / number of classes",
    )
    return Measured([row])
