"""Integrity and origin of a release: SHA256SUMS over every file, and an Ed25519 signature over SHA256SUMS.

Both can be checked without this program::

    sha256sum --check SHA256SUMS
    openssl pkeyutl -verify -rawin -pubin -inkey release.pub.pem -sigfile SHA256SUMS.sig -in SHA256SUMS
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

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
from fedsynth.files import sha256_file

SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
PUBLIC_KEY = "release.pub.pem"

# The list cannot hold itself, and the signature is made over the list.
UNLISTED = frozenset({SUMS, SIGNATURE})

_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\r\\]+)")


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


def files_of(folder: Path) -> list[str]:
    """POSIX paths of all regular files under `folder`, in the order of their bytes (as ``LC_ALL=C sort``).

    Raises:
        Refused: ``release_not_plain``, for a symbolic link or a special file: neither can be summed faithfully.
    """
    found = []
    for directory, subfolders, names in os.walk(folder):
        for name in (*subfolders, *names):
            path = Path(directory, name)
            plain = not path.is_symlink() and (path.is_file() or path.is_dir())
            if not plain:
                raise Refused("release_not_plain", f"{path.relative_to(folder)} is a link or no plain file.")
        found += [Path(directory, name).relative_to(folder).as_posix() for name in names]
    return sorted(found, key=os.fsencode)


def write_manifest(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the public key, SHA256SUMS over every file of `folder`, and its signature (64 raw bytes)."""
    (folder / PUBLIC_KEY).write_bytes(public_pem(key.public_key()))
    listed = [name for name in files_of(folder) if name not in UNLISTED]
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in listed).encode()
    (folder / SUMS).write_bytes(sums)
    (folder / SIGNATURE).write_bytes(key.sign(sums))


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) by path, as SHA256SUMS lists them.

    Raises:
        Refused: ``manifest_missing`` or ``manifest_malformed``.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise Refused("manifest_missing", f"The release has no {SUMS}.") from None
    except UnicodeDecodeError:
        raise Refused("manifest_malformed", f"{SUMS} is not UTF-8 text.") from None
    sums: dict[str, str] = {}
    if lines.pop() != "":
        raise Refused("manifest_malformed", f"{SUMS} does not end with a line break.")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        inside = match is not None and ".." not in PurePosixPath(match[2]).parts and not match[2].startswith("/")
        if match is None or not inside or match[2] in sums:
            raise Refused("manifest_malformed", f"Line {number} of {SUMS} is malformed, repeated or leads outside.")
        sums[match[2]] = match[1]
    return sums


def manifest_faults(folder: Path) -> list[str]:
    """What differs between the files of `folder` and SHA256SUMS; empty when nothing does.

    Raises:
        Refused: SHA256SUMS cannot be read, or `folder` holds links or special files.
    """
    sums = read_sums(folder)
    present = set(files_of(folder)) - UNLISTED
    faults = [f"missing: {name}" for name in sorted(sums.keys() - present)]
    faults += [f"not listed: {name}" for name in sorted(present - sums.keys())]
    faults += [f"altered: {name}" for name in sorted(sums.keys() & present) if sha256_file(folder / name) != sums[name]]
    return faults


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
