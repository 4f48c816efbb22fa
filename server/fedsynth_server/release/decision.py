"""What the gate decided about a release, as values: every check, and an override where somebody answered for one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
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
        overridable: whether somebody may answer for releasing although it failed. Never for damaged files, identifiers,
            missing ledgers, a site that did not sign, or a claim that was shown to be false.
    """

    id: str
    title: str
    status: Status
    finding: str
    remedy: str = ""
    overridable: bool = True


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
    """All checks of a release, in the order in which they are shown.

    Attributes:
        subject: which synthetic patients it is about (`fedsynth.synthetic.subject_digest`).
        content: SHA-256 of ``CONTENT.SHA256SUMS``, which is what sites countersign.
        code: SHA-256 over the sources that touch or protect patients (`fedsynth.auditing.code.code_digest`), as installed
            where it was decided; the audit must be of these.
    """

    schema_version: Literal[1] = 1
    plan_digest: str
    subject: str
    content: str = ""
    code: str = ""
    checks: list[GateCheck]
    override: Override | None = None

    @property
    def failed(self) -> list[GateCheck]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]


@dataclass(frozen=True)
class OverrideRequest:
    """That somebody wants to answer for a release whose checks fail.

    Attributes:
        statement: why, in the words of whoever answers for it.
        responsible: their role, e.g. "data protection officer of the coordinator".
        checks: ids of the checks that are expected to fail, all of them and no other: nobody answers for what they have not
            seen.
    """

    statement: str
    responsible: str
    checks: tuple[str, ...]


def sign_override(request: OverrideRequest, decision: GateDecision, key: Ed25519PrivateKey) -> Override:
    """`request` as a signed statement about `decision`."""
    unsigned = Override(
        statement=request.statement,
        responsible=request.responsible,
        failed=[check.id for check in decision.failed],
        signature="",
    )
    return unsigned.model_copy(update={"signature": key.sign(_message(unsigned, decision)).hex()})


def override_is_signed(decision: GateDecision, key: Ed25519PublicKey) -> bool:
    """Whether `key` signed the override of `decision` for this plan, content and subject."""
    if decision.override is None:
        return False
    try:
        key.verify(bytes.fromhex(decision.override.signature), _message(decision.override, decision))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(override: Override, decision: GateDecision) -> bytes:
    """What is signed: canonical JSON of everything that the override is about."""
    about = {
        "kind": "override of a release's gate",
        "plan_digest": decision.plan_digest,
        "subject": decision.subject,
        "content": decision.content,
        "statement": override.statement,
        "responsible": override.responsible,
        "failed": override.failed,
    }
    return json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
