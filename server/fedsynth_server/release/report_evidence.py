"""The report's evidence: gate, attacks, audit and the sites' own evaluation, every cell as text beside its chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from fedsynth.attacks.values import Attacks, AttributeAttack, CopyCheck, Distances, MembershipAttack, Rate, View
from fedsynth.auditing.values import Audit, AuditedModule, MechanismCheck
from fedsynth.evaluation.site_values import NoisyScore, SiteEvaluation
from fedsynth.statement import PrivacyStatement
from fedsynth_server.release import report_wording as words
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Mark, span_chart
from fedsynth_server.release.decision import GateDecision

_AREA_SCALE = (0.4, 1.0)
_VIEW_TITLES: dict[View, tuple[str, str]] = {
    "release": ("By whoever holds the release", "Whoever holds the release"),
    "coordinator": (
        "By a coordinator who kept every message of the training",
        "A coordinator who kept every message of the training",
    ),
}


@dataclass(frozen=True)
class PointView:
    """True positive rate at one false positive rate, and the most that the claimed epsilon leaves any attacker."""

    asked: str
    reached: str
    found: str
    interval: str
    permitted: str
    beyond: bool


@dataclass(frozen=True)
class MembershipView:
    """One membership attack."""

    attack: MembershipAttack
    area: str
    interval: str
    permitted_area: str
    points: list[PointView]
    bound: str
    claimed: str
    finding: words.Finding
    chart: Markup


@dataclass(frozen=True)
class ViewedFrom:
    """The membership attacks of one view: over all sites first, then by site; and the strongest of them.

    Attributes:
        who: the attacker in words, at the beginning of a sentence.
    """

    title: str
    who: str
    strongest: MembershipView
    together: list[MembershipView]
    by_site: list[MembershipView]
    resolution: str


@dataclass(frozen=True)
class AttributeView:
    """One attribute attack."""

    attack: AttributeAttack
    members: str
    non_members: str
    baseline: str
    gap: str
    finding: words.Finding


@dataclass(frozen=True)
class CopyView:
    """One search for copies."""

    check: CopyCheck
    threshold: str
    most_similar: tuple[str, str]
    finding: words.Finding


@dataclass(frozen=True)
class DistanceView:
    """Nearest-neighbour distances."""

    distances: Distances
    training: tuple[str, ...]
    holdout: tuple[str, ...]
    nearer: str
    finding: words.Finding


@dataclass(frozen=True)
class AttacksView:
    """All attacks.

    Attributes:
        refuted: an attack proves more than was claimed.
        claim_is_loose: the claimed epsilon permits an area above 0.99, so no failing attack could be due to it.
        power: whether so few patients could have refuted the claim at all.
    """

    attacks: Attacks
    views: list[ViewedFrom]
    attributes: list[AttributeView]
    copies: list[CopyView]
    distances: list[DistanceView]
    refuted: bool
    claim_is_loose: bool
    power: str


@dataclass(frozen=True)
class AuditedView:
    """One audited mechanism."""

    module: AuditedModule
    claimed: str
    bound: str
    reachable: str
    guesses: str
    confidence: str
    finding: words.Finding
    chart: Markup


@dataclass(frozen=True)
class AuditView:
    """The audit: what is claimed beside what was proven, and the direct checks."""

    audit: Audit
    finding: words.Finding
    modules: list[AuditedView]
    checks: list[MechanismCheck]
    minutes: str


@dataclass(frozen=True)
class ScoreView:
    """One noisy score."""

    title: str
    meaning: str
    floor_meaning: str
    value: str
    interval: str
    floor: str
    gain: str
    patients: str
    finding: words.Finding
    chart: Markup


@dataclass(frozen=True)
class SiteScoresView:
    """The noisy scores of one site, or of all together."""

    name: str
    epsilon: str
    epsilon_lifetime: str
    scores: list[ScoreView]


@dataclass(frozen=True)
class SiteEvaluationView:
    """What sites found on their own held-out patients."""

    evaluation: SiteEvaluation
    groups: list[SiteScoresView]


@dataclass(frozen=True)
class GateView:
    """The decision."""

    decision: GateDecision
    finding: words.Finding


def gate(decision: GateDecision | None) -> GateView | None:
    """The gate's decision, if there was one."""
    return None if decision is None else GateView(decision, words.gate(decision))


def attacks(found: Attacks, statement: PrivacyStatement) -> AttacksView:
    """The attacks beside what `statement` claims of the patients whom they attacked."""
    claims = {site.name: site.epsilon for site in statement.sites}
    rows = [
        (attack, _membership(attack, claims, statement.delta, f"attack-{place}"))
        for place, attack in enumerate(found.membership)
    ]
    views = []
    for view, (title, who) in _VIEW_TITLES.items():
        own = [row for attack, row in rows if attack.view == view]
        if own:
            together = [row for row in own if not row.attack.site]
            by_site = [row for row in own if row.attack.site]
            best = words.strongest([row.attack for row in own])
            strongest = next(row for row in own if row.attack is best)
            resolution = words.resolution([row.attack for row in own])
            views.append(ViewedFrom(title, who, strongest, together, by_site, resolution))
    return AttacksView(
        attacks=found,
        views=views,
        attributes=[_attribute(attack) for attack in found.attributes],
        copies=[
            CopyView(
                check,
                wording.number(check.threshold),
                (wording.number(check.most_similar[0]), wording.number(check.most_similar[1])),
                words.copies(check),
            )
            for check in found.copies
        ],
        distances=[
            DistanceView(
                each,
                tuple(map(wording.number, each.training)),
                tuple(map(wording.number, each.holdout)),
                _percents(each.nearer),
                words.distances(each),
            )
            for each in found.distances
        ],
        refuted=any(attack.epsilon_bound > _claim(attack, claims) for attack in found.membership),
        claim_is_loose=words.permitted_area(max(claims.values()), statement.delta) > 0.99,
        power=words.power(found.membership, max(claims.values())),
    )


def audit(found: Audit) -> AuditView:
    """The audit's view."""
    top = max((max(each.claimed_epsilon, each.reachable, each.epsilon_bound) for each in found.modules), default=1.0)
    return AuditView(
        audit=found,
        finding=words.audit(found),
        modules=[_audited(module, top, f"audit-{place}") for place, module in enumerate(found.modules)],
        checks=found.checks,
        minutes=wording.number(found.seconds / 60, 2),
    )


def site_evaluation(found: SiteEvaluation) -> SiteEvaluationView:
    """The sites' scores, all together first."""
    groups = []
    if found.pooled:
        scores = [_score(score, found, f"sites-all-{place}") for place, score in enumerate(found.pooled)]
        groups.append(SiteScoresView("All sites together", "", "", scores))
    for number, site in enumerate(found.sites):
        scores = [_score(score, found, f"sites-{number}-{place}") for place, score in enumerate(site.scores)]
        spent = wording.epsilon(site.epsilon), wording.epsilon(site.epsilon_lifetime)
        groups.append(SiteScoresView(site.site, *spent, scores))
    return SiteEvaluationView(found, groups)


def _claim(attack: MembershipAttack, claims: Mapping[str, float]) -> float:
    """What is claimed of the attacked patients: their site's epsilon, or the largest of all sites."""
    return claims.get(attack.site, max(claims.values()))


def _membership(attack: MembershipAttack, claims: Mapping[str, float], delta: float, identifier: str) -> MembershipView:
    claimed = _claim(attack, claims)
    most = words.permitted_area(claimed, delta)
    marks = (
        Mark(0.5, "chance", "0.5: guessing"),
        Mark(most, "claim", f"{wording.fixed(most, 3)}: the most that the claimed epsilon permits"),
    )
    points = []
    for point in attack.points:
        # The true false positive rate may be as high as its interval ends; the claim is held against that.
        permitted = words.permitted_rate(min(1.0, point.reached.high), claimed, delta)
        points.append(
            PointView(
                asked=_percent(point.asked),
                reached=_percents(point.reached),
                found=_percent(point.true_positive_rate.value),
                interval=_percent_ends(point.true_positive_rate),
                permitted="nearly all" if permitted > 0.9995 else _percent(permitted),
                beyond=point.true_positive_rate.low > permitted,
            )
        )
    return MembershipView(
        attack=attack,
        area=wording.fixed(attack.area.value, 2),
        interval=_ends((attack.area.low, attack.area.high)),
        permitted_area="nearly 1" if most > 0.9995 else wording.fixed(most, 3),
        points=points,
        bound=wording.number(attack.epsilon_bound),
        claimed=wording.epsilon(claimed),
        finding=words.membership(attack, claimed),
        chart=span_chart(
            attack.area.value,
            (attack.area.low, attack.area.high),
            _AREA_SCALE,
            marks,
            f"area {words.rate(attack.area)} between 0.5, guessing, and {wording.fixed(most, 3)}, permitted",
            identifier,
        ),
    )


def _attribute(attack: AttributeAttack) -> AttributeView:
    return AttributeView(
        attack=attack,
        members=wording.number(attack.members),
        non_members=wording.number(attack.non_members),
        baseline="–" if attack.baseline is None else wording.number(attack.baseline),
        gap=words.rate(attack.gap, 3),
        finding=words.attribute(attack),
    )


def _audited(module: AuditedModule, top: float, identifier: str) -> AuditedView:
    marks = (
        Mark(module.reachable, "reach", f"{wording.number(module.reachable)}: had every guess been right"),
        Mark(module.claimed_epsilon, "claim", f"{wording.epsilon(module.claimed_epsilon)}: claimed"),
    )
    title = f"at least {wording.number(module.epsilon_bound)} of {wording.epsilon(module.claimed_epsilon)} claimed"
    return AuditedView(
        module=module,
        claimed=wording.epsilon(module.claimed_epsilon),
        bound=wording.number(module.epsilon_bound),
        reachable=wording.number(module.reachable),
        guesses=f"{module.correct} of {module.guesses}",
        confidence=wording.percent(module.confidence),
        finding=words.audited(module),
        chart=span_chart(module.epsilon_bound, (0.0, module.epsilon_bound), (0.0, top), marks, title, identifier),
    )


def _score(score: NoisyScore, found: SiteEvaluation, identifier: str) -> ScoreView:
    meaning = found.meaning(score.name)
    chart = Markup("")
    if score.value is not None:
        marks = () if score.floor is None else (Mark(score.floor, "chance", f"floor {wording.fixed(score.floor, 2)}"),)
        title = f"{meaning.title}: {wording.fixed(score.value, 2)}"
        chart = span_chart(score.value, score.interval, (0.0, 1.0), marks, title, identifier)
    return ScoreView(
        title=meaning.title,
        meaning=meaning.meaning,
        floor_meaning=meaning.floor,
        value="–" if score.value is None else wording.fixed(score.value, 2),
        interval=_ends(score.interval),
        floor="–" if score.floor is None else wording.fixed(score.floor, 2),
        gain=_ends(score.gain),
        patients=wording.fixed(score.patients, 0),
        finding=words.noisy_score(score),
        chart=chart,
    )


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{wording.fixed(interval[0], 2)} to {wording.fixed(interval[1], 2)}"


def _percents(rate: Rate) -> str:
    return f"{_percent(rate.value)} ({_percent_ends(rate)})"


def _percent_ends(rate: Rate) -> str:
    return f"{100 * rate.low:.3g} to {_percent(rate.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"
