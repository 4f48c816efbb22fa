"""What a site signs when it agrees that a release be made, and checking it.

The site signs a statement (JSON, the very bytes that are kept) with the Ed25519 key whose public half its plan entry
names. The statement names the content by the SHA-256 of ``CONTENT.SHA256SUMS`` (`fedsynth.sums`), the evidence that lay
beside it, and what the site itself found: no figure, but that its own attacks stayed within the limits, and the SHA-256 of
the report, which stays at the site. In a release, ``countersignatures/`` holds statement, signature and key of each site::

    openssl pkeyutl -verify -rawin -pubin -inkey NAME.pub.pem -sigfile NAME.sig -in NAME.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from fedsynth.attacks.values import View
from fedsynth.epsilons import Epsilon
from fedsynth.errors import Refused, UsageError
from fedsynth.plan import Name, StudyPlan

FOLDER = "countersignatures"
# Files that may lie beside the content when a site signs; it names those that do.
EVIDENCE = ("attacks.json", "audit.json", "evaluation.json", "site-evaluation.json")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OwnAttacks(_Value):
    """That the site attacked the synthetic patients with its own patients, and that nothing was above the limits.

    Attributes:
        report: SHA-256 of the attack report, which stays at the site.
        subject: which synthetic patients were attacked (`fedsynth.synthetic.subject_digest`).
        views: what the attackers saw.
        selected: whether those alone were attacked, too, who fit what was selected for the release. Said only where it is
            so: statements about releases of all that the model draws are written as they were.
    """

    report: Digest
    subject: Digest
    views: list[View]
    selected: bool = False
    within_limits: Literal[True] = True

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if not self.selected:
            del content["selected"]
        return content


class Statement(_Value):
    """What a site signs.

    Attributes:
        content: SHA-256 of ``CONTENT.SHA256SUMS``, which names every image, table, the plan, the privacy statement and
            the limits.
        evidence: SHA-256 by name of the evidence that lay beside it.
        ledger_head: the entry that the privacy statement quotes; the site found it in its ledger.
        epsilon: what the privacy statement says that this site spent; the site's ledger says the same. Infinite, in JSON
            ``null``, of a study without privacy.
        attacks: None when the site did not attack.
    """

    schema_version: Literal[1] = 1
    kind: Literal["countersignature of a release"] = "countersignature of a release"
    site: Name
    plan_digest: Digest
    content: Digest
    evidence: dict[str, Digest]
    ledger_head: Digest
    epsilon: Epsilon
    attacks: OwnAttacks | None


class Countersignature(_Value):
    """The file that a site hands over: the statement's exact text, and the signature over its UTF-8 bytes (hex)."""

    schema_version: Literal[1] = 1
    statement: str
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @property
    def stated(self) -> Statement:
        """The statement, read.

        Raises:
            Refused: ``countersignature_invalid``.
        """
        try:
            return Statement.model_validate_json(self.statement)
        except ValidationError:
            raise Refused("countersignature_invalid", "A countersignature holds no statement of a site.") from None


def sign(statement: Statement, key: Ed25519PrivateKey) -> Countersignature:
    """`statement`, signed with the site's `key`."""
    text = json.dumps(statement.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"
    return Countersignature(statement=text, signature=key.sign(text.encode()).hex())


def key_hex(key: Ed25519PublicKey) -> str:
    """A public key as a plan names it: its 32 bytes in hex."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def key_pem(key: str) -> bytes:
    """The public `key` (hex) as PEM, as openssl reads it."""
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed_by(countersignature: Countersignature, key: str) -> bool:
    """Whether the public `key` (hex) belongs to the signature."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(countersignature.signature), countersignature.statement.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def read_countersignature(path: Path) -> Countersignature:
    """Read the file that a site handed over.

    Raises:
        UsageError: ``countersignature_unreadable``.
    """
    try:
        return Countersignature.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(
            "countersignature_unreadable", f"{path} is no countersignature ({type(error).__name__})."
        ) from None


def write_into(folder: Path, countersignature: Countersignature, plan: StudyPlan) -> None:
    """Write a site's statement, signature (64 raw bytes) and key (PEM) into ``countersignatures/`` of the release.

    Raises:
        Refused: ``countersignature_invalid``; ``countersignature_unasked``: the plan names no key for that site.
        UsageError: ``site_not_in_plan``.
    """
    name = countersignature.stated.site
    key = plan.site(name).countersign_key
    if key is None:
        raise Refused(
            "countersignature_unasked",
            f"The plan names no key of site {name}, so nobody could tell whose signature it is.",
            "A site that wants to countersign says so in the plan, before it approves it.",
        )
    home = folder / FOLDER
    home.mkdir(exist_ok=True)
    (home / f"{name}.json").write_text(countersignature.statement, encoding="utf-8")
    (home / f"{name}.sig").write_bytes(bytes.fromhex(countersignature.signature))
    (home / f"{name}.pub.pem").write_bytes(key_pem(key))


def read_from(folder: Path) -> dict[str, Countersignature]:
    """The countersignatures in a release or a candidate, by the name of their files.

    Raises:
        Refused: ``countersignature_invalid``.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            signature = path.with_suffix(".sig").read_bytes().hex()
            found[path.stem] = Countersignature(statement=path.read_bytes().decode(), signature=signature)
        except (OSError, ValueError):
            raise Refused(
                "countersignature_invalid", f"{FOLDER}/{path.name} has no signature beside it, or is no text."
            ) from None
    return found
