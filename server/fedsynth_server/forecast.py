"""What a plan will cost and whether it can learn anything, before anything is spent.

The signal of a private step is at most the clipping norm C; its noise has norm sigma C sqrt(d) / B over d parameters.
Steps add up in the signal and only as their square root in the noise, and so do sites whose results are averaged. The
forecast is the ratio of the two over the whole run,

    noise_to_signal = sigma sqrt(d) / (B sqrt(T K)),

for T steps at K sites. A statistic that is released once is one step whose batch is every patient. It is a comparison
of plans, not a prediction of quality: below about 1 the mean direction of the updates comes through, far above nothing
does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from fedsynth.budget import noise_multipliers, planned_epsilon
from fedsynth.engines import embedding, moments
from fedsynth.models.dcgan import make_discriminator
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Module, StatisticPlan, StudyPlan, TrainingPlan

HARD, HOPELESS = 1.0, 3.0


@dataclass(frozen=True)
class ModuleForecast:
    """What one module costs at one site, and how its noise compares with its signal.

    Attributes:
        site, module: which.
        sample_rate, noise_multiplier, steps: the mechanism over all rounds.
        epsilon_alone: epsilon of this module by itself, at the plan's delta.
        noise_to_batch: noise multiplier over expected batch: the noise of one step in units of the clipping norm.
        noise_to_signal: see the module's docstring.
    """

    site: str
    module: Module
    sample_rate: float
    noise_multiplier: float
    steps: int
    epsilon_alone: float
    noise_to_batch: float
    noise_to_signal: float


@dataclass(frozen=True)
class Forecast:
    """All modules at all sites, epsilon of each site, and advice in plain words."""

    modules: list[ModuleForecast]
    epsilon: dict[str, float]
    advice: list[str]


def forecast(plan: StudyPlan) -> Forecast:
    """Compute what `plan` costs and what its noise leaves to learn."""
    modules = [_module(plan, site.name, module) for site in plan.sites for module in plan.modules]
    advice = []
    for module in plan.modules:
        worst = max((m for m in modules if m.module == module), key=lambda m: m.noise_to_signal)
        if worst.noise_to_signal > HARD:
            advice.append(_advice(plan, worst))
    small = [site.name for site in plan.sites if plan.privacy.delta > 1 / (10 * site.nominal_patients)]
    if small:
        advice.append(
            f"delta {plan.privacy.delta:g} is above 1 / (10 n) for {', '.join(small)}: "
            "a delta near 1 / n allows a mechanism that reveals whole patients."
        )
    return Forecast(modules, {site.name: planned_epsilon(plan, site.name) for site in plan.sites}, advice)


def parameters(plan: StudyPlan, module: Module) -> int:
    """Number of parameters, or of coordinates of a statistic, that receive noise."""
    if module == "moments":
        return moments.row_size(plan)
    if module == "embedding":
        return embedding.row_size(plan)
    model: nn.Module
    if module == "autoencoder":
        model = make_autoencoder(plan)
    elif module == "radiogenomics":
        model = make_radiogenomic_dnn(plan)
    else:
        model = make_discriminator(plan)
    return sum(parameter.numel() for parameter in model.parameters())


def _module(plan: StudyPlan, site: str, module: Module) -> ModuleForecast:
    sigma = noise_multipliers(plan, site)[module]
    return ModuleForecast(
        site=site,
        module=module,
        sample_rate=plan.sample_rate(module, site),
        noise_multiplier=sigma,
        steps=plan.training(module).steps,
        epsilon_alone=planned_epsilon(plan, site, module),
        noise_to_batch=sigma / _batch(plan, site, module),
        noise_to_signal=_noise_to_signal(plan, site, module, sigma),
    )


def _batch(plan: StudyPlan, site: str, module: Module) -> int:
    training = plan.training(module)
    return plan.site(site).nominal_patients if isinstance(training, StatisticPlan) else training.expected_batch


def _noise_to_signal(plan: StudyPlan, site: str, module: Module, sigma: float) -> float:
    # Discriminators are local and meet only through the generator; the other modules are averaged every round.
    sites = 1 if module == "gan" else len(plan.sites)
    steps = plan.training(module).steps
    return sigma * math.sqrt(parameters(plan, module)) / (_batch(plan, site, module) * math.sqrt(steps * sites))


def _advice(plan: StudyPlan, worst: ModuleForecast) -> str:
    word = "will drown in noise" if worst.noise_to_signal > HOPELESS else "will learn little"
    levers = {name: _what_if(change, worst) for name, change in _levers(plan, worst.module).items()}
    best = min(levers, key=lambda name: levers[name])
    listed = ", ".join(f"{name}: {value:.1f}" for name, value in sorted(levers.items(), key=lambda item: item[1]))
    text = (
        f"{worst.module} {word}: its noise is {worst.noise_to_signal:.1f} times its signal at site {worst.site} "
        f"(noise/batch {worst.noise_to_batch:.3f}). What would change that ({listed}); {best} helps most."
    )
    if worst.module == "gan" and plan.gan.warm_start is None:
        text += " A warm start from public weights leaves less to learn, which no ratio shows."
    return text


def _levers(plan: StudyPlan, module: Module) -> dict[str, StudyPlan]:
    """Plans in which one thing is doubled or halved."""
    training = plan.training(module)
    bigger = [site.model_copy(update={"nominal_patients": 2 * site.nominal_patients}) for site in plan.sites]
    twice = plan.model_copy(update={"sites": bigger})
    levers = {
        "twice the epsilon": plan.model_copy(
            update={"privacy": plan.privacy.model_copy(update={"epsilon": 2 * plan.privacy.epsilon})}
        ),
        "twice the patients a site": twice,
    }
    if isinstance(training, TrainingPlan):

        def with_training(**update: object) -> dict[str, object]:
            return {module: training.model_copy(update=update)}

        batch = 2 * training.expected_batch
        levers["twice the patients a site"] = twice.model_copy(update=with_training(expected_batch=batch))
        levers["twice the steps"] = plan.model_copy(update=with_training(rounds=2 * training.rounds))
        if batch <= min(site.nominal_patients for site in plan.sites):
            levers["twice the batch"] = plan.model_copy(update=with_training(expected_batch=batch))
    if module != "gan":
        more = [site.model_copy(update={"name": f"{site.name[:58]}-2"}) for site in plan.sites]
        levers["twice the sites"] = plan.model_copy(update={"sites": [*plan.sites, *more]})
    return levers


def _what_if(plan: StudyPlan, worst: ModuleForecast) -> float:
    return _noise_to_signal(plan, worst.site, worst.module, noise_multipliers(plan, worst.site)[worst.module])
