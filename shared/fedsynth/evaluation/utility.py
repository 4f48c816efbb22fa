"""Is a model that was trained on synthetic patients of use on real ones (TSTR; Esteban et al., 2017), and the reverse?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsynth.evaluation.calibration import calibration_figures, reliability_curve, roc_curve_of
from fedsynth.evaluation.columns import Columns, attempt
from fedsynth.evaluation.linear import class_scores
from fedsynth.evaluation.samples import Volumes, shrink_factor
from fedsynth.evaluation.slice_tasks import (
    dice_by_place,
    positive_slices,
    probabilities_by_position,
    segmentation_dice,
    train_classifier,
    train_segmenter,
    tumour_probabilities,
)
from fedsynth.evaluation.tested import Tested, groups_of, tested_figure, value_of
from fedsynth.evaluation.values import Curve, Figure, Group, Section
from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.domain_extractor import DomainExtractor, extract
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.roc_auc import macro_auc, roc_auc
from fedsynth.plan import StudyPlan

MIN_TEST_PATIENTS = 8
MAX_TEST_PATIENTS = 150
CLASSIFIER_STEPS = 250
UNET_STEPS = 200
POSITIVE_AREA_MM2 = 100.0
SLICE = "tumour-bearing slice"

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class _Task:
    """What one task found: trained on each column and tested on real patients, on real and synthetic together, and the
    reverse (trained on real, tested on each column)."""

    metric: str
    note: str
    forward: Columns[Tested]
    together: Tested | NotMeasurable
    reverse: Columns[Tested]


def utility(
    plan: StudyPlan,
    volumes: Columns[Volumes],
    holdout: Volumes,
    extractor: DomainExtractor,
    rng: np.random.Generator,
    site_names: Sequence[str] = (),
) -> Section:
    """Train on each column of `volumes` and on real and synthetic together, test on the held-out real patients; train on
    real, test on synthetic.

    Every network is trained once. Nothing is chosen by a score.

    Args:
        plan: pixel spacing and classes.
        volumes: synthetic, real training and public-only patients; the floors are made here.
        holdout: held-out real patients.
        extractor: its features carry the patient label.
        rng: source of all draws.
        site_names: of the codes in `holdout.sites`; without names nothing is told by site.
    """
    pixels = positive_pixels(plan)
    seen = Columns(volumes.synthetic, holdout, public_only=volumes.public_only).map(lambda v: _at_most(v, rng))
    slices, curves, calibration = _slices(volumes, seen, pixels, rng)
    dice = _dice(volumes, seen, rng)
    labels, labelled = _labels(volumes, holdout, extractor, plan)

    def groups(task: _Task, of: Volumes, by_class: bool = True) -> list[Group]:
        classes = groups_of("class", plan.label.classes, of.labels, task.forward, rng) if by_class else []
        return [*classes, *groups_of("site", site_names, of.sites, task.forward, rng)]

    test = value_of(seen.real)
    return Section(
        id="utility",
        title="Usefulness: train on synthetic, test on real",
        explanation=(
            "The same small networks are trained on the synthetic patients, on the real training patients (column "
            "'real') and, where there is one, on the public generator that saw no private data, and are all tested on "
            "real patients who were held out. Settings and number of training steps are fixed beforehand; nothing is "
            "chosen by its score on the tested patients. The floor is what a model reaches that never looks at the "
            "image and knows only where tumours tend to be. A release that does not beat floor and public-only adds "
            "nothing. 'Real and synthetic together' asks whether synthetic patients add to real ones; the reverse, "
            "trained on real and tested on synthetic, whether what real patients teach holds in synthetic ones: images "
            "or outlines that are not like real ones fail it, while too few kinds of patients do not. Calibration asks "
            "whether probabilities can be believed. Intervals (95 %, bootstrap over the tested patients) hold the chance "
            "of which patients were tested, not that of training again or of drawing other synthetic patients. The "
            "networks are small yardsticks: the numbers compare data sets and are no claim about clinical performance."
        ),
        figures=[
            *_figures(slices, rng, groups(slices, test)),
            *calibration,
            *_figures(dice, rng, groups(dice, test)),
            *_figures(labels, rng, groups(labels, labelled, by_class=False)),
        ],
        curves=curves,
    )


def positive_pixels(plan: StudyPlan) -> int:
    """Fewest tumour pixels of a slice that counts as tumour-bearing, on the grid that is evaluated: 1 square cm."""
    spacing = plan.image.pixel_spacing_mm * shrink_factor(plan.image.size)
    return math.ceil(POSITIVE_AREA_MM2 / spacing**2)


def _slices(
    volumes: Columns[Volumes], seen: Columns[Volumes], pixels: int, rng: np.random.Generator
) -> tuple[_Task, list[Curve], list[Figure]]:
    test = value_of(seen.real)
    positive = positive_slices(test, pixels)

    def train(*sets: Volumes | NotMeasurable) -> nn.Module:
        _testable(test)  # nobody trains for nobody to be tested on
        return train_classifier([value_of(one) for one in sets], pixels, rng, CLASSIFIER_STEPS)

    def by_position(patients: Volumes) -> Scores:
        return probabilities_by_position(value_of(volumes.real), _testable(patients), pixels)

    def area(scores: Scores, truth: NDArray[np.bool_]) -> Tested:
        return Tested(lambda rows: roc_auc(scores[rows].ravel(), truth[rows].ravel()), len(scores))

    def imitation(patients: Volumes) -> Tested:
        scores = tumour_probabilities(value_of(networks.real), _testable(patients))
        return area(scores, positive_slices(patients, pixels))

    networks = volumes.map(train)
    both = attempt(lambda: train(volumes.real, volumes.synthetic))
    answers = replace(
        networks.map(lambda network: tumour_probabilities(network, _testable(test))),
        floor=attempt(lambda: by_position(test)),
    )
    together = attempt(lambda: tumour_probabilities(value_of(both), _testable(test)))
    forward = answers.map(lambda scores: area(scores, positive))
    reverse = Columns(seen.synthetic, public_only=seen.public_only).map(imitation)
    floor = Columns(seen.synthetic).map(lambda v: area(by_position(v), positive_slices(v, pixels))).synthetic
    task = _Task(
        f"AUC, {SLICE}",
        f"Positive: at least {pixels} tumour pixels (1 cm²). Tested on {positive.size} slices of "
        f"{len(test)} patients, {int(positive.sum())} positive. Floor: the share of positive slices at the "
        "same position among the real training patients.",
        forward,
        attempt(lambda: area(value_of(together), positive)),
        replace(reverse, real=forward.real, floor=floor),
    )
    lines = {
        "trained on synthetic": answers.synthetic,
        "trained on real": answers.real,
        "trained on real and synthetic": together,
        "trained on the public-only generator": answers.public_only,
        "position alone": answers.floor,
    }
    drawn = [attempt(partial(draw, SLICE, lines, positive)) for draw in (roc_curve_of, reliability_curve)]
    curves = [curve for curve in drawn if isinstance(curve, Curve)]
    return task, curves, calibration_figures(SLICE, answers, positive, rng)


def _dice(volumes: Columns[Volumes], seen: Columns[Volumes], rng: np.random.Generator) -> _Task:
    test = value_of(seen.real)

    def train(*sets: Volumes | NotMeasurable) -> nn.Module:
        _testable(test)
        return train_segmenter([value_of(one) for one in sets], rng, UNET_STEPS)

    def mean(values: Scores) -> Tested:
        def of(rows: Rows) -> float:
            known = values[rows][np.isfinite(values[rows])]
            require_rows("patients with a tumour in truth or prediction", known, 1)
            return float(known.mean())

        return Tested(of, len(values))

    def outlined(network: nn.Module, patients: Volumes) -> Tested:
        return mean(segmentation_dice(network, _testable(patients)))

    def by_place(patients: Volumes) -> Tested:
        return mean(dice_by_place(value_of(volumes.real), _testable(patients)))

    networks = volumes.map(train)
    both = attempt(lambda: train(volumes.real, volumes.synthetic))
    forward = replace(networks.map(lambda network: outlined(network, test)), floor=attempt(lambda: by_place(test)))
    reverse = Columns(seen.synthetic, public_only=seen.public_only).map(lambda v: outlined(value_of(networks.real), v))
    return _Task(
        "Dice, tumour",
        f"Mean over {len(test)} patients of the Dice coefficient of the volume. Floor: where tumours are "
        "most often among the real training patients, as large as the mean tumour.",
        forward,
        attempt(lambda: outlined(value_of(both), test)),
        replace(reverse, real=forward.real, floor=Columns(seen.synthetic).map(by_place).synthetic),
    )


def _labels(
    volumes: Columns[Volumes], holdout: Volumes, extractor: DomainExtractor, plan: StudyPlan
) -> tuple[_Task, Volumes]:
    test, classes = holdout.take(np.flatnonzero(holdout.labels >= 0)), len(plan.label.classes)
    described = volumes.map(lambda patients: _Described(patient_features(extractor, patients), patients.labels))
    unseen = attempt(lambda: _Described(patient_features(extractor, _testable(test)), test.labels))

    def recognised(train: _Described, patients: _Described) -> Tested:
        require_rows("patients to test on", patients.labels, MIN_TEST_PATIENTS)
        require_finite("features of the tested patients", patients.features)
        scores = class_scores(train.features, train.labels, patients.features, classes)
        return _macro_area(scores, patients.labels)

    def constant(patients: _Described) -> Tested:
        return _macro_area(np.full((len(patients.labels), classes), 1 / classes), patients.labels)

    forward = replace(
        described.map(lambda train: recognised(train, value_of(unseen))),
        floor=attempt(lambda: constant(value_of(unseen))),
    )
    reverse = Columns(described.synthetic, public_only=described.public_only).map(
        lambda patients: recognised(value_of(described.real), patients)
    )
    task = _Task(
        f"AUC, {plan.label.name} from images",
        "Class-conditional check: logistic regression on the extractor's mean features of a patient's slices. "
        f"Tested on {len(test)} patients. Floor: any constant answer, 0.5.",
        forward,
        attempt(lambda: recognised(_joined(value_of(described.real), value_of(described.synthetic)), value_of(unseen))),
        replace(reverse, real=forward.real, floor=Columns(described.synthetic).map(constant).synthetic),
    )
    return task, test


@dataclass(frozen=True)
class _Described:
    """Patients by their features (N, D) and labels (N,)."""

    features: NDArray[np.float64]
    labels: NDArray[np.int64]


def _joined(first: _Described, second: _Described) -> _Described:
    return _Described(np.concatenate([first.features, second.features]), np.concatenate([first.labels, second.labels]))


def _macro_area(scores: Scores, labels: NDArray[np.int64]) -> Tested:
    return Tested(lambda rows: macro_auc(scores[rows], labels[rows]), len(scores))


def _figures(task: _Task, rng: np.random.Generator, groups: list[Group]) -> list[Figure]:
    return [
        tested_figure(task.metric, "higher", task.forward, task.note, rng, groups),
        tested_figure(
            f"{task.metric}, trained on real and synthetic together",
            "higher",
            Columns(task.together, task.forward.real, task.forward.floor),
            "In the column 'synthetic'; in as many training steps. 'real' is trained on real patients alone: above it, "
            "synthetic patients add to real ones.",
            rng,
        ),
        tested_figure(
            f"{task.metric}, trained on real and tested on synthetic",
            "higher",
            task.reverse,
            "'real' is tested on held-out patients; far above it, synthetic patients are easier than real ones. Floor: as "
            "above, on the synthetic patients. The interval is over the synthetic patients.",
            rng,
        ),
    ]


def patient_features(extractor: DomainExtractor, volumes: Volumes) -> NDArray[np.float64]:
    """(N, D) mean of the extractor's features over each patient's slices.

    Raises:
        NotMeasurable: no patient has images.
    """
    require_rows("patients with images", volumes.images, 1)
    return np.stack([extract(extractor, np.moveaxis(volume, 0, 1)).mean(axis=0) for volume in volumes.images])


def _at_most(volumes: Volumes, rng: np.random.Generator) -> Volumes:
    """`MAX_TEST_PATIENTS` random patients, or all where they are no more."""
    if len(volumes) <= MAX_TEST_PATIENTS:
        return volumes
    return volumes.take(rng.permutation(len(volumes))[:MAX_TEST_PATIENTS])


def _testable(patients: Volumes) -> Volumes:
    require_rows("patients to test on", patients.images, MIN_TEST_PATIENTS)
    return patients
