"""Two other generators of profiles, fitted to the same real patients, beside which the study's is judged.

One sees everything and protects nobody: a multivariate normal distribution for each class. The other is private: for each
gene its distribution in each class, measured with Gaussian noise. That is the star-shaped graphical model of label and
genes, for which private inference has a closed form (McKenna, Sheldon and Miklau, ICML 2019; the method that did best on
expression in Chen et al., PoPETs 2024, with more marginals).

Both are drawn from for comparison inside an evaluation, which is computed without privacy anyway. Neither is released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf

from fedsynth.dp.accounting import Mechanism, epsilon, noise_multiplier
from fedsynth.dp.randomness import Randomness
from fedsynth.evaluation.samples import Profiles
from fedsynth.metrics.measurable import require_finite, require_rows
from fedsynth.plan import StudyPlan

MIN_TRAINING = 8
BINS = 4  # the quarters of the public reference distribution of a gene

Floats = NDArray[np.float64]


def draw_normal(train: Profiles, count: int, clip: float, rng: np.random.Generator) -> Profiles:
    """Draw `count` profiles from a normal distribution a class, all of one covariance (Ledoit and Wolf, 2004): not private.

    Args:
        train: real patients; the labelled ones count, and classes come in their shares.
        count: how many to draw.
        clip: genes are held within ± this value, as in the plan.
        rng: source of the draws.

    Raises:
        NotMeasurable: fewer than `MIN_TRAINING` labelled patients, or genes that are not finite.
    """
    known = train.take(np.flatnonzero(train.labels >= 0))
    require_rows("labelled patients with genes", known.genes, MIN_TRAINING)
    require_finite("training genes", known.genes)
    classes, place = np.unique(known.labels, return_inverse=True)
    means = np.stack([known.genes[known.labels == code].mean(axis=0, dtype=np.float64) for code in classes])
    covariance, _ = ledoit_wolf(known.genes - means[place], assume_centered=True)
    variances, axes = np.linalg.eigh(covariance)
    root = axes * np.sqrt(np.maximum(variances, 0.0))
    drawn = rng.integers(len(known), size=count)
    genes = means[place[drawn]] + rng.standard_normal((count, len(root))) @ root.T
    return _profiles(np.clip(genes, -clip, clip), known.labels[drawn], train)


@dataclass(frozen=True)
class PrivateMarginals:
    """What sites would have released: noisy counts, and what they cost each patient.

    Attributes:
        counts: (K, G, B) noisy number of patients of each class with the gene in each bin, all sites together.
        noise_sd: standard deviation of the noise in each count.
        epsilon: of a patient, neighbours differing by adding or removing one, at the plan's delta.
    """

    counts: Floats
    noise_sd: float
    epsilon: float


def measure_marginals(plan: StudyPlan, train: Profiles, randomness: Randomness) -> PrivateMarginals:
    """One noisy sum a site, with the whole budget of the plan: no other module would have any left.

    A labelled patient's row has the entry 1 / sqrt(G) in one bin of each of G genes, in the columns of the patient's class;
    so its norm is 1 whatever the patient, and the sum has sensitivity 1. A patient without label or with genes that are not
    finite adds nothing. Every site adds its own noise, and a patient is at one site.

    Args:
        plan: classes, epsilon, delta and accountant.
        train: real patients with their sites.
        randomness: of the noise. With a seeded one the sum is not private, which serves where it is never released.
    """
    known = train.take(np.flatnonzero((train.labels >= 0) & np.isfinite(train.genes).all(axis=1)))
    sigma = noise_multiplier(1.0, 1, plan.privacy.epsilon, plan.privacy.delta, plan.privacy.accountant)
    classes, genes = len(plan.label.classes), known.genes.shape[1]
    total = torch.zeros(classes, genes, BINS, dtype=torch.float64)
    sites = np.unique(train.sites)
    for site in sites:
        rows = known.sites == site
        total += _sum_of_rows(known.genes[rows], known.labels[rows], classes)
        total += randomness.normal((classes, genes, BINS), sigma).double()
    unit = np.sqrt(genes)
    spent = epsilon([Mechanism(1.0, sigma, 1)], plan.privacy.delta, plan.privacy.accountant)
    return PrivateMarginals(total.numpy() * unit, float(sigma * np.sqrt(len(sites)) * unit), spent)


def draw_marginals(
    measured: PrivateMarginals, count: int, clip: float, like: Profiles, rng: np.random.Generator
) -> Profiles:
    """Draw `count` profiles from noisy counts (post-processing): the class, then each gene by itself given the class.

    Counts are shrunk by what their noise is known to be, first each gene's towards the public distribution, then each
    class's towards its gene's (empirical Bayes). Within a bin a gene has the public distribution, standard normal.

    Args:
        measured: the noisy counts.
        count: how many to draw.
        clip: genes are held within ± this value, as in the plan.
        like: gives the number of morphology features, which are left unknown.
        rng: source of the draws.
    """
    classes, genes, bins = measured.counts.shape
    of_class = np.maximum(measured.counts.sum(axis=2).mean(axis=1), 0.0)
    prior = of_class / of_class.sum() if of_class.sum() > 0 else np.full(classes, 1 / classes)
    pooled = measured.counts.sum(axis=0)
    marginal = _distribution(
        _shrunk(pooled, np.full_like(pooled, of_class.sum() / bins), measured.noise_sd * np.sqrt(classes))
    )
    given_class = np.stack(
        [
            _distribution(_shrunk(counts, patients * marginal, measured.noise_sd))
            for counts, patients in zip(measured.counts, of_class, strict=True)
        ]
    )
    labels = rng.choice(classes, count, p=prior)
    below = np.cumsum(given_class, axis=2)[:, :, :-1]
    bin_of = (rng.random((count, genes))[:, :, None] > below[labels]).sum(axis=2)
    drawn = norm.ppf((bin_of + rng.random((count, genes))) / bins)
    return _profiles(np.clip(drawn, -clip, clip), labels, like)


def _sum_of_rows(genes: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> torch.Tensor:
    """(K, G, B) sum of the patients' rows, each of norm 1."""
    bins = np.searchsorted(norm.ppf(np.arange(1, BINS) / BINS), genes)
    counts = np.zeros((classes, genes.shape[1], BINS))
    np.add.at(counts, (labels[:, None], np.arange(genes.shape[1])[None, :], bins), 1.0)
    return torch.from_numpy(counts / np.sqrt(genes.shape[1]))


def _shrunk(counts: Floats, expected: Floats, noise_sd: float) -> Floats:
    """`counts` (G, B) drawn towards what is `expected`, by how much they differ beyond their noise."""
    off = counts - expected
    real = max(float(np.square(off).mean()) - noise_sd**2, 0.0)
    if real == 0:
        return expected
    return expected + off * real / (real + noise_sd**2)


def _distribution(counts: Floats) -> Floats:
    """(G, B) counts as probabilities; even where nothing positive is left."""
    held = np.maximum(counts, 0.0)
    total = held.sum(axis=1, keepdims=True)
    return np.divide(held, total, out=np.full_like(held, 1 / held.shape[1]), where=total > 0)


def _profiles(genes: Floats, labels: NDArray[np.int64], like: Profiles) -> Profiles:
    unknown = np.full((len(genes), like.morphology.shape[1]), np.nan, dtype=np.float32)
    return Profiles(genes.astype(np.float32), unknown, labels.astype(np.int64), np.full(len(genes), -1))


def baseline_names(spent: float, delta: float) -> tuple[str, str]:
    """How the two are called in a report; epsilon is rounded up."""
    noise = (
        f"with noise for epsilon {math.ceil(100 * spent) / 100:g}, delta {delta:g} a patient"
        if spent < math.inf
        else ""
    )
    return (
        "multivariate normal by class, NOT private",
        f"marginals by class, {noise or 'without noise, NOT private'}",
    )
