"""Integrity and origin of a release: SHA256SUMS over every file, and an Ed25519 signature over SHA256SUMS.

Both can be checked without this program::

    sha256sum --check SHA256SUMS
    openssl pkeyutl -verify -rawin -pubin -inkey release.pub.pem -sigfile SHA256SUMS.sig -in SHA256SUMS
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedsynth.errors import Refused, UsageError
from fedsynth.sums import SUMS, differences, files_of, list_of, read_sums

SIGNATURE = "SHA256SUMS.sig"
PUBLIC_KEY = "release.pub.pem"

__all__ = ["PUBLIC_KEY", "SIGNATURE", "SUMS", "files_of", "read_sums"]

# The list cannot hold itself, and the signature is made over the list.
UNLISTED = frozenset({SUMS, SIGNATURE})


def generate_key(path: Path) -> str:
    """Make a signing key at `path` (PKCS#8 PEM, mode 0600) and give the fingerprint of its public half.

    Raises:
        Refused: ``signing_key_exists``; a key is never overwritten, for what it signed could not be told apart again.
    """
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Refused("signing_key_exists", f"{path} exists and is not overwritten.", "Choose another name.") from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return fingerprint(key.public_key())


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key.

    Raises:
        UsageError: ``signing_key_missing``, ``signing_key_invalid``, or ``signing_key_exposed`` when others than its
            owner can read it.
    """
    try:
        exposed = path.stat().st_mode & 0o077
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError("signing_key_missing", f"There is no signing key at {path}.") from None
    if exposed:
        raise UsageError(
            "signing_key_exposed",
            f"{path} can be read or written by others than its owner.",
            "Set its mode to 0600; if others had access, make a new key.",
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError("signing_key_invalid", f"{path} is not an unencrypted private key in PEM.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError("signing_key_invalid", f"{path} is a key of another kind than Ed25519.")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key (PEM).

    Raises:
        UsageError: ``public_key_missing`` or ``public_key_invalid``.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError("public_key_missing", f"There is no public key at {path}.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError("public_key_invalid", f"{path} is not a public key in PEM.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError("public_key_invalid", f"{path} is a key of another kind than Ed25519.")
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """`key` as PEM (SubjectPublicKeyInfo)."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the DER form: ``openssl pkey -pubin -in release.pub.pem -outform DER | sha256sum``."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def write_manifest(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the public key, SHA256SUMS over every file of `folder`, and its signature (64 raw bytes)."""
    (folder / PUBLIC_KEY).write_bytes(public_pem(key.public_key()))
    sums = list_of(folder, [name for name in files_of(folder) if name not in UNLISTED])
    (folder / SUMS).write_bytes(sums)
    (folder / SIGNATURE).write_bytes(key.sign(sums))


def manifest_faults(folder: Path) -> list[str]:
    """What differs between the files of `folder` and SHA256SUMS; empty when nothing does.

    Raises:
        Refused: SHA256SUMS cannot be read, or `folder` holds links or special files.
    """
    return differences(folder, read_sums(folder), set(files_of(folder)) - UNLISTED)


def signature_is_valid(folder: Path, key: Ed25519PublicKey) -> bool:
    """Whether `key` signed SHA256SUMS as it stands.

    Raises:
        Refused: ``signature_missing`` or ``manifest_missing``.
    """
    try:
        signature = (folder / SIGNATURE).read_bytes()
    except FileNotFoundError:
        raise Refused("signature_missing", f"The release has no {SIGNATURE}.") from None
    try:
        sums = (folder / SUMS).read_bytes()
    except FileNotFoundError:
        raise Refused("manifest_missing", f"The release has no {SUMS}.") from None
    try:
        key.verify(signature, sums)
    except InvalidSignature:
        return False
    return True
