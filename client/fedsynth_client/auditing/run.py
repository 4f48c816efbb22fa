"""The audit of a plan: every module's private computation, run once with canaries, and checks of its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

from fedsynth import __version__
from fedsynth.auditing.code import code_digest
from fedsynth.auditing.one_run import outcome, planned_guesses, reachable
from fedsynth.auditing.values import Audit, AuditedModule, MechanismCheck
from fedsynth.budget import charge, private_activities
from fedsynth.dp.accounting import epsilon
from fedsynth.dp.randomness import Randomness, SystemRandomness
from fedsynth.errors import UsageError
from fedsynth.plan import Activity, StudyPlan
from fedsynth.progress import say
from fedsynth_client.auditing.canaries import run_with_canaries, watched
from fedsynth_client.auditing.checks import (
    accountant_composes,
    clipping_binds,
    closed_list,
    noise_beside_patients,
    noise_is_fresh,
    noise_scale,
    patient_counts_once,
    progress_is_public,
    sampling_rate,
)
from fedsynth_client.auditing.preprocessing import preprocessing_is_apart
from fedsynth_client.auditing.standins import has_default_options
from fedsynth_client.auditing.wire import answers_are_as_charged, rounds_are_charged_and_closed

CONFIDENCE = 0.95
# How many canaries are tried in turn, until a broken mechanism could be told from what is claimed. The limits are
# memory (a statistic's canaries have a coordinate each) and time (a GAN's are images).
_CANARIES: dict[Activity, tuple[int, ...]] = {
    "moments": (1024, 2048, 4096, 6144),
    "autoencoder": (1024, 2048, 4096),
    "radiogenomics": (1024, 2048, 4096),
    "embedding": (1024, 2048, 4096, 6144),
    "gan": (512, 1024, 2048),
    "translation": (128, 256, 512),
    "evaluation": (1024, 2048, 4096, 6144),
}
_MARGIN = 1.02
_RELEASE = "the release of a noisy sum, with a coordinate for each canary"
_MODELS: dict[Activity, str] = {
    "moments": _RELEASE,
    "autoencoder": "a stand-in of hidden layer 4 with a gene for each canary; all rounds' weights seen, each round started "
    "from weights chosen for the auditor",
    "radiogenomics": "a stand-in of hidden layer 4 with a gene for each canary, without dropout; all rounds' weights seen, "
    "each round started from weights chosen for the auditor",
    "embedding": _RELEASE,
    "evaluation": _RELEASE,
    "gan": "a stand-in of width 4 on slices of 32 x 32, with the clipping norm as the unit; the discriminator seen, which "
    "never leaves a site, started from weights chosen for the auditor",
    "translation": "a stand-in of width 2 on slices of 32 x 32, with the clipping norm as the unit and steps of plain "
    "gradient descent; all four networks seen, each step started from the same weights",
}
# Of the GAN with any option that sets it apart from the default ones.
_CANARIES_OF_OPTIONS = _CANARIES["translation"]
_MODEL_OF_OPTIONS = (
    "a stand-in of width 4 on slices of 32 x 32 with the plan's architecture and losses, in the midst of growth, with the "
    "clipping norm as the unit and steps of plain gradient descent; both networks seen as far as they see patients, each "
    "step started from the same weights"
)


def audit_module(
    plan: StudyPlan,
    site: str,
    module: Activity,
    canaries: int | None = None,
    randomness: Randomness | None = None,
) -> AuditedModule:
    """Run `module` of `site` once with canaries.

    Args:
        plan: the plan.
        site: whose sample rate and noise are taken.
        module: one of the plan's modules, or its evaluation of held-out patients.
        canaries: how many; by default as many as it takes to be able to refute the claim, if the machine can.
        randomness: of coins, draws and noise; by default the operating system's, as at a site.
    """
    started = time.monotonic()
    source = SystemRandomness() if randomness is None else randomness
    block, rounds, delta = charge(plan, site, module).mechanism, plan.rounds(module), plan.privacy.delta
    whole = replace(block, steps=block.steps * rounds)
    claimed = epsilon([whole], delta, plan.privacy.accountant)
    options = module == "gan" and not has_default_options(plan.gan)
    sizes = _CANARIES_OF_OPTIONS if options else _CANARIES[module]
    count = _enough(sizes, claimed, delta) if canaries is None else canaries
    seen, seen_rounds = watched(plan, module, block, rounds)
    steps = seen.steps * seen_rounds
    guesses = planned_guesses(count, block.sample_rate, block.noise_multiplier, steps, delta, CONFIDENCE)
    members = (source.uniform(count) < 0.5).numpy()
    looks = run_with_canaries(plan, module, seen, seen_rounds, members, guesses, source)
    found = outcome(looks, members, delta, CONFIDENCE)
    return AuditedModule(
        module=module,
        site=site,
        claimed_epsilon=claimed,
        delta=delta,
        sample_rate=block.sample_rate,
        noise_multiplier=block.noise_multiplier,
        steps=whole.steps,
        canaries=count,
        guesses=found.guesses,
        correct=found.correct,
        confidence=CONFIDENCE,
        epsilon_bound=found.bound,
        reachable=found.reachable,
        looks=found.looks,
        model=(_MODEL_OF_OPTIONS if options else _MODELS[module])
        + ("" if steps == whole.steps else f"; the first {steps} of {whole.steps} steps"),
        seconds=time.monotonic() - started,
    )


def _enough(sizes: tuple[int, ...], claimed: float, delta: float) -> int:
    """The fewest canaries of `sizes` of which all, guessed right in one of two looks, refute `claimed`."""
    return next((m for m in sizes if reachable((m, m), m, delta, CONFIDENCE) > _MARGIN * claimed), sizes[-1])


def checks(plan: StudyPlan, site: str) -> list[MechanismCheck]:
    """Every check of the private mechanisms of `plan` at `site`, made on the code that a site runs."""
    of_module = (
        noise_scale,
        noise_beside_patients,
        noise_is_fresh,
        clipping_binds,
        patient_counts_once,
        sampling_rate,
        closed_list,
        progress_is_public,
    )
    found = [check(plan, site, module) for module in private_activities(plan) for check in of_module]
    if not plan.privacy.private:  # what is left are checks of what a private study charges and sends
        return found
    return [
        *found,
        accountant_composes(plan, site),
        rounds_are_charged_and_closed(plan, site),
        answers_are_as_charged(plan, site),
        preprocessing_is_apart(plan),
    ]


def audit_plan(
    plan: StudyPlan,
    site: str | None = None,
    randomness: Randomness | None = None,
    canaries: Mapping[Activity, int] | None = None,
) -> Audit:
    """Audit the mechanisms of `plan` as this installation would run them; no patient takes part.

    Args:
        plan: the plan.
        site: whose mechanisms; by default those of the site with the fewest declared patients, which are drawn most
            often.
        randomness: of the canaries' coins, draws and noise; by default the operating system's, as at a site. The checks
            take the operating system's in any case.
        canaries: how many for a module, in place of as many as it takes to be able to refute its claim.

    Raises:
        UsageError: ``site_not_in_plan``; ``nothing_to_audit``: a study without privacy has no private mechanism, unless
            sites evaluate on held-out patients, whose noise is audited then.
    """
    started = time.monotonic()
    if not private_activities(plan):
        raise UsageError(
            "nothing_to_audit",
            f"The plan {plan.name!r} is a study without privacy: nothing is clipped or noised, so nothing can be audited.",
            "The gate of its release asks for no audit.",
        )
    chosen = min(plan.sites, key=lambda each: each.nominal_patients).name if site is None else plan.site(site).name
    modules = []
    for module in private_activities(plan):
        say(f"Running {module} with canaries")
        modules.append(audit_module(plan, chosen, module, (canaries or {}).get(module), randomness))
    say("Checking the mechanisms")
    found = checks(plan, chosen)
    return Audit(
        plan_digest=plan.digest,
        code=code_digest(),
        software=f"fedsynth {__version__}, opacus {version('opacus')}, torch {version('torch')}",
        modules=modules,
        checks=found,
        seconds=time.monotonic() - started,
    )
