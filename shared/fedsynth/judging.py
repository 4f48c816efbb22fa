"""Attacks held against limits: what a release's gate and a site that countersigns both ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsynth.attacks.values import RELEASE_ATTACKS, Attacks, CopyCheck, MembershipAttack, OperatingPoint, View
from fedsynth.epsilons import shown
from fedsynth.limits import VIEWS, Limits

Status = Literal["ok", "failed", "not asked"]

_RATE = 0.01  # the false positive rate that is judged
# What an attacker of each view sees, in words.
SEES: Mapping[View, str] = {
    "release": "the release",
    "coordinator": "all messages of the training",
}


@dataclass(frozen=True)
class Judgement:
    """How a condition was met.

    Attributes:
        finding: what was measured and what the limit is, with numbers.
        remedy: what could be done, when it failed.
        refuted: it failed because something that is claimed was shown to be false; no override may cover that.
    """

    status: Status
    finding: str
    remedy: str = ""
    refuted: bool = False


def judge_membership(attacks: Attacks, limits: Limits, view: View, claimed: Mapping[str, float]) -> Judgement:
    """Whether guessing who was trained on, of all patients and from what `view` shows, stayed within `limits`.

    Args:
        claimed: the epsilon that each site claims for this study.
    """
    asked = limits.membership
    if view not in asked.views:
        return _not_asked(limits)
    tried = [attack for attack in attacks.membership if attack.view == view and not attack.of_selected]
    if not tried:
        return Judgement("failed", f"No attack was tried that sees {SEES[view]}.", _TRY_REMEDY)
    largest = _largest(tried)
    if largest < asked.least_patients:
        return Judgement(
            "failed",
            f"Attacks that see {SEES[view]} were tried on {largest} members, or as few others, at most; the limits ask for "
            f"{asked.least_patients} of each.",
            _TRY_REMEDY,
        )
    if view == "release" and (untried := _untried(tried)):
        return Judgement("failed", f"Nobody tried {', '.join(untried)} on {SEES[view]}.", _TRY_REMEDY)
    return _judged(tried, limits, view, claimed)


def judge_selected(attacks: Attacks, limits: Limits, claimed: Mapping[str, float]) -> Judgement:
    """The same of a release of a part of all patients, for those alone who fit what was selected.

    Args:
        claimed: the epsilon that each site claims for this study.
    """
    asked = limits.membership
    if not asks_for_selected(limits):
        return _not_asked(limits)
    tried = [attack for attack in attacks.membership if attack.of_selected]
    if not tried:
        return Judgement("failed", "No attack was tried on those alone who fit what was selected.", _PART_REMEDY)
    if _largest(tried) < asked.least_patients:
        return Judgement(
            "failed",
            "Attacks on those alone who fit what was selected had too few members or too few others; the limits ask for "
            f"{asked.least_patients} of each.",
            _PART_REMEDY,
        )
    if untried := _untried(tried):
        return Judgement(
            "failed", f"Nobody tried {', '.join(untried)} on those alone who fit what was selected.", _PART_REMEDY
        )
    return _judged(tried, limits, "release", claimed)


def asks_for_selected(limits: Limits) -> bool:
    """Whether those who fit what was selected must have been attacked by themselves."""
    return limits.membership.selected and "release" in limits.membership.views


def _largest(tried: Sequence[MembershipAttack]) -> int:
    """The most members, or others where these are fewer, that any of the attacks had."""
    return max(min(attack.members, attack.non_members) for attack in tried)


def _judged(tried: Sequence[MembershipAttack], limits: Limits, view: View, claimed: Mapping[str, float]) -> Judgement:
    """What was `tried`, at least one attack, held against the limits and what is claimed."""
    faults = [fault for attack in tried for fault in _faults(attack, limits)]
    refuting = [fault for attack in tried for fault in _refuting(attack, claimed)]
    if faults or refuting:
        return Judgement(
            "failed",
            "; ".join([*refuting, *faults]) + ".",
            _REFUTED_REMEDY if refuting else _LEAKS_REMEDY,
            refuted=bool(refuting),
        )
    worst = max(tried, key=lambda attack: attack.area.low)
    return Judgement(
        "ok",
        f"{len(tried)} attacks; the strongest ({worst.title}{_at(worst)}) has an area of {worst.area.value:.3f}, at least "
        f"{worst.area.low:.3f}; {_limit(limits.membership.area_of(view))}. None proves an epsilon above "
        f"{max(attack.epsilon_bound for attack in tried):.2f}; {shown(max(claimed.values(), default=0.0), 2)} is claimed.",
    )


_TRY_REMEDY = (
    "Run the attacks with more patients (all sites together) and, for the coordinator's view, with the messages of the "
    "training, where they were kept; or leave this view out of the limits, with a reason."
)
_PART_REMEDY = (
    "Run the attacks on this candidate, with its selection.json, and with more patients (all sites together); why they were "
    "not made stands under not_done in their report. Or select a larger part, or set membership.selected to false in the "
    "limits, with a reason: nobody has tried then whether those few can be told from others."
)
_LEAKS_REMEDY = (
    "Do not release these patients. Draw fewer or others, train with a smaller epsilon, or find what the model memorised; "
    "then attack again."
)
_REFUTED_REMEDY = (
    "Do not release: the epsilon of the privacy statement is wrong. Find out whether noise, clipping, sampling or "
    "accounting is not what the plan says, and train anew; what was spent stays in the ledgers."
)


def _untried(tried: Sequence[MembershipAttack]) -> list[str]:
    """The ways to attack a release that are missing: one that finds nothing speaks for itself alone."""
    return [name for name in RELEASE_ATTACKS if not any(attack.id.startswith(name) for attack in tried)]


def _limit(area: float) -> str:
    return f"the limit is {area:g}" if area < 1 else "for this view there is no limit but the epsilon that is claimed"


def _faults(attack: MembershipAttack, limits: Limits) -> list[str]:
    asked = limits.membership
    faults = []
    area = asked.area_of(attack.view)
    if attack.area.low > area:
        faults.append(
            f"{attack.title}{_at(attack)}: area {attack.area.value:.3f}, at least {attack.area.low:.3f}, which is "
            f"{attack.area.low - area:.3f} above the limit of {area:g}"
        )
    point = next((point for point in attack.points if point.asked == _RATE), None)
    if point is None:
        return [*faults, f"{attack.title}{_at(attack)}: it does not say what it finds at {_RATE:.0%} false positives"]
    limit, found = _rate_limit(point, asked.rate_of(attack.view)), point.true_positive_rate
    if found.low > limit:
        faults.append(
            f"{attack.title}{_at(attack)}: finds {found.value:.1%} of the members, at least {found.low:.1%}, at "
            f"{_RATE:.0%} false positives, which is {found.low - limit:.1%} above the limit of {limit:.1%}"
        )
    return faults


def _rate_limit(point: OperatingPoint, limit: float) -> float:
    """`limit`, or the false positive rate that the attack may truly have had where few non-members leave that open."""
    return max(limit, point.reached.high)


def _refuting(attack: MembershipAttack, claimed: Mapping[str, float]) -> list[str]:
    epsilon = claimed.get(attack.site, max(claimed.values(), default=0.0))
    if attack.epsilon_bound <= epsilon:
        return []
    return [
        f"{attack.title}{_at(attack)}: proves an epsilon of at least {attack.epsilon_bound:.2f}, "
        f"{attack.epsilon_bound - epsilon:.2f} above the {epsilon:.2f} that is claimed"
    ]


def _at(attack: MembershipAttack) -> str:
    return f", {attack.site}" if attack.site else ""


def judge_attributes(attacks: Attacks, limits: Limits) -> Judgement:
    """Whether members were guessed no better than others."""
    asked = limits.attributes
    if not asked.asked:
        return _not_asked(limits)
    if not attacks.attributes:
        return Judgement(
            "failed", "Attribute inference was not tried.", "Run the attacks again, or leave it out with a reason."
        )
    over = [attack for attack in attacks.attributes if attack.gap.low > asked.gap]
    if over:
        return Judgement(
            "failed",
            "; ".join(
                f"{attack.title}: {attack.metric} is {attack.gap.value:.3f} higher on members, at least "
                f"{attack.gap.low:.3f}, which is {attack.gap.low - asked.gap:.3f} above the limit of {asked.gap:g}"
                for attack in over
            )
            + ".",
            _LEAKS_REMEDY,
        )
    worst = max(attacks.attributes, key=lambda attack: attack.gap.low)
    return Judgement(
        "ok",
        f"{len(attacks.attributes)} attacks; the largest gap is {worst.gap.value:.3f} ({worst.title}, {worst.metric}), at "
        f"least {worst.gap.low:.3f}; the limit is {asked.gap:g}.",
    )


def judge_copies(attacks: Attacks, limits: Limits) -> Judgement:
    """Whether no more synthetic patients repeat those who were trained on than chance makes alike to held-out ones."""
    asked = limits.copies
    if not asked.asked:
        return _not_asked(limits)
    kinds = {check.of for check in attacks.copies}
    if missing := [kind for kind in ("images", "genes") if kind not in kinds]:
        return Judgement(
            "failed",
            f"Nobody looked for copies of {' and '.join(missing)}.",
            "Run the attacks again, or leave it out of the limits with a reason.",
        )
    if part := [check for check in attacks.copies if check.compared < attacks.n_synthetic]:
        return Judgement(
            "failed",
            "; ".join(
                f"{check.of}: only {check.compared} of {attacks.n_synthetic} synthetic patients were compared"
                for check in part
            )
            + ".",
            "Run the attacks again on all synthetic patients.",
        )
    over = [check for check in attacks.copies if check.found - check.found_holdout > asked.beyond_chance]
    if over:
        return Judgement(
            "failed",
            "; ".join(_copies(check) + f", the limit is {asked.beyond_chance} more" for check in over) + ".",
            "Look at the pairs named in the attack report. Remove what repeats a person and find out why the model could "
            "learn it (a patient who is there twice, a batch too small); then draw and attack again.",
        )
    return Judgement("ok", "; ".join(_copies(check) for check in attacks.copies) + ".")


def _copies(check: CopyCheck) -> str:
    return (
        f"{check.of}: {check.found} of {check.compared} synthetic patients repeat one who was trained on, "
        f"{check.found_holdout} a held-out one"
    )


def _not_asked(limits: Limits) -> Judgement:
    return Judgement("not asked", f"The limits do not ask for it: {limits.reason}")


def judge(
    attacks: Attacks, limits: Limits, views: Collection[View], claimed: Mapping[str, float], *, selected: bool
) -> list[Judgement]:
    """All judgements of `attacks` that saw `views`, for whoever wants to know whether everything holds.

    Args:
        selected: judge those on patients who fit what was selected, too.
    """
    seen = [judge_membership(attacks, limits, view, claimed) for view in VIEWS if view in views]
    if selected:
        seen.append(judge_selected(attacks, limits, claimed))
    return [*seen, judge_attributes(attacks, limits), judge_copies(attacks, limits)]
