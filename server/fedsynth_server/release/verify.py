"""Checking a release as a recipient: is it whole, who signed it, is it what it says it is.

Content is opened only when every file is as it was signed: a file that somebody tampered with is not parsed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth_server.release import content
from fedsynth_server.release.manifest import (
    PUBLIC_KEY,
    fingerprint,
    load_public_key,
    manifest_faults,
    signature_is_valid,
)
from fedsynth_server.release.opened import Release, open_release

Status = Literal["ok", "failed", "skipped"]
_SHOWN_FAULTS = 5
# What the readers of the formats raise on content that was signed and is malformed all the same.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class Check:
    """One check: what it asks, how it ended, and why."""

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class VerificationResult:
    """All checks of a release.

    Attributes:
        fingerprint: of the key inside the folder; empty when it has none that can be read.
        signer_is_trusted: whether the key that the recipient named signed it; None when none was named.
        warnings: what a recipient must know even when every check is ok.
    """

    checks: list[Check]
    fingerprint: str
    signer_is_trusted: bool | None
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check was made and passed."""
        return all(check.status == "ok" for check in self.checks)

    def status(self, name: str) -> Status:
        """How the check called `name` ended."""
        return next(check.status for check in self.checks if check.name == name)


def verify(folder: Path, trusted_key: Path | None = None, trusted_fingerprint: str | None = None) -> VerificationResult:
    """Check the release in `folder`.

    Args:
        folder: the release.
        trusted_key: public key (PEM) of the coordinator, received by another way than the release.
        trusted_fingerprint: the same key's fingerprint (64 hexadecimal digits), where only that was received.

    Returns:
        The result; a release that fails is a result, not an exception.

    Raises:
        UsageError: ``release_missing``, or the trusted key cannot be read.
    """
    if not folder.is_dir():
        raise UsageError("release_missing", f"There is no folder {folder}.")
    trusted = fingerprint(load_public_key(trusted_key)) if trusted_key is not None else None
    if trusted_fingerprint is not None:
        trusted_fingerprint = trusted_fingerprint.lower()
        if trusted is not None and trusted != trusted_fingerprint:
            raise UsageError("trusted_key_ambiguous", "The trusted key does not have the trusted fingerprint.")
        trusted = trusted_fingerprint

    checks = [
        _run("manifest", "every file is as listed, none is missing, none is extra", lambda: manifest_faults(folder))
    ]
    found, signature = _check_signature(folder, trusted)
    checks.append(signature)
    intact = all(check.status == "ok" for check in checks)
    warnings = [] if trusted is not None else [_untrusted(found)]
    if intact:
        release, opened = _open(folder)
        checks.append(opened)
        if release is not None and opened.status == "ok":
            checks += [_run(name, says, partial(test, release)) for name, says, test in content.CHECKS]
            warnings += content.warnings(release)
    names = [check.name for check in checks]
    skipped = "not looked at, because an earlier check failed"
    missing = [name for name in ("structure", *(name for name, _, _ in content.CHECKS)) if name not in names]
    checks += [Check(name, "skipped", skipped) for name in missing]
    signer = None if trusted is None else signature.status == "ok"
    return VerificationResult(checks, found, signer, warnings)


def _check_signature(folder: Path, trusted: str | None) -> tuple[str, Check]:
    """The fingerprint of the key in `folder`, and whether it signed the manifest (and is the trusted one, if named)."""
    try:
        key = load_public_key(folder / PUBLIC_KEY)
    except UsageError as error:
        return "", Check("signature", "failed", error.message)
    found = fingerprint(key)

    def faults() -> list[str]:
        if trusted is not None and found != trusted:
            return [f"signed with the key {found}, which is not the trusted key {trusted}"]
        return [] if signature_is_valid(folder, key) else ["the signature does not belong to SHA256SUMS and this key"]

    says = "the trusted key signed it" if trusted is not None else "the key in the folder signed it"
    return found, _run("signature", says, faults)


def _untrusted(found: str) -> str:
    return (
        "No trusted key was named: the signature shows only that nothing changed since the holder of the key in the "
        f"folder signed it, not who that is. Compare its fingerprint with the coordinator's: {found or 'no readable key'}."
    )


def _open(folder: Path) -> tuple[Release | None, Check]:
    try:
        release = open_release(folder)
    except FedsynthError as error:
        return None, Check("structure", "failed", error.message)
    return release, _run("structure", "every required file is there", lambda: content.structure_faults(release))


def _run(name: str, says: str, faults: Callable[[], list[str]]) -> Check:
    """Make one check; its reason is what holds, or the first faults."""
    try:
        found = faults()
    except Refused as error:
        found = [error.message]
    except _UNREADABLE as error:
        found = [f"a file does not have the form that it must have ({type(error).__name__}: {error})"]
    if not found:
        return Check(name, "ok", says)
    more = f"; and {len(found) - _SHOWN_FAULTS} more" if len(found) > _SHOWN_FAULTS else ""
    return Check(name, "failed", "; ".join(found[:_SHOWN_FAULTS]) + more)
