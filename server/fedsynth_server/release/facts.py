"""What every file of a release repeats: its study, its time, its licence and its guarantee."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedsynth import __version__
from fedsynth.errors import UsageError
from fedsynth.marks import NO_GUARANTEE, marks
from fedsynth.plan import StudyPlan
from fedsynth.selection import Selected, sequences_of, told
from fedsynth.statement import PrivacyStatement
from fedsynth_server.release.wording import epsilon

SOFTWARE = "fedsynth"
MODEL = "conditional GAN"
NOT_A_PATIENT = "SYNTHETIC DATA - NOT A PATIENT"
NOT_FOR_DIAGNOSIS = "SYNTHETIC DATA - NOT FOR DIAGNOSIS"


@dataclass(frozen=True)
class Licence:
    """The licence of the data: its SPDX identifier, its name, and where its text is."""

    spdx: str
    name: str
    url: str


CC_BY_4_0 = Licence(
    spdx="CC-BY-4.0",
    name="Creative Commons Attribution 4.0 International",
    url="https://creativecommons.org/licenses/by/4.0/legalcode",
)


@dataclass(frozen=True)
class Publication:
    """Who publishes a release and under which licence.

    Attributes:
        authors: names for citation; empty for "the coordinator of study ...".
        contact: an address for questions and for reports of a suspected leak; empty for none.
    """

    authors: tuple[str, ...] = ()
    contact: str = ""
    licence: Licence = CC_BY_4_0


@dataclass(frozen=True)
class ReleaseFacts:
    """The facts of one release. No clock is read anywhere: `released` is the only time in any file of it.

    Attributes:
        released: aware date and time; written in UTC.
        selected: what was selected of all that the study can draw; None where nothing was.

    Raises:
        UsageError: ``release_time_without_zone``; ``release_plan_mismatch`` when the statement is of another plan.
    """

    plan: StudyPlan
    statement: PrivacyStatement
    released: datetime
    publication: Publication = field(default_factory=Publication)
    selected: Selected | None = None

    def __post_init__(self) -> None:
        if self.released.tzinfo is None:
            raise UsageError("release_time_without_zone", "The time of release has no time zone.", "Give it in UTC.")
        if self.statement.plan_digest != self.plan.digest:
            raise UsageError(
                "release_plan_mismatch",
                f"The privacy statement is of plan {self.statement.plan_digest[:12]}, not of {self.plan.digest[:12]}.",
                "Make the release with the plan that the study ran under.",
            )
        object.__setattr__(self, "released", self.released.astimezone(UTC))

    @property
    def sequences(self) -> tuple[str, ...]:
        """The MR sequences of the images, in the order of their channels."""
        return sequences_of(self.plan, self.selected)

    @property
    def selection(self) -> str:
        """What was selected and what came of it, in plain words; empty where nothing was."""
        return "" if self.selected is None else " ".join(told(self.selected, self.plan))

    @property
    def identifier(self) -> str:
        """Name of this release: study, time of release, and the head of the plan's digest."""
        return f"{self.plan.name}-{self.released:%Y%m%dT%H%M%SZ}-{self.plan.digest[:12]}"

    @property
    def version(self) -> str:
        """Version of the data set by its date (a release is never changed, only followed)."""
        return f"{self.released:%Y.%m.%d}"

    @property
    def software(self) -> str:
        """Name and version of the program that made the release."""
        return f"{SOFTWARE} {__version__}"

    @property
    def authors(self) -> list[str]:
        """Names for citation."""
        return list(self.publication.authors) or [f"Coordinator of study {self.plan.name}"]

    @property
    def guarantee(self) -> str:
        """The formal guarantee in one ASCII sentence, for headers and sidecars."""
        if not self.statement.private:
            return not_private(self.plan, self.statement)
        spent = max((site.epsilon for site in self.statement.sites), default=0.0)
        return (
            f"Generator trained with differential privacy at patient level: epsilon {epsilon(spent)} at most at any site "
            f"(budget {self.statement.epsilon_budget:.3g}), delta {self.statement.delta:.1e}."
        )


def not_private(plan: StudyPlan, statement: PrivacyStatement) -> str:
    """Why a release protects nobody, in ASCII; empty where it is private.

    A plan that asks for privacy may have got none: a site may say that its noise came from a seed.
    """
    return " ".join(marks(plan.privacy)) or ("" if statement.private else NO_GUARANTEE)


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 (hex) of `parts`, each preceded by its length so that no two lists of parts collide."""
    state = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "big"))
        state.update(content)
    return state.hexdigest()
