"""Runner: the radiogenomic DNN against linear regression, by cross-validation over patients.

Every method is fitted to the same normalised morphology and predicts the same held-out patients. Errors are taken in
physical units. The DNN is trained by the client's own block: of a column with privacy, at the column's epsilon in each fold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.models.gene_autoencoder import GeneAutoencoder, make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, start_from_encoder
from fedsynth.morphology import denormalise, features
from fedsynth.plan import Count, Section, StudyPlan
from fedsynth.records import State
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.profiles import train_autoencoder, train_radiogenomics
from fedsynth_simulations.experiments.profiles import budget_text, network_plan, run_rounds, tensor
from fedsynth_simulations.experiments.radiogenomic_data import RadiogenomicData, load_data
from fedsynth_simulations.experiments.run import Experiment, Findings, Kept
from fedsynth_simulations.experiments.spec import Column, merged
from fedsynth_simulations.experiments.values import Cell, Curves, Line, Row, Table

_COMPONENTS = 16
# Methods that no plan trains, and that no noise protects. Two know no gene: the training mean, which has R2 of 0, and the
# constant of least MAPE, which a method has to beat before its MAPE says anything.
OLS, RIDGE, COMPONENTS = "least squares", "ridge", f"least squares on {_COMPONENTS} components"
MEAN, CONSTANT = "training mean", "constant of least MAPE"
_RESAMPLES = 2000
# Of the plan, that a specification may set.
SECTIONS = frozenset({"image", "morphology", "autoencoder", "radiogenomics", "privacy", "aggregation"})
_PENALTIES = np.logspace(0, 6, 13)
# Of a feature that can be 0, a relative error is taken where it is at least this share of its public range.
_LEAST_SHARE = 0.01
Floats = NDArray[np.float64]


class Options(Section):
    """Options of the runner.

    Real data: `genes` are taken evenly spread over the table's alphabetical order; `encoder_profiles` is the folder,
    relative to that of the data, of profiles of further patients, on which the encoder is trained. Simulated data:
    `patients` at three hospitals, and an encoder trained on a public simulated population.
    """

    folds: int = Field(default=10, ge=2)
    genes: Count = 1300
    encoder_profiles: str = "../tcga_glioma_expression"
    patients: Count = 300


class ColumnOptions(Section):
    """A column has no options of its own."""


@dataclass(frozen=True)
class Scores:
    """Absolute errors of a method on patients that it was not fitted to, in physical units.

    Attributes:
        absolute: (N, F) error; NaN where the feature was not measured.
        relative: (N, F) error over the true value, in percent; NaN also where that value is too near 0.
        squared, about_mean: (N, F) squared error, and squared distance to the fold's training mean, on the normalised
            scale.
        folds: (N,) number of the fold that a patient was held out in.
    """

    absolute: Floats
    relative: Floats
    squared: Floats
    about_mean: Floats
    folds: NDArray[np.int64]

    def mape_of_folds(self) -> Floats:
        """(K,) mean over features of the mean relative error (%), fold by fold."""
        return np.array([_mean_over_features(self.relative[self.folds == fold]) for fold in np.unique(self.folds)])

    def r2(self, rows: NDArray[np.integer] | None = None) -> Floats:
        """(F,) share of the variation about the training mean that is predicted, of all patients or of `rows`."""
        squared, about_mean = (part if rows is None else part[rows] for part in (self.squared, self.about_mean))
        return 1 - np.nansum(squared, axis=0) / np.nansum(about_mean, axis=0)


def _mean_over_features(errors: Floats) -> float:
    """Mean of the features' mean errors; of features that were measured in nobody of `errors` (N, F), nothing."""
    measured = np.isfinite(errors).any(axis=0)
    return float(np.nanmean(errors[:, measured], axis=0).mean())


def run(experiment: Experiment) -> Findings:
    """Cross-validate every column and the linear methods on the same folds."""
    data, options = load_data(experiment), experiment.options()
    assert isinstance(options, Options)
    names = data.features
    folds = fold_of_patients(len(data.genes), options.folds, experiment.spec.seed)
    columns, notes = experiment.spec.columns, []
    predictions = linear_predictions(data, folds)
    curves: dict[str, dict[str, list[float]]] = {}
    for column in columns:
        plan = _plan(experiment, column, data, folds)
        kept = _kept(experiment, column, plan, data, folds)
        predictions[column.name], curves[column.name] = kept.arrays["predicted"].numpy(), kept.facts["curve"]
        if plan.privacy.private:
            notes.append(f"{column.name}: {budget_text(plan, 'radiogenomics')}, in each fold.")
    means = predictions[MEAN]
    scores = {name: score(found, means, data.morphology, names, folds) for name, found in predictions.items()}
    order = [*(column.name for column in columns), OLS, RIDGE, COMPONENTS, MEAN, CONSTANT]
    scores = {name: scores[name] for name in order}
    steps = {column.name: _plan(experiment, column, data, folds).radiogenomics.steps_per_round for column in columns}
    tables = [_summary(experiment, scores), *_by_feature(scores, names)]
    notes += _notes(data, scores, options.folds)
    of_mean = float(np.nanmean(scores[MEAN].squared))
    return Findings(data.description, tables, _curves(curves, steps, of_mean), [], notes)


def fold_of_patients(count: int, folds: int, seed: int) -> NDArray[np.int64]:
    """(N,) a fold for each patient, at random and of nearly equal sizes."""
    return np.random.default_rng(seed).permutation(count).astype(np.int64) % folds


def linear_predictions(data: RadiogenomicData, folds: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """(N, F) predictions of each linear method, and of two constants, each patient's from the folds it is not in.

    With fewer patients than genes least squares has many solutions; the one of least norm is taken. The ridge's penalty
    is chosen among the training patients, by leaving one out. The components are the principal directions of the same
    further profiles that the encoder is trained on.
    """
    from sklearn.linear_model import LinearRegression, RidgeCV

    outside = data.encoder_profiles
    centre = outside.mean(axis=0)
    _, _, directions = np.linalg.svd(outside - centre, full_matrices=False)
    coded = (data.genes - centre) @ directions[:_COMPONENTS].T
    methods = {
        OLS: (LinearRegression(), data.genes),
        RIDGE: (RidgeCV(alphas=_PENALTIES), data.genes),
        COMPONENTS: (LinearRegression(), coded),
    }
    found = {name: np.full(data.morphology.shape, np.nan) for name in (*methods, MEAN, CONSTANT)}
    counts = relative_to(data.morphology, data.features)
    for fold in np.unique(folds):
        inside, held = folds != fold, folds == fold
        for place in range(data.morphology.shape[1]):
            target = data.morphology[:, place].astype(np.float64)
            rows = inside & np.isfinite(target)
            found[MEAN][held, place] = target[rows].mean()
            found[CONSTANT][held, place] = weighted_median(target[rows], counts[rows, place])
            for name, (model, inputs) in methods.items():
                model.fit(inputs[rows], target[rows])
                found[name][held, place] = model.predict(inputs[held])
    return found


def score(
    predicted: NDArray[np.floating],
    means: NDArray[np.floating],
    morphology: NDArray[np.floating],
    names: Sequence[str],
    folds: NDArray[np.int64],
) -> Scores:
    """Errors of predictions (N, F) on the normalised scale; a prediction outside [0, 1] is moved to its border."""
    off = np.abs(denormalise(predicted, names).astype(np.float64) - denormalise(morphology, names))
    weights = relative_to(morphology, names)
    relative = np.where(weights > 0, 100 * off * weights, np.nan)
    real = morphology.astype(np.float64)
    return Scores(off, relative, (np.clip(predicted, 0, 1) - real) ** 2, (means - real) ** 2, folds)


def relative_to(morphology: NDArray[np.floating], names: Sequence[str]) -> Floats:
    """(N, F) what an absolute error is multiplied by to be a relative one: 1 over the true value in physical units.

    0 where the value is not measured, and where the feature can be 0 and is too near it: such a value takes no part.
    """
    true = denormalise(morphology, names).astype(np.float64)
    floor = np.array([_LEAST_SHARE * (f.high - f.low) if f.low == 0 else 0.0 for f in features(names)])
    takes_part = np.isfinite(true) & (true >= floor)
    return np.where(takes_part, 1 / np.where(takes_part, true, 1.0), 0.0)


def weighted_median(values: Floats, weights: Floats) -> float:
    """The value whose weighted sum of distances to all others is least."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def paired_interval(a: Floats, b: Floats) -> tuple[float, tuple[float, float]]:
    """Mean of a - b over folds, and its 95 % interval by Student's t.

    Folds share training patients, so the interval is narrower than repetitions with new patients would be.
    """
    from scipy.stats import t

    difference = a - b
    half = float(t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / math.sqrt(len(difference)))
    middle = float(difference.mean())
    return middle, (middle - half, middle + half)


def _plan(experiment: Experiment, column: Column, data: RadiogenomicData, folds: NDArray[np.int64]) -> StudyPlan:
    """The plan of a column; its one site declares the patients of the smallest training set."""
    smallest = int(min((folds != fold).sum() for fold in np.unique(folds)))
    changes = merged(experiment.spec.plan, column.plan)
    return network_plan("radiogenomics", changes, {"pooled": smallest}, data.panel, column.epsilon)


def _kept(
    experiment: Experiment, column: Column, plan: StudyPlan, data: RadiogenomicData, folds: NDArray[np.int64]
) -> Kept:
    inputs = {
        "plan": plan.digest,
        "encoder": _encoder_plan(experiment, column, data).digest,
        "profiles": hashlib.sha256(np.ascontiguousarray(data.encoder_profiles).tobytes()).hexdigest(),
        "seed": experiment.spec.seed,
        "data": data.description,
        "folds": len(np.unique(folds)),
    }
    return experiment.kept(column.slug, inputs, lambda: _train(experiment, column, plan, data, folds))


def _train(
    experiment: Experiment, column: Column, plan: StudyPlan, data: RadiogenomicData, folds: NDArray[np.int64]
) -> Kept:
    encoder = _encoder(experiment, column, data) if plan.radiogenomics.start_from_encoder else None
    predicted = np.zeros(data.morphology.shape, dtype=np.float32)
    curves: dict[str, list[list[float]]] = {"train": [], "validation": []}
    for fold in np.unique(folds):
        held, seed = folds == fold, 100 * experiment.spec.seed + int(fold)
        state, curve = _fold(plan, data, held, encoder, seed)
        predicted[held] = _predict(plan, state, data.genes[held])
        for part, values in curve.items():
            curves[part].append(values)
    return Kept(
        {"predicted": torch.from_numpy(predicted)},
        {"curve": {part: np.mean(values, axis=0).tolist() for part, values in curves.items()}},
    )


def _fold(
    plan: StudyPlan, data: RadiogenomicData, held: NDArray[np.bool_], encoder: GeneAutoencoder | None, seed: int
) -> tuple[State, dict[str, list[float]]]:
    """The DNN trained without the patients `held`, and after each round its error on both sides of the split."""
    genes, morphology = tensor(data.genes[~held]), tensor(data.morphology[~held])
    labels = torch.from_numpy(data.labels[~held])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_radiogenomic_dnn(plan)
    if encoder is not None:
        start_from_encoder(model, encoder)

    def block(state: State, _: str, first: int, noise: Mechanism, randomness: Randomness) -> BlockResult:
        return train_radiogenomics(plan, state, genes, morphology, labels, noise, randomness, first_step=first)

    curve: dict[str, list[float]] = {"train": [], "validation": []}

    def observe(_: int, state: State) -> None:
        for part, rows in (("train", ~held), ("validation", held)):
            found = _predict(plan, state, data.genes[rows])
            curve[part].append(float(np.nanmean((found - data.morphology[rows]) ** 2)))

    start = {name: value.clone() for name, value in model.state_dict().items()}
    observe(0, start)
    return run_rounds(plan, "radiogenomics", start, block, seed, observe), curve


def _predict(plan: StudyPlan, state: State, genes: NDArray[np.floating]) -> NDArray[np.float32]:
    """(N, F) morphology on the normalised scale."""
    model = make_radiogenomic_dnn(plan)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return model(tensor(genes))[0].numpy()


def _encoder_plan(experiment: Experiment, column: Column, data: RadiogenomicData) -> StudyPlan:
    """The plan of the encoder; that of the column leaves it out."""
    changes = merged(experiment.spec.plan, column.plan)
    return network_plan("autoencoder", changes, {"further": len(data.encoder_profiles)}, data.panel, math.inf)


def _encoder(experiment: Experiment, column: Column, data: RadiogenomicData) -> GeneAutoencoder:
    """An autoencoder of the profiles of further people, whom no fold holds; without privacy, as public weights are."""
    profiles = tensor(data.encoder_profiles)
    plan = _encoder_plan(experiment, column, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.spec.seed)
        model = make_autoencoder(plan)

    def block(state: State, _: str, first: int, noise: Mechanism, randomness: Randomness) -> BlockResult:
        return train_autoencoder(plan, state, profiles, noise, randomness, first_step=first)

    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(run_rounds(plan, "autoencoder", start, block, experiment.spec.seed))
    return model


def _summary(experiment: Experiment, scores: dict[str, Scores]) -> Table:
    def ahead(of: str) -> dict[str, Cell]:
        cells = {}
        for name, one in scores.items():
            if name != of:
                middle, interval = paired_interval(one.mape_of_folds(), scores[of].mape_of_folds())
                cells[name] = Cell(value=middle, interval=interval)
        return cells

    mape = {name: Cell(value=_mean_over_features(one.relative)) for name, one in scores.items()}
    rng = np.random.default_rng(experiment.spec.seed)
    patients = len(next(iter(scores.values())).folds)
    draws = [np.arange(patients), *(rng.integers(patients, size=patients) for _ in range(_RESAMPLES))]
    resampled = {name: np.array([float(one.r2(rows).mean()) for rows in draws]) for name, one in scores.items()}
    r2 = {name: _resampled_cell(values) for name, values in resampled.items() if name != MEAN}
    above = {name: _resampled_cell(values - resampled[RIDGE]) for name, values in resampled.items() if name != RIDGE}
    paired = "Percentage points, paired over the folds; below 0 is better than linear regression."
    return Table(
        title="Mean over the features",
        columns=list(scores),
        rows=[
            experiment.row("mape", "MAPE (%, lower is better)", mape),
            experiment.row("mape-against-least-squares", "MAPE minus that of least squares", ahead(OLS), paired),
            experiment.row("mape-against-ridge", "MAPE minus that of ridge regression", ahead(RIDGE), paired),
            Row(
                what="MAPE minus that of the constant of least MAPE",
                cells=ahead(CONSTANT),
                note="Percentage points; not below 0: the MAPE shows nothing that was learnt from a gene.",
            ),
            Row(
                what="R2 (higher is better; 0: the training mean)",
                cells=r2,
                note="On the normalised scale; intervals: patients drawn anew.",
            ),
            Row(what="R2 above that of ridge regression", cells=above, note="Paired over the same patients."),
        ],
    )


def _resampled_cell(values: Floats) -> Cell:
    """The first of `values`, and the interval of the others, which are of patients drawn anew."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Cell(value=float(values[0]), interval=(float(low), float(high)))


def _by_feature(scores: dict[str, Scores], names: Sequence[str]) -> list[Table]:
    chosen = features(names)

    def table(title: str, unit: bool, values: dict[str, Floats]) -> Table:
        rows = [
            Row(
                what=f"{feature.name} ({feature.unit})" if unit and feature.unit != "1" else feature.name,
                cells={name: Cell(value=float(of[place])) for name, of in values.items()},
            )
            for place, feature in enumerate(chosen)
        ]
        return Table(title=title, columns=list(scores), rows=rows)

    return [
        table("MAE (lower is better)", True, {name: np.nanmean(one.absolute, axis=0) for name, one in scores.items()}),
        table(
            "MAPE (%, lower is better)", False, {name: np.nanmean(one.relative, axis=0) for name, one in scores.items()}
        ),
        table("R2 on the normalised scale", False, {name: one.r2() for name, one in scores.items()}),
    ]


def _notes(data: RadiogenomicData, scores: dict[str, Scores], folds: int) -> list[str]:
    one = next(iter(scores.values()))
    measured = int(np.isfinite(one.absolute).sum())
    left = measured - int(np.isfinite(one.relative).sum())
    return [
        f"MAE and MAPE are in physical units, of {folds}-fold cross-validation over patients. Of a feature that can be 0 a "
        f"relative error is taken where the true value is at least {_LEAST_SHARE:.0%} of the feature's public range: {left} "
        f"of {measured} values are left out of MAPE, none of MAE.",
        f"Where patients are fewer than the {len(data.panel.panel)} genes, least squares has no unique solution and the one "
        f"of least norm is taken. Ridge regression and least squares on {_COMPONENTS} principal components of the encoder's "
        "profiles are the fairer opponents.",
        "MAPE is kind to whatever predicts too little, a tumour's volume above all: a network of noise can have a lower "
        "MAPE than the training mean. R2 and the constant of least MAPE tell whether anything was learnt.",
        "Intervals are of paired differences over folds, which share training patients: read them as too narrow.",
        f"The linear methods and the constants are not private. {data.encoder_note}",
    ]


def _curves(curves: dict[str, dict[str, list[float]]], steps: dict[str, int], of_mean: float) -> list[Curves]:
    """Errors on the normalised scale, mean over folds; beside those of validation patients that of the training mean."""
    plots = []
    for part in ("train", "validation"):
        lines = [
            Line(name=name, x=[float(number * steps[name]) for number in range(len(curve[part]))], y=curve[part])
            for name, curve in curves.items()
        ]
        if part == "validation":
            lines.append(Line(name=MEAN, x=[0.0, max(line.x[-1] for line in lines)], y=[of_mean] * 2))
        plots.append(
            Curves(
                title=f"Learning curves: {part} patients",
                x_label="steps",
                y_label="mean squared error",
                lines=lines,
                log_y=True,
            )
        )
    return plots
