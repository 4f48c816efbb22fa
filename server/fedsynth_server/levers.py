"""What would help a module whose noise hides its signal: one thing is changed at a time and the forecast made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsynth.plan import EmbeddingPlan, Module, MomentsPlan, PublicWeights, StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth_server.forecast import Forecast, ModuleForecast, noise_to_signal

TO_BE_NAMED = PublicWeights(sha256="0" * 64, provenance="public weights that are still to be named")
_ONE_SHOT = {
    "moments": "one-shot moments instead of the networks",
    "embedding": "a one-shot embedding instead of the gan",
}


@dataclass(frozen=True)
class Levers:
    """What each change would do to one module at the site where it fares worst.

    Attributes:
        module, site, noise_to_signal: which, and its ratio as planned.
        changes: the ratio after each change that lowers it by a fiftieth or more, the most helpful first.
        sentence: the same in words.
    """

    module: Module
    site: str
    noise_to_signal: float
    changes: dict[str, float]
    sentence: str

    @property
    def best(self) -> str | None:
        """The change that helps most; None where none helps."""
        return next(iter(self.changes), None)


def levers(plan: StudyPlan, found: Forecast, public: Mapping[str, State] | None = None) -> list[Levers]:
    """For every module of `plan` whose signal does not come through whole, what would help it."""
    worst = [found.worst(module) for module in plan.modules]
    return [_levers(plan, each, public or {}) for each in worst if each.reading != "learns"]


def ratio_text(ratio: float) -> str:
    """A noise-to-signal ratio in two digits.

    >>> ratio_text(0.0571), ratio_text(1.06), ratio_text(88.02), ratio_text(1234.5)
    ('0.057', '1.1', '88', '1234')
    """
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:.0f}"


def _levers(plan: StudyPlan, worst: ModuleForecast, public: Mapping[str, State]) -> Levers:
    # A dozen allocations by privacy random variables take minutes; what a change gains is nearly the same by Renyi DP.
    quick = plan
    if plan.privacy.accountant == "prv":
        quick = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"accountant": "rdp"})})
    base = noise_to_signal(quick, worst.site, worst.module, public)
    scale = worst.noise_to_signal / base
    after = {
        name: scale * noise_to_signal(changed, worst.site, worst.module, public)
        for name, changed in _same_module(quick, worst.module).items()
    }
    for module, changed in _one_shot_instead(quick, worst.module).items():
        after[_ONE_SHOT[module]] = noise_to_signal(changed, worst.site, module, public)
    helpful = {name: ratio for name, ratio in after.items() if ratio <= 0.98 * worst.noise_to_signal}
    ordered = dict(sorted(helpful.items(), key=lambda item: item[1]))
    return Levers(worst.module, worst.site, worst.noise_to_signal, ordered, _sentence(plan, worst, ordered))


def _sentence(plan: StudyPlan, worst: ModuleForecast, changes: Mapping[str, float]) -> str:
    word = "will drown in noise" if worst.reading == "drowns" else "will learn a part"
    text = (
        f"{worst.module} {word}: its noise is {ratio_text(worst.noise_to_signal)} times its signal at site {worst.site} "
        f"(noise/batch {worst.noise_to_batch:.3f})."
    )
    if changes:
        listed = ", ".join(f"{name}: {ratio_text(ratio)}" for name, ratio in changes.items())
        text += f" What would change that ({listed}); {next(iter(changes))} helps most."
    else:
        text += " No single change of the plan helps."
    if worst.module == "gan" and plan.gan.warm_start is None:
        text += " A warm start from public weights leaves less to learn, which no ratio shows."
    return text


def _same_module(plan: StudyPlan, module: Module) -> dict[str, StudyPlan]:
    """Plans in which one thing is doubled or halved, or every other module left out."""
    changed = {
        "twice the epsilon": _with_privacy(plan, epsilon=2 * plan.privacy.epsilon),
        "twice the patients a site": _with_twice_the_patients(plan),
    }
    training = plan.training(module)
    if isinstance(training, TrainingPlan):
        changed["twice the steps"] = _with(plan, module, rounds=2 * training.rounds)
        if 2 * training.expected_batch <= min(site.nominal_patients for site in plan.sites):
            changed["twice the batch"] = _with(plan, module, expected_batch=2 * training.expected_batch)
    if isinstance(training, EmbeddingPlan) and training.dimensions > 1:
        changed["half the dimensions"] = _with(plan, module, dimensions=training.dimensions // 2)
    if isinstance(training, MomentsPlan) and training.components > 1:
        changed["half the components"] = _with(plan, module, components=training.components // 2)
    if module not in ("gan", "translation"):
        # Discriminators are not averaged, so other sites do not help one.
        more = [site.model_copy(update={"name": f"{site.name[:58]}-2"}) for site in plan.sites]
        changed["twice the sites"] = plan.model_copy(update={"sites": [*plan.sites, *more]})
    if len(plan.modules) > 1:
        changed["the whole budget for it"] = _without(plan, *(other for other in plan.modules if other != module))
    return changed


def _one_shot_instead(plan: StudyPlan, module: Module) -> dict[Module, StudyPlan]:
    """The statistic that could replace a trained module, and the plan that has it with the same share of the budget."""
    if module in ("autoencoder", "radiogenomics") and plan.moments is None:
        share = min(plan.autoencoder.budget_share + plan.radiogenomics.budget_share, 1.0)
        moments = MomentsPlan(budget_share=share, public=TO_BE_NAMED)
        return {"moments": _without(plan, "autoencoder", "radiogenomics").model_copy(update={"moments": moments})}
    if module == "gan" and plan.embedding is None:
        embedding = EmbeddingPlan(budget_share=plan.gan.budget_share, public=TO_BE_NAMED)
        return {"embedding": _without(plan, "gan").model_copy(update={"embedding": embedding})}
    return {}


def _with(plan: StudyPlan, module: Module, **update: Any) -> StudyPlan:
    return plan.model_copy(update={module: plan.training(module).model_copy(update=update)})


def _with_privacy(plan: StudyPlan, **update: Any) -> StudyPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=update)})


def _with_twice_the_patients(plan: StudyPlan) -> StudyPlan:
    """Batches grow along, so every sample rate and noise multiplier stays as it is."""
    sites = [site.model_copy(update={"nominal_patients": 2 * site.nominal_patients}) for site in plan.sites]
    trainings: dict[str, Any] = {}
    for module in plan.modules:
        training = plan.training(module)
        if isinstance(training, TrainingPlan):
            trainings[module] = training.model_copy(update={"expected_batch": 2 * training.expected_batch})
    return plan.model_copy(update={"sites": sites, **trainings})


def _without(plan: StudyPlan, *modules: Module) -> StudyPlan:
    """Without some modules. Such a plan may lack an engine: it serves to compute noise, not to run."""
    gone: dict[str, Any] = {}
    for module in modules:
        training = plan.training(module)
        gone[module] = training.model_copy(update={"rounds": 0}) if isinstance(training, TrainingPlan) else None
    return plan.model_copy(update=gone)
