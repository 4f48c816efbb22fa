"""One-shot private mean embedding of images: one row a patient, in features of a public network.

Harder et al. (2021, DP-MERF) release the mean of random features once and fit a generator to it; with features of a
public network little noise suffices (Harder et al. 2023, DP-MEPF; Jiang et al. 2023, DP-Kernel). Here a row is made so that
few patients are enough:

- *Deviations.* Public patients tell what the features of a slice are on average, given its position and the patient's
  morphology and label (linear regression). A row holds what differs from that, averaged over the patient's slices, so
  that little of its norm is spent on what everybody knows, and so that a generator which is asked under other
  conditions than the patients' can still be compared with them.
- *Moments.* Features are the leading principal components of `fedsynth.models.features.describe_slices`, and the
  products of the first of them (second moments).
- *Conditions.* Deviations are crossed with 1 (how images differ), with the label and with each morphology feature (how
  their relation to the patient differs).
- *Weights by a public rule.* Each coordinate's weight is the one that minimises the expected error of all, given the
  variances of public patients and the plan's noise and numbers of patients: what cannot rise above the noise gets
  none (`allocate_weights`). The sum of squares is scaled to stay below 1 in most public patients, and clipped in all.
- *Counts.* The first coordinates are a one-hot of the label, with one place for unknown labels: their sums are the
  noisy numbers of patients, which nothing else may tell.

The sum over patients changes by at most 1 (Euclidean norm) when a patient is added or removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsynth.budget import noise_multipliers
from fedsynth.models.features import FeatureNetwork, describe_slices, features_size, make_feature_network
from fedsynth.plan import StudyPlan

State = dict[str, Tensor]

TARGETS = 8  # that the public network is trained to predict
COMPONENTS = 40  # principal components of the features of a slice
_PRODUCTS = 12  # of them, those whose products are features, too
DEVIATIONS = COMPONENTS + _PRODUCTS * (_PRODUCTS + 1) // 2
COUNT_WEIGHT = 0.25  # of the one-hot: a fair noisy count, and less than a thirtieth of the norm of the rest is lost
_HEADROOM = 2.0  # mean square norm of public rows below the clip
FEATURE_BOUND, _SCORE_BOUND, _CONDITION_BOUND = 4.0, 3.0, 3.0  # in standard deviations
# How far a site's mean is expected from the public one, in standard deviations between public patients, and likewise
# the slope on a condition.
_SHIFT, _SLOPE = 0.4, 0.15
_TINY = 1e-12


@dataclass(frozen=True)
class Embedding:
    """The function from slices to rows that sites and coordinator share; all of it is public.

    Attributes:
        network: describes slices.
        state: the public state, see `public_template`.
        weight: (DEVIATIONS, 1 + Q) weight of each deviation times condition.
        chosen: (dimensions,) int64, which of them (flattened) a row holds, the most telling first.
        classes: label classes K.
        prior: (DEVIATIONS, 1 + Q) expected mean square of a site's mean coordinates, unweighted.
    """

    network: FeatureNetwork
    state: State
    weight: Tensor
    chosen: Tensor
    classes: int
    prior: Tensor

    @property
    def counts(self) -> int:
        """Coordinates, the first of a row, that count patients: one a class and one for unknown labels."""
        return self.classes + 1

    @property
    def size(self) -> int:
        """Length of a row."""
        return self.counts + len(self.chosen)

    @property
    def chosen_weight(self) -> Tensor:
        """(dimensions,) weights of the chosen coordinates, 0 where the noise leaves nothing to be learnt."""
        return self.weight.flatten()[self.chosen]

    @property
    def of_label(self) -> Tensor:
        """(dimensions,) bool: coordinates crossed with the label, which patients without one leave at 0."""
        column = self.chosen % self.weight.shape[1]
        return (column >= 1) & (column < self.classes)

    def conditions(self, morphology: Tensor, labels: Tensor) -> Tensor:
        """(N, 1 + Q): 1, the label's contrasts (0 where unknown), morphology in public standard deviations (0 for NaN)."""
        shares = self.state["label_share"]
        one_hot = (
            torch.nn.functional.one_hot(labels.clamp(0, self.classes - 1), self.classes).to(torch.float32) - shares
        )
        contrasts = one_hot[:, 1:] * (labels >= 0)[:, None] / (shares * (1 - shares)).sqrt()[1:]
        standard = (morphology.to(torch.float32) - self.state["morphology_centre"]) / self.state["morphology_scale"]
        standard = standard.nan_to_num(nan=0.0).clamp(-_CONDITION_BOUND, _CONDITION_BOUND)
        return torch.cat([torch.ones(len(labels), 1), contrasts, standard], dim=1)

    def scores(self, slices: Tensor, places: Tensor) -> Tensor:
        """Features of slices, bounded and without what is due to position alone: (B, DEVIATIONS), differentiable.

        Args:
            slices: (B, C + 1, H, W) in [-1, 1].
            places: (B,) int64, index of each slice in its volume.
        """
        return project(self.state, describe_slices(self.network, slices), places)

    def deviations(self, slices: Tensor, places: Tensor, conditions: Tensor) -> Tensor:
        """How slices differ from what their conditions (B, 1 + Q) make public patients look like: (B, DEVIATIONS)."""
        expected = torch.einsum("bq,bqk->bk", conditions, self.state["regression"][places])
        return (self.scores(slices, places) - expected) @ self.state["rotation"]

    def coordinates(self, deviations: Tensor, conditions: Tensor) -> Tensor:
        """Weighted coordinates (N, dimensions), not clipped, of mean deviations (N, DEVIATIONS)."""
        return crossed(deviations, conditions)[:, self.chosen] * self.chosen_weight

    @torch.no_grad()
    def rows(self, volumes: Tensor, morphology: Tensor, labels: Tensor) -> Tensor:
        """One row a patient, of norm at most 1 whatever the patient holds.

        Args:
            volumes: (N, C + 1, S, H, W) of any float type, meant to be in [-1, 1]; other values are clamped, NaN is -1.
            morphology: (N, F) in [0, 1], NaN where not measured.
            labels: (N,) class codes, -1 where unknown.

        Returns:
            (N, size) float32.
        """
        # One at a time: how a product of matrices is rounded depends on how many rows it has, and a patient's row must
        # be a function of that patient alone, to the last bit.
        parts = [self._row(volumes[i : i + 1], morphology[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
        return torch.cat(parts) if parts else torch.zeros(0, self.size)

    def _row(self, volumes: Tensor, morphology: Tensor, labels: Tensor) -> Tensor:
        patients, depth = len(volumes), volumes.shape[2]
        clean = volumes.to(torch.float32).nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
        slices = clean.transpose(1, 2).flatten(0, 1)
        conditions = self.conditions(morphology, labels)
        places = torch.arange(depth).repeat(patients)
        deviations = self.deviations(slices, places, conditions.repeat_interleave(depth, dim=0))
        values = self.coordinates(deviations.reshape(patients, depth, -1).mean(dim=1), conditions)
        limit = math.sqrt(1 - COUNT_WEIGHT**2)
        clipped = values * (limit / values.norm(dim=1, keepdim=True).clamp(min=limit))
        places_of = torch.where(labels >= 0, labels.clamp(max=self.classes - 1), self.classes)
        counted = COUNT_WEIGHT * torch.nn.functional.one_hot(places_of, self.counts)
        row = torch.cat([counted, clipped], dim=1)
        # Rounding may leave a norm of 1 + 1e-7.
        return row / row.norm(dim=1, keepdim=True).clamp(min=1.0)


def crossed(deviations: Tensor, conditions: Tensor) -> Tensor:
    """Every deviation times every condition: (N, DEVIATIONS * (1 + Q)), unweighted."""
    return (deviations[:, :, None] * conditions[:, None, :]).flatten(1)


def project(state: State, described: Tensor, places: Tensor) -> Tensor:
    """Bounded principal components and their products (B, DEVIATIONS) of what `describe_slices` returns (B, M)."""
    standard = bounded((described - state["centre"][places]) / state["scale"], FEATURE_BOUND)
    spread = state["spread"]
    scores = bounded(standard @ state["directions"] / spread, _SCORE_BOUND) * spread
    leading = scores[:, :_PRODUCTS]
    first, second = torch.triu_indices(_PRODUCTS, _PRODUCTS)
    return torch.cat([scores, leading[:, first] * leading[:, second]], dim=1)


def bounded(values: Tensor, bound: float) -> Tensor:
    """Smooth and increasing, about the identity near 0, between -bound and bound."""
    return values / torch.sqrt(1 + (values / bound) ** 2)


def most_telling(variance: Tensor, residual: Tensor, dimensions: int) -> Tensor:
    """Indices (dimensions,) of the coordinates that get a weight first, as `allocate_weights` tells why.

    Sites and coordinator compute them apart and must agree on every one, so they follow from single operations in float64
    whose rounding IEEE 754 fixes, and not from the weights, which a sum in another order may change in the last digit.
    """
    v, e = (values.double().flatten().clamp(min=_TINY) for values in (variance, residual))
    return torch.argsort(e / v.sqrt(), descending=True, stable=True)[:dimensions]


def allocate_weights(variance: Tensor, residual: Tensor, noise: float, dimensions: int) -> Tensor:
    """Weights that make the sum over patients most telling, by public numbers alone.

    A coordinate of weight w whose mean differs from the public one by an amount of mean square e is estimated with the
    expected squared error e / (1 + w^2 e / s^2), where s is the noise of the mean. The weights minimise the sum of
    these, given the expected squared norm of a row, sum w^2 v: water-filling, so weak coordinates get none.

    Args:
        variance: mean square v of each coordinate over public patients.
        residual: e, of the same shape.
        noise: s, standard deviation of the noise of a mean (noise of the sum over number of patients). At 0 the weights are
            those that a vanishing noise leads to, w^2 in proportion to 1 / sqrt(v).
        dimensions: at most so many get a weight.

    Returns:
        Weights of that shape, with sum w^2 v = (1 - COUNT_WEIGHT^2) / 2.
    """
    v, e = (values.double().flatten().clamp(min=_TINY) for values in (variance, residual))
    gain = e / v.sqrt()
    kept = most_telling(variance, residual, dimensions)
    budget = (1 - COUNT_WEIGHT**2) / _HEADROOM

    def squares(level: float) -> Tensor:
        return (noise**2 / e[kept] * (gain[kept] / (noise * level) - 1)).clamp(min=0)

    def filled() -> Tensor:
        low, high = 1e-12, float(gain[kept[0]]) / noise
        for _ in range(200):
            middle = math.sqrt(low * high)
            if float((squares(middle) * v[kept]).sum()) > budget:
                low = middle
            else:
                high = middle
        return squares(low)

    weights = torch.zeros_like(v)
    found = filled() if noise > 0 else v[kept].rsqrt()
    weights[kept] = (found * (budget / (found * v[kept]).sum())).sqrt()
    return weights.reshape(variance.shape).to(torch.float32)


def embedding_from(state: State, classes: int, dimensions: int, patients: int, noise_sd: float) -> Embedding:
    """The embedding of a public state for given numbers.

    Args:
        state: see `public_template`.
        classes: label classes K.
        dimensions: coordinates of a row beside the counts.
        patients: expected number of patients of all sites together.
        noise_sd: standard deviation of the noise of the sum over all sites.
    """
    variance = state["variance"].double()
    relative = torch.full_like(variance, _SLOPE**2)
    relative[:, 0] = _SHIFT**2
    prior = relative * variance
    residual = state["expected"].double() ** 2 + prior
    weight = allocate_weights(variance, residual, noise_sd / patients, dimensions)
    chosen = most_telling(variance, residual, dimensions)
    network = make_feature_network(
        {k.removeprefix("network/"): t for k, t in state.items() if k.startswith("network/")}
    )
    return Embedding(network, state, weight, chosen, classes, prior.float())


def plan_embedding(plan: StudyPlan, public: State) -> Embedding:
    """The embedding of a plan: its numbers are the declared patients and the noise of all its sites.

    Raises:
        ValueError: the plan has no section `embedding`.
    """
    if plan.embedding is None:
        raise ValueError("the plan has no section embedding")
    noise = math.sqrt(sum(noise_multipliers(plan, site.name)["embedding"] ** 2 for site in plan.sites))
    patients = sum(site.nominal_patients for site in plan.sites)
    return embedding_from(public, len(plan.label.classes), plan.embedding.dimensions, patients, noise)


def public_template(plan: StudyPlan) -> State:
    """Names, shapes and types of the public state that the sites are sent; the values mean nothing.

    ``network/...`` are the weights of the feature network; ``centre`` (S, M) and ``scale`` (M,) standardise what it
    describes; ``directions`` (M, COMPONENTS) and ``spread`` (COMPONENTS,) are principal components; ``regression``
    (S, 1 + Q, DEVIATIONS) predicts them from a patient's conditions; ``rotation`` (DEVIATIONS, DEVIATIONS) makes
    patients' deviations uncorrelated; ``variance`` and ``expected`` (DEVIATIONS, 1 + Q) are the mean square over public
    patients and the mean over the public generator of each coordinate; ``label_share`` (K,), ``morphology_centre`` and
    ``morphology_scale`` (F,) are those of the public patients.
    """
    classes, features, depth = len(plan.label.classes), len(plan.morphology.features), plan.image.slices
    channels = len(plan.image.sequences)
    described, conditions = features_size(channels), classes + features
    shapes = {
        "centre": (depth, described),
        "scale": (described,),
        "directions": (described, COMPONENTS),
        "spread": (COMPONENTS,),
        "regression": (depth, conditions, DEVIATIONS),
        "rotation": (DEVIATIONS, DEVIATIONS),
        "variance": (DEVIATIONS, conditions),
        "expected": (DEVIATIONS, conditions),
        "label_share": (classes,),
        "morphology_centre": (features,),
        "morphology_scale": (features,),
    }
    network = FeatureNetwork(channels, TARGETS).state_dict()
    return {
        **{f"network/{name}": torch.zeros_like(tensor) for name, tensor in network.items()},
        **{name: torch.zeros(shape) for name, shape in shapes.items()},
    }


def row_size(plan: StudyPlan) -> int:
    """Length of a row.

    Raises:
        ValueError: the plan has no section `embedding`.
    """
    if plan.embedding is None:
        raise ValueError("the plan has no section embedding")
    return len(plan.label.classes) + 1 + plan.embedding.dimensions


def rows(plan: StudyPlan, public: State, values: Tensor, morphology: Tensor, labels: Tensor) -> Tensor:
    """One row a patient, (N, row_size(plan)) float32, of norm at most 1 each; see `Embedding.rows`."""
    return plan_embedding(plan, public).rows(values, morphology, labels)
