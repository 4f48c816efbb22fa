"""Averaging of weights over sites: pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from fedsynth.plan import StudyPlan
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
