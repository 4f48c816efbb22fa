"""The site policy: what the hospital allows. Silence means no.

Every default refuses: no plan is approved, no module may train, nothing may be spent.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import Field

from fedsynth.errors import Refused, UsageError
from fedsynth.files import write_atomic
from fedsynth.plan import ACTIVITIES, Activity, Name, Population, Section, StudyPlan
from fedsynth.toml import load_toml

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SitePolicy(Section):
    """What this hospital allows.

    Attributes:
        site: the name under which plans know this site.
        approved_plans: digests of the plans that may run.
        max_epsilon: largest epsilon of a training patient over the life of the cohort, all studies composed, at `max_delta`.
        max_holdout_epsilon: the same of a held-out patient, on whom generators are evaluated and never trained.
        max_delta: largest delta of a plan.
        min_patients: smallest number of training patients with which a module may train.
        declared_patients: the cohort size that the hospital makes public (rounded); plans must use this figure.
        modules: modules that may use the cohort, and whose noisy results may leave; ``"evaluation"`` uses held-out patients.
        allow_reproducible_noise: whether a seeded run, which is not private, may touch this cohort.
        allow_not_private: whether a study without privacy (``privacy.epsilon = inf``) may touch this cohort, whose patients
            are then unprotected for ever: for public or simulated data. `max_epsilon` does not bind such a study.
        countersign_releases: whether staff may sign, with this site's key, that a release may be made.
    """

    schema_version: Literal[1] = 1
    site: Name
    approved_plans: list[Digest] = Field(default=[])
    max_epsilon: Annotated[float, Field(ge=0)] = 0.0
    max_holdout_epsilon: Annotated[float, Field(ge=0)] = 0.0
    max_delta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    min_patients: Annotated[int, Field(ge=1)] = 100
    declared_patients: Annotated[int, Field(ge=1)] | None = None
    modules: list[Activity] = Field(default=[])
    allow_reproducible_noise: bool = False
    allow_not_private: bool = False
    countersign_releases: bool = False


def load_policy(path: Path) -> SitePolicy:
    """Read the policy.

    Raises:
        Refused: ``policy_missing``: without a policy nothing is allowed.
        UsageError: ``policy_not_toml`` or ``policy_invalid``.
    """
    try:
        return load_toml(path, SitePolicy, "policy")
    except UsageError as error:
        if error.code != "policy_missing":
            raise
        raise Refused(
            "policy_missing",
            f"There is no policy at {path}, so nothing is allowed.",
            "Write one with `fedsynth site init` and fill it in.",
        ) from None


def save_policy(policy: SitePolicy, path: Path) -> None:
    """Write `policy` as TOML, whole or not at all, since a runner may read it at any moment; owner and mode stay."""
    before = path.stat() if path.exists() else None
    write_atomic(path, tomli_w.dumps(policy.model_dump(mode="json", exclude_none=True)).encode())
    if before is not None:
        if os.geteuid() == 0:
            os.chown(path, before.st_uid, before.st_gid)
        path.chmod(before.st_mode & 0o777)


def check_plan(policy: SitePolicy, plan: StudyPlan) -> None:
    """Refuse a plan that the policy does not allow as a whole.

    Raises:
        Refused: with the first cause found: ``site_not_in_plan``, ``plan_not_approved``, ``not_private_not_allowed``,
            ``epsilon_above_policy``, ``delta_above_policy``, ``reproducible_noise_not_allowed``,
            ``declared_size_differs``.
    """
    sites = {site.name: site for site in plan.sites}
    if policy.site not in sites:
        raise Refused("site_not_in_plan", f"The plan does not name this site ({policy.site}).")
    if plan.digest not in policy.approved_plans:
        raise Refused(
            "plan_not_approved",
            f"The plan {plan.name!r} with digest {plan.digest} is not approved at this site.",
            "Read the plan; to approve it, add its digest to approved_plans in the policy.",
        )
    if not plan.privacy.private and not policy.allow_not_private:
        raise Refused(
            "not_private_not_allowed",
            "The plan is a study without privacy (epsilon infinite): what leaves this site would not be clipped or noised, "
            "and its patients would be unprotected.",
            "For patients whose data are confidential ask for a plan with a finite epsilon. Only for public or simulated "
            "data set allow_not_private = true.",
        )
    if plan.privacy.private and plan.privacy.epsilon > policy.max_epsilon:
        raise Refused(
            "epsilon_above_policy",
            f"The plan asks for epsilon {plan.privacy.epsilon:g}; the policy allows {policy.max_epsilon:g}.",
        )
    if plan.privacy.delta > policy.max_delta:
        raise Refused(
            "delta_above_policy",
            f"The plan asks for delta {plan.privacy.delta:g}; the policy allows {policy.max_delta:g}.",
        )
    if plan.privacy.reproducible_seed is not None and not policy.allow_reproducible_noise:
        raise Refused(
            "reproducible_noise_not_allowed",
            "The plan fixes the noise seed, which makes the run reproducible and therefore not private.",
            "Remove privacy.reproducible_seed from the plan.",
        )
    if policy.declared_patients is not None and sites[policy.site].nominal_patients != policy.declared_patients:
        raise Refused(
            "declared_size_differs",
            f"The plan assumes {sites[policy.site].nominal_patients} patients at this site; "
            f"the policy declares {policy.declared_patients}.",
            "Agree on one public figure; it sets the sample rate and so the cost of every step.",
        )


def check_module(policy: SitePolicy, module: Activity) -> None:
    """Refuse a module or evaluation that may not use the cohort, and whose stored results may not be sent either.

    Raises:
        Refused: ``module_not_allowed``.
    """
    if module not in policy.modules:
        raise Refused(
            "module_not_allowed", f"The policy does not list {module!r} among its modules.", f"Known: {ACTIVITIES}."
        )


def check_evaluation(policy: SitePolicy, plan: StudyPlan) -> None:
    """Refuse an evaluation that would cost held-out patients more than the policy allows; the rest of the plan may run.

    It is private in a study without privacy, too: held-out patients are other people.

    Raises:
        Refused: ``holdout_epsilon_above_policy``.
    """
    asked = 0.0 if plan.site_evaluation is None else plan.site_evaluation.epsilon
    if asked > policy.max_holdout_epsilon:
        raise Refused(
            "holdout_epsilon_above_policy",
            f"The plan's evaluation asks for epsilon {asked:g} of held-out patients; the policy allows "
            f"{policy.max_holdout_epsilon:g}.",
            "Allow it with max_holdout_epsilon, or let the study go on without this site's evaluation.",
        )


def check_patients(policy: SitePolicy, module: Activity, patients: int) -> None:
    """Refuse to train `module` on `patients` training patients.

    Raises:
        Refused: ``cohort_too_small``.
    """
    if patients < policy.min_patients:
        raise Refused(
            "cohort_too_small",
            f"{patients} training patients can take part in {module!r}; the policy wants at least {policy.min_patients}.",
        )


def lifetime_epsilon(policy: SitePolicy, plan: StudyPlan, population: Population) -> float:
    """Largest epsilon that a patient of `population` may have spent, all studies composed, after a block of `plan`.

    Infinite for training patients of a study without privacy that the policy allows; for every other study what such a
    study has spent stays above the limit for ever.
    """
    if population == "holdout":
        return policy.max_holdout_epsilon
    return math.inf if policy.allow_not_private and not plan.privacy.private else policy.max_epsilon
