"""A linear-Gaussian model of expression, morphology and label: each class a normal distribution, all of one covariance.

With u the coordinates of expression in r public directions and m the standardised morphology,

    label ~ prior,    (u, m) | label ~ N(mean of the class, covariance),    genes = basis u + residual.

The residual gives each gene, independently of the others, the variance that the plan's scale says it has and that u
lacks. Morphology is predicted from genes by the best linear predictor under the model, the label by linear discriminant
analysis. Drawn morphology keeps the model's means, standard deviations and (nearly) correlations, and takes the *shape* of
each feature's distribution from the public population: a fraction that is often 0, or a place that avoids the midline, is
no normal variable. A state is fitted by `fedsynth_server.fitting.moments`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsynth.engines.moments import Sizes, public_template, sizes
from fedsynth.plan import StudyPlan
from fedsynth.synthesis import SyntheticProfiles

State = dict[str, Tensor]

# Least variance of a gene's residual: no gene is a function of others, not even where noisy moments make it look so.
_LEAST_RESIDUAL = 0.1


def linear_gaussian_template(plan: StudyPlan) -> State:
    """Names, shapes and types of a fitted model; the values are those of `public_prior` without public weights."""
    return public_prior(sizes(plan), public_template(plan))


def public_prior(size: Sizes, public: Mapping[str, Tensor]) -> State:
    """The model that knows public constants only: classes equally frequent and as different in morphology as in the public
    population, alike in genes, which are not linked to morphology.

    Args:
        size: of the model.
        public: the public weights of the moments (`fedsynth.engines.moments.public_template`), which every state holds.

    Returns:
        The public weights, ``class_prior`` (K,), ``means`` (K, r + F) and ``covariance`` (r + F, r + F) of u and m.
    """
    r, width = size.components, size.components + size.features
    means, covariance = torch.zeros(size.classes, width), torch.eye(width)
    means[:, r:] = public["morphology_by_class"]
    apart = means - means.mean(0)
    return {
        **{name: tensor.to(torch.float32).clone() for name, tensor in public.items()},
        "class_prior": torch.full((size.classes,), 1 / size.classes),
        "means": means,
        "covariance": covariance - apart.T @ apart / size.classes,
    }


class LinearGaussianProfiles:
    """The model of a state: draws synthetic profiles, predicts morphology and label from genes.

    Args:
        state: as `public_prior` describes it, finite.
        clip: genes are kept within ± this value.
    """

    def __init__(self, state: Mapping[str, Tensor], clip: float) -> None:
        values = {name: tensor.double() for name, tensor in state.items()}
        self._clip = clip
        self._genes_scale = values["genes_scale"]
        self._basis = values["basis"]
        self._centre, self._scale = values["morphology_centre"], values["morphology_scale"]
        self._shape = values["morphology_shape"]
        self._prior, self._means, within = values["class_prior"], values["means"], values["covariance"]
        r = len(self._genes_scale)
        self._middle = self._prior @ self._means
        apart = self._means - self._middle
        total = within + apart.T @ (self._prior[:, None] * apart)
        # The best linear predictor of m from u, over all classes.
        self._slopes = torch.linalg.solve(total[:r, :r], total[:r, r:])
        # Linear discriminants: log prior + u' W^-1 mean - mean' W^-1 mean / 2.
        self._discriminants = torch.linalg.solve(within[:r, :r], self._means[:, :r].T)
        self._offsets = self._prior.log() - 0.5 * (self._means[:, :r].T * self._discriminants).sum(0)
        self._spread = total.diagonal()[r:].clamp(min=0.0).sqrt()
        variances, axes = torch.linalg.eigh(within)
        self._root = axes * variances.clamp(min=0.0).sqrt()
        self._loadings = self._basis * self._genes_scale
        explained = ((self._loadings @ total[:r, :r]) * self._loadings).sum(1)
        self._residual_sd = (1.0 - explained).clamp(min=_LEAST_RESIDUAL).sqrt()

    def draw(self, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """Draw `count` synthetic patients: genes (count, G) on the plan's scale, morphology (count, F) in [0, 1], labels."""
        return self._given(torch.multinomial(self._prior, count, replacement=True, generator=generator), generator)

    def draw_class(self, code: int, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """Draw `count` synthetic patients of the class `code`, exactly: given its class a patient is a normal variable."""
        return self._given(torch.full((count,), code), generator)

    def share_of_class(self, code: int) -> float:
        """The share of the class `code` among all who are drawn."""
        return float(self._prior[code] / self._prior.sum())

    def _given(self, labels: Tensor, generator: torch.Generator) -> SyntheticProfiles:
        """One patient for each of the class codes `labels` (N,)."""
        r, count = len(self._genes_scale), len(labels)
        normal = torch.randn(count, self._means.shape[1], generator=generator, dtype=torch.float64)
        both = self._means[labels] + normal @ self._root.T
        residual = torch.randn(count, len(self._basis), generator=generator, dtype=torch.float64) * self._residual_sd
        genes = (both[:, :r] @ self._loadings.T + residual).clamp(-self._clip, self._clip)
        return SyntheticProfiles(genes.to(torch.float32), self._unit(self._shaped(both[:, r:])), labels)

    def predict(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Genes (B, G) on the plan's scale -> expected morphology (B, F) in [0, 1], label logits (B, K)."""
        r = len(self._genes_scale)
        u = genes.double() @ self._basis / self._genes_scale
        expected = self._middle[r:] + (u - self._middle[:r]) @ self._slopes
        return self._unit(expected), (u @ self._discriminants + self._offsets).to(torch.float32)

    def _shaped(self, drawn: Tensor) -> Tensor:
        """Standardised morphology (N, F), normal over all classes together -> the same ranks in the public shape."""
        middle = self._middle[len(self._genes_scale) :]
        ranks = torch.special.ndtr((drawn - middle) / self._spread.clamp(min=1e-12))
        points = self._shape.shape[1]
        place = (ranks * points - 0.5).clamp(0.0, points - 1.0)
        below = place.floor().long().clamp(max=points - 2)
        low = torch.gather(self._shape, 1, below.T).T
        high = torch.gather(self._shape, 1, below.T + 1).T
        return middle + self._spread * torch.lerp(low, high, place - below)

    def _unit(self, standardised: Tensor) -> Tensor:
        return (self._centre + self._scale * standardised).clamp(0.0, 1.0).to(torch.float32)
