"""The privacy statement of a study, from its plan and the receipts of the sites' ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from fedsynth.budget import evaluation_mechanism, mechanism
from fedsynth.dp.accounting import Accountant, epsilon
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.errors import Refused
from fedsynth.marks import marks
from fedsynth.plan import Module, SiteEvaluationPlan, StudyPlan
from fedsynth.statement import HoldoutStatement, Mechanism, PrivacyStatement, SiteStatement
from fedsynth_server.checkpoint import Receipt, StudyState

_TRUST = (
    "Each hospital trusts its own machines. The coordinator is honest-but-curious: it sees every site's noisy weights "
    "and sums, and the epsilon of a site holds against it as well as against recipients. Sites need not trust each other."
)
_NO_TRUST = (
    "Whoever receives what a site sent is trusted with its patients: nothing of theirs was clipped or noised. The "
    "coordinator sees every site's exact weights and sums. Nothing is claimed against those who receive what was made from "
    "them, either."
)
_NO_COMPOSITION = (
    "Nothing composes to a finite epsilon: whatever else they take part in, the epsilon of these training patients is "
    "infinite from this study on."
)
_NOTHING_COVERED = (
    "everything about the training patients: without noise there is no guarantee that could cover anything"
)
_NO_NOISE = "none: a study without privacy"
_COMPOSITION = (
    "Disjoint patients at several sites compose in parallel: a patient's epsilon is that of the patient's own site. A "
    "patient who is treated at two sites of the study has at most the sum of both epsilons, at the sum of both deltas. "
    "Later releases from the same cohorts add to the lifetime epsilon, which each site's ledger keeps."
)
_HOLDOUT = (
    " Held-out patients are other people than training patients: a site's evaluation of the finished generator costs them "
    "alone, and costs training patients nothing. Where nothing is stated of a site's held-out patients, no evaluation of "
    "theirs was received; one that was charged and lost on the way cost them at most the budget of held-out patients."
)
_NOT_COVERED = [
    "the choice of panel, sequences, architectures and hyper-parameters, made on public or simulated data",
    "the declared (rounded) cohort sizes, which sites and modules took part, and the times of their messages",
    "how long a site takes to answer, and whether its cohort is above the smallest size that its policy allows",
    "floating-point effects of the noise generator (Mironov 2012)",
    "what a recipient infers about everybody from correlations that hold in the population",
]
_ACCOUNTANTS: dict[Accountant, tuple[str, str]] = {  # what composes, and the package that holds its formulas
    "rdp": ("Renyi DP of the sampled Gaussian mechanism", "fedsynth"),
    "prv": ("privacy random variables of the sampled Gaussian mechanism", "opacus"),
}
# Where a site may countersign (`fedsynth.countersignature`).
_COUNTERSIGNED = (
    "whether a site countersigned this release, and which attacks with its own patients it says stayed within the limits: a "
    "yes of people who have seen their patients' data"
)
_ONE_DIRECTION = (
    "a proof that adding a patient costs no more than removing one: the PRV accountant composes the direction of removal, "
    "and that addition costs less is checked numerically"
)


def check_receipts(plan: StudyPlan, site: str, by_module: Mapping[Module, Receipt]) -> Receipt:
    """Refuse receipts of a site that contradict the plan or themselves, since nothing could be released with them.

    Returns:
        The newest receipt.

    Raises:
        Refused: ``epsilon_above_plan``: the newest is above the budget. ``steps_above_plan``: one states more steps than the
            plan has. ``epsilon_below_charges``: the newest states less than the steps that were released must have cost.
    """
    newest = max(by_module.values(), key=lambda receipt: receipt.order)
    if newest.epsilon > plan.privacy.epsilon + 1e-6:
        raise Refused(
            "epsilon_above_plan",
            f"Site {site} states epsilon {newest.epsilon:.4f}, above the plan's {plan.privacy.epsilon:g}.",
        )
    if any(receipt.steps > plan.training(module).steps for module, receipt in by_module.items()):
        raise Refused("steps_above_plan", f"Site {site} states more steps than the plan has.")
    history = [mechanism(plan, site, module, steps=receipt.steps) for module, receipt in by_module.items()]
    least = epsilon(history, plan.privacy.delta, plan.privacy.accountant)
    if newest.epsilon < least - 1e-6:
        raise Refused(
            "epsilon_below_charges",
            f"Site {site} states epsilon {newest.epsilon:.4f}, but the steps that it released cost {least:.4f}.",
            "Its ledger has lost entries; ask the site.",
        )
    return newest


def check_holdout_receipt(plan: StudyPlan, site: str, receipt: Receipt) -> None:
    """Refuse a receipt of an evaluation that contradicts the plan.

    Raises:
        Refused: ``epsilon_above_plan``: held-out patients have spent more than the plan allows. ``steps_above_plan``: more
            than one sum. ``epsilon_below_charges``: less than that sum must have cost.
    """
    budget = 0.0 if plan.site_evaluation is None else plan.site_evaluation.epsilon
    if receipt.epsilon > budget + 1e-6:
        raise Refused(
            "epsilon_above_plan",
            f"Site {site} states epsilon {receipt.epsilon:.4f} of held-out patients, above the plan's {budget:g}.",
        )
    if receipt.steps != 1:
        raise Refused("steps_above_plan", f"Site {site} states more sums over held-out patients than the plan has.")
    least = epsilon([evaluation_mechanism(plan)], plan.privacy.delta, plan.privacy.accountant)
    if receipt.epsilon < least - 1e-6:
        raise Refused(
            "epsilon_below_charges",
            f"Site {site} states epsilon {receipt.epsilon:.4f} of held-out patients, but its sum cost {least:.4f}.",
            "Its ledger has lost entries; ask the site.",
        )


def _holdout(plan: StudyPlan, state: StudyState, site: str) -> HoldoutStatement | None:
    receipt = None if state.evaluated is None else state.evaluated.receipts.get(site)
    if receipt is None:
        return None
    check_holdout_receipt(plan, site, receipt)
    return HoldoutStatement(
        epsilon=receipt.epsilon,
        epsilon_lifetime=receipt.epsilon_lifetime,
        noise_multiplier=evaluation_mechanism(plan).noise_multiplier,
        max_grad_norm=SiteEvaluationPlan.max_grad_norm,
    )


def privacy_statement(plan: StudyPlan, state: StudyState) -> PrivacyStatement:
    """What the sites spent on the study, as their receipts say, checked against what the plan allows.

    Raises:
        Refused: ``receipts_missing``: no site has sent one; and as `check_receipts`.
    """
    if not state.receipts:
        raise Refused("receipts_missing", "No site has taken part in this study yet, so there is nothing to release.")
    sites = []
    for name, by_module in sorted(state.receipts.items()):
        mechanisms = []
        for module, receipt in by_module.items():
            charged = mechanism(plan, name, module, steps=receipt.steps)
            mechanisms.append(
                Mechanism(
                    module=module,
                    sample_rate=charged.sample_rate,
                    noise_multiplier=charged.noise_multiplier,
                    max_grad_norm=plan.training(module).max_grad_norm,
                    steps=charged.steps,
                    steps_planned=plan.training(module).steps,
                    epsilon_alone=epsilon([charged], plan.privacy.delta, plan.privacy.accountant),
                )
            )
        newest, last = check_receipts(plan, name, by_module), state.newest_receipt(name)
        sites.append(
            SiteStatement(
                name=name,
                nominal_patients=plan.site(name).nominal_patients,
                epsilon=newest.epsilon,
                epsilon_lifetime=newest.epsilon_lifetime,
                ledger_head=newest.head if last is None else last.head,
                mechanisms=mechanisms,
                holdout=_holdout(plan, state, name),
            )
        )
    receipts = [receipt for by_module in state.receipts.values() for receipt in by_module.values()]
    receipts += [] if state.evaluated is None else state.evaluated.receipts.values()
    private = not marks(plan.privacy) and all(receipt.private for receipt in receipts)
    composition = _COMPOSITION if plan.privacy.private else _NO_COMPOSITION
    accountant, package = _ACCOUNTANTS[plan.privacy.accountant]
    return PrivacyStatement(
        study=plan.name,
        plan_digest=plan.digest,
        private=private,
        epsilon_budget=plan.privacy.epsilon,
        holdout_epsilon_budget=None if plan.site_evaluation is None else plan.site_evaluation.epsilon,
        delta=plan.privacy.delta,
        accountant=accountant,
        accountant_version=f"{package} {version(package)}",
        noise_source=_noise_source(plan, private),
        sites=sites,
        trust_model=_TRUST if plan.privacy.private else _NO_TRUST,
        composition=composition if plan.site_evaluation is None else composition + _HOLDOUT,
        not_covered=_not_covered(plan),
        intended_use="Developing and teaching methods for paired imaging and expression data; software tests.",
        forbidden_use="Diagnosis or treatment of anyone; attempts to single out or to re-identify a person.",
    )


def _noise_source(plan: StudyPlan, private: bool) -> str:
    """Where noise came from; of a study without privacy the only noise there can be is that of the sites' evaluation."""
    if plan.privacy.private:
        return SystemRandomness.description if private else SeededRandomness.description
    if plan.site_evaluation is None:
        return _NO_NOISE
    source = SystemRandomness if plan.privacy.reproducible_seed is None else SeededRandomness
    return f"{_NO_NOISE}; of the sums over held-out patients alone: {source.description}"


def _not_covered(plan: StudyPlan) -> list[str]:
    listed = [] if plan.privacy.private else [_NOTHING_COVERED]
    listed += _NOT_COVERED
    if any(site.countersign_key for site in plan.sites):
        listed.append(_COUNTERSIGNED)
    if plan.privacy.accountant == "prv":
        listed.append(_ONE_DIRECTION)
    return listed
