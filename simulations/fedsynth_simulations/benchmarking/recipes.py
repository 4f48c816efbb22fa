"""Recipes of private training, run on prepared patients in one process with the functions of client and server.

What is left out against a study: messages, ledger, checkpoints (tests show that the federation computes the same). The
randomness is seeded, so that a run can be repeated: *not private*, which simulated patients do not mind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsynth.budget import noise_multipliers
from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.engines import embedding, moments
from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.plan import EmbeddingPlan, Module, MomentsPlan, PublicWeights, StudyPlan, WarmStart
from fedsynth.profiles import profile_model
from fedsynth.records import PROFILES, PUBLIC, State, state_digest
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_client.training.statistic import release_statistic
from fedsynth_server.aggregation import site_weights, summed
from fedsynth_server.fitting.embedding import fit_generator
from fedsynth_server.fitting.moments import fit_moments
from fedsynth_simulations.benchmarking.rounds import train_rounds

Recipe = Literal["public", "conditions", "scratch", "warm", "embedding", "hybrid"]
RECIPES: tuple[Recipe, ...] = ("public", "conditions", "scratch", "warm", "embedding", "hybrid")
Conditions = Literal["moments", "public"]

_POOL = 2048
_NO_NOISE = 1e-3  # of a clip, once or in a few steps: nothing beside any estimate's own error
_NO_LIMIT = 1e4  # stands for an infinite epsilon where a plan wants a number; its noise is not used
_UNKNOWN = PublicWeights(sha256="0" * 64, provenance="not there: conditions come from the public cohort")


# Sections of the plan and what of them a recipe changes against the plan's defaults.
Changes = Mapping[str, Mapping[str, object]]

# Shares weigh the modules (`fedsynth.dp.accounting.allocate`). From random weights the generator has to move; from public
# ones it must not run away (`fedsynth.recommend`).
DEFAULTS: Mapping[Recipe, Changes] = {
    "public": {"gan": {"rounds": 0}},
    "conditions": {"gan": {"rounds": 0}},
    "scratch": {
        "moments": {"budget_share": 0.3},
        "gan": {
            "rounds": 20,
            "budget_share": 0.7,
            "discriminator_trains": "all",
            "learning_rate": 4e-4,
            "generator_learning_rate": 2e-4,
            "warm_start": None,
        },
    },
    "warm": {
        "moments": {"budget_share": 0.3},
        "gan": {"rounds": 3, "budget_share": 0.7, "generator_learning_rate": 2e-5},
    },
    "embedding": {
        "moments": {"budget_share": 0.3},
        "embedding": {"budget_share": 0.7},
        "gan": {"rounds": 0},
    },
    "hybrid": {
        "moments": {"budget_share": 0.3},
        "embedding": {"budget_share": 0.5},
        "gan": {"rounds": 3, "budget_share": 0.2, "generator_learning_rate": 2e-5},
    },
}


@dataclass(frozen=True)
class SiteData:
    """A site's training patients: images, morphology and labels, and genes (N, G)."""

    patients: ImagePatients
    genes: Tensor

    def first(self, n: int) -> SiteData:
        """The first `n` patients."""
        p = self.patients
        return SiteData(ImagePatients(p.slices[:n], p.morphology[:n], p.labels[:n]), self.genes[:n])


def pooled(sites: Mapping[str, SiteData]) -> SiteData:
    """All sites' patients as if they were one site's."""
    parts = [site.patients for site in sites.values()]
    return SiteData(
        ImagePatients(
            torch.cat([part.slices for part in parts]),
            torch.cat([part.morphology for part in parts]),
            torch.cat([part.labels for part in parts]),
        ),
        torch.cat([site.genes for site in sites.values()]),
    )


def recipe_plan(
    base: StudyPlan,
    recipe: Recipe,
    target_epsilon: float,
    weights: Mapping[str, State],
    start: WarmStart,
    changes: Changes | None = None,
) -> StudyPlan:
    """The plan of a study that follows `recipe`.

    Args:
        base: grid, panel, features and sites.
        recipe: which modules make images; conditions always come from `moments` (or are public at the same charge).
        target_epsilon: of all modules together; may be infinite.
        weights: public weights by name, of which the statistics' digests go into the plan.
        start: public weights of generator and discriminator.
        changes: to the recipe's `DEFAULTS`, by section; those of a section that the recipe lacks are left out.

    Raises:
        pydantic.ValidationError: a change names no field of its section, or a value that it cannot have.
    """
    sections: dict[str, dict[str, object]] = {
        "privacy": {**base.privacy.model_dump(), "epsilon": min(target_epsilon, _NO_LIMIT)},
        "moments": MomentsPlan(budget_share=1.0, public=_public(weights, "moments")).model_dump(),
        "autoencoder": {**base.autoencoder.model_dump(), "rounds": 0, "warm_start": None},
        "radiogenomics": {**base.radiogenomics.model_dump(), "rounds": 0},
        "gan": {**base.gan.model_dump(), "warm_start": start.model_dump()},
    }
    if "embedding" in DEFAULTS[recipe]:
        sections["embedding"] = EmbeddingPlan(budget_share=1.0, public=_public(weights, "embedding")).model_dump()
    for section, values in sections.items():
        values |= DEFAULTS[recipe].get(section, {})
        values |= (changes or {}).get(section, {})
    return StudyPlan.model_validate({**base.model_dump(), "embedding": None, **sections})


def _public(weights: Mapping[str, State], module: Module) -> PublicWeights:
    state = weights.get(PUBLIC[module])
    return _UNKNOWN if state is None else PublicWeights(sha256=state_digest(state), provenance="of the benchmark")


def check_public(plan: StudyPlan, weights: Mapping[str, State]) -> None:
    """Make sure that public weights are those that the engines of this version take.

    Raises:
        ValueError: a statistic's weights are missing, or have other names or shapes.
    """
    for module, template in (
        ("moments", moments.public_template(plan)),
        ("embedding", embedding.public_template(plan)),
    ):
        held = weights.get(PUBLIC["moments" if module == "moments" else "embedding"], {})
        if {name: tensor.shape for name, tensor in held.items()} != {n: t.shape for n, t in template.items()}:
            raise ValueError(f"the public weights of {module} are missing or of another version: make them anew")


@dataclass(frozen=True)
class Outcome:
    """What a recipe ends with.

    Attributes:
        generator: weights.
        conditions: pool of synthetic conditions that it was trained under and is drawn with.
        report: plain numbers: what fits report, noise multipliers, epsilon spent.
    """

    generator: State
    conditions: SyntheticProfiles
    report: dict[str, float]


def run_recipe(
    plan: StudyPlan,
    sites: Mapping[str, SiteData],
    weights: Mapping[str, State],
    public_conditions: SyntheticProfiles,
    conditions: Conditions,
    *,
    noise: bool,
    seed: int,
) -> Outcome:
    """Run the modules of `plan` on the sites' patients.

    Args:
        plan: of `recipe_plan`; it names the sites.
        sites: their training patients.
        weights: public weights by name: generator, discriminator and what the statistics need.
        public_conditions: pool of public conditions.
        conditions: where conditions come from; public ones are charged as if they were private, so that images of both
            have the same noise.
        noise: False runs without any (an infinite epsilon); clipping stays.
        seed: of every draw and of the noise.
    """
    draws = torch.Generator().manual_seed(seed)
    randomness = {name: SeededRandomness(1000 * seed + i) for i, name in enumerate(sorted(sites))}
    history = _mechanisms(plan, sites, noise)
    report = _spent(plan, history, noise)
    declared = sum(plan.site(name).nominal_patients for name in sites)
    pool = public_conditions
    if conditions == "moments":
        public = weights[PUBLIC["moments"]]
        totals = {}
        for name, site in sites.items():
            rows = moments.rows(plan, public, site.genes, site.patients.morphology, site.patients.labels)
            totals[name] = release_statistic(rows, history[name]["moments"], 1.0, randomness[name]).weights
        noise_sd = _noise_sd(history, "moments")
        state, fit = fit_moments(plan, public, summed(totals)["total"], noise_sd, declared)
        report |= {f"moments_{key}": value for key, value in fit.items()}
        pool = profile_model(plan, {PROFILES: state}).draw(_POOL, draws)
    generator, critic = _start(plan, weights, draws)
    if plan.embedding is not None:
        public = weights[PUBLIC["embedding"]]
        totals = {}
        for name, site in sites.items():
            p = site.patients
            rows = embedding.rows(plan, public, p.slices, p.morphology, p.labels)
            totals[name] = release_statistic(rows, history[name]["embedding"], 1.0, randomness[name]).weights
        noise_sd = _noise_sd(history, "embedding")
        generator, fit = fit_generator(
            plan, generator, public, summed(totals)["total"], noise_sd, declared, pool, draws
        )
        report |= {f"embedding_{key}": value for key, value in fit.items()}
    if plan.gan.rounds:
        generator = _adversarial(plan, generator, critic, sites, history, randomness, pool)
    return Outcome(generator, pool, report)


def _mechanisms(plan: StudyPlan, sites: Mapping[str, SiteData], noise: bool) -> dict[str, dict[Module, Mechanism]]:
    """Each site's mechanisms over the whole study."""
    found: dict[str, dict[Module, Mechanism]] = {}
    for name in sites:
        multipliers = noise_multipliers(plan, name) if noise else dict.fromkeys(plan.modules, _NO_NOISE)
        found[name] = {
            module: Mechanism(plan.sample_rate(module, name), multipliers[module], plan.training(module).steps)
            for module in plan.modules
        }
    return found


def _spent(plan: StudyPlan, history: Mapping[str, Mapping[Module, Mechanism]], noise: bool) -> dict[str, float]:
    if not history:
        return {}
    one = history[min(history)]
    report = {f"sigma_{module}": mechanism.noise_multiplier for module, mechanism in one.items()}
    if noise:
        report["epsilon_spent"] = max(epsilon(list(each.values()), plan.privacy.delta) for each in history.values())
    return report


def _noise_sd(history: Mapping[str, Mapping[Module, Mechanism]], module: Module) -> float:
    return math.sqrt(sum(site[module].noise_multiplier ** 2 for site in history.values()))


def _start(plan: StudyPlan, weights: Mapping[str, State], draws: torch.Generator) -> tuple[State, State]:
    if plan.gan.warm_start is not None:
        return weights["generator"], weights["discriminator"]
    generator, discriminator = make_generator(plan), make_discriminator(plan)
    initialise(generator, draws)
    initialise(discriminator, draws)
    return generator.state_dict(), discriminator.state_dict()


def _adversarial(
    plan: StudyPlan,
    start: State,
    critic: State,
    sites: Mapping[str, SiteData],
    history: Mapping[str, Mapping[Module, Mechanism]],
    randomness: Mapping[str, SeededRandomness],
    pool: SyntheticProfiles,
) -> State:
    """Rounds of local blocks and averaging; returns the moving average of the generator."""
    blocks = {name: replace(history[name]["gan"], steps=plan.gan.steps_per_round) for name in sites}
    patients = {name: site.patients for name, site in sites.items()}
    weights = site_weights(plan, sorted(sites))
    return train_rounds(plan, start, critic, patients, blocks, randomness, weights, pool).average
