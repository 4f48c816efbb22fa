"""Can the probabilities of a classifier that was trained on synthetic slices be believed?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns, beside_floor
from fedsynth.evaluation.tested import Tested, tested_figure
from fedsynth.evaluation.values import Curve, Figure, Line
from fedsynth.metrics.bootstrap import Rows
from fedsynth.metrics.calibration import (
    BINS,
    brier_score,
    calibration_error_by_chance,
    expected_calibration_error,
    reliability,
)
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.roc_auc import roc_points

Probabilities = NDArray[np.float64]
Lines = Mapping[str, Probabilities | NotMeasurable]


def calibration_figures(
    what: str, probabilities: Columns[Probabilities], positive: NDArray[np.bool_], rng: np.random.Generator
) -> list[Figure]:
    """Calibration error and Brier score of each column's probabilities (N, S) on slices `positive` (N, S) or not.

    Args:
        what: the classes, e.g. ``"tumour-bearing slice"``.
        probabilities: of the slices of N patients; the floor's are those of a classifier that sees no image.
        positive: truth.
        rng: source of the intervals.
    """

    def error(values: Probabilities) -> Tested:
        def of(rows: Rows) -> float:
            return expected_calibration_error(values[rows].ravel(), positive[rows].ravel())

        # Drawing patients twice would look like less agreement, so patients are left out instead.
        return Tested(of, len(values), "leave-out", (0.0, 1.0))

    def brier(values: Probabilities) -> Tested:
        return Tested(lambda rows: brier_score(values[rows].ravel(), positive[rows].ravel()), len(values))

    errors = beside_floor(probabilities, error, lambda values: error(np.full(values.shape, 0.5)))
    synthetic = probabilities.synthetic
    chance = ""
    if not isinstance(synthetic, NotMeasurable):
        by_chance = calibration_error_by_chance(synthetic.ravel(), rng)
        chance = f" Exactly right probabilities would show {by_chance:.3f} on as many independent slices."
    return [
        tested_figure(
            f"Calibration error, {what} (ECE)",
            "lower",
            errors,
            f"Mean distance of predicted probability and observed share, in {BINS} bins of equal mass "
            f"(Naeini et al., 2015; Nixon et al., 2019).{chance} Floor: the answer 0.5 to everything.",
            rng,
        ),
        tested_figure(
            f"Brier score, {what}",
            "lower",
            probabilities.map(brier),
            "Mean squared difference of probability and truth: right and sharp. Floor: the share of positive slices at "
            "the same position among the real training patients.",
            rng,
        ),
    ]


def reliability_curve(what: str, lines: Lines, positive: NDArray[np.bool_]) -> Curve:
    """Observed against predicted frequency in bins of equal mass, one line a column that could be measured.

    Raises:
        NotMeasurable: none could, or there are fewer slices than bins.
    """
    diagrams = {name: reliability(values.ravel(), positive.ravel()) for name, values in _measured(lines).items()}
    drawn = [
        Line(name=name, points=list(zip(found.predicted.tolist(), found.observed.tolist(), strict=True)))
        for name, found in diagrams.items()
    ]
    return Curve(
        title=f"Reliability, {what}",
        x="predicted probability",
        y="observed share of positives",
        lines=[*drawn, Line(name="calibrated", points=[(0.0, 0.0), (1.0, 1.0)])],
        explanation=(
            "Below the diagonal a classifier claims more than happens, above it less. One point is one of "
            f"{BINS} bins of as many held-out slices each (equal predictions share a bin)."
        ),
    )


def roc_curve_of(what: str, lines: Lines, positive: NDArray[np.bool_]) -> Curve:
    """True against false positive rate, one line a column that could be measured.

    Raises:
        NotMeasurable: none could, or all slices are of one class.
    """
    return Curve(
        title=f"ROC, {what}",
        x="false positive rate",
        y="true positive rate",
        lines=[
            Line(name=name, points=roc_points(values.ravel(), positive.ravel()))
            for name, values in _measured(lines).items()
        ],
        explanation="How many of the positives are found (up) at the price of how many false alarms (right).",
    )


def _measured(lines: Lines) -> dict[str, Probabilities]:
    measured = {name: values for name, values in lines.items() if not isinstance(values, NotMeasurable)}
    if not measured:
        raise NotMeasurable("no column has predictions")
    return measured
