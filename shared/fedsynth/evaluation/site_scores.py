"""How well the generator's patients prepare for a held-out patient: one row of bounded scores a patient, summed and noised.

Two small networks are trained on synthetic patients alone, to find tumour-bearing slices and to outline the tumour; the
study's own profile model predicts morphology and label from genes. A site lets them answer for each of its held-out
patients. A patient's row has a fixed length and norm at most 1 whatever the patient and whatever the networks, and is
computed from that patient alone, so the sum over patients is a statistic that can be released with Gaussian noise
(`fedsynth_client.training.statistic`). Here also is what can be read from a noisy sum.

A row holds each of `SCORED` as 2 s - 1, and each of `MEASURED` as 1; what could not be measured is 0. Centred so, a score
takes the same share of the norm as it would between 0 and 1, and suffers half the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsynth.evaluation.networks import SliceClassifier, SmallUNet, predict
from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.samples import shrink, shrink_factor
from fedsynth.evaluation.site_values import NoisyScore, ScoreMeaning, ScoreName
from fedsynth.metrics.dice import dice_by_patient
from fedsynth.plan import StudyPlan
from fedsynth.profiles import ProfileModel, profile_model
from fedsynth.records import EVALUATORS, State

SCORED = ("dice", "slices", "morphology", "morphology_floor", "label", "label_floor")
MEASURED = ("images", "morphology", "label")
ROW_SIZE = len(SCORED) + len(MEASURED)

LARGEST_ERROR = 0.25
"""Error of a morphology feature, as a share of its public range, at which its score is 0."""

BEARING_MM2 = 100.0
"""Least area of tumour in a slice that counts as tumour-bearing: 1 square cm."""

_SCALE = 1 / math.sqrt(ROW_SIZE)  # every entry is between -1 and 1
_NORMAL_95 = 1.959963984540054
_DROWNED = 0.5  # width of an interval above which a score is called drowned

_MEANINGS = (
    ScoreMeaning(
        name="dice",
        title="Dice, tumour",
        meaning="A small U-Net, trained on synthetic patients, outlines the whole tumour: Dice coefficient of the volume.",
        floor="",
    ),
    ScoreMeaning(
        name="slices",
        title="Balanced accuracy, tumour-bearing slice",
        meaning="A small network, trained on synthetic slices, says whether a slice holds at least 1 cm² of tumour: mean of "
        "the shares of a patient's slices with and without tumour that it gets right.",
        floor="0.5, the value of any answer that does not look at the slice.",
    ),
    ScoreMeaning(
        name="morphology",
        title="Morphology from genes",
        meaning=f"The study's profile model predicts a patient's tumour from the genes: 1 without error, 0 for an error of "
        f"{LARGEST_ERROR:g} of a feature's public range or more, mean over the features that were measured.",
        floor="The mean of synthetic patients as the answer for everybody.",
    ),
    ScoreMeaning(
        name="label",
        title="Label from genes",
        meaning="The study's profile model predicts a patient's label from the genes: share of patients it gets right.",
        floor="The most frequent label of synthetic patients as the answer for everybody.",
    ),
)


def meanings(plan: StudyPlan) -> list[ScoreMeaning]:
    """What the scores are, under the plan's name for the label."""
    title = f"{plan.label.name.capitalize()} from genes"
    return [each.model_copy(update={"title": title}) if each.name == "label" else each for each in _MEANINGS]


def evaluators_template(plan: StudyPlan) -> State:
    """Names, shapes and types of the record `fedsynth.records.EVALUATORS`; the values mean nothing.

    ``unet/...`` and ``classifier/...`` are state dicts; ``morphology_floor`` (F,) is the mean morphology of synthetic
    patients and ``label_floor`` (K,) the frequency of their labels.
    """
    networks = {"unet": _unet(plan), "classifier": _classifier(plan)}
    state = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    return {
        **state,
        "morphology_floor": torch.zeros(len(plan.morphology.features)),
        "label_floor": torch.zeros(len(plan.label.classes)),
    }


def _unet(plan: StudyPlan) -> SmallUNet:
    return SmallUNet(len(plan.image.sequences))


def _classifier(plan: StudyPlan) -> SliceClassifier:
    return SliceClassifier(len(plan.image.sequences))


@dataclass(frozen=True)
class Evaluators:
    """What answers for a patient: nothing in it was made with anybody's data but what had been released before.

    Attributes:
        unet: slices (N, C, H, W) in [0, 1] -> tumour logits (N, H, W).
        classifier: the same slices -> logits (N,) of whether a slice bears tumour.
        profiles: genes -> morphology and label.
        morphology_floor: (F,) the answer for everybody.
        label_floor: class code, the answer for everybody.
        pixels: fewest tumour pixels of a tumour-bearing slice.
    """

    unet: SmallUNet
    classifier: SliceClassifier
    profiles: ProfileModel
    morphology_floor: NDArray[np.float64]
    label_floor: int
    pixels: int


def evaluators(plan: StudyPlan, weights: Mapping[str, State]) -> Evaluators:
    """Build them from the records that a task of an evaluation carries (`fedsynth.records.task_weights`)."""
    state = weights[EVALUATORS]
    unet, classifier = _unet(plan), _classifier(plan)
    for name, network in (("unet", unet), ("classifier", classifier)):
        prefix = f"{name}/"
        network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return Evaluators(
        unet.eval(),
        classifier.eval(),
        profile_model(plan, weights),
        state["morphology_floor"].double().numpy(),
        int(state["label_floor"].argmax()),
        bearing_pixels(plan),
    )


def bearing_pixels(plan: StudyPlan) -> int:
    """Fewest tumour pixels of a tumour-bearing slice, on the grid that is evaluated."""
    spacing = plan.image.pixel_spacing_mm * shrink_factor(plan.image.size)
    return math.ceil(BEARING_MM2 / spacing**2)


def rows(used: Evaluators, patients: Patients) -> Tensor:
    """(N, ROW_SIZE) float64, one row of norm at most 1 a patient.

    One patient after the other: what shares a batch with others could differ in its last bits by who the others are, and
    a voxel that flips for that reason would make one patient's row depend on another.
    """
    found = [_row(used, patients.rows(np.array([i]))) for i in range(len(patients))]
    return torch.from_numpy(np.array(found, dtype=np.float64).reshape(-1, ROW_SIZE) * _SCALE)


def _row(used: Evaluators, patient: Patients) -> list[float]:
    scores: dict[str, float] = {}
    measured = dict.fromkeys(MEASURED, 0.0)
    if patient.has_images[0] and (images := _image_scores(used, patient)):
        scores |= images
        measured["images"] = 1.0
    if patient.has_genes[0]:
        of_genes = _gene_scores(used, patient)
        scores |= of_genes
        measured |= {name: 1.0 for name in ("morphology", "label") if name in of_genes}
    # Whatever the networks answered, no entry is outside [-1, 1]; NaN is the worst score.
    centred = [2 * min(max(_finite(scores[name]), 0.0), 1.0) - 1 if name in scores else 0.0 for name in SCORED]
    return [*centred, *measured.values()]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _image_scores(used: Evaluators, patient: Patients) -> dict[str, float]:
    """Dice and balanced accuracy; empty where the patient has no slice with enough tumour, or none without."""
    truth = shrink(patient.masks[0] > 0) >= 0.5
    bearing = truth.sum(axis=(1, 2)) >= used.pixels
    if bearing.all() or not bearing.any():
        return {}
    slices = np.nan_to_num(np.moveaxis(shrink(patient.images[0]), 0, 1).astype(np.float32))
    outlined = predict(used.unet, np.ascontiguousarray(slices)) > 0
    said = predict(used.classifier, np.ascontiguousarray(slices)) > 0
    return {
        "dice": float(dice_by_patient(outlined[None], truth[None])[0]),
        "slices": float(said[bearing].mean() + (~said[~bearing]).mean()) / 2,
    }


def _gene_scores(used: Evaluators, patient: Patients) -> dict[str, float]:
    morphology, logits = used.profiles.predict(torch.from_numpy(patient.genes))
    truth, label = patient.morphology[0].astype(np.float64), int(patient.labels[0])
    found: dict[str, float] = {}
    known = np.isfinite(truth)
    if known.any():
        found["morphology"] = _closeness(morphology[0].double().numpy()[known], truth[known])
        found["morphology_floor"] = _closeness(used.morphology_floor[known], truth[known])
    if label >= 0:
        found["label"] = float(int(logits[0].argmax()) == label)
        found["label_floor"] = float(used.label_floor == label)
    return found


def _closeness(answer: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    error = np.nan_to_num(np.abs(answer - truth), nan=LARGEST_ERROR)
    return float(1 - np.minimum(error / LARGEST_ERROR, 1).mean())


def noisy_scores(total: Tensor, noise_sd: float) -> list[NoisyScore]:
    """What a noisy sum of rows tells of the mean scores.

    Args:
        total: (ROW_SIZE,) the sum over one or several sites.
        noise_sd: standard deviation of its noise in each coordinate, all sites' together.

    Returns:
        One a `ScoreName`. A mean is the ratio of two noisy numbers, so its interval is Fieller's (1954), which holds in
        95 % of cases however large the noise is; where it is not bounded, the noise has drowned the score.
    """
    entry = dict(zip((*SCORED, *(f"n_{name}" for name in MEASURED)), (total.double() / _SCALE).tolist(), strict=True))
    sd = noise_sd / _SCALE
    return [
        _score("dice", entry["dice"], entry["n_images"], sd),
        _score("slices", entry["slices"], entry["n_images"], sd, constant_floor=0.5),
        _score("morphology", entry["morphology"], entry["n_morphology"], sd, floor=entry["morphology_floor"]),
        _score("label", entry["label"], entry["n_label"], sd, floor=entry["label_floor"]),
    ]


def expected_width(patients: float, noise_sd: float) -> float:
    """Width of the interval of a score of three quarters over so many patients, 1 being all there is.

    Args:
        patients: in whom the score can be measured.
        noise_sd: as of `noisy_scores`.
    """
    sd = noise_sd / _SCALE
    found = ratio_interval(0.5 * patients, patients, sd, sd)
    if found is None:
        return 1.0
    return min((found[1] - found[0]) / 2, 1.0)


def _score(
    name: ScoreName,
    centred: float,
    patients: float,
    sd: float,
    *,
    floor: float | None = None,
    constant_floor: float | None = None,
) -> NoisyScore:
    """`centred` and `floor` are sums of 2 s - 1."""
    around = ratio_interval(centred, patients, sd, sd)
    if around is None or around[0] > 1 or around[1] < -1:  # not bounded, or no possible score in it
        return NoisyScore(
            name=name,
            value=None,
            interval=None,
            standard_error=None,
            floor=None,
            gain=None,
            patients=patients,
            drowned=True,
        )
    interval, ratio = (_unit(around[0]), _unit(around[1])), centred / patients
    beneath, gain = constant_floor, None
    if constant_floor is not None:
        gain = (interval[0] - constant_floor, interval[1] - constant_floor)
    elif floor is not None:
        beneath = _unit(floor / patients)
        # Bounded, as that of the score is: it depends on the same number of patients.
        difference = ratio_interval(centred - floor, patients, math.sqrt(2) * sd, sd)
        gain = None if difference is None else (max(difference[0] / 2, -1.0), min(difference[1] / 2, 1.0))
    return NoisyScore(
        name=name,
        value=_unit(ratio),
        interval=interval,
        standard_error=sd * math.hypot(1, ratio) / patients / 2,
        floor=beneath,
        gain=gain if gain is None or gain[0] <= gain[1] else None,
        patients=patients,
        # Before it is cut off at 0 and 1: where all is noise, the number of patients may come out positive by chance, and
        # what little of a wide interval lies between 0 and 1 would look sharp.
        drowned=(around[1] - around[0]) / 2 > _DROWNED,
    )


def _unit(centred: float) -> float:
    return (min(max(centred, -1.0), 1.0) + 1) / 2


def ratio_interval(above: float, below: float, sd_above: float, sd_below: float) -> tuple[float, float] | None:
    """95 % confidence interval of the ratio of two Gaussian means (Fieller 1954, J. R. Stat. Soc. B 16).

    All r for which ``above - r below`` lies within 1.96 of its standard deviations.

    Args:
        above, below: one observation of each, independent.
        sd_above, sd_below: their known standard deviations.

    Returns:
        The interval; None where it is not bounded, or `below`, which stands for a number of people, is not above 0.
    """
    k = _NORMAL_95**2
    square = below**2 - k * sd_below**2
    if below <= 0 or square <= 0:
        return None
    middle = above * below
    half = math.sqrt(k * ((sd_above * below) ** 2 + (sd_below * above) ** 2 - k * (sd_above * sd_below) ** 2))
    return (middle - half) / square, (middle + half) / square
