"""Combining what the sites sent: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

import torch

from fedsynth.plan import AggregationPlan, StudyPlan
from fedsynth.records import State


def site_weights(plan: StudyPlan, sites: list[str]) -> dict[str, float]:
    """Weights, adding up to 1, of the sites that replied.

    They come from the plan's declared cohort sizes (or are equal), never from true counts, which are private.
    """
    raw = {s: float(plan.site(s).nominal_patients) if plan.aggregation.weighting == "nominal" else 1.0 for s in sites}
    total = sum(raw.values())
    return {site: weight / total for site, weight in raw.items()}


def weighted_average(states: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """Weighted mean of the sites' states (McMahan et al. 2017); summed in float64, in the order of the sites' names."""
    sites = sorted(states)
    return {
        name: sum(weights[site] * states[site][name].double() for site in sites).to(reference.dtype)  # type: ignore[union-attr]
        for name, reference in states[sites[0]].items()
    }


def combined(states: Mapping[str, State], weights: Mapping[str, float], rule: AggregationPlan) -> State:
    """The sites' states combined by the plan's rule.

    ``median`` and ``trimmed_mean`` are coordinate-wise (Yin et al. 2018, Byzantine-robust distributed learning): as long as
    fewer sites are poisoned than are left out at each end, every coordinate lies between values of honest sites.

    Args:
        states: by site.
        weights: by site, adding up to 1; for the mean only.
        rule: the plan's aggregation.
    """
    if rule.rule == "mean":
        return weighted_average(states, weights)
    sites = sorted(states)
    left_out = (len(sites) - 1) // 2 if rule.rule == "median" else math.floor(rule.trim * len(sites))
    return {name: _trimmed_mean([states[site][name] for site in sites], left_out) for name in states[sites[0]]}


def _trimmed_mean(tensors: list[torch.Tensor], left_out: int) -> torch.Tensor:
    ordered = torch.stack([tensor.double() for tensor in tensors]).sort(dim=0).values
    return ordered[left_out : len(tensors) - left_out].mean(dim=0).to(tensors[0].dtype)


def update_norm(sent: State, received: State) -> float:
    """L2 distance over all tensors together."""
    return math.sqrt(sum(float((received[name].double() - sent[name].double()).pow(2).sum()) for name in sent))


def bounded(sent: State, received: State, largest: float) -> State:
    """`received`, drawn back towards `sent` so far that the update's L2 norm is at most `largest`."""
    norm = update_norm(sent, received)
    if norm <= largest:
        return received
    share = largest / norm
    return {
        name: (start.double() + share * (received[name].double() - start.double())).to(start.dtype)
        for name, start in sent.items()
    }


def summed(states: Mapping[str, State]) -> State:
    """The sum over the sites' statistics; in float64, in the order of the sites' names.

    Sums of disjoint patients add up to the sum over all of them, and the variances of the sites' noise add up, too.
    """
    sites = sorted(states)
    return {
        name: sum(states[site][name].double() for site in sites).to(reference.dtype)  # type: ignore[union-attr]
        for name, reference in states[sites[0]].items()
    }


def moving_average(average: State, new: State, decay: float) -> State:
    """``decay * average + (1 - decay) * new``: the exponential moving average of the generator over rounds."""
    return {name: decay * average[name] + (1 - decay) * new[name] for name in new}


def averaging_decay(plan: StudyPlan, number: int) -> float:
    """Decay of the generator's moving average in round `number` (from 1).

    It is 0 in the first round of a generator that started from random weights, and in the first of each resolution of a
    growing one: until then its layers, or those of the resolution, held weights that nobody trained, and a short study
    would release a good part of them.
    """
    untrained = plan.gan.warm_start is None and plan.embedding is None
    firsts = {1} if untrained else set()
    if plan.gan.growth:
        firsts |= {1, *(1 + rounds for rounds in accumulate(plan.gan.growth))}
    return 0.0 if number in firsts else plan.gan.ema_decay
