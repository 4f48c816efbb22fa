"""From the noisy sum of the sites' moments to a linear-Gaussian model: post-processing, without privacy cost.

Every entry of the sum carries noise of known variance. Each moment is therefore shrunk towards what public constants say
(no link, unit variances, equal classes) by empirical Bayes: the moments of a block are taken as draws around the public
value with a variance tau^2 that is estimated by maximum marginal likelihood, given each entry's noise and sampling variance
(Efron and Morris 1973). Infinite noise leaves the public model, no noise and many patients leave the moments themselves.

The prediction of morphology needs no further correction for the noise in the moments of genes. The expected squared
error of slopes B, var(m) - 2 tr(B' cov(u, m)) + tr(B' cov(u) B), is linear in the moments, so the best B given the noisy
sum is that of the moments' posterior means, which is what shrinkage computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.engines.moments import Sizes, noise_variances, sizes, unpack
from fedsynth.models.linear_gaussian import public_prior
from fedsynth.plan import StudyPlan

State = dict[str, Tensor]

# Least variance in any direction, in units of the public one.
_FLOOR = 0.02
# How far counts may be from what the plan declares, as a share of it (standard deviation of a normal prior).
_COUNT_PRIOR = 0.5
_TAUS = torch.cat([torch.zeros(1), torch.logspace(-3, 1, 81)]).double()


@dataclass(frozen=True)
class Counts:
    """Estimated numbers of patients, at least 1 each; never exact ones.

    Attributes:
        genes: with a profile.
        features: (F,) with each feature.
        both: (F,) with a profile and the feature.
        class_genes: (K,) of each class with a profile.
        class_features: (K, F) of each class with the feature.
        prior: (K,) share of each class among those whose class is known.
    """

    genes: Tensor
    features: Tensor
    both: Tensor
    class_genes: Tensor
    class_features: Tensor
    prior: Tensor


def fit_moments(
    plan: StudyPlan, public: Mapping[str, Tensor], total: Tensor, noise_sd: float, patients: int
) -> tuple[State, dict[str, float]]:
    """Fit the linear-Gaussian model to a noisy sum of rows.

    Args:
        plan: the study plan.
        public: the public weights that the rows were computed with.
        total: (D,) sum over sites of `fedsynth.engines.moments.rows`, noise included.
        noise_sd: standard deviation of all sites' noise in each entry of `total`; may be 0.
        patients: number of patients that the sites declare together.

    Returns:
        State of a `fedsynth.models.linear_gaussian.LinearGaussianProfiles`, and a report: ``noise_to_signal`` of the
        link between genes and morphology (root of noise over estimated signal variance, at most 1000) and
        ``kept_link`` (share of the noisy link's norm that shrinkage left).
    """
    return fit_sum(sizes(plan), public, total, noise_sd, patients)


def fit_sum(
    size: Sizes, public: Mapping[str, Tensor], total: Tensor, noise_sd: float, patients: int
) -> tuple[State, dict[str, float]]:
    """`fit_moments` for moments of given sizes."""
    moments, noise = unpack(size, total), noise_variances(size, noise_sd)
    counts = estimate_counts(moments, noise, patients)
    means = torch.cat(
        [
            _class_means(moments["class_genes"], noise["class_genes"], counts.class_genes[:, None], counts.prior),
            _class_means(moments["class_morphology"], noise["class_morphology"], counts.class_features, counts.prior),
        ],
        dim=1,
    )
    r = size.components
    middle = counts.prior @ means
    apart = means - middle
    between = apart.T @ (counts.prior[:, None] * apart)

    genes = _covariance(moments["genes"], noise["genes"], counts.genes.expand(r), middle[:r])
    morphology = _covariance(moments["morphology"], noise["morphology"], counts.features, middle[r:])
    raw_link = moments["link"] / counts.both - torch.outer(middle[:r], middle[r:])
    link_noise = noise["link"] / counts.both**2
    link = torch.stack(
        [shrink(*columns) for columns in zip(raw_link.T, (link_noise + 1 / counts.both).T, strict=True)], dim=1
    )

    whole = _usable(torch.cat([torch.cat([genes, link], dim=1), torch.cat([link.T, morphology], dim=1)]))
    within = _usable(whole - between)
    state = public_prior(size, public)
    fitted = {"class_prior": counts.prior, "means": means, "covariance": within}
    signal = float(link.square().mean())
    report = {
        "noise_to_signal": min(math.sqrt(float(link_noise.mean()) / signal), 1000.0) if signal > 0 else 1000.0,
        "kept_link": float(link.norm() / raw_link.norm().clamp(min=1e-12)),
    }
    return {**state, **{name: value.to(torch.float32) for name, value in fitted.items()}}, report


def estimate_counts(moments: Mapping[str, Tensor], noise: Mapping[str, Tensor], patients: int) -> Counts:
    """Numbers of patients from noisy counts and the number that the sites declare.

    Each is the posterior mean under a normal prior around what is declared; a study's sites declare rounded figures, and
    some patients lack a profile or images.
    """
    noisy, variance = moments["class_counts"], noise["class_counts"]
    classes = len(noisy) - 1
    declared = torch.tensor(float(patients), dtype=torch.float64)
    with_each = _near(noisy.sum(0), variance.sum(0), declared).clamp(1.0, 10 * patients)
    genes, features = with_each[0], with_each[1:]
    fewer = torch.minimum(genes, features)
    both = torch.minimum(_near(moments["pair_counts"], noise["pair_counts"], fewer), fewer).clamp(min=1.0)

    # The shares of the classes, from patients with a profile and from those with features alike.
    weights = torch.cat([torch.ones(1), torch.full((len(features),), 1 / len(features))]).double()
    votes, votes_noise = noisy[:classes] @ weights, variance[:classes] @ weights**2
    voters = _near(votes.sum(), votes_noise.sum(), 2 * declared).clamp(min=1.0)
    even = 1 / classes
    # Variance of a share when all compositions are equally likely.
    spread = torch.tensor((classes - 1) / (classes**2 * (classes + 1)), dtype=torch.float64)
    share_noise = votes_noise / voters**2 + even * (1 - even) / (0.5 * voters)
    prior = even + (votes / voters - even) * spread / (spread + share_noise)
    prior = prior.clamp(min=0.01)
    prior = prior / prior.sum()

    by_class = _near(noisy[:classes], variance[:classes], prior[:, None] * with_each).clamp(min=1.0)
    by_class = torch.minimum(by_class, with_each)
    return Counts(genes, features, both, by_class[:, 0], by_class[:, 1:], prior)


def shrink(noisy: Tensor, variance: Tensor) -> Tensor:
    """Posterior means of quantities that are normal around 0 with a common variance, observed with normal errors.

    Args:
        noisy: observations, any shape.
        variance: of each observation's error, same shape, positive.

    Returns:
        ``noisy * tau^2 / (tau^2 + variance)`` with the tau of largest marginal likelihood on a grid from 0 to 10.
    """
    spread = (_TAUS**2)[:, None] + variance.flatten()
    likelihood = -(spread.log() + noisy.flatten().square() / spread).sum(1)
    best = (_TAUS**2)[likelihood.argmax()]
    return noisy * best / (best + variance)


def _near(noisy: Tensor, variance: Tensor, declared: Tensor) -> Tensor:
    """Posterior mean of counts given a normal prior around `declared`."""
    spread = (_COUNT_PRIOR * declared).square()
    return declared + (noisy - declared) * spread / (spread + variance)


def _class_means(sums: Tensor, noise: Tensor, counts: Tensor, prior: Tensor) -> Tensor:
    """(K, d) class means: their common part shrunk towards the public centre 0, their differences towards none."""
    means = sums / counts
    variance = noise / counts**2 + 1 / counts
    weights = prior[:, None]
    common = (weights * means).sum(0)
    common_shrunk = shrink(common, (weights**2 * variance).sum(0))
    apart = shrink(means - common, variance)
    return common_shrunk + apart - (weights * apart).sum(0)


def _covariance(moments: Tensor, noise: Tensor, counts: Tensor, middle: Tensor) -> Tensor:
    """(d, d) covariance, shrunk towards equal variances (and those towards 1) and no correlation.

    Args:
        moments: (d, d) noisy sum of second moments.
        noise: (d, d) its noise variance.
        counts: (d,) patients with each coordinate. Those with two are taken to be as many as have the rarer, which is
            so when a patient or site that lacks the rarer is the only one that may lack the other.
        middle: (d,) estimated mean.
    """
    pairs = torch.minimum(counts[:, None], counts[None, :])
    raw = moments / pairs - torch.outer(middle, middle)
    variance = noise / pairs**2 + 1 / pairs
    variances, errors = raw.diagonal(), (noise.diagonal() / counts**2 + 2 / counts)
    common = 1 + shrink(variances.mean() - 1, errors.mean() / len(errors))
    diagonal = common + shrink(variances - common, errors)
    row, column = torch.triu_indices(len(raw), len(raw), offset=1)
    result = diagonal.diag()
    if len(row):
        upper = shrink(raw[row, column], variance[row, column])
        result[row, column] = upper
        result[column, row] = upper
    return result


def _usable(covariance: Tensor) -> Tensor:
    """The nearest (Frobenius) symmetric matrix whose eigenvalues are at least the floor."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=_FLOOR)) @ vectors.T
