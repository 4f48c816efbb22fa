"""What a plan will cost and whether it can learn anything, before anything is spent.

The signal of a private step is at most the clipping norm C; its noise has norm sigma C sqrt(d) / B over d parameters.
Steps add up in the signal and only as their square root in the noise, and so do sites whose results are averaged. The
forecast of a module that is trained is the ratio of the two over the whole run,

    noise_to_signal = sigma sqrt(d) / (B sqrt(T K)),

for T steps at K sites. Of a statistic that is released once the ratio is that of the noise of the mean over all sites
to what it usually has to tell (`fedsynth_server.statistics_forecast`). Either is a comparison of plans, not a prediction
of quality: well below its limit the signal comes through, far above it nothing does.

A study without privacy has no noise: every ratio is 0, every epsilon infinite, and no statistic needs a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedsynth.budget import evaluation_mechanism, noise_multipliers, planned_epsilon
from fedsynth.dp.accounting import Demand, allocation_report
from fedsynth.engines import embedding, moments
from fedsynth.evaluation.site_scores import expected_width
from fedsynth.models.trainable import trainable_parameters
from fedsynth.plan import Module, StatisticPlan, StudyPlan
from fedsynth.records import State
from fedsynth_server.statistics_forecast import RULE_OF_THUMB, StatisticForecast, forecast_statistic

HARD, HOPELESS = 1.0, 3.0
STATISTIC_HARD, STATISTIC_HOPELESS = RULE_OF_THUMB, 1.5

# Held-out patients a declared training patient, at the usual split of four to one. Their number is not declared.
HOLDOUT_SHARE = 0.25
_TELLS_LITTLE = 0.5  # width of an interval of scores between 0 and 1

Reading = Literal["learns", "partly", "drowns"]


@dataclass(frozen=True)
class ModuleForecast:
    """What one module costs at one site, and how its noise compares with its signal.

    Attributes:
        site, module: which.
        sample_rate, noise_multiplier, steps: the mechanism over all rounds.
        epsilon_alone: epsilon of this module by itself, at the plan's delta.
        noise_to_batch: noise multiplier over expected batch: the noise of one step in units of the clipping norm.
        noise_to_signal: see the module's docstring; of a statistic, of all sites together.
        reading: what that ratio means.
    """

    site: str
    module: Module
    sample_rate: float
    noise_multiplier: float
    steps: int
    epsilon_alone: float
    noise_to_batch: float
    noise_to_signal: float
    reading: Reading


@dataclass(frozen=True)
class SiteBudget:
    """Joint accounting at one site against adding up.

    Attributes:
        site: which.
        epsilon: all modules composed.
        epsilon_summed: the sum of the modules' epsilons, each alone with the same noise.
        split_noise: by module, how many times the noise it would need if epsilon were split and each paid its share alone;
            empty where there is no noise.
    """

    site: str
    epsilon: float
    epsilon_summed: float
    split_noise: dict[Module, float]


@dataclass(frozen=True)
class SiteEvaluationForecast:
    """What the sites' evaluation costs held-out patients, and what its noise leaves to know.

    Attributes:
        epsilon: of a held-out patient; training patients pay nothing for it.
        noise_multiplier: of the one noisy sum, at every site.
        width: by site, width of the 95 % interval that the noise leaves of a score of three quarters (1: nothing is known),
            with `HOLDOUT_SHARE` held-out patients a declared training patient.
        pooled_width: the same over all sites.
        sentence: the same in words.
    """

    epsilon: float
    noise_multiplier: float
    width: dict[str, float]
    pooled_width: float
    sentence: str


@dataclass(frozen=True)
class Forecast:
    """All modules at all sites, what the statistics can tell, the budget of each site, and the sites' evaluation, if any."""

    modules: list[ModuleForecast]
    statistics: list[StatisticForecast]
    budgets: list[SiteBudget]
    site_evaluation: SiteEvaluationForecast | None = None

    @property
    def epsilon(self) -> dict[str, float]:
        """By site, epsilon of all modules composed."""
        return {budget.site: budget.epsilon for budget in self.budgets}

    def worst(self, module: Module) -> ModuleForecast:
        """`module` at the site where its noise is largest beside its signal."""
        return max((m for m in self.modules if m.module == module), key=lambda m: m.noise_to_signal)


def forecast(plan: StudyPlan, public: Mapping[str, State] | None = None) -> Forecast:
    """Compute what `plan` costs and what its noise leaves to learn.

    Args:
        plan: the study plan.
        public: the plan's public weights by record name, where they are at hand: they sharpen what is said of an embedding.
    """
    public = public or {}
    statistics = {
        module: forecast_statistic(plan, module, public)
        for module in plan.modules
        if plan.privacy.private and isinstance(plan.training(module), StatisticPlan)
    }
    ratio = {module: found.noise_to_signal for module, found in statistics.items()}
    modules = [_module(plan, site.name, module, ratio.get(module)) for site in plan.sites for module in plan.modules]
    budgets = [_budget(plan, site.name) for site in plan.sites]
    return Forecast(modules, list(statistics.values()), budgets, _site_evaluation(plan))


def noise_to_signal(plan: StudyPlan, site: str, module: Module, public: Mapping[str, State] | None = None) -> float:
    """The ratio of one module at one site; `public` as for `forecast`. 0 without privacy."""
    if not plan.privacy.private:
        return 0.0
    training = plan.training(module)
    if isinstance(training, StatisticPlan):
        return forecast_statistic(plan, module, public or {}).noise_to_signal
    # Discriminators are local and meet only through the generator; the other networks are averaged every round. Of a
    # translation half is local, and that half leads the other.
    sites = 1 if module in ("gan", "translation") else len(plan.sites)
    sigma, size = noise_multipliers(plan, site)[module], parameters(plan, module)
    return sigma * math.sqrt(size) / (training.expected_batch * math.sqrt(training.steps * sites))


def limits(plan: StudyPlan, module: Module) -> tuple[float, float]:
    """Ratios up to which `module` learns, and above which it drowns."""
    if isinstance(plan.training(module), StatisticPlan):
        return STATISTIC_HARD, STATISTIC_HOPELESS
    return HARD, HOPELESS


def read(plan: StudyPlan, module: Module, ratio: float) -> Reading:
    """What a noise-to-signal ratio of `module` means."""
    hard, hopeless = limits(plan, module)
    return "learns" if ratio <= hard else "partly" if ratio <= hopeless else "drowns"


def parameters(plan: StudyPlan, module: Module) -> int:
    """Number of parameters, or of coordinates of a statistic, that receive noise."""
    if module == "moments":
        return moments.row_size(plan)
    if module == "embedding":
        return embedding.row_size(plan)
    return trainable_parameters(plan, module)


def _module(plan: StudyPlan, site: str, module: Module, ratio: float | None) -> ModuleForecast:
    training, sigma = plan.training(module), noise_multipliers(plan, site)[module]
    batch = plan.site(site).nominal_patients if isinstance(training, StatisticPlan) else training.expected_batch
    found = noise_to_signal(plan, site, module) if ratio is None else ratio
    return ModuleForecast(
        site=site,
        module=module,
        sample_rate=plan.sample_rate(module, site),
        noise_multiplier=sigma,
        steps=training.steps,
        epsilon_alone=planned_epsilon(plan, site, module),
        noise_to_batch=sigma / batch,
        noise_to_signal=found,
        reading=read(plan, module, found),
    )


def _site_evaluation(plan: StudyPlan) -> SiteEvaluationForecast | None:
    if plan.site_evaluation is None:
        return None
    asked, sigma = plan.site_evaluation.epsilon, evaluation_mechanism(plan).noise_multiplier
    held_out = {site.name: HOLDOUT_SHARE * site.nominal_patients for site in plan.sites}
    width = {site: expected_width(patients, sigma) for site, patients in held_out.items()}
    pooled = expected_width(sum(held_out.values()), sigma * math.sqrt(len(held_out)))
    sentence = (
        f"site evaluation: epsilon {asked:g} of held-out patients, who are other people than training patients. With one of "
        f"them for every {1 / HOLDOUT_SHARE:.0f} declared training patients, the noise leaves a score between 0 and 1 open "
        f"to an interval {pooled:.2f} wide over all sites, and at a site "
        + ", ".join(f"{site} {each:.2f}" for site, each in width.items())
        + "."
    )
    if pooled > _TELLS_LITTLE:
        sentence += " That tells next to nothing: leave the evaluation out, or let it cost more."
    return SiteEvaluationForecast(asked, sigma, width, pooled, sentence)


def _budget(plan: StudyPlan, site: str) -> SiteBudget:
    demands = {
        str(module): Demand(
            plan.sample_rate(module, site), plan.training(module).steps, plan.training(module).budget_share
        )
        for module in plan.modules
    }
    sigmas, privacy = noise_multipliers(plan, site), plan.privacy
    found = allocation_report(
        demands, {str(m): sigma for m, sigma in sigmas.items()}, privacy.epsilon, privacy.delta, privacy.accountant
    )
    return SiteBudget(
        site,
        found.epsilon,
        found.epsilon_summed,
        {
            module: found.modules[module].noise_multiplier_split / found.modules[module].noise_multiplier
            for module in plan.modules
            if plan.privacy.private
        },
    )
