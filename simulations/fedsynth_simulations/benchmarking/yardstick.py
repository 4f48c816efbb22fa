"""How good are drawn patients? One quick measurement, the same for every recipe, on held-out real patients.

The measures are those of the release's report (`fedsynth.evaluation`) with the same networks and settings;
bootstrap intervals and what does not concern images are left out. Nothing is chosen by these numbers during a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional

from fedsynth.evaluation.fidelity import head_positions
from fedsynth.evaluation.linear import class_scores
from fedsynth.evaluation.networks import SliceClassifier, SmallUNet, fit, predict, segmentation_loss
from fedsynth.evaluation.samples import Volumes, even_slices, training_slices
from fedsynth.evaluation.utility import patient_features, positive_pixels
from fedsynth.metrics.density_coverage import density_coverage
from fedsynth.metrics.dice import dice_by_patient
from fedsynth.metrics.domain_extractor import DomainExtractor, extract, train_extractor
from fedsynth.metrics.frechet import frechet_distance
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.precision_recall import precision_recall
from fedsynth.metrics.roc_auc import macro_auc, roc_auc
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.plan import StudyPlan
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.cohort.public import PublicCohort
from fedsynth_simulations.extractor import extractor_task

# As in the release's report.
_TRAINING_SLICES = 4000
_CLASSIFIER_STEPS, _CLASSIFIER_BATCH = 250, 64
_UNET_STEPS, _UNET_BATCH = 200, 32
_COMPARED_SLICES = 2000
_BATCH = 32  # patients drawn at a time


@dataclass(frozen=True)
class Score:
    """What is measured; None where it could not be measured (a generator that draws no tumour, say).

    Attributes:
        frechet: Fréchet distance in domain features, 0 for equal laws; not comparable with published FID.
        precision, recall, density, coverage: of the same features.
        tumour_auc: mean, over networks that start differently, of the area under the curve of "1 cm² of tumour in this
            slice", trained on the drawn patients and tested on real ones.
        tumour_auc_sd: standard deviation over these networks.
        t1_auc, t1c_auc: the same from that sequence alone. On FLAIR oedema is so bright that everything finds it, and the
            public generator alone comes near the ceiling; without FLAIR there is something left to be learnt.
        label_auc: area of the label from images.
        dice: of the whole tumour.
    """

    frechet: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    tumour_auc: float | None
    tumour_auc_sd: float | None
    t1_auc: float | None
    t1c_auc: float | None
    label_auc: float | None
    dice: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Its fields by name, rounded to four digits."""
        return {name: None if value is None else round(value, 4) for name, value in asdict(self).items()}


def volumes(patients: Patients) -> Volumes:
    """Prepared patients as the metrics take them."""
    return Volumes(patients.images, patients.masks > 0, patients.labels, np.full(len(patients.labels), -1))


def draw_volumes(
    plan: StudyPlan, model: ImageGenerator, profiles: SyntheticProfiles, generator: torch.Generator
) -> Volumes:
    """A volume for each profile, one z a patient, as `fedsynth.synthesis.draw_patients` draws them, in larger batches."""
    positions, classes = slice_positions(plan.image.slices), len(plan.label.classes)
    images, masks = [], []
    model.eval()
    for rows in torch.arange(len(profiles.labels)).split(_BATCH):
        code = condition(
            profiles.labels[rows].repeat_interleave(len(positions)),
            profiles.morphology[rows].repeat_interleave(len(positions), 0),
            positions.repeat(len(rows)),
            classes,
        )
        z = torch.randn(len(rows), plan.gan.latent_dim, generator=generator).repeat_interleave(len(positions), 0)
        with torch.no_grad():
            drawn = model(z, code).unflatten(0, (len(rows), len(positions))).transpose(1, 2)
        images.append(((drawn[:, :-1] + 1) / 2).half())
        masks.append(drawn[:, -1] > 0)
    labels = profiles.labels.numpy()
    return Volumes(torch.cat(images).numpy(), torch.cat(masks).numpy(), labels, np.full(len(labels), -1))


def measure(
    plan: StudyPlan,
    drawn: Volumes,
    holdout: Volumes,
    extractor: DomainExtractor,
    seed: int,
    *,
    networks: int = 2,
    dice: bool = False,
) -> Score:
    """Measure drawn (or real training) patients on held-out real ones.

    Args:
        plan: pixel spacing and classes.
        drawn: what is measured.
        holdout: real patients that nothing was trained on.
        extractor: the feature network, see `load_extractor`.
        seed: of every draw; the same for all recipes that are compared.
        networks: tumour classifiers that are trained, each from another start.
        dice: whether to train a segmentation, which takes the longest.
    """
    frechet, precision, recall, density, coverage = _fidelity(drawn, holdout, extractor, seed)
    every = _tumour_aucs(plan, drawn, holdout, seed, networks)
    single = {
        name: _tumour_aucs(plan, _only(drawn, channel), _only(holdout, channel), seed, networks)
        for channel, name in enumerate(plan.image.sequences)
        if name != "FLAIR"
    }
    return Score(
        frechet,
        precision,
        recall,
        density,
        coverage,
        _mean(every),
        float(np.std(every)) if every else None,
        _mean(single.get("T1", [])),
        _mean(single.get("T1c", [])),
        _label_auc(plan, drawn, holdout, extractor),
        _dice(drawn, holdout, np.random.default_rng([seed, 3])) if dice else None,
    )


Fidelity = tuple[float | None, float | None, float | None, float | None, float | None]


def _fidelity(drawn: Volumes, holdout: Volumes, extractor: DomainExtractor, seed: int) -> Fidelity:
    patients = min(len(drawn), len(holdout))
    positions = head_positions(holdout)
    slices = max(1, min(len(positions), _COMPARED_SLICES // patients))
    real = extract(extractor, even_slices(holdout, patients, positions, slices, np.random.default_rng([seed, 0])))
    try:
        fake = extract(extractor, even_slices(drawn, patients, positions, slices, np.random.default_rng([seed, 1])))
        return (
            frechet_distance(real, fake),
            *precision_recall(real, fake),
            *density_coverage(real, fake),
        )
    except NotMeasurable:
        return None, None, None, None, None


def _only(volumes: Volumes, channel: int) -> Volumes:
    return Volumes(volumes.images[:, channel : channel + 1], volumes.masks, volumes.labels, volumes.sites)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _tumour_aucs(plan: StudyPlan, drawn: Volumes, holdout: Volumes, seed: int, networks: int) -> list[float]:
    """An area for each of so many networks; none where the drawn slices cannot train one."""
    areas = (_tumour_auc(plan, drawn, holdout, np.random.default_rng([seed, 2, i])) for i in range(networks))
    return [area for area in areas if area is not None]


def _tumour_auc(plan: StudyPlan, drawn: Volumes, holdout: Volumes, rng: np.random.Generator) -> float | None:
    pixels = positive_pixels(plan)
    images, masks = training_slices(drawn, _TRAINING_SLICES, rng)
    targets = (masks.sum(axis=(1, 2)) >= pixels).astype(np.float32)
    if targets.min() == targets.max():
        return None
    network = fit(
        lambda: SliceClassifier(images.shape[1]),
        functional.binary_cross_entropy_with_logits,
        images,
        targets,
        rng,
        _CLASSIFIER_STEPS,
        _CLASSIFIER_BATCH,
        "Training a tumour classifier",
    )
    positive = holdout.masks.sum(axis=(2, 3)) >= pixels
    return roc_auc(predict(network, _as_slices(holdout)), positive.ravel())


def _label_auc(plan: StudyPlan, drawn: Volumes, holdout: Volumes, extractor: DomainExtractor) -> float | None:
    test = holdout.take(np.flatnonzero(holdout.labels >= 0))
    try:
        scores = class_scores(
            patient_features(extractor, drawn), drawn.labels, patient_features(extractor, test), len(plan.label.classes)
        )
    except NotMeasurable:
        return None
    return macro_auc(scores, test.labels)


def _dice(drawn: Volumes, holdout: Volumes, rng: np.random.Generator) -> float | None:
    images, masks = training_slices(drawn, _TRAINING_SLICES, rng, tumour_share=0.5)
    if not masks.any():
        return None
    network = fit(
        lambda: SmallUNet(images.shape[1]),
        segmentation_loss,
        images,
        masks.astype(np.float32),
        rng,
        _UNET_STEPS,
        _UNET_BATCH,
        "Training a tumour segmentation",
    )
    predicted = predict(network, _as_slices(holdout)).reshape(holdout.masks.shape) > 0
    return float(np.nanmean(dice_by_patient(predicted, holdout.masks)))


def _as_slices(volumes: Volumes) -> NDArray[np.float32]:
    slices = np.moveaxis(volumes.images, 1, 2)
    return np.ascontiguousarray(slices.reshape(-1, *slices.shape[2:]), dtype=np.float32)


def load_extractor(path: Path, public: Patients, names: Sequence[str], seed: int) -> DomainExtractor:
    """The feature network in the file `path`, or else one that is trained on `public` patients and stored there.

    Args:
        path: a safetensors file.
        public: public simulated patients.
        names: the plan's sequences, one a channel.
        seed: of its training.
    """
    provenance = f"{len(public)} public simulated patients at {public.images.shape[-1]} pixels"
    if path.exists():
        state = load_file(path)
        extractor = DomainExtractor(len(names), len(state["head.1.weight"]), provenance)
        extractor.load_state_dict(state)
        return extractor.eval()
    cohort = PublicCohort(public.images, public.masks, public.morphology.astype(np.float64), public.labels)
    images, targets = extractor_task(cohort)
    extractor = train_extractor(images, targets, torch.Generator().manual_seed(seed), provenance)
    # Two processes may do this at once; they write the same bytes.
    draft = path.with_suffix(f".{os.getpid()}.part")
    save_file(extractor.state_dict(), draft)
    draft.rename(path)
    return extractor.eval()
