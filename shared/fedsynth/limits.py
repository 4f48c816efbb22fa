"""What a release's gate asks of attacks: a small file (TOML) that lies in the release, so that sites judge by the same.

Every limit is on the end of a 95 % interval, not on the estimate: what fails is surely too much, not unluckily so. A
release is attacked some twenty times (several attacks, by site and together), so about every second private release has an
attack whose interval lies above chance by luck alone; the margins are what such luck does not reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from fedsynth.attacks.values import View
from fedsynth.plan import Section
from fedsynth.toml import load_toml

FILE = "limits.toml"
VIEWS: tuple[View, ...] = ("release", "coordinator")


class MembershipLimits(Section):
    """Guessing who was trained on.

    Attributes:
        views: which attackers must have been tried; what is left out is said first in the report.
        area: the low end of an attack's area under the ROC curve from the release may not be above this. 0.55: with 100
            members and 100 others luck puts it there once in 1,000 attacks (Hanley and McNeil, 1982), with 30 and 30 once in
            140.
        true_positive_rate: neither may the low end of its true positive rate at 1 % false positives. 0.05: of those whom
            it accuses five times as many are members as by chance. Where few non-members leave the false positive rate
            itself uncertain up to a higher value, that value is the limit.
        coordinator_area: the same for what a coordinator saw of the training. 1: no limit. That view was agreed to with the
            plan's epsilon, and holding a release back takes nothing of it away; what counts there is that no attack proves
            an epsilon above the one that is claimed. At epsilon 10 areas of 0.8 are to be expected (`docs/attacks.md`): who
            does not want that needs a smaller epsilon or secure aggregation.
        coordinator_true_positive_rate: likewise.
        least_patients: at least one attack of each view must have been tried on so many members and so many others; with
            fewer no attack could fail, and none would mean anything.
        selected: whether a release of a part of all patients (`fedsynth.selection.subset_words`) must have been attacked
            with those alone who fit it, too, so many of them likewise.
    """

    views: list[View] = Field(default=list(VIEWS))
    area: Annotated[float, Field(ge=0.5, lt=1)] = 0.55
    true_positive_rate: Annotated[float, Field(ge=0.01, lt=1)] = 0.05
    coordinator_area: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    coordinator_true_positive_rate: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    least_patients: Annotated[int, Field(ge=2)] = 20
    selected: bool = True

    def area_of(self, view: View) -> float:
        """The limit of the area of an attacker who sees `view`."""
        return self.area if view == "release" else self.coordinator_area

    def rate_of(self, view: View) -> float:
        """The limit of the true positive rate of an attacker who sees `view`."""
        return self.true_positive_rate if view == "release" else self.coordinator_true_positive_rate


class AttributeLimits(Section):
    """Guessing one part of a patient from another.

    Attributes:
        asked: whether it must have been tried.
        gap: the low end of how much better members are guessed than others may not be above this, in units of the
            attack's metric (R², AUC: 1 is everything). 0.05, as for the area.
    """

    asked: bool = True
    gap: Annotated[float, Field(ge=0, lt=1)] = 0.05


class CopyLimits(Section):
    """Synthetic patients that repeat real ones.

    Attributes:
        asked: whether they must have been looked for.
        beyond_chance: so many synthetic patients more may be as similar to patients who were trained on as to held-out
            ones. 0: one copy of a person is one too many.
    """

    asked: bool = True
    beyond_chance: Annotated[int, Field(ge=0)] = 0


class Limits(Section):
    """All limits; the defaults ask for everything.

    Attributes:
        reason: why something is not asked for, or is allowed to reach more than by default, in words for the reader of the
            report.
    """

    schema_version: Literal[1] = 1
    reason: str = ""
    membership: MembershipLimits = MembershipLimits()
    attributes: AttributeLimits = AttributeLimits()
    copies: CopyLimits = CopyLimits()

    @property
    def asks_for_attacks(self) -> bool:
        """Whether anything has to be tried on real patients."""
        return bool(self.membership.views) or self.attributes.asked or self.copies.asked

    @property
    def loosened(self) -> list[str]:
        """What is asked for less strictly than by default, with both values: a limit that nothing reaches asks nothing."""
        membership, kept = self.membership, MembershipLimits()
        pairs = {
            "membership.area": (membership.area, kept.area),
            "membership.true_positive_rate": (membership.true_positive_rate, kept.true_positive_rate),
            "attributes.gap": (self.attributes.gap, AttributeLimits().gap),
            "copies.beyond_chance": (self.copies.beyond_chance, CopyLimits().beyond_chance),
        }
        above = [
            f"{name} {value:g} instead of {default:g}" for name, (value, default) in pairs.items() if value > default
        ]
        if membership.least_patients < kept.least_patients:
            above.append(f"membership.least_patients {membership.least_patients} instead of {kept.least_patients}")
        return above

    @model_validator(mode="after")
    def _what_is_left_out_has_a_reason(self) -> Self:
        membership = self.membership
        whole = set(membership.views) == set(VIEWS) and self.attributes.asked and self.copies.asked
        whole = whole and membership.selected
        if not whole and len(self.reason.strip()) < 10:
            raise ValueError("reason: say in a sentence why not every attack is asked for; the report quotes it")
        if self.loosened and len(self.reason.strip()) < 10:
            raise ValueError(f"reason: say in a sentence why limits are looser ({'; '.join(self.loosened)})")
        if len(set(self.membership.views)) != len(self.membership.views):
            raise ValueError("membership.views names one twice")
        return self


def load_limits(path: Path) -> Limits:
    """Read limits.

    Raises:
        UsageError: ``limits_missing``, ``limits_not_toml`` or ``limits_invalid``.
    """
    return load_toml(path, Limits, "limits")


def limits_toml(limits: Limits) -> str:
    """`limits` as TOML; `load_limits` gives back equal ones."""
    content = limits.model_dump(mode="json")
    if (
        limits.membership.selected
    ):  # it says nothing of a release of all that the model draws, which keeps the file it had
        del content["membership"]["selected"]
    return tomli_w.dumps(content)


TEMPLATE = """\
# What attacks on a release may reach at most. Each limit is on the low end of a 95 % interval: what is above it is surely
# above it. `fedsynth release make --limits FILE` puts this file into the release, where sites judge by it, too.
schema_version = 1

# Needed as soon as something below is not asked for, or looser than here: why, in words for the reader of the report.
reason = ""

[membership]  # who was trained on?
# What the attacker sees: the release, or all messages of the training, as the coordinator does. [] asks for neither.
views = ["release", "coordinator"]
# Area under the ROC curve; 0.5 is chance. With 100 members and 100 others luck exceeds 0.55 once in 1,000 attacks.
area = 0.55
# True positives at 1 % false positives; 0.01 is chance.
true_positive_rate = 0.05
# The same for what the coordinator saw of the training; 1 is no limit. Holding a release back takes nothing of that away: it
# was agreed to with the plan's epsilon. An attack that proves a larger epsilon than is claimed fails in any case.
coordinator_area = 1.0
coordinator_true_positive_rate = 1.0
# An attack on fewer members or fewer others proves nothing.
least_patients = 20
# A release of chosen classes or ranges of morphology: must those who fit them have been attacked by themselves, too?
selected = true

[attributes]  # a part of a patient from another part: are those who were trained on guessed better?
asked = true
gap = 0.05

[copies]  # does a synthetic patient repeat a real one?
asked = true
# More synthetic patients like those who were trained on than like those who were not.
beyond_chance = 0
"""
