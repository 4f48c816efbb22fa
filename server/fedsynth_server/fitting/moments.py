"""From the noisy sum of the sites' moments to a linear-Gaussian model: post-processing, without privacy cost.

Every entry of the sum carries noise of known variance. Each moment is therefore shrunk towards what public constants say
(no link, unit variances, equal shares of the classes, their public differences in morphology) by empirical Bayes: the
moments of a block are taken as draws around the public value with a variance tau^2, over whose posterior is averaged,
given each entry's noise and sampling variance (Efron and Morris 1973). Infinite noise leaves the public model, no noise
and many patients leave the moments themselves.

Rows hold vectors that were shortened to a bound; what that takes away from each moment in a public population is given
back. Patients who vary more than the public population seem to vary as it does: lengths beyond the bound are not told
apart.

The prediction of morphology needs no further correction for the noise in the moments of genes. The expected squared
error of slopes B, var(m) - 2 tr(B' cov(u, m)) + tr(B' cov(u) B), is linear in the moments, so the best B given the noisy
sum is that of the moments' posterior means, which is what shrinkage computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor

from fedsynth.engines.moments import CLIPPED_MEAN_SQUARE, Sizes, noise_variances, sizes, unpack
from fedsynth.models.linear_gaussian import public_prior
from fedsynth.plan import StudyPlan

State = dict[str, Tensor]

# Least variance in any direction, in units of the public one.
_FLOOR = 0.02
# How far counts may be from what the plan declares, as a share of it (standard deviation of a normal prior).
_COUNT_PRIOR = 0.5
# Grid over tau and the logarithm of its half-Cauchy prior (Gelman 2006): moments of standardised quantities seldom differ
# from the public ones by much more than the scale, and the noise may hide all of them.
_TAU_SCALE = 0.1
_TAUS = torch.logspace(-3, 1, 81, dtype=torch.float64)
_LOG_PRIOR = _TAUS.log() - (1 + (_TAUS / _TAU_SCALE) ** 2).log()  # the grid is even in log tau


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


@dataclass(frozen=True)
class Attenuation:
    """Share that is left of moments after vectors were shortened to a bound (`CLIPPED_MEAN_SQUARE`).

    Attributes:
        mean: of means, and of covariances with other vectors.
        variance: of the mean variance over coordinates.
        correlation: of differences of variances, and of covariances between coordinates.
    """

    mean: float
    variance: float
    correlation: float


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
    """`fit_moments` for moments of given sizes; without features, a model of genes and label alone."""
    moments, noise = unpack(size, total), noise_variances(size, noise_sd)
    r = size.components
    of_genes, of_morphology = attenuation(r), attenuation(size.features)
    for name, left in (
        ("class_genes", of_genes.mean),
        ("class_morphology", of_morphology.mean),
        ("link", of_genes.mean * of_morphology.mean),
    ):
        moments[name], noise[name] = moments[name] / left, noise[name] / left**2
    counts = estimate_counts(moments, noise, patients)
    means = torch.cat(
        [
            _class_means(
                moments["class_genes"],
                noise["class_genes"],
                counts.class_genes[:, None],
                counts.prior,
                torch.zeros(size.classes, r, dtype=torch.float64),
            ),
            _class_means(
                moments["class_morphology"],
                noise["class_morphology"],
                counts.class_features,
                counts.prior,
                public["morphology_by_class"].double(),
            ),
        ],
        dim=1,
    )
    middle = counts.prior @ means
    apart = means - middle
    between = apart.T @ (counts.prior[:, None] * apart)

    genes = _covariance(moments["genes"], noise["genes"], counts.genes.expand(r), of_genes, middle[:r])
    morphology = _covariance(moments["morphology"], noise["morphology"], counts.features, of_morphology, middle[r:])
    raw_link = moments["link"] / counts.both - torch.outer(middle[:r], middle[r:])
    link_noise = noise["link"] / counts.both**2
    link = shrink(raw_link, link_noise + 1 / counts.both)

    whole = _usable(torch.cat([torch.cat([genes, link], dim=1), torch.cat([link.T, morphology], dim=1)]))
    within = _usable(whole - between)
    state = public_prior(size, public)
    fitted = {"class_prior": counts.prior, "means": means, "covariance": within}
    signal = float(link.square().sum())
    report = {
        "noise_to_signal": min(math.sqrt(float(link_noise.sum()) / signal), 1000.0) if signal > 0 else 1000.0,
        "kept_link": float(link.norm() / raw_link.norm().clamp(min=1e-12)),
    }
    return {**state, **{name: value.to(torch.float32) for name, value in fitted.items()}}, report


def link_noise(size: Sizes, noise_sd: float, patients: int) -> float:
    """Standard deviation that noise will give each correlation between a direction of expression and a feature.

    Known before anything is spent. Links of genes and morphology are about 0.1 to 0.3 strong; where the noise is well
    above that, little of them is left after shrinkage.

    Args:
        size: of the moments, with at least one feature.
        noise_sd: standard deviation of all sites' noise in each entry of the sum.
        patients: expected number of patients with both profile and morphology.
    """
    left = attenuation(size.components).mean * attenuation(size.features).mean
    return math.sqrt(float(noise_variances(size, noise_sd)["link"][0, 0])) / (patients * left)


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
    weights = torch.cat([torch.ones(1), torch.full((len(features),), 1 / max(len(features), 1))]).double()
    votes, votes_noise = noisy[:classes] @ weights, variance[:classes] @ weights**2
    voters = _near(votes.sum(), votes_noise.sum(), weights.sum() * declared).clamp(min=1.0)
    even = 1 / classes
    # Variance of a share when all compositions are equally likely.
    spread = torch.tensor((classes - 1) / (classes**2 * (classes + 1)), dtype=torch.float64)
    share_noise = votes_noise / voters**2 + even * (1 - even) / (voters / weights.sum())
    prior = even + (votes / voters - even) * spread / (spread + share_noise)
    prior = prior.clamp(min=0.01)
    prior = prior / prior.sum()

    by_class = _near(noisy[:classes], variance[:classes], prior[:, None] * with_each).clamp(min=1.0)
    by_class = torch.minimum(by_class, with_each)
    return Counts(genes, features, both, by_class[:, 0], by_class[:, 1:], prior)


def shrink(noisy: Tensor, variance: Tensor) -> Tensor:
    """Posterior means of quantities that are normal around 0 with an unknown common variance, observed with normal errors.

    Args:
        noisy: observations, any shape.
        variance: of each observation's error, same shape, positive.

    Returns:
        ``noisy * tau^2 / (tau^2 + variance)``, averaged over the posterior of tau.
    """
    spread = (_TAUS**2)[:, None] + variance.flatten()
    likelihood = -0.5 * (spread.log() + noisy.flatten().square() / spread).sum(1)
    weights = torch.softmax(likelihood + _LOG_PRIOR, dim=0)
    kept = weights @ ((_TAUS**2)[:, None] / spread)
    return noisy * kept.reshape(noisy.shape)


def attenuation(d: int) -> Attenuation:
    """What shortening leaves of the moments of `d` standard normal coordinates.

    With n the norm of such a vector and R the bound, one with n > R loses the factor R / n. To first order in what differs
    from uncorrelated standard normal vectors, means and covariances with something else keep E n min(n, R) / d; the mean
    variance keeps E min(n^2, R^2) / d; differences of variances, and covariances, keep that less
    2 R^2 P(n > R) / (d (d + 2)).
    """
    if d == 0:
        return Attenuation(1.0, 1.0, 1.0)
    bound = CLIPPED_MEAN_SQUARE * d
    within, beyond = float(chi2.cdf(bound, d + 2)), float(chi2.sf(bound, d))
    mean_norm = math.sqrt(2.0) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    variance = within + bound / d * beyond
    return Attenuation(
        mean=within + math.sqrt(bound) * mean_norm / d * float(chi2.sf(bound, d + 1)),
        variance=variance,
        correlation=variance - 2 * bound * beyond / (d * (d + 2)),
    )


def _near(noisy: Tensor, variance: Tensor, declared: Tensor) -> Tensor:
    """Posterior mean of counts given a normal prior around `declared`."""
    spread = (_COUNT_PRIOR * declared).square()
    return declared + (noisy - declared) * spread / (spread + variance)


def _class_means(sums: Tensor, noise: Tensor, counts: Tensor, prior: Tensor, public: Tensor) -> Tensor:
    """(K, d) class means: their common part shrunk towards the public centre 0, their differences towards `public` ones."""
    means = sums / counts
    variance = noise / counts**2 + 1 / counts
    weights = prior[:, None]
    common = (weights * means).sum(0)
    common_shrunk = shrink(common, (weights**2 * variance).sum(0))
    expected = public - (weights * public).sum(0)
    apart = expected + shrink(means - common - expected, variance)
    return common_shrunk + apart - (weights * apart).sum(0)


def _covariance(moments: Tensor, noise: Tensor, counts: Tensor, left: Attenuation, middle: Tensor) -> Tensor:
    """(d, d) covariance, shrunk towards equal variances (and those towards 1) and no correlation.

    Args:
        moments: (d, d) noisy sum of second moments.
        noise: (d, d) its noise variance.
        counts: (d,) patients with each coordinate. Those with two are taken to be as many as have the rarer, which is
            right where whoever has the rarer has the other; elsewhere correlations come out too weak.
        left: what shortening left of the moments.
        middle: (d,) estimated mean.
    """
    width = len(moments)
    if width == 0:
        return moments
    pairs = torch.minimum(counts[:, None], counts[None, :])
    raw = moments / pairs
    level = raw.diagonal().mean()
    round_part = level * torch.eye(width, dtype=raw.dtype)
    raw = round_part / left.variance + (raw - round_part) / left.correlation - torch.outer(middle, middle)
    variance = noise / (pairs * left.correlation) ** 2 + 1 / pairs

    variances, errors = raw.diagonal(), variance.diagonal() + 1 / counts
    common_error = (noise.diagonal() / (counts * left.variance) ** 2 + 2 / counts).mean() / width
    common = 1 + shrink(variances.mean() - 1, common_error)
    result = (common + shrink(variances - common, errors)).diag()
    if width > 1:
        row, column = torch.triu_indices(width, width, offset=1)
        upper = shrink(raw[row, column], variance[row, column])
        result[row, column] = upper
        result[column, row] = upper
    return result


def _usable(covariance: Tensor) -> Tensor:
    """The nearest (Frobenius) symmetric matrix whose eigenvalues are at least the floor."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=_FLOOR)) @ vectors.T
