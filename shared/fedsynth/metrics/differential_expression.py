"""Differential expression between classes, and how well one table recovers what another shows.

Each class is compared with all others (two classes: the second with the first), gene by gene, by Welch's t test (1947) with
the false discovery rate held by Benjamini and Hochberg (1995). Recovery as in Viñas et al. (2022) and Chen et al. (2024):
which of the genes that differ in real patients differ, in the same direction, in the compared ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, spearmanr, ttest_ind_from_stats

from fedsynth.metrics.measurable import NotMeasurable, require_finite

FALSE_DISCOVERY_RATE = 0.05
MIN_PATIENTS = 5  # in a class
_VARIES = 1e-6


@dataclass(frozen=True)
class Differences:
    """What differs between classes, one row a comparison (J of them) and one column a gene.

    Attributes:
        effects: (J, G) difference of the means over the root of the mean of both variances (Cohen's d); 0 for a gene that
            does not vary.
        called: (J, G) 1 or -1, the sign of the difference, where it is called at the false discovery rate; else 0.
    """

    effects: NDArray[np.float64]
    called: NDArray[np.int8]


def differential_expression(
    genes: NDArray[np.floating], labels: NDArray[np.integer], classes: NDArray[np.integer]
) -> Differences:
    """Compare the expression of `classes`: each with all others, or, if they are two, the second with the first.

    Args:
        genes: (N, G) expression.
        labels: (N,) class codes; patients of other classes are left out.
        classes: codes of at least two classes.

    Raises:
        NotMeasurable: fewer than two classes, fewer than `MIN_PATIENTS` patients in one, or values that are not finite.
    """
    require_finite("profiles", genes)
    if len(classes) < 2:
        raise NotMeasurable("only one class has enough patients")
    counts = [int((labels == code).sum()) for code in classes]
    if min(counts) < MIN_PATIENTS:
        raise NotMeasurable(f"a class has {min(counts)} patients with genes, at least {MIN_PATIENTS} are needed")
    others = np.isin(labels, classes)
    compared = classes[1:] if len(classes) == 2 else classes
    found = [_welch(genes[labels == code], genes[others & (labels != code)]) for code in compared]
    return Differences(np.stack([effects for effects, _ in found]), np.stack([called for _, called in found]))


def recovery(reference: Differences, found: Differences) -> tuple[float, float]:
    """True and false positive rate of the calls of `found`, where those of `reference` are the truth.

    The first is the share of the called genes that are called with the same sign, the second the share of the genes not
    called that are called; NaN where there is no such gene. The truth itself rests on a sample: a gene that differs may
    have been missed for want of patients, and then counts as a false positive for whoever finds it.
    """
    truth, calls = reference.called, found.called
    differs = truth != 0
    true = float((calls == truth)[differs].mean()) if differs.any() else np.nan
    false = float((calls != 0)[~differs].mean()) if not differs.all() else np.nan
    return true, false


def effect_agreement(reference: Differences, found: Differences) -> float:
    """Spearman correlation of the effects over genes and comparisons; 0 where `found` has no effects at all.

    Raises:
        NotMeasurable: `reference` has no effects.
    """
    if np.ptp(reference.effects) == 0:
        raise NotMeasurable("no gene varies among the real patients")
    if np.ptp(found.effects) == 0:
        return 0.0
    return float(spearmanr(reference.effects.ravel(), found.effects.ravel()).statistic)


def concordance_at_top(reference: Differences, found: Differences, sizes: NDArray[np.integer]) -> NDArray[np.float64]:
    """(len(sizes),) share in common, sign included, of the genes of largest effect (Irizarry et al., 2005).

    Args:
        reference: of the real patients.
        found: of the compared ones.
        sizes: how many top genes each, from 1 to G; means over comparisons.
    """
    shares = np.zeros(len(sizes))
    for true, guess in zip(reference.effects, found.effects, strict=True):
        first, second = (np.argsort(-np.abs(effects), kind="stable") for effects in (true, guess))
        agree = np.sign(true) == np.sign(guess)
        shares += [float(agree[np.intersect1d(first[:size], second[:size])].sum()) / size for size in sizes]
    return np.asarray(shares / len(reference.effects))


def _welch(these: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """(G,) effects and calls of one comparison."""
    means = [part.mean(axis=0, dtype=np.float64) for part in (these, others)]
    spreads = [part.std(axis=0, ddof=1, dtype=np.float64) for part in (these, others)]
    difference = means[0] - means[1]
    varies = np.maximum(*spreads) > _VARIES
    scale = np.where(varies, np.sqrt((np.square(spreads[0]) + np.square(spreads[1])) / 2), 1.0)
    safe = [np.where(varies, spread, 1.0) for spread in spreads]
    p = ttest_ind_from_stats(means[0], safe[0], len(these), means[1], safe[1], len(others), equal_var=False).pvalue
    # A gene that is constant in both has no test; calling it would reward a collapsed generator.
    adjusted = false_discovery_control(np.where(varies, p, 1.0))
    called = np.where(varies & (adjusted <= FALSE_DISCOVERY_RATE), np.sign(difference), 0.0)
    return np.where(varies, difference / scale, 0.0), called.astype(np.int8)
