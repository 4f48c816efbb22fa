"""The two tasks on slices by which images are judged: is there a tumour in this slice, and where is it.

Each is learnt by a small network in a fixed number of steps, and has a floor that never looks at an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from torch import nn
from torch.nn import functional

from fedsynth.evaluation.networks import SliceClassifier, SmallUNet, fit, predict, segmentation_loss
from fedsynth.evaluation.samples import Volumes, training_slices
from fedsynth.metrics.dice import dice_by_patient
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows

MAX_TRAINING_SLICES = 4000  # of each set
CLASSIFIER_BATCH = 64
UNET_BATCH = 32


def positive_slices(volumes: Volumes, pixels: int) -> NDArray[np.bool_]:
    """(N, S) whether a slice holds at least `pixels` tumour pixels."""
    return np.asarray(volumes.masks.sum(axis=(2, 3)) >= pixels)


def train_classifier(sets: Sequence[Volumes], pixels: int, rng: np.random.Generator, steps: int) -> nn.Module:
    """A network that tells tumour-bearing slices, trained on slices of all `sets` of patients together.

    Raises:
        NotMeasurable: a set is empty or not finite, or all slices are of one class.
    """
    images, masks = _slices_of(sets, rng, None)
    targets = (masks.sum(axis=(1, 2)) >= pixels).astype(np.float32)
    if targets.min() == targets.max():
        raise NotMeasurable("no classifier can be trained, because the training slices are all of one class")
    return fit(
        lambda: SliceClassifier(images.shape[1]),
        functional.binary_cross_entropy_with_logits,
        images,
        targets,
        rng,
        steps,
        CLASSIFIER_BATCH,
        "Training a tumour classifier",
    )


def train_segmenter(sets: Sequence[Volumes], rng: np.random.Generator, steps: int) -> nn.Module:
    """A U-Net that outlines the tumour, trained on slices of all `sets`, half of them tumour-bearing where there are.

    Raises:
        NotMeasurable: a set is empty or not finite.
    """
    images, masks = _slices_of(sets, rng, 0.5)
    return fit(
        lambda: SmallUNet(images.shape[1]),
        segmentation_loss,
        images,
        masks.astype(np.float32),
        rng,
        steps,
        UNET_BATCH,
        "Training a tumour segmentation",
    )


def tumour_probabilities(classifier: nn.Module, test: Volumes) -> NDArray[np.float64]:
    """(N, S) probability that each slice bears a tumour."""
    logits = predict(classifier, _as_slices(test)).astype(np.float64)
    return np.asarray(expit(logits)).reshape(test.masks.shape[:2])


def segmentation_dice(segmenter: nn.Module, test: Volumes) -> NDArray[np.float64]:
    """(N,) Dice coefficient of each patient's volume; NaN where truth and prediction are both empty."""
    return dice_by_patient(predict(segmenter, _as_slices(test)).reshape(test.masks.shape) > 0, test.masks)


def probabilities_by_position(real: Volumes, test: Volumes, pixels: int) -> NDArray[np.float64]:
    """Floor of the classifier: (N, S) the share of tumour-bearing slices at each position among `real` patients."""
    require_rows("real training patients", real.images, 1)
    return np.broadcast_to(positive_slices(real, pixels).mean(axis=0), test.masks.shape[:2])


def dice_by_place(real: Volumes, test: Volumes) -> NDArray[np.float64]:
    """Floor of the segmentation: (N,) Dice of the voxels where tumours of `real` patients are most often, as many as in
    their mean tumour."""
    require_rows("real training patients", real.images, 1)
    frequency = real.masks.mean(axis=0, dtype=np.float64)
    voxels = round(float(frequency.sum()))
    guess = np.zeros(frequency.size, dtype=bool)
    guess[np.argsort(-frequency, axis=None, kind="stable")[:voxels]] = True
    return dice_by_patient(np.broadcast_to(guess.reshape(frequency.shape), test.masks.shape), test.masks)


def _slices_of(
    sets: Sequence[Volumes], rng: np.random.Generator, tumour_share: float | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    drawn = [training_slices(volumes, MAX_TRAINING_SLICES, rng, tumour_share) for volumes in sets]
    return np.concatenate([images for images, _ in drawn]), np.concatenate([masks for _, masks in drawn])


def _as_slices(volumes: Volumes) -> NDArray[np.float32]:
    """(N * S, C, H, W) all slices, patient by patient."""
    slices = np.moveaxis(volumes.images, 1, 2)
    require_finite("images", slices)
    return np.ascontiguousarray(slices.reshape(-1, *slices.shape[2:]), dtype=np.float32)
