"""From a plan to the mechanism that each module runs at each site: the same pure function for forecast and for charge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fedsynth.dp.accounting import Accountant, Demand, Mechanism, allocate, epsilon, noise_multiplier
from fedsynth.plan import Activity, Module, Population, StudyPlan


def noise_multipliers(plan: StudyPlan, site: str) -> dict[Module, float]:
    """Noise multipliers with which all modules of `plan` together meet its epsilon at `site`.

    0 for all modules of a study without privacy, and above 0 for all of any other.

    Raises:
        ValueError: the plan's epsilon is too small for any noise.
    """
    demands = tuple(
        (module, plan.sample_rate(module, site), plan.training(module).steps, plan.training(module).budget_share)
        for module in plan.modules
    )
    found = dict(_allocate(demands, plan.privacy.epsilon, plan.privacy.delta, plan.privacy.accountant))
    for module, sigma in found.items():
        _check_noise(plan, module, sigma)
    return found


def _check_noise(plan: StudyPlan, what: str, sigma: float) -> None:
    """No noise where the plan promises privacy would be the worst of errors, so nothing relies on arithmetic alone.

    Raises:
        ValueError: a private plan would get no noise, or one without privacy would get some.
    """
    if (sigma > 0) is not plan.privacy.private:
        raise ValueError(
            f"{what} would run with noise multiplier {sigma:g} under a plan of epsilon {plan.privacy.epsilon:g}"
        )


@lru_cache(maxsize=256)
def _allocate(
    demands: tuple[tuple[Module, float, int, float], ...], target: float, delta: float, accountant: str
) -> tuple[tuple[Module, float], ...]:
    asked: dict[str, Demand] = {module: Demand(rate, steps, share) for module, rate, steps, share in demands}
    found = allocate(asked, target, delta, "prv" if accountant == "prv" else "rdp")
    return tuple((module, found[module]) for module, *_ in demands)


def mechanism(plan: StudyPlan, site: str, module: Module, *, steps: int | None = None) -> Mechanism:
    """The sampled Gaussian mechanism of `module` at `site`: one round's steps unless `steps` says otherwise.

    It has no noise exactly where the study is one without privacy (`_check_noise`).
    """
    return Mechanism(
        plan.sample_rate(module, site),
        noise_multipliers(plan, site)[module],
        plan.training(module).steps_per_round if steps is None else steps,
    )


def planned_epsilon(plan: StudyPlan, site: str, module: Module | None = None) -> float:
    """Epsilon that all steps of one module, or of all modules composed, cost at `site`; infinite without privacy."""
    chosen = plan.modules if module is None else (module,)
    history = [mechanism(plan, site, each, steps=plan.training(each).steps) for each in chosen]
    return epsilon(history, plan.privacy.delta, plan.privacy.accountant)


def private_activities(plan: StudyPlan) -> tuple[Activity, ...]:
    """What of `plan` is noised: everything, or of a study without privacy the sites' evaluation alone, if it has one."""
    return tuple(each for each in plan.activities if plan.privacy.private or each == "evaluation")


@dataclass(frozen=True)
class Charge:
    """What one round of an activity costs a site, and whom.

    Attributes:
        population: whose account it is charged to.
        mechanism: the round's mechanism.
        max_grad_norm: what a patient's part is clipped to.
        study_epsilon: what the plan allows to spend of that population, at the plan's delta; infinite without privacy.
    """

    population: Population
    mechanism: Mechanism
    max_grad_norm: float
    study_epsilon: float


def charge(plan: StudyPlan, site: str, activity: Activity) -> Charge:
    """What one round of `activity` is charged at `site`.

    Raises:
        ValueError: the plan has no such activity.
    """
    if activity != "evaluation":
        training = plan.training(activity)
        return Charge("train", mechanism(plan, site, activity), training.max_grad_norm, plan.privacy.epsilon)
    if plan.site_evaluation is None:
        raise ValueError("the plan has no section site_evaluation")
    section = plan.site_evaluation
    return Charge("holdout", evaluation_mechanism(plan), section.max_grad_norm, section.epsilon)


def evaluation_mechanism(plan: StudyPlan) -> Mechanism:
    """The one noisy sum over a site's held-out patients, which takes all of them: the same at every site.

    It is no part of what training patients spend (`planned_epsilon`): they are other people. So it is private in a study
    without privacy, too.

    Raises:
        ValueError: the plan has no section ``site_evaluation``, or its epsilon is too small for any noise.
    """
    if plan.site_evaluation is None:
        raise ValueError("the plan has no section site_evaluation")
    privacy = plan.privacy
    return Mechanism(1.0, _once(plan.site_evaluation.epsilon, privacy.delta, privacy.accountant), 1)


@lru_cache(maxsize=64)
def _once(target: float, delta: float, accountant: Accountant) -> float:
    return noise_multiplier(1.0, 1, target, delta, accountant)
