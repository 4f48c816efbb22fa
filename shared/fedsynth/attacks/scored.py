"""What every membership attack hands over: scores of members and non-members, and what the attacker knew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsynth.attacks.rates import ASKED, epsilon_bound, largest_epsilon_bound, operating_point, roc_area
from fedsynth.attacks.values import MembershipAttack, View
from fedsynth.metrics.measurable import NotMeasurable

T = TypeVar("T")
# What is attempted, for the reader, and how.
Attempt = tuple[str, Callable[[], list[T]]]


@dataclass(frozen=True)
class Scored:
    """Scores of one attack; larger means "member".

    Attributes:
        members: (N,).
        others: (M,) non-members.
        site: whose patients these are; empty for all sites.
        proves: whether the scores can prove anything of epsilon: not where they were made knowing who else is a member
            (`fedsynth.attacks.rates.epsilon_bound`).
    """

    id: str
    title: str
    view: View
    knows: str
    source: str
    members: NDArray[np.floating]
    others: NDArray[np.floating]
    site: str = ""
    note: str = ""
    proves: bool = True


def measured(scored: Scored, delta: float, rng: np.random.Generator, attacks: int) -> MembershipAttack:
    """The attack's rates with their intervals, one of so many `attacks`.

    Raises:
        NotMeasurable: too few members or non-members, or scores that are not finite.
    """
    members, others = scored.members, scored.others
    return MembershipAttack(
        id=scored.id,
        title=scored.title,
        view=scored.view,
        knows=scored.knows,
        source=scored.source,
        site=scored.site,
        members=len(members),
        non_members=len(others),
        area=roc_area(members, others),
        points=[operating_point(members, others, asked) for asked in ASKED],
        epsilon_bound=epsilon_bound(members, others, delta, rng, attacks) if scored.proves else 0.0,
        largest_bound=largest_epsilon_bound(len(members), len(others), delta, attacks) if scored.proves else None,
        note=scored.note,
    )


def parted(scores: NDArray[np.floating], members: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Scores of the first `members` patients, and of the rest."""
    return scores[:members], scores[members:]


def done(attempts: Iterable[Attempt[T]], not_done: list[str]) -> list[T]:
    """What the attempts found; of those that could not be made, the reason goes to `not_done`."""
    found: list[T] = []
    for title, attempt in attempts:
        try:
            found += attempt()
        except NotMeasurable as reason:
            not_done.append(f"{title}: {reason}.")
    return found
