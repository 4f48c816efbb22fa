"""Whether synthetic masks help: a U-Net trained on real slices alone (schema A), and on real and synthetic ones (B, C)."""

from __future__ import annotations

import numpy as np

from fedsynth.evaluation.samples import Volumes
from fedsynth.evaluation.slice_tasks import segmentation_dice, train_segmenter
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.experiments.bench import REAL, Bench, Measured, with_interval
from fedsynth_simulations.experiments.drawing import Drawn
from fedsynth_simulations.experiments.values import Cell


def segmentation(bench: Bench) -> Measured:
    """Dice of the tumour in test patients, for each column's slices added to the real ones, and alone."""
    real, test = _real(bench.data.train), _real(bench.data.test)
    together, alone = {REAL: _dice(bench, [real], test)}, {}
    alone[REAL] = together[REAL]
    for column, drawn in bench.drawn.items():
        made = _synthetic(drawn)
        together[column] = _dice(bench, [real, made], test)
        alone[column] = (
            _dice(bench, [made], test) if made.masks.any() else Cell(value=None, note="no synthetic slice has a mask")
        )
    shares = {column: Cell(value=float(drawn.masks.mean())) for column, drawn in bench.drawn.items()}
    shares[REAL] = Cell(value=float(bench.train.masks.mean()))
    row = bench.experiment.row
    return Measured(
        [
            row(
                "dice",
                "U-Net Dice, real + synthetic slices (column real: schema A, real alone)",
                together,
                "Mean over test patients, interval over patients",
            ),
            row("dice-alone", "U-Net Dice, synthetic slices alone", alone),
            row("mask-share", "Share of pixels in the tumour", shares),
        ]
    )


def _dice(bench: Bench, sets: list[Volumes], test: Volumes) -> Cell:
    segmenter = train_segmenter(sets, bench.rng(10), bench.unet_steps)
    dice = segmentation_dice(segmenter, test)
    dice = dice[np.isfinite(dice)]
    return with_interval(lambda rows: float(dice[rows].mean()), np.arange(len(dice)), bench.rng(11))


def _real(patients: Patients) -> Volumes:
    return Volumes(patients.images, patients.masks > 0, patients.labels, np.zeros(len(patients), dtype=np.int64))


def _synthetic(drawn: Drawn) -> Volumes:
    return Volumes(drawn.images[:, :, None], drawn.masks[:, None], drawn.labels, np.full(len(drawn), -1))
