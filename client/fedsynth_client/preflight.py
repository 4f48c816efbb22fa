"""Checks before a study: one line each, with the remedy; nothing is spent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from fedsynth.budget import mechanism
from fedsynth.dp.accounting import PRV_LEAST_DELTA, epsilon
from fedsynth.errors import FedsynthError, Refused
from fedsynth.plan import StudyPlan
from fedsynth_client.cohort import load_cohort
from fedsynth_client.outbox import Outbox, check_ledger_is_whole
from fedsynth_client.policy import check_module, check_patients, check_plan
from fedsynth_client.site import Site

_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Line:
    """One check: whether it passed, what was found, what to do."""

    ok: bool
    what: str
    remedy: str = ""


def preflight(site: Site, plan: StudyPlan | None) -> list[Line]:
    """Check the site's folder and, when given, whether `plan` could run."""
    checks: list[Callable[[], str]] = [
        lambda: f"policy of site {site.policy().site}",
        lambda: _ledger(site),
        lambda: _disk(site),
    ]
    if plan is not None:
        checks += [
            lambda: _approved(site, plan),
            lambda: _cohort(site, plan),
            lambda: _budget(site, plan),
        ]
    return [_line(check) for check in checks]


def _line(check: Callable[[], str]) -> Line:
    try:
        return Line(True, check())
    except FedsynthError as error:
        return Line(False, f"{error.message} [{error.code}]", error.hint)


def _ledger(site: Site) -> str:
    entries = site.ledger().entries()
    check_ledger_is_whole(site.ledger(), Outbox(site.folder))
    return f"ledger: {len(entries)} entries, chain intact"


def _disk(site: Site) -> str:
    free = shutil.disk_usage(site.folder).free
    if free < _FREE_BYTES:
        raise Refused("disk_low", f"Only {free / 2**30:.1f} GiB are free at {site.folder}.", "Free at least 2 GiB.")
    return f"disk: {free / 2**30:.0f} GiB free"


def _approved(site: Site, plan: StudyPlan) -> str:
    check_plan(site.policy(), plan)
    site.plan(plan.digest)
    return f"plan {plan.name} is approved ({plan.digest[:12]})"


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
    # A policy whose delta is too small for PRV refuses every plan that asks for it; RDP still tells what was spent.
    by = "rdp" if policy.max_delta < PRV_LEAST_DELTA else plan.privacy.accountant
    spent = ledger.epsilon(policy.max_delta, by)
    after = epsilon([*ledger.history(), *ahead], policy.max_delta, by)
    if after > policy.max_epsilon + 1e-9:
        raise Refused(
            "budget_exceeded",
            f"This cohort has spent epsilon {spent:.3f}; the plan would raise it to {after:.3f}, above "
            f"{policy.max_epsilon:g}.",
            "A smaller plan, or a larger max_epsilon in the policy.",
        )
    return f"budget: lifetime epsilon {spent:.3f} now, {after:.3f} after the study, {policy.max_epsilon:g} allowed"


def _is_charge(kind: str, body: dict[str, object], plan: StudyPlan) -> bool:
    return kind == "charge" and body["study"] == plan.digest
