"""FID, KID, precision, recall, density and coverage in the features of a network, on the whole and by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import NOT_ASKED, Columns, attempt, figure
from fedsynth.evaluation.fidelity_slices import FeatureSet, Slices, features_of
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.bootstrap import Rows, bootstrap_interval
from fedsynth.metrics.density_coverage import neighbourhood_members
from fedsynth.metrics.feature_network import Ensemble
from fedsynth.metrics.frechet import frechet_distance, frechet_folds
from fedsynth.metrics.jackknife import jackknife_interval
from fedsynth.metrics.kernel_distance import kernel_folds
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.precision_recall import manifold_members

Interval = tuple[float, float] | None
Sets = Sequence[FeatureSet]  # of one collection of slices, one a network of the ensemble

# Wider features have fewer folds, since each costs an eigendecomposition: 2 s for 1,024 features.
WIDE, FOLDS, FOLDS_IF_WIDE = 256, 20, 6
# Up to this width a covariance without full rank is refused; wider networks could hardly ever be used otherwise.
FULL_RANK_UP_TO = 256
FEWEST_IN_GROUP = 10

MEASURES = ("FID", "KID", "Precision", "Recall", "Density", "Coverage")


@dataclass(frozen=True)
class Measured:
    """A value, and its interval when it is asked for."""

    value: float
    interval: Callable[[], Interval]


Comparison = dict[str, Measured | NotMeasurable]


def compare(reals: Sets, fakes: Sets, rng: np.random.Generator) -> Comparison:
    """All six measures of fakes against reals, each the mean over the networks.

    FID and KID compare two sets of patients: their intervals are jackknifes over the patients of both. The four others are
    shares or means over the slices of one set, given the other: their intervals are bootstraps over that set's patients.
    """
    manifolds = attempt(lambda: [manifold_members(r.values, f.values) for r, f in zip(reals, fakes, strict=True)])
    balls = attempt(lambda: [neighbourhood_members(r.values, f.values) for r, f in zip(reals, fakes, strict=True)])
    return {
        "FID": attempt(lambda: _fid(reals, fakes)),
        "KID": attempt(lambda: _kid(reals, fakes)),
        "Precision": _share(manifolds, 0, fakes[0].patients, rng),
        "Recall": _share(manifolds, 1, reals[0].patients, rng),
        "Density": _share(balls, 0, fakes[0].patients, rng),
        "Coverage": _share(balls, 1, reals[0].patients, rng),
    }


@dataclass(frozen=True)
class GroupNames:
    """What groups are called: classes and sites by their codes, sequences by their channels."""

    classes: tuple[str, ...]
    sequences: tuple[str, ...]
    sites: tuple[str, ...]


def distance_figures(
    ensemble: Ensemble,
    columns: Columns[list[FeatureSet]],
    held_out: list[FeatureSet] | NotMeasurable,
    slices: Columns[Slices],
    reference: Slices | NotMeasurable,
    names: GroupNames,
    size: str,
    rng: np.random.Generator,
) -> list[Figure]:
    """The six figures of one ensemble, each with its groups.

    Args:
        ensemble: the networks.
        columns: features of `slices`, one set a network.
        held_out: features of `reference`.
        slices: of the columns, to look at single sequences.
        reference: of the held-out patients.
        names: what the groups are called.
        size: how many patients and slices a column has, for the notes.
        rng: source of the bootstraps.
    """
    groups: list[tuple[Group, Comparison, Comparison]] = []
    if isinstance(held_out, NotMeasurable) or isinstance(reference, NotMeasurable):
        compared = Columns[Comparison](NotMeasurable(f"held-out patients: {held_out}"))
    else:
        compared = columns.map(lambda fakes: compare(held_out, fakes, rng))
        fakes, ceiling = columns.synthetic, columns.real
        if not isinstance(fakes, NotMeasurable):
            groups += by_patient("class", names.classes, held_out, fakes, ceiling, rng)
            groups += _by_sequence(ensemble, names.sequences, reference, slices, rng)
            groups += by_patient("site", names.sites, held_out, fakes, ceiling, rng)
    return [
        _figure(measure, better, note, ensemble, compared, groups)
        for measure, better, note in _descriptions(ensemble, size)
    ]


def by_patient(
    by: Literal["class", "site"],
    names: Sequence[str],
    reals: Sets,
    fakes: Sets,
    ceiling: Sets | NotMeasurable,
    rng: np.random.Generator,
) -> list[tuple[Group, Comparison, Comparison]]:
    """Each class or site with its comparison and that of its ceiling; nothing where there is only one.

    Of a class, synthetic and real patients of that class are compared; of a site, all synthetic patients with that site's
    held-out patients. As many patients on every side.
    """
    codes = (reals[0].labels, fakes[0].labels) if by == "class" else (reals[0].sites, None)
    if sum(bool((codes[0] == code).any()) for code in range(len(names))) < 2:
        return []
    groups: list[tuple[Group, Comparison, Comparison]] = []
    for code, name in enumerate(names):
        sides = [_of_code(reals, by, code), fakes if by == "site" else _of_code(fakes, by, code)]
        if not isinstance(ceiling, NotMeasurable):
            sides.append(_of_code(ceiling, by, code))
        n = min(side[0].n_patients for side in sides)
        group = Group(by=by, name=name, n=n, synthetic=None)
        if n < FEWEST_IN_GROUP:
            short = _nothing(NotMeasurable(f"{n} patients on one side, at least {FEWEST_IN_GROUP} are needed"))
            groups.append((group, short, short))
            continue
        equal = [[each.first(n) for each in side] for side in sides]
        real = compare(equal[0], equal[2], rng) if len(equal) == 3 else _nothing(NOT_ASKED)
        groups.append((group, compare(equal[0], equal[1], rng), real))
    return groups


def _by_sequence(
    ensemble: Ensemble, names: Sequence[str], reference: Slices, slices: Columns[Slices], rng: np.random.Generator
) -> list[tuple[Group, Comparison, Comparison]]:
    """Each sequence alone, by the first network only, as this takes features anew; nothing where there is only one."""
    if len(names) < 2:
        return []
    groups = []
    for channel, name in enumerate(names):

        def alone(of: Slices, channel: int = channel) -> list[FeatureSet]:
            return [features_of(of, ensemble.networks[0], channel)]

        reals = alone(reference)
        synthetic, real = slices.synthetic, slices.real
        found = [
            _nothing(side) if isinstance(side, NotMeasurable) else compare(reals, alone(side), rng)
            for side in (synthetic, real)
        ]
        group = Group(by="sequence", name=name, n=reals[0].n_patients, synthetic=None)
        groups.append((group, found[0], found[1]))
    return groups


def _nothing(reason: NotMeasurable) -> Comparison:
    return dict.fromkeys(MEASURES, reason)


def _descriptions(ensemble: Ensemble, size: str) -> list[tuple[str, Literal["higher", "lower"], str]]:
    wide = ensemble.networks[0].num_features > FULL_RANK_UP_TO
    return [
        (
            "FID",
            "lower",
            f"Features: {ensemble.name}. {ensemble.comparable} {size} Floor: the mean real slice, again and again. Fewer "
            "patients give larger values, so that a group compares with its own 'real' only. A sequence is seen alone, by "
            "the first network. Interval: jackknife over patients of both sides."
            + (
                " Wide features: with fewer slices than features mostly bias, and then without interval."
                if wide
                else ""
            ),
        ),
        (
            "KID",
            "lower",
            "Same features. Pairs of different patients only; unbiased, so it can be negative. Interval: jackknife over "
            "patients of both sides.",
        ),
        ("Precision", "higher", "Nearest neighbours: 3. Interval: bootstrap over synthetic patients."),
        ("Recall", "higher", "Nearest neighbours: 3. Interval: bootstrap over held-out patients."),
        (
            "Density",
            "higher",
            "Nearest neighbours: 5. Read it against 'real': far above means that only typical slices are drawn. "
            "Interval: bootstrap over synthetic patients.",
        ),
        ("Coverage", "higher", "Nearest neighbours: 5. Interval: bootstrap over held-out patients."),
    ]


def _figure(
    measure: str,
    better: Literal["higher", "lower"],
    note: str,
    ensemble: Ensemble,
    compared: Columns[Comparison],
    groups: Sequence[tuple[Group, Comparison, Comparison]],
) -> Figure:
    values = compared.map(lambda comparison: _value(comparison[measure]))
    synthetic = compared.synthetic
    measured = synthetic if isinstance(synthetic, NotMeasurable) else synthetic[measure]
    # The domain network's figures of neighbours have short names, as they are the ones that are always there.
    named = measure in ("FID", "KID") or ensemble.label != "domain"
    return figure(
        f"{measure} in {ensemble.label} features" if named else measure,
        better,
        values,
        note,
        interval=None if isinstance(measured, NotMeasurable) else measured.interval(),
    ).model_copy(
        update={
            "extractor": ensemble.name,
            "groups": [_filled(group, fake[measure], real[measure]) for group, fake, real in groups],
        }
    )


def _filled(group: Group, fake: Measured | NotMeasurable, real: Measured | NotMeasurable) -> Group:
    ceiling = None if isinstance(real, NotMeasurable) else real.value
    if isinstance(fake, NotMeasurable):
        return group.model_copy(update={"real": ceiling, "note": f"Not measured: {fake}."})
    return group.model_copy(update={"synthetic": fake.value, "interval": fake.interval(), "real": ceiling})


def _value(measured: Measured | NotMeasurable) -> float:
    if isinstance(measured, NotMeasurable):
        raise measured
    return measured.value


def _of_code(sets: Sets, by: Literal["class", "site"], code: int) -> list[FeatureSet]:
    return [each.keep((each.labels if by == "class" else each.sites) == code) for each in sets]


def _fid(reals: Sets, fakes: Sets) -> Measured:
    width = reals[0].values.shape[1]
    any_rank = width > FULL_RANK_UP_TO
    value = float(np.mean([frechet_distance(r.values, f.values, any_rank) for r, f in zip(reals, fakes, strict=True)]))

    def folds_of(r: FeatureSet, f: FeatureSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        folds = FOLDS if width <= WIDE else FOLDS_IF_WIDE
        return frechet_folds(r.values, f.values, r.patients, f.patients, any_rank, folds)

    def interval() -> Interval:
        if min(len(reals[0].values), len(fakes[0].values)) <= width:
            return None  # each patient adds directions of its own, so leaving some out tells nothing
        folds = attempt(lambda: [folds_of(r, f) for r, f in zip(reals, fakes, strict=True)])
        if isinstance(folds, NotMeasurable):
            return None
        return jackknife_interval(value, *(np.mean(side, axis=0) for side in zip(*folds, strict=True)), least=0.0)

    return Measured(value, interval)


def _kid(reals: Sets, fakes: Sets) -> Measured:
    found = [kernel_folds(r.values, f.values, r.patients, f.patients, FOLDS) for r, f in zip(reals, fakes, strict=True)]
    value, *sides = (np.mean(part, axis=0) for part in zip(*found, strict=True))
    return Measured(float(value), lambda: jackknife_interval(float(value), *sides))


def _share(
    members: Sequence[tuple[NDArray[Any], NDArray[Any]]] | NotMeasurable,
    side: int,
    patients: NDArray[np.int64],
    rng: np.random.Generator,
) -> Measured | NotMeasurable:
    """The mean over the slices of one side, with a bootstrap over its patients, who have as many slices each."""
    if isinstance(members, NotMeasurable):
        return members
    by_slice = np.mean([network[side] for network in members], axis=0)
    _, number = np.unique(patients, return_inverse=True)
    by_patient = np.bincount(number, weights=by_slice) / np.bincount(number)

    def mean(rows: Rows) -> float:
        return float(by_patient[rows].mean())

    return Measured(float(by_patient.mean()), lambda: bootstrap_interval(mean, len(by_patient), rng))
