"""From a plan to the mechanism that each module runs at each site: the same pure function for forecast and for charge."""

from __future__ import annotations

from functools import lru_cache

from fedsynth.dp.accounting import Demand, Mechanism, allocate, epsilon
from fedsynth.plan import Module, StudyPlan


def noise_multipliers(plan: StudyPlan, site: str) -> dict[Module, float]:
    """Noise multipliers with which all modules of `plan` together meet its epsilon at `site`."""
    demands = tuple(
        (module, plan.sample_rate(module, site), plan.training(module).steps, plan.training(module).budget_share)
        for module in plan.modules
    )
    return dict(_allocate(demands, plan.privacy.epsilon, plan.privacy.delta, plan.privacy.accountant))


@lru_cache(maxsize=256)
def _allocate(
    demands: tuple[tuple[Module, float, int, float], ...], target: float, delta: float, accountant: str
) -> tuple[tuple[Module, float], ...]:
    asked: dict[str, Demand] = {module: Demand(rate, steps, share) for module, rate, steps, share in demands}
    found = allocate(asked, target, delta, "prv" if accountant == "prv" else "rdp")
    return tuple((module, found[module]) for module, *_ in demands)


def mechanism(plan: StudyPlan, site: str, module: Module, *, steps: int | None = None) -> Mechanism:
    """The sampled Gaussian mechanism of `module` at `site`: one round's steps unless `steps` says otherwise."""
    return Mechanism(
        plan.sample_rate(module, site),
        noise_multipliers(plan, site)[module],
        plan.training(module).steps_per_round if steps is None else steps,
    )


def planned_epsilon(plan: StudyPlan, site: str, module: Module | None = None) -> float:
    """Epsilon that all steps of one module, or of all modules composed, cost at `site`."""
    chosen = plan.modules if module is None else (module,)
    history = [mechanism(plan, site, each, steps=plan.training(each).steps) for each in chosen]
    return epsilon(history, plan.privacy.delta, plan.privacy.accountant)
