"""Fréchet distance in radiomics-like features, which have names, of whole patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns, attempt, figure
from fedsynth.evaluation.fidelity_slices import FeatureSet, present, require_images
from fedsynth.evaluation.samples import Volumes
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.frechet import frechet_distance, frechet_folds
from fedsynth.metrics.jackknife import jackknife_interval
from fedsynth.metrics.measurable import NotMeasurable, require_rows
from fedsynth.metrics.radiomics import FIRST_ORDER, SHAPE, TEXTURE, TUMOUR, feature_names, radiomics, sequence_columns

LEAST_SPREAD = 1e-3  # of a feature, before it is divided by: a feature that is constant among reals
FEWEST_PATIENTS = 10


def radiomics_figure(
    volumes: Columns[Volumes],
    holdout: Volumes,
    learning: Volumes | NotMeasurable,
    patients: int,
    positions: NDArray[np.integer],
    spacing_mm: tuple[float, float, float],
    class_names: Sequence[str],
    sequence_names: Sequence[str],
    site_names: Sequence[str],
    rng: np.random.Generator,
) -> Figure:
    """The figure, with groups by class, sequence and site.

    Args:
        volumes: the columns.
        holdout: held-out patients.
        learning: real training patients in no column; features are standardised by their mean and spread.
        patients: how many of each column are compared.
        positions: slice positions that show the head.
        spacing_mm: (s, h, w) distance between voxel centres.
        class_names: the plan's classes.
        sequence_names: the plan's sequences.
        site_names: names of the site codes.
        rng: source of the draw of patients.
    """

    def measured(of: Volumes) -> FeatureSet:
        rows = rng.permutation(len(require_images(of)))[:patients]
        same = (
            len(rows) > 1 and not any(of.images.strides[:1]) and not of.masks.any()
        )  # the floor: one patient, repeated
        each = rows[:1] if same else rows
        values = np.stack([radiomics(of.images[row], of.masks[row], positions, spacing_mm) for row in each])
        return FeatureSet(
            np.broadcast_to(values, (len(rows), values.shape[1])),
            np.arange(len(rows), dtype=np.int64),
            of.labels[rows],
            of.sites[rows],
        )

    scale = attempt(lambda: _scale(measured(present(learning))))

    def standardised(of: Volumes) -> FeatureSet:
        mean, sd = present(scale)
        found = measured(of)
        return FeatureSet((found.values - mean) / sd, found.patients, found.labels, found.sites)

    held_out = attempt(lambda: standardised(holdout))
    columns = volumes.map(standardised)

    def distance(of: FeatureSet) -> float:
        if isinstance(held_out, NotMeasurable):
            raise NotMeasurable(f"held-out patients: {held_out}")
        return _distance(held_out, of)

    synthetic, real = columns.synthetic, columns.real
    groups, ends = [], None
    if not isinstance(synthetic, NotMeasurable) and not isinstance(held_out, NotMeasurable):
        ends = _interval(held_out, synthetic)
        for code, name in enumerate(class_names):
            parts = [_code(each, code, "class") for each in (held_out, synthetic, real)]
            groups.append(_group("class", name, *parts))
        if len(sequence_names) > 1:
            for name in sequence_names:
                parts = [_columns(each, sequence_columns(sequence_names, name)) for each in (held_out, synthetic, real)]
                groups.append(_group("sequence", name, *parts))
        if len(site_names) > 1:
            for code, name in enumerate(site_names):
                of_site = [_code(each, code, "site") for each in (held_out, real)]
                groups.append(_group("site", name, of_site[0], synthetic, of_site[1]))
    of_sequence = ", ".join((*FIRST_ORDER, *TEXTURE, *TUMOUR))
    note = (
        f"Features of a patient: of each sequence {of_sequence}; of the mask {', '.join(SHAPE)}. Standardised by real "
        f"training patients who are in no column. {patients} patients a column. Floor: the mean real patient, again and "
        "again, without a tumour. Computed on the study grid: not comparable with a radiomics package. With "
        f"no more patients than the {len(feature_names(sequence_names))} features mostly bias, "
        "the same for 'real', and then without interval. Interval: jackknife over patients of both sides."
    )
    return figure("Fréchet distance of radiomics features", "lower", columns.map(distance), note, ends).model_copy(
        update={"groups": groups}
    )


def _scale(learning: FeatureSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    require_rows("training patients to standardise by", learning.values, FEWEST_PATIENTS)
    return learning.values.mean(axis=0), np.maximum(learning.values.std(axis=0), LEAST_SPREAD)


def _distance(reals: FeatureSet, fakes: FeatureSet) -> float:
    for what, side in (("held-out patients", reals), ("compared patients", fakes)):
        require_rows(what, side.values, FEWEST_PATIENTS)
    return frechet_distance(reals.values, fakes.values, any_rank=True)


def _interval(reals: FeatureSet, fakes: FeatureSet) -> tuple[float, float] | None:
    value = attempt(lambda: _distance(reals, fakes))
    folds = attempt(lambda: frechet_folds(reals.values, fakes.values, reals.patients, fakes.patients))
    if isinstance(value, NotMeasurable) or isinstance(folds, NotMeasurable):
        return None
    return jackknife_interval(value, *folds, least=0.0)


def _group(
    by: str,
    name: str,
    reals: FeatureSet | NotMeasurable,
    fakes: FeatureSet | NotMeasurable,
    ceiling: FeatureSet | NotMeasurable,
) -> Group:
    """A group's distances, from as many patients on every side."""
    sides = [each for each in (reals, fakes, ceiling) if not isinstance(each, NotMeasurable)]
    n = min(each.n_patients for each in sides)

    def distance(of: FeatureSet | NotMeasurable) -> float:
        return _distance(present(reals).first(n), present(of).first(n))

    fake, real = attempt(lambda: distance(fakes)), attempt(lambda: distance(ceiling))
    missing = isinstance(fake, NotMeasurable)
    return Group.model_validate(
        {
            "by": by,
            "name": name,
            "n": n,
            "synthetic": None if missing else fake,
            "interval": None if missing else _interval(present(reals).first(n), present(fakes).first(n)),
            "real": None if isinstance(real, NotMeasurable) else real,
            "note": f"Not measured: {fake}." if missing else "",
        }
    )


def _code(of: FeatureSet | NotMeasurable, code: int, by: str) -> FeatureSet | NotMeasurable:
    if isinstance(of, NotMeasurable):
        return of
    return of.keep((of.labels if by == "class" else of.sites) == code)


def _columns(of: FeatureSet | NotMeasurable, columns: NDArray[np.int64]) -> FeatureSet | NotMeasurable:
    if isinstance(of, NotMeasurable):
        return of
    return FeatureSet(of.values[:, columns], of.patients, of.labels, of.sites)
