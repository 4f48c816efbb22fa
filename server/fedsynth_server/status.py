"""Where a study stands, in a file that commands and people read: ``status.json`` in the study's folder.

It tells nothing that the coordinator does not know already: names of sites, rounds, and codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.marks import marks
from fedsynth.plan import StudyPlan
from fedsynth.progress import say

FILE = "status.json"

# waiting: nothing was asked of any site yet. paused: fewer sites than the plan wants; the study asks again by itself.
Phase = Literal["waiting", "running", "paused", "finished", "failed"]
# absent: no node of that name is connected. lost: the task or its reply did not arrive; it is sent again.
SiteState = Literal["unknown", "absent", "asked", "answered", "refused", "lost"]


class SiteStatus(BaseModel):
    """What the coordinator last saw of a site; `code` is the cause of ``refused`` and ``lost``."""

    state: SiteState = "unknown"
    code: str = ""
    module: str = ""
    round: int = 0
    since: datetime


class StudyStatus(BaseModel):
    """Where a study stands.

    Attributes:
        study: the plan's digest.
        marks: why the study protects nobody, in words (`fedsynth.marks`); empty where it is private.
        phase: what the study is doing.
        code: cause of ``paused`` and ``failed``.
        message: one sentence for a person.
        module: the module that is trained, or was last.
        round: its round, from 1.
        rounds: how many rounds the plan gives it.
        sites: by name, all sites of the plan.
        since: when the phase began.
    """

    study: str
    marks: list[str] = []
    phase: Phase = "waiting"
    code: str = ""
    message: str = ""
    module: str = ""
    round: int = 0
    rounds: int = 0
    sites: dict[str, SiteStatus]
    since: datetime


def read_status(folder: Path) -> StudyStatus | None:
    """The status in `folder`; None when no study ran there."""
    path = folder / FILE
    return StudyStatus.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass
class StatusFile:
    """Writes ``status.json`` of `folder` whenever something changes."""

    folder: Path
    plan: StudyPlan
    status: StudyStatus = field(init=False)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        sites = {site.name: SiteStatus(since=now) for site in self.plan.sites}
        self.status = StudyStatus(study=self.plan.digest, marks=marks(self.plan.privacy), sites=sites, since=now)

    def phase(self, phase: Phase, message: str = "", code: str = "") -> None:
        """Enter `phase`."""
        before = self.status
        if (before.phase, before.message, before.code) == (phase, message, code):
            return
        since = before.since if before.phase == phase else datetime.now(UTC)
        self._write(before.model_copy(update={"phase": phase, "message": message, "code": code, "since": since}))

    def round(self, module: str, number: int, rounds: int) -> None:
        """Say which round is under way."""
        self._write(self.status.model_copy(update={"module": module, "round": number, "rounds": rounds}))

    def site(self, name: str, state: SiteState, code: str = "") -> None:
        """Say what was seen of a site."""
        status = self.status
        before = status.sites[name]
        if (before.state, before.code, before.module, before.round) == (state, code, status.module, status.round):
            return
        now = SiteStatus(state=state, code=code, module=status.module, round=status.round, since=datetime.now(UTC))
        self._write(status.model_copy(update={"sites": {**status.sites, name: now}}))

    def _write(self, status: StudyStatus) -> None:
        self.status = status
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / FILE, status.model_dump_json(indent=2).encode())
        except OSError as error:
            # The checkpoint decides whether a full disk ends the study; a status that cannot be written must not.
            if error.errno not in DISK_FULL:
                raise
            say("the disk is full: status.json is not up to date")
