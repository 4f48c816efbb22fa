"""Checks before a study: one line each, with the remedy; nothing is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from fedsynth.budget import evaluation_mechanism, mechanism
from fedsynth.deployment.checks import Doubt, Line, check
from fedsynth.deployment.machine import disk
from fedsynth.dp.accounting import PRV_LEAST_DELTA, Accountant, epsilon
from fedsynth.epsilons import shown
from fedsynth.errors import FedsynthError, Refused
from fedsynth.marks import marks
from fedsynth.plan import StudyPlan
from fedsynth_client.account import account, current_split
from fedsynth_client.cohort import load_cohort, read_entries
from fedsynth_client.outbox import Outbox, check_ledger_is_whole
from fedsynth_client.policy import (
    SitePolicy,
    check_evaluation,
    check_module,
    check_patients,
    check_plan,
    lifetime_epsilon,
)
from fedsynth_client.site import Site

_FREE_BYTES = 2 * 2**30


def preflight(site: Site, plan: StudyPlan | None) -> list[Line]:
    """Check the site's folder and, when given, whether `plan` could run."""
    checks: list[Callable[[], str]] = [
        lambda: f"policy of site {site.policy().site}",
        lambda: _ledger(site),
        lambda: disk(site.folder, _FREE_BYTES),
    ]
    if plan is not None:
        checks += [
            lambda: _approved(site, plan),
            lambda: _cohort(site, plan),
            lambda: _budget(site, plan),
        ]
        if plan.site_evaluation is not None:
            checks.append(lambda: _evaluation(site, plan))
    return [check(each) for each in checks]


def approved_lines(site: Site) -> list[Line]:
    """One line for each plan that the policy approves, and one for what is left of the budget.

    Raises:
        FedsynthError: the policy cannot be read; `preflight` says so in a line of its own.
    """
    approved = site.policy().approved_plans
    if not approved:
        return [
            Line(
                "warn",
                "plans: none is approved, so nothing can run",
                "fedsynth site plan show FOLDER FILE, then approve.",
                "no_plan_approved",
            )
        ]
    return [*(check(partial(_approved_digest, site, digest)) for digest in approved), check(lambda: _left(site))]


def _approved_digest(site: Site, digest: str) -> str:
    return _approved(site, site.plan(digest))


def _left(site: Site) -> str:
    current = account(site)
    if math.isinf(current.epsilon) and current.marks:
        raise Doubt("not_private", f"budget: {current.marks[0]}", "See fedsynth site ledger.")
    if current.left <= 0:
        raise Doubt(
            "budget_spent",
            f"budget: nothing is left of epsilon {current.max_epsilon:g} (delta {current.delta:g})",
            "What was released can still be sent; no further step can run.",
        )
    return f"budget: epsilon {current.left:.3f} of {current.max_epsilon:g} left at delta {current.delta:g}"


def _ledger(site: Site) -> str:
    return check_ledger_is_whole(site.ledger(), Outbox(site.folder))


def _approved(site: Site, plan: StudyPlan) -> str:
    check_plan(site.policy(), plan)
    site.plan(plan.digest)
    found = f"plan {plan.name} is approved ({plan.digest[:12]})"
    if protects_nobody := marks(plan.privacy):
        raise Doubt("not_private", f"{found}. {' '.join(protects_nobody)}", "Only for public or simulated data.")
    return found


def _cohort(site: Site, plan: StudyPlan) -> str:
    policy = site.policy()
    site.check_cohort(plan)
    cohort = load_cohort(site.cohort_path, plan.morphology.features).split("train")
    found = {module: int(cohort.usable_for(module).sum()) for module in plan.modules}
    for module in plan.modules:
        check_module(policy, module)
        check_patients(policy, module, found[module])
    return "cohort: training patients " + ", ".join(f"{module} {count}" for module, count in found.items())


def _budget(site: Site, plan: StudyPlan) -> str:
    policy, ledger = site.policy(), site.ledger()
    already = {(e.body["module"], e.body["round"]) for e in ledger.entries() if _is_charge(e.kind, e.body, plan)}
    ahead = [
        mechanism(plan, policy.site, module)
        for module in plan.modules
        for number in range(1, plan.training(module).rounds + 1)
        if (module, number) not in already
    ]
    by, split = _accountant(policy, plan), current_split(site)
    spent = ledger.epsilon(policy.max_delta, by, split=split)
    after = epsilon([*ledger.history(split=split), *ahead], policy.max_delta, by)
    if after > lifetime_epsilon(policy, plan, "train") + 1e-9:
        if math.isinf(spent) and plan.privacy.private:
            raise Refused(
                "budget_exceeded",
                "This cohort took part in a study without privacy: its epsilon is infinite, above any budget.",
                "No private study can use these patients any more.",
            )
        raise Refused(
            "budget_exceeded",
            f"This cohort has spent epsilon {spent:.3f}; the plan would raise it to {after:.3f}, above "
            f"{policy.max_epsilon:g}.",
            "A smaller plan, or a larger max_epsilon in the policy.",
        )
    text = f"budget: lifetime epsilon {shown(spent)} now, {shown(after)} after the study"
    if not plan.privacy.private:
        return f"{text}: a study without privacy, which the policy allows (allow_not_private)"
    return f"{text}, {policy.max_epsilon:g} allowed"


def _evaluation(site: Site, plan: StudyPlan) -> str:
    """Whether the site would evaluate the study's generator; one that does not takes part in all the rest."""
    try:
        return _evaluation_budget(site, plan)
    except FedsynthError as error:
        raise Doubt(
            error.code,
            f"site evaluation: not here. {error.message}",
            error.hint or "The study goes on without this site's evaluation.",
        ) from None


def _evaluation_budget(site: Site, plan: StudyPlan) -> str:
    policy, ledger = site.policy(), site.ledger()
    check_module(policy, "evaluation")
    check_evaluation(policy, plan)
    held_out = sum(entry.split == "holdout" for entry in read_entries(site.cohort_path))
    by, split = _accountant(policy, plan), current_split(site)
    ledger.check_not_moved(plan.digest, split or "")
    history = ledger.history(population="holdout", split=split)
    done = any(_is_charge(e.kind, e.body, plan) and e.body["module"] == "evaluation" for e in ledger.entries())
    spent = epsilon(history, policy.max_delta, by)
    after = epsilon(history if done else [*history, evaluation_mechanism(plan)], policy.max_delta, by)
    if after > policy.max_holdout_epsilon + 1e-9:
        raise Refused(
            "budget_exceeded",
            f"It would raise the epsilon of held-out patients from {spent:.3f} to {after:.3f}, above "
            f"{policy.max_holdout_epsilon:g}.",
        )
    return (
        f"site evaluation: {held_out} held-out patients, their lifetime epsilon {spent:.3f} now, {after:.3f} after the "
        f"study, {policy.max_holdout_epsilon:g} allowed"
    )


def _accountant(policy: SitePolicy, plan: StudyPlan) -> Accountant:
    # A policy whose delta is too small for PRV refuses every plan that asks for it; RDP still tells what was spent.
    return "rdp" if policy.max_delta < PRV_LEAST_DELTA else plan.privacy.accountant


def _is_charge(kind: str, body: dict[str, object], plan: StudyPlan) -> bool:
    return kind == "charge" and body["study"] == plan.digest
