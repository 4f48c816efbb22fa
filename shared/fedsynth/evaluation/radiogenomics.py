"""Does expression predict morphology on held-out real patients, and is that link in the synthetic patients too?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import NOT_ASKED, Columns, attempt, beside_floor, figure, interval
from fedsynth.evaluation.linear import ridge_predictions
from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.samples import Profiles
from fedsynth.evaluation.values import Figure, Section
from fedsynth.metrics.association import association_map, map_agreement
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.regression import (
    mae_by_feature,
    mean_absolute_error,
    mean_absolute_percentage_error,
    mean_r2,
)
from fedsynth.morphology import FEATURES, WHOLE_TUMOUR, features, normalise
from fedsynth.morphometry import measure
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth.synthetic import SyntheticPatient

MIN_TEST_PATIENTS = 8
MAX_MEASURED = 200
PERMUTATIONS = 20

Values = NDArray[np.floating]
Predictor = Callable[[NDArray[np.float32]], NDArray[np.floating]]


def radiogenomics(
    plan: StudyPlan,
    profiles: Columns[Profiles],
    holdout: Profiles,
    predict_morphology: Predictor,
    measured: Columns[tuple[Values, Values]],
    rng: np.random.Generator,
) -> Section:
    """Errors of the DNN and of the synthetic pairs, agreement of association maps, and of image with morphology.

    Args:
        plan: names and order of the features.
        profiles: synthetic, real training and public-only patients.
        holdout: held-out real patients.
        predict_morphology: the released DNN, from genes (N, G) to normalised morphology (N, F).
        measured: intended and re-measured morphology, see `remeasured`.
        rng: source of all draws.
    """
    names = plan.morphology.features
    pairs = profiles.map(lambda sample: sample.with_morphology)
    test = holdout.with_morphology
    figures = [
        *_released_network(names, pairs, test, predict_morphology, rng),
        *_synthetic_pairs(names, pairs, test, rng),
        _association(pairs, test, rng),
        *_consistency(names, measured, rng),
    ]
    return Section(
        id="radiogenomics",
        title="The link from genes to morphology",
        explanation=(
            f"Morphology is predicted from expression for {len(test)} held-out real patients in whom both are known. "
            "First by the released network (DNN), beside a linear (ridge) regression on the real training pairs and "
            "the floor that always answers with the middle of the public range. Then by a linear regression that saw "
            "synthetic pairs only: if it does well, the synthetic table carries the link. The agreement of association "
            "maps asks whether the same genes go with the same features. The last rows measure the tumour in the "
            "synthetic images themselves and correlate it with the morphology that they were made to have. A "
            "correlation is not a cause; place and shape of a tumour may not depend on expression at all, and then no "
            "method beats the floor there. Intervals: 95 %, bootstrap over the held-out patients."
        ),
        figures=figures,
    )


def _released_network(
    names: list[str], pairs: Columns[Profiles], test: Profiles, predict_morphology: Predictor, rng: np.random.Generator
) -> list[Figure]:
    def network() -> Values:
        _require_test(test)
        predicted = np.asarray(predict_morphology(test.genes), dtype=np.float64)
        if predicted.shape != test.morphology.shape:
            raise ValueError(f"predict_morphology gave shape {predicted.shape}, expected {test.morphology.shape}")
        require_finite("the DNN's predictions", predicted)
        return np.clip(predicted, 0.0, 1.0)

    linear = Columns(NOT_ASKED, real=pairs.real).map(lambda train: _ridge(train, test)).real
    predicted = Columns(attempt(network), linear, attempt(lambda: _middle(test)))
    by_feature = predicted.map(lambda values: mae_by_feature(values, test.morphology)).synthetic
    detail = "" if isinstance(by_feature, NotMeasurable) else f" DNN by feature: {_list(names, by_feature)}."
    note = "'real' is ridge regression on the real training pairs; floor: the middle of the public range."
    return _errors("released DNN", names, predicted, test, note, detail, rng)


def _synthetic_pairs(
    names: list[str], pairs: Columns[Profiles], test: Profiles, rng: np.random.Generator
) -> list[Figure]:
    predicted = beside_floor(pairs, lambda train: _ridge(train, test), lambda _: _middle(test))
    note = "Ridge regression on the pairs of each column; floor: the middle of the public range."
    return _errors("trained on the pairs", names, predicted, test, note, "", rng)


def _errors(
    who: str,
    names: list[str],
    predicted: Columns[Values],
    test: Profiles,
    note: str,
    detail: str,
    rng: np.random.Generator,
) -> list[Figure]:
    truth = test.morphology

    def percentage(values: Values, rows: NDArray[np.int64]) -> float:
        return mean_absolute_percentage_error(values[rows], truth[rows], names)

    everyone = np.arange(len(test))
    return [
        figure(
            f"MAE of morphology, {who} (share of the public range)",
            "lower",
            predicted.map(lambda values: mean_absolute_error(values, truth)),
            f"Mean over features. {note}{detail}",
            interval(predicted, lambda values, rows: mean_absolute_error(values[rows], truth[rows]), len(test), rng),
        ),
        figure(
            f"MAPE of morphology, {who} (%)",
            "lower",
            predicted.map(lambda values: percentage(values, everyone)),
            f"In physical units, mean over features; true values near 0 are left out. {note}",
            interval(predicted, percentage, len(test), rng),
        ),
        figure(
            f"R² of morphology, {who}",
            "higher",
            predicted.map(lambda values: mean_r2(values, truth)),
            "Share of the variance explained, mean over features; negative is worse than always answering with the "
            f"mean of the tested patients. {note}",
        ),
    ]


def _association(pairs: Columns[Profiles], test: Profiles, rng: np.random.Generator) -> Figure:
    reference = attempt(lambda: association_map(test.genes, test.morphology))

    def agreement(sample: Profiles) -> float:
        if isinstance(reference, NotMeasurable):
            raise NotMeasurable(f"held-out patients: {reference}")
        require_finite("genes", sample.genes)
        return map_agreement(association_map(sample.genes, sample.morphology), reference)

    def unpaired(real: Profiles) -> float:
        shuffled = (replace(real, morphology=rng.permutation(real.morphology)) for _ in range(PERMUTATIONS))
        return float(np.mean([agreement(sample) for sample in shuffled]))

    return figure(
        "Agreement of the gene-by-feature association maps",
        "higher",
        beside_floor(pairs, agreement, unpaired),
        "Correlation of the map with that of the held-out patients, whose own chance noise also holds down 'real'. "
        f"Floor: the real training patients with genes and morphology paired at random, mean of {PERMUTATIONS} pairings.",
    )


def _consistency(names: list[str], measured: Columns[tuple[Values, Values]], rng: np.random.Generator) -> list[Figure]:
    def drawn(pair: tuple[Values, Values]) -> float:
        return float(np.isfinite(pair[1]).any(axis=1).mean())

    rows = [
        figure(
            "Share of patients whose mask shows a tumour",
            "higher",
            measured.map(drawn),
            "Every patient is made to have a tumour; a column without one in the mask counts as a miss.",
        )
    ]
    for column, feature in enumerate(features(names)):

        def agreement(pair: tuple[Values, Values], column: int = column) -> float:
            return _correlation(pair[0][:, column], pair[1][:, column])

        def shuffled(pair: tuple[Values, Values], column: int = column) -> float:
            asked, found = pair[0][:, column], pair[1][:, column]
            known = np.isfinite(asked) & np.isfinite(found)
            asked, found = asked[known], found[known]
            return float(np.mean([_correlation(rng.permutation(asked), found) for _ in range(PERMUTATIONS)]))

        rows.append(
            figure(
                f"Image follows morphology: {feature.name}",
                "higher",
                beside_floor(measured, agreement, shuffled),
                f"Correlation of what was asked for and what is measured in image and mask ({feature.meaning}). 'real' "
                "measures held-out real patients again, on the tumour outline alone, as for synthetic ones; floor: "
                "paired at random, mean of several pairings.",
            )
        )
    return rows


def remeasured(
    plan: StudyPlan,
    synthetic: Sequence[SyntheticPatient],
    holdout: Patients,
    public_only: Sequence[SyntheticPatient] | None,
) -> Columns[tuple[Values, Values]]:
    """Intended morphology and that measured in the image, (N, F) each and normalised, N at most `MAX_MEASURED`.

    A synthetic mask tells tumour from no tumour only, so real masks are reduced to that here.
    """
    names = plan.morphology.features
    columns = [[feature.name for feature in FEATURES].index(name) for name in names]
    spacing = (plan.image.slice_spacing_mm, plan.image.pixel_spacing_mm, plan.image.pixel_spacing_mm)

    def again(images: NDArray[np.floating], mask: NDArray[np.integer]) -> Values:
        if not np.isfinite(images).all():
            return np.full(len(names), np.nan)
        outline = np.where(mask > 0, WHOLE_TUMOUR, 0).astype(np.uint8)
        return measure(images, outline, plan.image.sequences, spacing)[columns]

    def of_synthetic(patients: Sequence[SyntheticPatient]) -> tuple[Values, Values]:
        patients = patients[:MAX_MEASURED]
        require_rows("synthetic patients", np.arange(len(patients)), 1)
        found = [again(p.images, p.mask) for p in track(patients, "Measuring synthetic tumours", len(patients))]
        return normalise(np.stack([p.morphology for p in patients]), names), normalise(np.stack(found), names)

    def of_real() -> tuple[Values, Values]:
        rows = np.flatnonzero(holdout.has_images)[:MAX_MEASURED]
        require_rows("held-out patients with images", rows, 1)
        found = [again(holdout.images[i], holdout.masks[i]) for i in rows]
        return holdout.morphology[rows], normalise(np.stack(found), names)

    return Columns(
        attempt(lambda: of_synthetic(synthetic)),
        attempt(of_real),
        public_only=NOT_ASKED if public_only is None else attempt(lambda: of_synthetic(public_only)),
    )


def _correlation(first: Values, second: Values) -> float:
    known = np.isfinite(first) & np.isfinite(second)
    require_rows("patients with the feature", first[known], MIN_TEST_PATIENTS)
    first, second = first[known].astype(np.float64), second[known].astype(np.float64)
    if min(first.std(), second.std()) < 1e-6:
        raise NotMeasurable("the feature does not vary")
    return float(np.corrcoef(first, second)[0, 1])


def _ridge(train: Profiles, test: Profiles) -> Values:
    _require_test(test)
    return ridge_predictions(train.genes, train.morphology, test.genes)


def _middle(test: Profiles) -> Values:
    _require_test(test)
    return np.full(test.morphology.shape, 0.5)


def _require_test(test: Profiles) -> None:
    require_rows("held-out patients with genes and morphology", test.genes, MIN_TEST_PATIENTS)


def _list(names: list[str], values: Values) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True) if np.isfinite(value))
