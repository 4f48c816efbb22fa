"""Is a model that was trained on synthetic patients of use on real ones? (TSTR; Esteban et al., 2017.)"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

from fedsynth.evaluation.columns import Columns, beside_floor, figure, interval
from fedsynth.evaluation.linear import class_scores
from fedsynth.evaluation.networks import SliceClassifier, SmallUNet, fit, predict, segmentation_loss
from fedsynth.evaluation.samples import Volumes, shrink_factor, training_slices
from fedsynth.evaluation.values import Section
from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.dice import dice_by_patient
from fedsynth.metrics.domain_extractor import DomainExtractor, extract
from fedsynth.metrics.measurable import NotMeasurable, require_rows
from fedsynth.metrics.roc_auc import macro_auc, roc_auc
from fedsynth.plan import StudyPlan

MIN_TEST_PATIENTS = 8
MAX_TEST_PATIENTS = 150
MAX_TRAINING_SLICES = 4000
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 250, 64
UNET_STEPS, UNET_BATCH = 200, 32
POSITIVE_AREA_MM2 = 100.0

Scores = NDArray[np.floating]


def utility(
    plan: StudyPlan, volumes: Columns[Volumes], holdout: Volumes, extractor: DomainExtractor, rng: np.random.Generator
) -> Section:
    """Train on each column of `volumes`, test on the held-out real patients.

    Args:
        plan: pixel spacing and classes.
        volumes: synthetic, real training and public-only patients; the floors are made here.
        holdout: held-out real patients.
        extractor: its features carry the patient label.
        rng: source of all draws.
    """
    pixels = positive_pixels(plan)
    labelled = holdout
    if len(holdout) > MAX_TEST_PATIENTS:
        holdout = holdout.take(rng.permutation(len(holdout))[:MAX_TEST_PATIENTS])
    positive = holdout.masks.sum(axis=(2, 3)) >= pixels
    areas, areas_interval = _slice_areas(volumes, holdout, positive, pixels, rng)
    dice, dice_interval = _dice(volumes, holdout, rng)
    labels, labels_interval = _label_areas(volumes, labelled, extractor, len(plan.label.classes), rng)
    return Section(
        id="utility",
        title="Usefulness: train on synthetic, test on real",
        explanation=(
            "The same small networks are trained on the synthetic patients, on the real training patients (column "
            "'real') and, where there is one, on the public generator that saw no private data, and are all tested on "
            "real patients who were held out. Settings and number of training steps are fixed beforehand; nothing is "
            "chosen by its score on the tested patients. The floor is what a model reaches that never looks at the "
            "image and knows only where tumours tend to be. A release that does not beat floor and public-only adds "
            "nothing. Intervals (95 %, bootstrap over patients) hold the chance of which patients were tested, not "
            "that of training again or of drawing other synthetic patients. The networks are small yardsticks: the "
            "numbers compare data sets and are no claim about clinical performance."
        ),
        figures=[
            figure(
                "AUC, tumour-bearing slice",
                "higher",
                areas,
                f"Positive: at least {pixels} tumour pixels (1 cm²). Tested on {positive.size} slices of "
                f"{len(holdout)} patients, {int(positive.sum())} positive. Floor: the share of positive slices at the "
                "same position among the real training patients.",
                areas_interval,
            ),
            figure(
                "Dice, tumour",
                "higher",
                dice,
                f"Mean over {len(holdout)} patients of the Dice coefficient of the volume. Floor: where tumours are "
                "most often among the real training patients, as large as the mean tumour.",
                dice_interval,
            ),
            figure(
                f"AUC, {plan.label.name} from images",
                "higher",
                labels,
                "Class-conditional check: logistic regression on the extractor's mean features of a patient's slices. "
                f"Tested on {int((labelled.labels >= 0).sum())} patients. Floor: any constant answer, 0.5.",
                labels_interval,
            ),
        ],
    )


def positive_pixels(plan: StudyPlan) -> int:
    """Fewest tumour pixels of a slice that counts as tumour-bearing, on the grid that is evaluated: 1 square cm."""
    spacing = plan.image.pixel_spacing_mm * shrink_factor(plan.image.size)
    return math.ceil(POSITIVE_AREA_MM2 / spacing**2)


def _slice_areas(
    volumes: Columns[Volumes], holdout: Volumes, positive: NDArray[np.bool_], pixels: int, rng: np.random.Generator
) -> tuple[Columns[float], tuple[float, float] | None]:
    def area(scores: Scores) -> float:
        return roc_auc(scores.ravel(), positive.ravel())

    def resampled(scores: Scores, rows: Rows) -> float:
        return roc_auc(scores[rows].ravel(), positive[rows].ravel())

    def trained(volumes: Volumes) -> Scores:
        _require_test(holdout)
        images, masks = training_slices(volumes, MAX_TRAINING_SLICES, rng)
        targets = (masks.sum(axis=(1, 2)) >= pixels).astype(np.float32)
        if targets.min() == targets.max():
            raise NotMeasurable("no classifier can be trained, because the training slices are all of one class")
        network = fit(
            lambda: SliceClassifier(images.shape[1]),
            functional.binary_cross_entropy_with_logits,
            images,
            targets,
            rng,
            CLASSIFIER_STEPS,
            CLASSIFIER_BATCH,
            "Training a tumour classifier",
        )
        return predict(network, _as_slices(holdout)).reshape(positive.shape)

    def by_position(real: Volumes) -> Scores:
        _require_test(holdout)
        require_rows("real training patients", real.images, 1)
        frequency = (real.masks.sum(axis=(2, 3)) >= pixels).mean(axis=0)
        return np.broadcast_to(frequency, positive.shape)

    scores = beside_floor(volumes, trained, by_position)
    return scores.map(area), interval(scores, resampled, len(holdout), rng)


def _dice(
    volumes: Columns[Volumes], holdout: Volumes, rng: np.random.Generator
) -> tuple[Columns[float], tuple[float, float] | None]:
    def mean(values: Scores) -> float:
        known = values[np.isfinite(values)]
        require_rows("patients with a tumour in truth or prediction", known, 1)
        return float(known.mean())

    def trained(volumes: Volumes) -> Scores:
        _require_test(holdout)
        images, masks = training_slices(volumes, MAX_TRAINING_SLICES, rng, tumour_share=0.5)
        network = fit(
            lambda: SmallUNet(images.shape[1]),
            segmentation_loss,
            images,
            masks.astype(np.float32),
            rng,
            UNET_STEPS,
            UNET_BATCH,
            "Training a tumour segmentation",
        )
        return dice_by_patient(predict(network, _as_slices(holdout)).reshape(holdout.masks.shape) > 0, holdout.masks)

    def by_place(real: Volumes) -> Scores:
        _require_test(holdout)
        require_rows("real training patients", real.images, 1)
        frequency = real.masks.mean(axis=0, dtype=np.float64)
        voxels = round(float(frequency.sum()))
        guess = np.zeros(frequency.size, dtype=bool)
        guess[np.argsort(-frequency, axis=None, kind="stable")[:voxels]] = True
        return dice_by_patient(np.broadcast_to(guess.reshape(frequency.shape), holdout.masks.shape), holdout.masks)

    by_patient = beside_floor(volumes, trained, by_place)
    return by_patient.map(mean), interval(by_patient, lambda values, rows: mean(values[rows]), len(holdout), rng)


def _label_areas(
    volumes: Columns[Volumes], holdout: Volumes, extractor: DomainExtractor, classes: int, rng: np.random.Generator
) -> tuple[Columns[float], tuple[float, float] | None]:
    test = holdout.take(np.flatnonzero(holdout.labels >= 0))

    def trained(volumes: Volumes) -> Scores:
        _require_test(test)
        features, unseen = patient_features(extractor, volumes), patient_features(extractor, test)
        return class_scores(features, volumes.labels, unseen, classes)

    scores = beside_floor(volumes, trained, lambda _: np.full((len(test), classes), 1 / classes))
    area = scores.map(lambda values: macro_auc(values, test.labels))
    return area, interval(scores, lambda values, rows: macro_auc(values[rows], test.labels[rows]), len(test), rng)


def patient_features(extractor: DomainExtractor, volumes: Volumes) -> NDArray[np.float64]:
    """(N, D) mean of the extractor's features over each patient's slices.

    Raises:
        NotMeasurable: no patient has images.
    """
    require_rows("patients with images", volumes.images, 1)
    return np.stack([extract(extractor, np.moveaxis(volume, 0, 1)).mean(axis=0) for volume in volumes.images])


def _require_test(holdout: Volumes) -> None:
    require_rows("held-out patients to test on", holdout.images, MIN_TEST_PATIENTS)


def _as_slices(volumes: Volumes) -> NDArray[np.float32]:
    """(N * S, C, H, W) all slices, patient by patient."""
    slices = np.moveaxis(volumes.images, 1, 2)
    return np.ascontiguousarray(slices.reshape(-1, *slices.shape[2:]), dtype=np.float32)
