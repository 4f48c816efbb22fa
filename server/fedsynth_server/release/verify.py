"""Checking a release as a recipient: is it whole, who signed it, is it what it says it is.

Content is opened only when every file is as it was signed: a file that somebody tampered with is not parsed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.sums import CONTENT, content_faults
from fedsynth_server.release import content
from fedsynth_server.release.candidate import is_candidate
from fedsynth_server.release.checks import Check, Status, check, content_checks
from fedsynth_server.release.gate import decision_faults, gate_warnings
from fedsynth_server.release.manifest import (
    PUBLIC_KEY,
    fingerprint,
    load_public_key,
    manifest_faults,
    signature_is_valid,
)
from fedsynth_server.release.opened import Release, open_release

__all__ = ["Check", "Status", "VerificationResult", "verify"]


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
        return all(each.status == "ok" for each in self.checks)

    def status(self, name: str) -> Status:
        """How the check called `name` ended."""
        return next(each.status for each in self.checks if each.name == name)


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

    if is_candidate(folder):
        return _candidate(folder, trusted)
    checks = [
        check("manifest", "every file is as listed, none is missing, none is extra", lambda: manifest_faults(folder))
    ]
    found, signature = _check_signature(folder, trusted)
    checks.append(signature)
    intact = all(each.status == "ok" for each in checks)
    warnings = [] if trusted is not None else [_untrusted(found)]
    if intact:
        release, opened = _open(folder)
        checks.append(opened)
        if release is not None and opened.status == "ok":
            checks += _of_content(release)
            warnings += _warnings(release)
    signer = None if trusted is None else signature.status == "ok"
    return VerificationResult([*checks, *_skipped(checks, intact)], found, signer, warnings)


def _of_content(release: Release) -> list[Check]:
    """What lies in the folder is what a release is, and the gate let it pass."""
    found = content_checks(release)
    if release.has_gate:
        says = "the gate's decision follows from the evidence; signatures of sites and overrides hold"
        key = load_public_key(release.folder / PUBLIC_KEY)
        found.append(check("gate", says, lambda: decision_faults(release, found[: len(content.CHECKS)], key)))
    return found


def _warnings(release: Release) -> list[str]:
    try:
        return [*gate_warnings(release), *content.warnings(release)]
    except Refused:  # the check of the gate says so
        return content.warnings(release)


def _skipped(made: list[Check], intact: bool) -> list[Check]:
    names = {each.name for each in made}
    last = () if intact and "participants" in names else ("gate",)  # earlier releases have none
    missing = [name for name in ("structure", *(name for name, _, _ in content.CHECKS), *last) if name not in names]
    return [Check(name, "skipped", "not looked at, because an earlier check failed") for name in missing]


def _candidate(folder: Path, trusted: str | None) -> VerificationResult:
    """A candidate is no release, whatever its files are."""
    listed = check("manifest", f"every file is as {CONTENT} lists it", lambda: content_faults(folder))
    unsigned = Check(
        "signature",
        "failed",
        "this is a candidate: the gate has not let it pass and nobody has signed it (fedsynth release finish)",
    )
    checks = [listed, unsigned]
    return VerificationResult([*checks, *_skipped(checks, False)], "", None if trusted is None else False)


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
    return found, check("signature", says, faults)


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
    return release, check("structure", "every required file is there", lambda: content.structure_faults(release))
