"""Attribute inference: one part of a patient guessed from another, by links that were learnt from the release alone.

That genes tell something of a tumour's form is what a radiogenomic release is for, and holds for people whom nobody
trained on. Only what is guessed better of training patients than of held-out ones is about membership
(`fedsynth.attacks.values.AttributeAttack`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from fedsynth.attacks.descriptions import Described
from fedsynth.attacks.rates import MIN_PATIENTS
from fedsynth.attacks.values import AttributeAttack, Rate
from fedsynth.evaluation.linear import MIN_TRAINING, PENALTIES, class_scores, ridge_predictions
from fedsynth.metrics.bootstrap import bootstrap_interval
from fedsynth.metrics.measurable import NotMeasurable, require_rows

COMPONENTS = 10
"""Leading principal components of the reference patients' genes that are guessed from images."""

_KNOWS = "the release; the part of the patient that is given"
_TINY = 1e-9
_BOUND = 4.0  # of an input, in standard deviations


@dataclass(frozen=True)
class Guessed:
    """How well each patient was guessed, larger is better.

    Attributes:
        members, non_members: (N,), (M,) scores by the attack.
        baseline: mean score of both by a guess that looks at nothing.
    """

    members: NDArray[np.float64]
    non_members: NDArray[np.float64]
    baseline: float


def genes_from_images(
    members: Described, non_members: Described, synthetic: Described, reference: Described, rng: np.random.Generator
) -> AttributeAttack:
    """The leading components of expression from image features, mask and morphology; ridge regression.

    Raises:
        NotMeasurable: too few patients with both parts.
    """
    train, held, known, usual = (_with_both(each) for each in (members, non_members, synthetic, reference))
    require_rows("synthetic patients with images and genes", known.labels, MIN_TRAINING)
    _require(train, held)
    # The directions are those of patients who are neither: components of a release that repeats its members would lie
    # along those members' own noise, and make them look hard to guess.
    neutral = usual if len(usual) > COMPONENTS else known
    middle = neutral.genes.mean(axis=0, dtype=np.float64)
    components = min(COMPONENTS, len(neutral) - 1)
    *_, axes = np.linalg.svd(neutral.genes - middle, full_matrices=False)

    def coordinates(patients: Described) -> NDArray[np.float64]:
        return np.asarray((patients.genes - middle) @ axes[:components].T)

    inputs, targets = _image_inputs(known), coordinates(known)
    centre, spread = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-3)

    def standard(patients: Described) -> NDArray[np.float64]:
        # Real images may lie where no synthetic one does; a linear rule means nothing there.
        return np.clip((_image_inputs(patients) - centre) / spread, -_BOUND, _BOUND)

    model = RidgeCV(PENALTIES, alpha_per_target=components > 1)
    model.fit(standard(known), targets if components > 1 else targets[:, 0])

    def guess(patients: Described) -> NDArray[np.float64]:
        found = np.asarray(model.predict(standard(patients))).reshape(len(patients), -1)
        return np.clip(found, targets.min(axis=0), targets.max(axis=0))

    truths = coordinates(train), coordinates(held)
    # Without the release there is the reference's mean; without a reference, the plan's public centre, which is 0.
    blind = coordinates(usual).mean(axis=0) if len(usual) else (0.0 - middle) @ axes[:components].T
    return _attack(
        "genes-from-images",
        "Genes guessed from images",
        f"the {components} leading components of expression from features of all slices, mask and morphology",
        "R² of the components together",
        _r2(truths, (guess(train), guess(held)), blind, together=True),
        _blind_note(len(usual), "the plan's public centre of every gene"),
        rng,
    )


def morphology_from_genes(
    members: Described, non_members: Described, synthetic: Described, reference: Described, rng: np.random.Generator
) -> AttributeAttack:
    """The tumour's measured morphology from genes; ridge regression.

    Raises:
        NotMeasurable: too few patients with genes and morphology.
    """
    train, held, known, usual = (
        each.take(each.has("genes") & np.isfinite(each.morphology).any(axis=1))
        for each in (members, non_members, synthetic, reference)
    )
    _require(train, held)
    blind = np.full(train.morphology.shape[1], 0.5)
    if len(usual):
        measured = np.isfinite(usual.morphology).any(axis=0)
        blind[measured] = np.nanmean(usual.morphology[:, measured], axis=0)
    guesses = tuple(ridge_predictions(known.genes, known.morphology, each.genes) for each in (train, held))
    return _attack(
        "morphology-from-genes",
        "Morphology guessed from genes",
        "the measured morphology of the tumour from the expression profile",
        "R², mean over features",
        _r2((train.morphology, held.morphology), (guesses[0], guesses[1]), blind),
        _blind_note(len(usual), "the middle of each feature's public range"),
        rng,
    )


def label_from_genes(
    members: Described,
    non_members: Described,
    synthetic: Described,
    reference: Described,
    classes: int,
    rng: np.random.Generator,
) -> AttributeAttack:
    """The label from genes; logistic regression.

    Raises:
        NotMeasurable: too few patients with genes and label, or synthetic patients of one class only.
    """
    train, held, known, usual = (
        each.take(each.has("genes") & (each.labels >= 0)) for each in (members, non_members, synthetic, reference)
    )
    _require(train, held)
    right = [
        (class_scores(known.genes, known.labels, each.genes, classes).argmax(axis=1) == each.labels).astype(float)
        for each in (train, held)
    ]
    commonest = int(np.bincount((usual if len(usual) else known).labels, minlength=classes).argmax())
    everybody = np.concatenate([train.labels, held.labels])
    guessed = Guessed(right[0], right[1], float((everybody == commonest).mean()))
    whose = "reference patients" if len(usual) else "synthetic patients"
    return _attack(
        "label-from-genes",
        "Label guessed from genes",
        "the label from the expression profile",
        "share of labels guessed",
        guessed,
        f"The baseline guesses the commonest label of the {whose} for everybody.",
        rng,
    )


def _attack(
    identity: str, title: str, guesses: str, metric: str, found: Guessed, note: str, rng: np.random.Generator
) -> AttributeAttack:
    return AttributeAttack(
        id=identity,
        title=title,
        knows=_KNOWS,
        guesses=guesses,
        metric=metric,
        members=float(found.members.mean()),
        non_members=float(found.non_members.mean()),
        gap=_gap(found, rng),
        baseline=found.baseline,
        note=note,
    )


def _gap(found: Guessed, rng: np.random.Generator) -> Rate:
    """Members minus non-members with a 95 % bootstrap interval; both groups are drawn anew."""
    inside, outside = found.members, found.non_members

    # A resample of the members; that of the non-members comes from the same stream.
    def difference(rows: NDArray[np.int64]) -> float:
        return float(inside[rows].mean() - outside[rng.integers(len(outside), size=len(outside))].mean())

    interval = bootstrap_interval(difference, len(inside), rng)
    value = float(inside.mean() - outside.mean())
    assert interval is not None  # a mean always has a value
    return Rate(value=value, low=interval[0], high=interval[1])


Pair = tuple[NDArray[np.floating], NDArray[np.floating]]


def _r2(truths: Pair, guesses: Pair, blind: NDArray[np.floating], *, together: bool = False) -> Guessed:
    """R² by patient: 1 - mean over targets of squared error over the target's variance among all attacked patients.

    The mean over patients is the usual R²; with one variance for members and non-members their difference is due to
    the guesses alone. Targets that hardly vary, and those that were not measured, are left out. With `together` all
    targets share their mean variance, so that those that vary most count most.
    """
    everybody = np.concatenate(truths).astype(np.float64)
    known = np.isfinite(everybody)
    filled = np.where(known, everybody, 0.0)
    count = np.maximum(known.sum(axis=0), 1)
    mean = filled.sum(axis=0) / count
    variance = np.where(known, np.square(filled - mean), 0.0).sum(axis=0) / count
    kept = variance > _TINY
    if not kept.any():
        raise NotMeasurable("what is to be guessed is the same in all patients")
    if together:
        variance = np.full_like(variance, variance[kept].mean())

    def scores(truth: NDArray[np.floating], guess: NDArray[np.floating]) -> NDArray[np.float64]:
        measured = np.isfinite(truth) & kept
        error = np.where(measured, np.square(np.where(measured, truth, 0.0) - guess), 0.0)
        relative = (error / np.where(kept, variance, 1.0)).sum(axis=1)
        # Each patient counts by the targets that were measured in it.
        return np.asarray(1 - relative[measured.any(axis=1)] / measured.sum(axis=1)[measured.any(axis=1)])

    blindly = np.concatenate([scores(truth, np.broadcast_to(blind, truth.shape)) for truth in truths])
    return Guessed(scores(truths[0], guesses[0]), scores(truths[1], guesses[1]), float(blindly.mean()))


def _with_both(described: Described) -> Described:
    return described.take(described.has("both"))


def _image_inputs(patients: Described) -> NDArray[np.float64]:
    morphology = np.where(np.isfinite(patients.morphology), patients.morphology, 0.5)
    return np.concatenate([patients.slices, patients.mask, morphology], axis=1).astype(np.float64)


def _require(members: Described, non_members: Described) -> None:
    require_rows("members with both parts", members.labels, MIN_PATIENTS)
    require_rows("non-members with both parts", non_members.labels, MIN_PATIENTS)


def _blind_note(references: int, otherwise: str) -> str:
    return f"The baseline guesses {'the mean of reference patients' if references else otherwise} for everybody."
