"""Are the genes that differ between the classes of real patients found again in synthetic ones, and no others?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.samples import Profiles
from fedsynth.evaluation.values import Curve, Line
from fedsynth.metrics.differential_expression import (
    MIN_PATIENTS,
    Differences,
    concordance_at_top,
    differential_expression,
    effect_agreement,
    recovery,
)
from fedsynth.metrics.measurable import NotMeasurable

HALVES = 50
TOP_SIZES = 25
"""Points of the curve of concordance."""


@dataclass(frozen=True)
class Recovered:
    """What was found again in one column, one value for each way of halving the real patients (NaN: it has none).

    Attributes:
        true_rate, false_rate: `fedsynth.metrics.differential_expression.recovery`.
        agreement: rank correlation of the effects.
        concordance: (HALVES, T) share in common of the genes of largest effect.
    """

    true_rate: NDArray[np.float64]
    false_rate: NDArray[np.float64]
    agreement: NDArray[np.float64]
    concordance: NDArray[np.float64]


@dataclass(frozen=True)
class Recovery:
    """Recovery in all columns and baselines.

    Attributes:
        columns: synthetic, the other half of the real patients, and public-only.
        baselines: other generators by name.
        called: mean share of the genes that the reference half calls; of so many calls at random as many are right.
        sizes: numbers of top genes of the concordance.
        patients: in a class of each column.
    """

    columns: Columns[Recovered]
    baselines: dict[str, Recovered | NotMeasurable]
    called: float
    sizes: NDArray[np.int64]
    patients: tuple[int, ...]


def recover(
    profiles: Columns[Profiles],
    baselines: Mapping[str, Profiles | NotMeasurable],
    everyone: Profiles,
    rng: np.random.Generator,
) -> Recovery:
    """Compare what differs in each column with what differs in a random half of the real patients, `HALVES` times.

    The other half is the ceiling: new patients of the same hospitals. Halves are alike in classes and sites, and all columns
    have as many patients in each class, since what is called depends on how many there are.

    Args:
        profiles: synthetic and public-only; the real column is made here.
        baselines: other generators by name.
        everyone: real patients, trained on and held out.
        rng: source of the halves.

    Raises:
        NotMeasurable: fewer than two classes have patients enough for two halves, or genes are not finite.
    """
    everyone = everyone.take(np.flatnonzero(everyone.labels >= 0))
    codes, counts = np.unique(everyone.labels, return_counts=True)
    codes, most = codes[counts >= 2 * MIN_PATIENTS], counts[counts >= 2 * MIN_PATIENTS] // 2
    if len(codes) < 2:
        raise NotMeasurable(f"fewer than two classes have {2 * MIN_PATIENTS} real patients with genes")
    given: dict[str, Profiles | NotMeasurable] = {
        "synthetic": profiles.synthetic,
        "public_only": profiles.public_only,
        **{f"baseline {name}": sample for name, sample in baselines.items()},
    }
    samples = {name: _with_all(sample, codes) for name, sample in given.items()}
    usable = {name: sample for name, sample in samples.items() if isinstance(sample, Profiles)}
    sizes = np.min([most, *(_counts(sample.labels, codes) for sample in usable.values())], axis=0)
    tops = np.unique(np.geomspace(1, everyone.genes.shape[1], TOP_SIZES).round().astype(np.int64))

    found: dict[str, list[tuple[float, float, float, NDArray[np.float64]]]] = {name: [] for name in ("real", *usable)}
    called = []
    for _ in range(HALVES):
        first, second = _halves(everyone, rng)
        reference = differential_expression(first.genes, first.labels, codes)
        for name, sample in {"real": second, **usable}.items():
            part = _of_sizes(sample, codes, sizes, rng)
            differences = differential_expression(part.genes, part.labels, codes)
            found[name].append(_compared(reference, differences, tops))
            if name == "real":
                called.append(float((differences.called != 0).mean()))

    def outcome(name: str) -> Recovered | NotMeasurable:
        sample = samples.get(name)
        return sample if isinstance(sample, NotMeasurable) else _recovered(found[name])

    return Recovery(
        Columns(outcome("synthetic"), outcome("real"), public_only=outcome("public_only")),
        {name: outcome(f"baseline {name}") for name in baselines},
        float(np.mean(called)),
        tops,
        tuple(int(size) for size in sizes),
    )


def over_halves(values: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Mean, and the 2.5 % and 97.5 % quantiles.

    A statistic of a random half of n patients varies from half to half as one of n patients varies from sample to sample
    (McCarthy, 1969), so the quantiles stand for which real patients there happened to be.

    Raises:
        NotMeasurable: in half of the halves or more it has no value.
    """
    known = values[np.isfinite(values)]
    if 2 * len(known) <= len(values):
        raise NotMeasurable("among the real patients no gene differs between the classes, or every gene does")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(known.mean()), (float(low), float(high))


def concordance_curve(found: Recovery, classes: str) -> Curve:
    """Share in common of the genes that differ most, against how many are looked at."""
    samples: dict[str, Recovered | NotMeasurable] = {
        "synthetic": found.columns.synthetic,
        "real, the other half": found.columns.real,
        "public-only generator": found.columns.public_only,
        **found.baselines,
    }
    lines = [
        Line(name=name, points=_points(found.sizes, sample.concordance.mean(axis=0)))
        for name, sample in samples.items()
        if isinstance(sample, Recovered)
    ]
    chance = found.sizes / found.sizes[-1] / 2
    return Curve(
        title=f"The genes that differ most by {classes}",
        x="number of top genes",
        y="share in common with a real half, direction included",
        lines=[*lines, Line(name="chosen at random", points=_points(found.sizes, chance))],
        explanation=(
            "Concordance at the top (Irizarry et al., 2005): of the genes that differ most in one half of the real "
            f"patients, how many are among as many top genes of each column. Mean over {HALVES} ways of halving."
        ),
    )


def _compared(
    reference: Differences, found: Differences, tops: NDArray[np.int64]
) -> tuple[float, float, float, NDArray[np.float64]]:
    return *recovery(reference, found), effect_agreement(reference, found), concordance_at_top(reference, found, tops)


def _recovered(found: list[tuple[float, float, float, NDArray[np.float64]]]) -> Recovered:
    true, false, agreement, concordance = zip(*found, strict=True)
    return Recovered(np.array(true), np.array(false), np.array(agreement), np.stack(concordance))


def _with_all(sample: Profiles | NotMeasurable, codes: NDArray[np.int64]) -> Profiles | NotMeasurable:
    """`sample`, or why it cannot be compared."""
    if isinstance(sample, NotMeasurable):
        return sample
    if not np.isfinite(sample.genes).all():
        return NotMeasurable("profiles hold values that are not finite")
    fewest = int(_counts(sample.labels, codes).min())
    if fewest < MIN_PATIENTS:
        return NotMeasurable(f"a class has {fewest} patients with genes, at least {MIN_PATIENTS} are needed")
    return sample


def _counts(labels: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    return (labels[:, None] == codes).sum(axis=0)


def _halves(everyone: Profiles, rng: np.random.Generator) -> tuple[Profiles, Profiles]:
    """Every other patient and the rest, in the order of class and site and at random within."""
    order = np.lexsort((rng.random(len(everyone)), everyone.sites, everyone.labels))
    return everyone.take(order[::2]), everyone.take(order[1::2])


def _of_sizes(
    sample: Profiles, codes: NDArray[np.int64], sizes: NDArray[np.int64], rng: np.random.Generator
) -> Profiles:
    rows = [
        rng.permutation(np.flatnonzero(sample.labels == code))[:size] for code, size in zip(codes, sizes, strict=True)
    ]
    return sample.take(np.concatenate(rows))


def _points(x: NDArray[np.int64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
    return list(zip(x.astype(np.float64).tolist(), y.tolist(), strict=True))
