"""Private files: node keys, the secret between node and runner, and who may read them.

A node signs its requests with a NIST elliptic-curve key that Flower reads in OpenSSH form; the coordinator registers its
public half. Private files have mode 0600 from their first byte on, and none is overwritten unless that is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsynth.deployment.certificates import (
    LONGEST_SERVER_DAYS,
    check_certificate,
    make_ca,
    make_server_certificate,
)
from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.files import write_atomic

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_SECRET_BYTES = 32
_LEAST_SECRET_BYTES = 16
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def write_private(path: Path, content: bytes, replace: bool = False) -> None:
    """Write a private file with mode 0600, whole or not at all.

    Raises:
        UsageError: ``key_exists``: there is one, and `replace` is not set.
        OSError: e.g. a full disk; an earlier file is then untouched.
    """
    if path.exists() and not replace:
        raise UsageError("key_exists", f"{path} exists already.", "Move it away first, or ask to renew it.")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_private(path: Path) -> str:
    """Check that only its owner, who is the present user, can read a private file.

    The superuser may check the files of the account that a service runs under.

    Raises:
        UsageError: ``key_missing``.
        Refused: ``key_readable_by_others``, ``key_of_other_owner``.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UsageError(
            "key_missing", f"There is no private file {path}.", "Put it there, or make a new one."
        ) from None
    if found.st_mode & 0o077:
        raise Refused(
            "key_readable_by_others",
            f"Group or others may use the private file {path} (mode {found.st_mode & 0o777:04o}).",
            f"chmod 600 {path}; if others could log in here, make a new one.",
        )
    if os.geteuid() not in (found.st_uid, 0):
        raise Refused(
            "key_of_other_owner",
            f"The private file {path} belongs to another account (uid {found.st_uid}).",
            "Run this as that account, or make this one the owner.",
        )
    return f"{path.name}: private"


def make_node_key(folder: Path, replace: bool = False) -> str:
    """Make ``node.key`` (ECDSA P-384, OpenSSH form) and ``node.pub``; returns the fingerprint.

    Raises:
        UsageError: ``key_exists``.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_private(folder / "node.key", private, replace)
    write_atomic(folder / "node.pub", public + b" fedsynth-node\n")
    return fingerprint(folder / "node.pub")


def public_key_bytes(path: Path) -> bytes:
    """A node's public key as the coordinator registers it: PEM of the SubjectPublicKeyInfo.

    Args:
        path: ``node.pub`` (OpenSSH public key).

    Raises:
        UsageError: ``node_key_missing``, ``node_key_invalid``.
        Refused: ``private_key_given``: it is a private key, which should never have left its site.
    """
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise Refused(
            "private_key_given",
            f"{path} is a private key.",
            "Take node.pub. A private key that was sent to anybody is spent: make a new one.",
        )
    return _spki(_public(content, path))


def fingerprint(path: Path) -> str:
    """SHA-256 fingerprint of a node's public or private key file, as ``ssh-keygen -lf`` prints it.

    Raises:
        UsageError: ``node_key_missing``, ``node_key_invalid``.
    """
    return _fingerprint(_public(_read(path), path))


def fingerprint_of(public_key: bytes) -> str:
    """Fingerprint of a public key in the form in which SuperLink keeps it (see `public_key_bytes`).

    Raises:
        UsageError: ``node_key_invalid``.
    """
    try:
        key = serialization.load_pem_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise _invalid("The registered key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _invalid("The registered key")
    return _fingerprint(key)


def check_node_key(folder: Path) -> str:
    """Check ``node.key`` and that ``node.pub`` is its public half.

    Raises:
        UsageError: ``node_key_missing``, ``key_missing``, ``node_key_invalid``.
        Refused: ``key_readable_by_others``, ``key_of_other_owner``, ``key_mismatch``.
    """
    check_private(folder / "node.key")
    found = fingerprint(folder / "node.key")
    if fingerprint(folder / "node.pub") != found:
        raise Refused(
            "key_mismatch",
            "node.pub does not belong to node.key.",
            "Write it anew: ssh-keygen -y -f node.key > node.pub",
        )
    return f"node key {found}"


def make_secret(path: Path, replace: bool = False) -> None:
    """Make the secret without which a Flower process hands out no task: 256 random bits.

    Flower takes the file's bytes as they are, so there is no newline at its end.

    Raises:
        UsageError: ``key_exists``.
    """
    write_private(path, secrets.token_urlsafe(_SECRET_BYTES).encode(), replace)


def read_secret(path: Path) -> bytes:
    """The secret's bytes, exactly as Flower reads them.

    Raises:
        UsageError: ``key_missing``; ``secret_too_short``: fewer than 16 bytes.
        Refused: ``key_readable_by_others``, ``key_of_other_owner``.
    """
    check_private(path)
    content = path.read_bytes()
    if len(content) < _LEAST_SECRET_BYTES:
        raise UsageError(
            "secret_too_short",
            f"The secret {path} has fewer than {_LEAST_SECRET_BYTES} bytes.",
            "Make a new one with `fedsynth deploy secret`.",
        )
    return content


def make_runtime_tls(folder: Path, extra_names: Sequence[str] = (), replace: bool = False) -> None:
    """Make ``runtime-ca.crt``, ``runtime.crt`` and ``runtime.key``, by which a site's runner knows its own node.

    The authority's key is thrown away, so nobody can make a second certificate that the runner would trust; a new pair
    comes with a new authority.

    Args:
        folder: the site's ``keys/``.
        extra_names: further names of the node beside this machine's local ones, e.g. of its container.
        replace: whether to replace earlier ones.

    Raises:
        UsageError: ``key_exists``, ``certificate_name_invalid``.
    """
    # One day more than the certificate, which may not outlive its authority.
    ca_cert, ca_key = make_ca("fedsynth local runtime", LONGEST_SERVER_DAYS + 1)
    certificate, key = make_server_certificate(ca_cert, ca_key, [*LOCAL_NAMES, *extra_names], LONGEST_SERVER_DAYS)
    write_private(folder / "runtime.key", key, replace)
    write_atomic(folder / "runtime.crt", certificate)
    write_atomic(folder / "runtime-ca.crt", ca_cert)


def renew_runtime_tls(folder: Path, extra_names: Sequence[str] = ()) -> bool:
    """Make the runtime files anew if they are missing, wrong, or expire within 30 days; returns whether it did.

    To be called before node and runner start: both read the files once.

    Raises:
        UsageError: ``certificate_name_invalid``.
    """
    names = [*LOCAL_NAMES, *extra_names]
    paths = folder / "runtime.crt", folder / "runtime.key", folder / "runtime-ca.crt"
    try:
        for name in names:
            check_certificate(*paths, name)
        check_private(folder / "runtime.key")
    except FedsynthError:  # whatever is wrong with them, a new set mends it
        make_runtime_tls(folder, extra_names, replace=True)
        return True
    return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            "node_key_missing", f"There is no node key {path}.", "Make one with `fedsynth deploy node-key`."
        ) from None
    except OSError as error:
        raise UsageError("node_key_invalid", f"{path} cannot be read: {error.strerror}.") from None


def _public(content: bytes, path: Path) -> ec.EllipticCurvePublicKey:
    try:
        if b"PRIVATE KEY" in content:
            key: object = serialization.load_ssh_private_key(content, password=None).public_key()
        else:
            key = serialization.load_ssh_public_key(content)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _invalid(str(path)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise _invalid(str(path))
    return key


def _invalid(label: str) -> UsageError:
    return UsageError(
        "node_key_invalid",
        f"{label} is no elliptic-curve key (P-256, P-384 or P-521) in OpenSSH form without a passphrase.",
        "Make one with `fedsynth deploy node-key`.",
    )


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
