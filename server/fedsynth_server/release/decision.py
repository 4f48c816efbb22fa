"""What the gate decided about a release, as values: every check, and an override where somebody answered for one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "failed", "not asked"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GateCheck(_Value):
    """One condition of a release.

    Attributes:
        id: ``"ledgers"``, ``"audit"``, ``"membership"``, ``"copies"``, ``"countersignatures"``, ...
        status: ``"not asked"`` when the limits do not ask for it, which the finding says.
        finding: what was measured and what the limit is, in a sentence with its numbers.
        remedy: what could be done when it failed.
    """

    id: str
    title: str
    status: Status
    finding: str
    remedy: str = ""


class Override(_Value):
    """A signed statement by which somebody answers for releasing although checks failed.

    Attributes:
        statement: why, in the words of whoever answers for it.
        responsible: their role.
        failed: ids of exactly the checks that had failed.
        signature: Ed25519 (hex) of the coordinator's key over the other values with plan digest and subject.
    """

    statement: str
    responsible: str
    failed: list[str]
    signature: str


class GateDecision(_Value):
    """All checks of a release, in the order in which they are shown."""

    schema_version: Literal[1] = 1
    plan_digest: str
    subject: str
    checks: list[GateCheck]
    override: Override | None = None

    @property
    def failed(self) -> list[GateCheck]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]
