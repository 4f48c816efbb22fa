"""Does expression predict morphology on held-out real patients, and is that link in the synthetic patients too?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import NOT_ASKED, Columns, attempt
from fedsynth.evaluation.linear import ridge_predictions
from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.samples import Profiles
from fedsynth.evaluation.tested import Tested, groups_of, tested_figure
from fedsynth.evaluation.values import Figure, Group, Section
from fedsynth.metrics.association import association_map, map_agreement
from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.measurable import NotMeasurable, require_finite, require_rows
from fedsynth.metrics.regression import (
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
_MIDDLE = "Floor: the middle of the public range."

Values = NDArray[np.floating]
Predictor = Callable[[NDArray[np.float32]], NDArray[np.floating]]


def radiogenomics(
    plan: StudyPlan,
    profiles: Columns[Profiles],
    holdout: Profiles,
    predict_morphology: Predictor,
    measured: Columns[tuple[Values, Values]],
    rng: np.random.Generator,
    site_names: Sequence[str] = (),
) -> Section:
    """Errors of the DNN and of the synthetic pairs, agreement of association maps, and of image with morphology.

    Args:
        plan: names and order of the features.
        profiles: synthetic, real training and public-only patients.
        holdout: held-out real patients.
        predict_morphology: the released DNN, from genes (N, G) to normalised morphology (N, F).
        measured: intended and re-measured morphology, see `remeasured`.
        rng: source of all draws.
        site_names: of the codes in `holdout.sites`; without names nothing is told by site.
    """
    names = plan.morphology.features
    pairs = profiles.map(lambda sample: sample.with_morphology)
    test = _Test(names, holdout.with_morphology, site_names)
    linear = pairs.map(lambda train: _ridge(train, test.patients))
    middle = attempt(lambda: _middle(test.patients))
    released = Columns(attempt(lambda: _predicted(predict_morphology, test.patients)), linear.real, middle)
    return Section(
        id="radiogenomics",
        title="The link from genes to morphology",
        explanation=(
            f"Morphology is predicted from expression for {len(test.patients)} held-out real patients in whom both are "
            "known. First by the released network (DNN), beside a linear (ridge) regression on the real training pairs and "
            "the floor that always answers with the middle of the public range. Then by a linear regression that saw "
            "synthetic pairs only: if it does well, the synthetic table carries the link. The agreement of association "
            "maps asks whether the same genes go with the same features. The last rows measure the tumour in the "
            "synthetic images themselves and correlate it with the morphology that they were made to have. A "
            "correlation is not a cause; place and shape of a tumour may not depend on expression at all, and then no "
            "method beats the floor there. Intervals: 95 % over which patients were tested (for the rows on images, which "
            "synthetic ones were drawn); not over training again."
        ),
        figures=[
            *_errors(
                "released DNN",
                released,
                test,
                "'real' is ridge regression on the real training pairs.",
                rng,
            ),
            *_errors(
                "trained on the pairs",
                replace(linear, floor=middle),
                test,
                "Ridge regression on the pairs of each column.",
                rng,
            ),
            _association(pairs, test, rng),
            *_consistency(names, measured, rng),
        ],
    )


@dataclass(frozen=True)
class _Test:
    """The held-out patients with genes and morphology."""

    names: list[str]
    patients: Profiles
    site_names: Sequence[str]

    def by_feature(
        self, columns: Callable[[NDArray[np.int64]], Columns[Tested]], rng: np.random.Generator
    ) -> list[Group]:
        """A figure's value on each feature alone, where `columns` gives the figure on some of the features."""
        groups = []
        for place, name in enumerate(self.names):
            row = tested_figure(name, "higher", columns(np.array([place])), "", rng)
            n = int(np.isfinite(self.patients.morphology[:, place]).sum())
            groups.append(
                Group(
                    by="feature",
                    name=name,
                    n=n,
                    synthetic=row.synthetic,
                    interval=row.interval,
                    real=row.real,
                    note=row.note,
                )
            )
        return groups

    def by_site(self, columns: Columns[Tested], rng: np.random.Generator) -> list[Group]:
        """A figure's value on the patients of each site."""
        return groups_of("site", self.site_names, self.patients.sites, columns, rng)


def _errors(who: str, predicted: Columns[Values], test: _Test, note: str, rng: np.random.Generator) -> list[Figure]:
    truth = test.patients.morphology

    def scored(
        score: Callable[[Values, Values, list[str]], float], places: NDArray[np.int64]
    ) -> Callable[[Values], Tested]:
        names = [test.names[place] for place in places]
        return lambda values: Tested(
            lambda rows: score(values[np.ix_(rows, places)], truth[np.ix_(rows, places)], names), len(truth)
        )

    everything = np.arange(len(test.names))
    absolute = predicted.map(scored(_absolute, everything))
    relative = predicted.map(scored(mean_absolute_percentage_error, everything))
    explained = predicted.map(scored(_explained, everything))
    if not isinstance(explained.floor, NotMeasurable):
        # Its own zero, not that of the middle of the range: far below 0, it would call anything a success.
        explained = replace(explained, floor=Tested(lambda rows: 0.0, len(truth)))
    return [
        tested_figure(
            f"MAE of morphology, {who} (share of the public range)",
            "lower",
            absolute,
            f"Mean over features. {note} {_MIDDLE}{_against_linear(absolute, rng)}",
            rng,
            [
                *test.by_feature(lambda places: predicted.map(scored(_absolute, places)), rng),
                *test.by_site(absolute, rng),
            ],
        ),
        tested_figure(
            f"MAPE of morphology, {who} (%)",
            "lower",
            relative,
            f"In physical units, mean over features; true values near 0 are left out. {note} {_MIDDLE}",
            rng,
            [
                *test.by_feature(lambda places: predicted.map(scored(mean_absolute_percentage_error, places)), rng),
                *test.by_site(relative, rng),
            ],
        ),
        tested_figure(
            f"R² of morphology, {who}",
            "higher",
            explained,
            "Share of the variance explained, mean over features. Floor: 0, always answering with the mean of the tested "
            f"patients; below that an answer is worse. {note}",
            rng,
        ),
    ]


def _absolute(predicted: Values, truth: Values, names: list[str]) -> float:
    return mean_absolute_error(predicted, truth)


def _explained(predicted: Values, truth: Values, names: list[str]) -> float:
    return mean_r2(predicted, truth)


def _against_linear(errors: Columns[Tested], rng: np.random.Generator) -> str:
    """The difference from linear regression on the real pairs, on the very same patients, which tells more than two
    intervals do."""
    ours, linear = errors.synthetic, errors.real
    if isinstance(ours, NotMeasurable) or isinstance(linear, NotMeasurable):
        return ""
    paired = Tested(lambda rows: ours.score(rows) - linear.score(rows), ours.patients)
    between = paired.interval(rng)
    over = "" if between is None else f" ({between[0]:+.3f} to {between[1]:+.3f})"
    return f" Patient by patient it differs from linear regression on the real pairs by {paired.value:+.3f}{over}."


def _association(pairs: Columns[Profiles], test: _Test, rng: np.random.Generator) -> Figure:
    genes, morphology = test.patients.genes, test.patients.morphology
    everything = np.arange(len(test.names))

    def tested(places: NDArray[np.int64]) -> Callable[[Profiles], Tested]:
        def of(sample: Profiles) -> Tested:
            require_finite("genes", sample.genes)
            require_finite("genes of held-out patients", genes)
            found = association_map(sample.genes, sample.morphology[:, places])

            def agreement(rows: Rows) -> float:
                reference = attempt(lambda: association_map(genes[rows], morphology[np.ix_(rows, places)]))
                if isinstance(reference, NotMeasurable):
                    raise NotMeasurable(f"held-out patients: {reference}")
                return map_agreement(found, reference)

            return Tested(agreement, len(genes), "leave-out", (-1.0, 1.0))

        return of

    def unpaired(real: Profiles) -> float:
        shuffled = (replace(real, morphology=rng.permutation(real.morphology)) for _ in range(PERMUTATIONS))
        return float(np.mean([tested(everything)(sample).value for sample in shuffled]))

    columns = pairs.map(tested(everything))
    floor = Columns(pairs.real).map(unpaired).synthetic
    return tested_figure(
        "Agreement of the gene-by-feature association maps",
        "higher",
        replace(columns, floor=_constant(floor)),
        "Correlation of the map with that of the held-out patients, whose own chance noise also holds down 'real'. "
        f"Floor: the real training patients with genes and morphology paired at random, mean of {PERMUTATIONS} pairings.",
        rng,
        [*test.by_feature(lambda places: pairs.map(tested(places)), rng), *test.by_site(columns, rng)],
    )


def _consistency(names: list[str], measured: Columns[tuple[Values, Values]], rng: np.random.Generator) -> list[Figure]:
    def drawn(pair: tuple[Values, Values]) -> Tested:
        shown = np.asarray(np.isfinite(pair[1]).any(axis=1))
        # Without an interval: where every mask shows one, resampling has nothing to vary and would claim certainty.
        return Tested(lambda rows: float(shown[rows].mean()), len(shown), "none")

    rows = [
        tested_figure(
            "Share of patients whose mask shows a tumour",
            "higher",
            measured.map(drawn),
            "Every patient is made to have a tumour; a column without one in the mask counts as a miss.",
            rng,
        )
    ]
    for column, feature in enumerate(features(names)):

        def agreement(pair: tuple[Values, Values], column: int = column) -> Tested:
            asked, found = pair[0][:, column], pair[1][:, column]
            return Tested(lambda rows: _correlation(asked[rows], found[rows]), len(asked))

        def shuffled(pair: tuple[Values, Values], column: int = column) -> float:
            asked, found = pair[0][:, column], pair[1][:, column]
            known = np.isfinite(asked) & np.isfinite(found)
            asked, found = asked[known], found[known]
            return float(np.mean([_correlation(rng.permutation(asked), found) for _ in range(PERMUTATIONS)]))

        floor = Columns(measured.real).map(shuffled).synthetic
        rows.append(
            tested_figure(
                f"Image follows morphology: {feature.name}",
                "higher",
                replace(measured.map(agreement), floor=_constant(floor)),
                f"Correlation of what was asked for and what is measured in image and mask ({feature.meaning}). 'real' "
                "measures held-out real patients again, on the tumour outline alone, as for synthetic ones; floor: "
                "paired at random, mean of several pairings.",
                rng,
            )
        )
    return rows


def _constant(value: float | NotMeasurable) -> Tested | NotMeasurable:
    return value if isinstance(value, NotMeasurable) else Tested(lambda rows: value, 1, "none")


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
        rows = np.flatnonzero(holdout.has_images)
        # Evenly, since patients come site by site: the first so many would be of one site.
        rows = rows[np.linspace(0, len(rows) - 1, min(MAX_MEASURED, len(rows))).round().astype(int)]
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


def _predicted(predict_morphology: Predictor, test: Profiles) -> Values:
    _require_test(test)
    predicted = np.asarray(predict_morphology(test.genes), dtype=np.float64)
    if predicted.shape != test.morphology.shape:
        raise ValueError(f"predict_morphology gave shape {predicted.shape}, expected {test.morphology.shape}")
    require_finite("the DNN's predictions", predicted)
    return np.clip(predicted, 0.0, 1.0)


def _ridge(train: Profiles, test: Profiles) -> Values:
    _require_test(test)
    return ridge_predictions(train.genes, train.morphology, test.genes)


def _middle(test: Profiles) -> Values:
    _require_test(test)
    return np.full(test.morphology.shape, 0.5)


def _require_test(test: Profiles) -> None:
    require_rows("held-out patients with genes and morphology", test.genes, MIN_TEST_PATIENTS)
