"""From the sum of the sites' noisy statistics to the model that is fitted to it: post-processing, without privacy cost."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fedsynth.budget import noise_multipliers
from fedsynth.engines import embedding, moments
from fedsynth.plan import Module, StudyPlan
from fedsynth.profiles import profile_model
from fedsynth.records import PROFILES, PUBLIC, WEIGHTS, State
from fedsynth_server.checkpoint import StudyState
from fedsynth_server.fitting.embedding import fit_generator
from fedsynth_server.fitting.moments import fit_moments

_POOL = 2048  # synthetic conditions that the generator is fitted under


def statistic_template(plan: StudyPlan, module: Module) -> State:
    """Names, shapes and types of what a site sends of the statistic `module`; the values mean nothing."""
    size = moments.row_size(plan) if module == "moments" else embedding.row_size(plan)
    return {"total": torch.zeros(size)}


def fit_statistic(plan: StudyPlan, state: StudyState, module: Module) -> StudyState:
    """Fit the model of the statistic `module`, whose sum `state` holds; the same state gives the same fit."""
    sites = [str(row["site"]) for row in state.curves[module]]
    noise_sd = math.sqrt(sum(noise_multipliers(plan, site)[module] ** 2 for site in sites))
    patients = sum(plan.site(site).nominal_patients for site in sites)
    total, public = state.weights[WEIGHTS[module]]["total"], state.weights[PUBLIC[module]]
    draws = torch.Generator().manual_seed(int(plan.digest[:15], 16))
    if module == "moments":
        profiles, report = fit_moments(plan, public, total, noise_sd, patients)
        return replace(state.with_weights(**{PROFILES: profiles}), fits={**state.fits, module: report})
    pool = profile_model(plan, state.weights).draw(_POOL, draws)
    generator, report = fit_generator(plan, state.weights["generator"], public, total, noise_sd, patients, pool, draws)
    fitted = state.with_weights(generator=generator, generator_ema=generator)
    return replace(fitted, fits={**state.fits, module: report})
