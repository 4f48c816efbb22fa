"""Evidence in plain sentences: what attacks, audit and gate found, and what they could not have found.

Every sentence is made of the numbers beside it. A difference counts only when its whole interval shows it, and that
nothing was found is never called proof that there is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedsynth.attacks.values import AttributeAttack, CopyCheck, Distances, MembershipAttack, Rate
from fedsynth.auditing.values import Audit, AuditedModule
from fedsynth.evaluation.site_values import NoisyScore
from fedsynth_server.release.decision import GateDecision
from fedsynth_server.release.wording import epsilon, fixed, number, percent

State = Literal["good", "open", "bad"]

VIEWS = {"release": "the release", "coordinator": "every message of the training"}


@dataclass(frozen=True)
class Finding:
    """A finding in a sentence or two, and whether it speaks for the release, against it, or for neither."""

    state: State
    sentence: str


def permitted_rate(false_positive_rate: float, claimed: float, delta: float) -> float:
    """Largest true positive rate that (epsilon, delta)-differential privacy leaves any attacker at a false positive rate.

    The smaller of ``e^epsilon * FPR + delta`` and ``1 - e^-epsilon * (1 - delta - FPR)``, which bounds the same trade-off
    from its other side (Kairouz, Oh and Viswanath, ICML 2015).

    >>> permitted_rate(0.01, 1.0, 0.0), permitted_rate(0.5, 1.0, 0.0)
    (0.027182818284590453, 0.8160602794142788)
    """
    if math.isinf(claimed):  # without privacy nothing is ruled out, whatever delta
        return 1.0
    first = math.exp(min(claimed, 700.0)) * false_positive_rate + delta
    second = 1.0 - math.exp(-claimed) * (1.0 - delta - false_positive_rate)
    return max(0.0, min(1.0, first, second))


def permitted_area(claimed: float, delta: float) -> float:
    """Largest area under the ROC curve that (epsilon, delta)-differential privacy leaves any attacker.

    The area under the curve of `permitted_rate`; without delta it is ``e^epsilon / (1 + e^epsilon)``.
    """
    if claimed > 700.0:  # beyond what a floating-point number tells from 1
        return 1.0
    odds = math.exp(-claimed)
    # Both bounds are straight lines; the curve is concave, so the corners alone give its area.
    meet = (1.0 - delta) * odds / (1.0 + odds)
    height = min(1.0, delta + math.exp(min(claimed, 700.0)) * meet)
    full = min(1.0, 1.0 - delta)  # from here on nothing is forbidden
    low = 0.5 * meet * (min(1.0, delta) + height)
    return min(1.0, low + 0.5 * max(0.0, full - meet) * (height + 1.0) + (1.0 - full))


def rate(value: Rate, decimals: int = 2) -> str:
    """``0.52 (0.48 to 0.56)``."""
    return f"{fixed(value.value, decimals)} ({fixed(value.low, decimals)} to {fixed(value.high, decimals)})"


def area(found: Rate) -> Finding:
    """What an area under the ROC curve says of an attacker.

    >>> area(Rate(value=0.52, low=0.48, high=0.56)).sentence
    'No better than guessing: 0.5 lies within the interval, and more than 0.56 is ruled out.'
    """
    if found.low > 0.55:
        strength = "Far better" if found.value >= 0.8 else "Better"
        return Finding("bad", f"{strength} than guessing: the whole interval lies above 0.55.")
    if found.low > 0.5:
        return Finding(
            "open",
            "Barely better than guessing: the interval lies just above 0.5, as one in forty does where there is nothing to "
            "find.",
        )
    if found.high < 0.5:
        return Finding("open", "Worse than guessing: this attack points the wrong way, and found nobody out.")
    if found.high >= 0.65:
        return Finding(
            "open",
            f"No better than guessing as far as it can be told: up to {fixed(found.high, 2)} is not ruled out with so few "
            "patients.",
        )
    return Finding(
        "good",
        f"No better than guessing: 0.5 lies within the interval, and more than {fixed(found.high, 2)} is ruled out.",
    )


def membership(attack: MembershipAttack, claimed: float) -> Finding:
    """What one attack says of the claimed epsilon of the patients whom it attacked."""
    guessing = area(attack.area)
    if attack.epsilon_bound > claimed:
        return Finding(
            "bad",
            f"The claim is refuted: this attack alone proves an epsilon of at least {number(attack.epsilon_bound)}, more "
            f"than the {epsilon(claimed)} that is claimed.",
        )
    if attack.epsilon_bound > 0:
        within = (
            f"It proves an epsilon of at least {number(attack.epsilon_bound)}, within the claim of {epsilon(claimed)}."
        )
        return Finding(guessing.state, f"{guessing.sentence} {within}")
    return guessing


def resolution(attacks: Sequence[MembershipAttack]) -> str:
    """What so few non-members cannot show, where a false positive rate was asked for that they cannot resolve."""
    few = [attack.non_members for attack in attacks if any(point.reached.value == 0 for point in attack.points)]
    if not few:
        return ""
    count = f"{min(few)}" if min(few) == max(few) else f"{min(few)} to {max(few)}"
    return (
        f"With {count} non-members the smallest false positive rate above 0 is {100 / max(few):.2g} %. Where a smaller one "
        "was asked for, the rate reached is 0: the threshold lies above every non-member."
    )


def power(attacks: Sequence[MembershipAttack], claimed: float) -> str:
    """Whether a perfect attack could have refuted the claim with as many patients; empty where nobody computed that."""
    bounds = [attack.largest_bound for attack in attacks if attack.largest_bound is not None]
    if not bounds or max(bounds) > claimed:
        return ""
    return (
        f"With so few patients even a perfect attack would prove an epsilon of {number(max(bounds))} at most, so none could "
        f"have refuted the claim of {epsilon(claimed)}."
    )


def attribute(attack: AttributeAttack) -> Finding:
    """Whether those who were trained on are guessed better than others."""
    if attack.gap.low > 0:
        return Finding("bad", "Patients who were trained on are guessed better than others: their taking part shows.")
    told = "Patients who were trained on are guessed no better than others, so what is guessed holds in the population"
    if attack.baseline is not None and max(attack.members, attack.non_members) > attack.baseline:
        return Finding("good", f"{told}. With the release a guess is better than without: that is what data are for.")
    return Finding("good", f"{told}.")


def copies(check: CopyCheck) -> Finding:
    """Whether synthetic patients repeat real ones."""
    if check.found == 0:
        return Finding("good", f"None of {check.compared} synthetic patients is as like a training patient as a copy.")
    chance = (
        f"{check.found_holdout} are as like a held-out patient, whom nobody can have copied: that is what chance does."
    )
    found = f"{check.found} of {check.compared} synthetic patients are as like a training patient as a copy would be"
    return Finding("bad" if check.found > check.found_holdout else "open", f"{found}; {chance}")


def distances(found: Distances) -> Finding:
    """A sanity check in its own words: it can look bad, it can never look safe."""
    share = (
        f"{percent(found.nearer.value)} of synthetic patients lie nearer to a training patient than to a held-out one"
    )
    if found.nearer.low > 0.5:
        return Finding("bad", f"{share}, more than the half that chance gives.")
    return Finding("open", f"{share}; chance gives half. That shows nothing wrong, and proves nothing either.")


def audited(module: AuditedModule) -> Finding:
    """What the canaries say of a module's claimed epsilon, and what they could have said."""
    confidence = f"with {percent(module.confidence)} confidence"
    if not module.ok:
        return Finding(
            "bad",
            f"The claim is refuted: {confidence} epsilon is at least {number(module.epsilon_bound)}, more than the "
            f"{epsilon(module.claimed_epsilon)} that is claimed. The mechanism does not do what its accountant assumes.",
        )
    found = (
        f"The canaries prove, {confidence}, an epsilon of at least {number(module.epsilon_bound)}; "
        f"{epsilon(module.claimed_epsilon)} is claimed"
        if module.epsilon_bound > 0
        else f"The canaries prove nothing against the claim of {epsilon(module.claimed_epsilon)}"
    )
    if module.reachable <= module.claimed_epsilon:
        return Finding(
            "open",
            f"{found}. This audit was too small to refute it: had every guess been right, it would have shown "
            f"{number(module.reachable)}.",
        )
    return Finding(
        "good", f"{found}. Had every guess been right, the audit would have shown {number(module.reachable)}."
    )


def audit(found: Audit) -> Finding:
    """The audit as a whole, in a sentence."""
    failed = [module.module for module in found.modules if not module.ok]
    broken = [check.title for check in found.checks if not check.ok]
    if failed or broken:
        return Finding("bad", f"The audit refutes what is claimed: {'; '.join([*failed, *broken])}.")
    parts = []
    if found.modules:
        parts.append(f"no claimed epsilon was refuted in {_count(len(found.modules), 'audited mechanism')}")
    if found.checks:
        parts.append(f"{_count(len(found.checks), 'direct check')} of noise, clipping, sampling and accounting held")
    if not parts:
        return Finding("open", "The audit holds no result.")
    return Finding("good", f"{', and '.join(parts)}.".capitalize())


def strongest(attacks: Sequence[MembershipAttack]) -> MembershipAttack | None:
    """The attack whose area is surely largest: by the lower end of the interval, then by the value."""
    return max(attacks, key=lambda attack: (attack.area.low, attack.area.value), default=None)


def gate(decision: GateDecision | None) -> Finding:
    """What was decided about the release."""
    if decision is None:
        return Finding("open", "No decision of a gate is recorded: nobody checked this release against limits.")
    failed = len(decision.failed)
    passed = sum(check.status == "ok" for check in decision.checks)
    unasked = sum(check.status == "not asked" for check in decision.checks)
    rest = f" {_count(unasked, 'check')} {'was' if unasked == 1 else 'were'} not asked for." if unasked else ""
    if decision.override is not None:
        return Finding(
            "bad",
            f"Released although {_count(failed or len(decision.override.failed), 'check')} failed: somebody signed for it.",
        )
    if failed:
        return Finding("bad", f"{_count(failed, 'check')} failed; this release should not exist.")
    return Finding("good", f"All {passed} checks that were asked for held.{rest}")


def noisy_score(score: NoisyScore) -> Finding:
    """What a site's noisy score says."""
    if score.value is None or score.interval is None or score.drowned:
        return Finding("open", "The noise leaves nothing to say.")
    if score.gain is None:
        return Finding("open", "There is no floor to compare it with.")
    if score.gain[0] > 0:
        return Finding("good", "Above its floor, the noise allowed for.")
    if score.gain[1] < 0:
        return Finding("bad", "Below its floor, the noise allowed for.")
    return Finding("open", "Not told apart from its floor.")


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}{'' if number_of == 1 else 's'}"
