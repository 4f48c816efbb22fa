"""What attacks found, as values."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

View = Literal["release", "coordinator"]

# Ways to tell from a release who was trained on; ids of attacks begin with them.
RELEASE_ATTACKS = ("nearest-neighbour", "monte-carlo", "calibrated", "density-ratio")
# Ids of attacks on those real patients alone who fit what was selected for the release end with it.
SELECTED = "-selected"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(_Value):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class OperatingPoint(_Value):
    """How many members an attack finds while it accuses few others.

    With n non-members no false positive rate between 0 and 1 / n can be had. `reached` is the largest rate not above
    `asked` that can, with the interval that n non-members leave for its true value; where it is 0, `true_positive_rate`
    is that of a threshold above every non-member.
    """

    asked: float
    reached: Rate
    true_positive_rate: Rate


class MembershipAttack(_Value):
    """One attack that scores patients by how much it believes that they were trained on.

    Attributes:
        id: ``"nearest-neighbour"``, ...; with `SELECTED` at its end, of those who fit what was selected.
        view: what the attacker sees.
        knows: what else the attacker is assumed to have, in plain words.
        source: the paper.
        site: the site whose patients were attacked; empty for all together.
        members: patients that were trained on.
        non_members: held-out patients of the same sites.
        area: under the ROC curve; 0.5 is chance.
        points: at false positive rates of 0.1 % and 1 %.
        epsilon_bound: what the attack alone proves at least of epsilon (95 % confidence, in all attacks together); 0 when
            nothing.
        largest_bound: what a perfect attack would prove with as many patients: `epsilon_bound` cannot be above it. None
            where the scores cannot prove anything (`note` says why).
    """

    id: str
    title: str
    view: View
    knows: str
    source: str
    site: str = ""
    members: int
    non_members: int
    area: Rate
    points: list[OperatingPoint]
    epsilon_bound: float
    largest_bound: float | None = None
    note: str = ""

    @property
    def of_selected(self) -> bool:
        """Whether only those were attacked who fit what was selected for the release."""
        return self.id.endswith(SELECTED)


class AttributeAttack(_Value):
    """Guessing one part of a patient from another with the help of the release.

    What an attacker guesses of people that nobody trained on holds in the population; only `gap` is about membership.

    Attributes:
        metric: how guesses are scored, e.g. ``"R², mean over genes"``; higher is a better guess.
        members: score on patients that were trained on.
        non_members: score on held-out patients.
        gap: members minus non-members.
        baseline: score of a guess without the release, named in `note`; None when there is none.
    """

    id: str
    title: str
    knows: str
    guesses: str
    metric: str
    members: float
    non_members: float
    gap: Rate
    baseline: float | None = None
    note: str = ""


class CopyCheck(_Value):
    """Whether synthetic patients repeat real ones.

    Attributes:
        of: what was compared: ``"images"`` or ``"genes"``.
        how: similarity and threshold in plain words.
        threshold: similarity from which a pair counts as a copy, set by pairs of real patients of whom none is a copy.
        compared: synthetic patients.
        found: synthetic patients at least as similar to a training patient as `threshold`.
        found_holdout: the same against held-out patients, who cannot have been copied: what chance does.
        participants: the synthetic patients in question.
        most_similar: the largest similarity to a training patient, and to a held-out one.
    """

    of: Literal["images", "genes"]
    how: str
    threshold: float
    compared: int
    found: int
    found_holdout: int
    participants: list[str]
    most_similar: tuple[float, float]


class Distances(_Value):
    """Nearest-neighbour distances from synthetic to real patients: a sanity check, no test of privacy.

    `training` and `holdout` are the 5 %, 50 % and 95 % quantiles of a synthetic patient's distance to the nearest of
    equally many training and held-out patients; `nearer` is the share of synthetic patients that are nearer to training.
    """

    of: Literal["images", "genes"]
    training: tuple[float, float, float]
    holdout: tuple[float, float, float]
    nearer: Rate
    note: str


class Attacks(_Value):
    """All attacks on a release, and on the study's training where its messages were at hand.

    Attributes:
        subject: which synthetic patients were attacked with (`fedsynth.synthetic.subject_digest`).
        data: what the real patients are, for the reader.
        sites: whose patients were the members and the others.
    """

    schema_version: Literal[1] = 1
    plan_digest: str
    subject: str
    data: str
    sites: list[str]
    n_synthetic: int
    membership: list[MembershipAttack]
    attributes: list[AttributeAttack]
    copies: list[CopyCheck]
    distances: list[Distances]
    not_done: list[str] = []
    seconds: float | None = None
