"""Node keys are what Flower and OpenSSH read, and private files stay private."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedsynth.deployment import keys
from fedsynth.deployment.certificates import check_certificate, make_ca, make_server_certificate
from fedsynth.deployment.keys import (
    check_node_key,
    check_private,
    fingerprint,
    fingerprint_of,
    make_node_key,
    make_runtime_tls,
    make_secret,
    public_key_bytes,
    read_secret,
    renew_runtime_tls,
    write_private,
)
from fedsynth.errors import FedsynthError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_openssh_reads_the_key_and_prints_the_same_fingerprint(tmp_path: Path) -> None:
    made = make_node_key(tmp_path)
    for name in ("node.key", "node.pub"):
        said = subprocess.run(["ssh-keygen", "-lf", str(tmp_path / name)], capture_output=True, text=True, check=True)
        assert said.stdout.split()[:2] == ["384", made]
        assert fingerprint(tmp_path / name) == made
    again = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "node.key")], capture_output=True, text=True, check=True
    )
    assert again.stdout.split()[:2] == (tmp_path / "node.pub").read_text().split()[:2]
    assert mode(tmp_path / "node.key") == 0o600
    assert check_node_key(tmp_path) == f"node key {made}"


def test_flower_reads_the_key_as_its_node_and_its_registration_do(tmp_path: Path) -> None:
    import argparse

    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    made = make_node_key(tmp_path)
    registered = public_key_bytes(tmp_path / "node.pub")
    assert registered == try_load_public_key(tmp_path / "node.pub")
    options = argparse.Namespace(auth_supernode_private_key=str(tmp_path / "node.key"), auth_supernode_public_key=None)
    pair = _try_setup_client_authentication(options)
    assert pair is not None and public_key_to_bytes(pair[1]) == registered
    assert fingerprint_of(registered) == made


def test_a_key_that_ssh_keygen_made_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)]
    subprocess.run(make, check=True)
    (tmp_path / "node.key.pub").rename(tmp_path / "node.pub")
    assert check_node_key(tmp_path).startswith("node key SHA256:")


def test_keys_that_are_not_taken(tmp_path: Path) -> None:
    make_node_key(tmp_path)
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "pkcs8").write_bytes(pem)
    (tmp_path / "ed25519.pub").write_bytes(
        edwards.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    (tmp_path / "locked").write_bytes(
        serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    (tmp_path / "text").write_text("a key")
    for name in ("pkcs8", "ed25519.pub", "locked", "text"):
        with pytest.raises(FedsynthError) as caught:
            fingerprint(tmp_path / name)
        assert caught.value.code == "node_key_invalid"
    with pytest.raises(FedsynthError) as caught:
        public_key_bytes(tmp_path / "node.key")
    assert caught.value.code == "private_key_given"
    with pytest.raises(FedsynthError) as caught:
        public_key_bytes(tmp_path / "absent.pub")
    assert caught.value.code == "node_key_missing"
    for registered in (b"nothing", edwards.public_bytes(*_SPKI)):
        with pytest.raises(FedsynthError) as caught:
            fingerprint_of(registered)
        assert caught.value.code == "node_key_invalid"


_SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def test_a_public_key_of_another_node_is_noticed(tmp_path: Path) -> None:
    make_node_key(tmp_path)
    make_node_key(tmp_path / "other")
    (tmp_path / "node.pub").write_bytes((tmp_path / "other" / "node.pub").read_bytes())
    with pytest.raises(FedsynthError) as caught:
        check_node_key(tmp_path)
    assert caught.value.code == "key_mismatch"


def test_nothing_private_is_overwritten_unless_asked(tmp_path: Path) -> None:
    first = make_node_key(tmp_path)
    make_secret(tmp_path / "superexec.secret")
    make_runtime_tls(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for make in (
        lambda: make_node_key(tmp_path),
        lambda: make_secret(tmp_path / "superexec.secret"),
        lambda: make_runtime_tls(tmp_path),
        lambda: write_private(tmp_path / "node.key", b""),
    ):
        with pytest.raises(FedsynthError) as caught:
            make()
        assert caught.value.code == "key_exists"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert make_node_key(tmp_path, replace=True) != first


def test_private_from_the_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is written under its temporary name, and whatever the umask; a failure leaves nothing."""
    seen: list[int] = []

    def full(descriptor: int) -> None:
        seen.extend(mode(path) for path in tmp_path.iterdir())
        raise OSError(28, "no space left")

    monkeypatch.setattr(keys.os, "fsync", full)
    before = os.umask(0)
    try:
        with pytest.raises(OSError, match="no space"):
            write_private(tmp_path / "new" / ".." / "node.key", b"secret")
    finally:
        os.umask(before)
    assert 0o600 in seen
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_private_file_that_others_can_use_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "node.key"
    write_private(path, b"secret")
    assert check_private(path) == "node.key: private"
    path.chmod(bits)
    with pytest.raises(FedsynthError) as caught:
        check_private(path)
    assert caught.value.code == "key_readable_by_others" and "chmod 600" in caught.value.hint


def test_a_private_file_of_another_account_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.key"
    write_private(path, b"secret")
    owner = path.stat().st_uid
    monkeypatch.setattr(keys.os, "geteuid", lambda: owner + 1)
    with pytest.raises(FedsynthError) as caught:
        check_private(path)
    assert caught.value.code == "key_of_other_owner"
    monkeypatch.setattr(keys.os, "geteuid", lambda: 0)
    check_private(path)
    with pytest.raises(FedsynthError) as caught:
        check_private(tmp_path / "absent")
    assert caught.value.code == "key_missing"


def test_flower_reads_the_very_secret(tmp_path: Path) -> None:
    from flwr.supercore.auth.superexec_secret import load_superexec_auth_secret

    path = tmp_path / "superexec.secret"
    make_secret(path)
    assert load_superexec_auth_secret(secret_file=str(path)) == read_secret(path)
    assert read_secret(path) == read_secret(path).strip() and len(read_secret(path)) == 43
    assert mode(path) == 0o600
    first = read_secret(path)
    make_secret(path, replace=True)
    assert read_secret(path) != first


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 15])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path: Path, content: bytes) -> None:
    write_private(tmp_path / "superexec.secret", content)
    with pytest.raises(FedsynthError) as caught:
        read_secret(tmp_path / "superexec.secret")
    assert caught.value.code == "secret_too_short"


def test_the_local_pair_serves_local_names_and_is_renewed_when_due(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("runtime.crt", "runtime.key", "runtime-ca.crt")]
    assert renew_runtime_tls(tmp_path, ["node_1"])
    for name in ("localhost", "127.0.0.1", "::1", "node_1"):
        check_certificate(*paths, name)
    check_private(tmp_path / "runtime.key")
    made = paths[0].read_bytes()
    assert not renew_runtime_tls(tmp_path, ["node_1"]) and paths[0].read_bytes() == made
    assert renew_runtime_tls(tmp_path, ["another"])  # a new name
    ca = make_ca("soon")
    certificate, key = make_server_certificate(*ca, ["localhost", "127.0.0.1", "::1"], days=10)
    for path, content in zip(paths, (certificate, key, ca[0]), strict=True):
        path.write_bytes(content)
    assert renew_runtime_tls(tmp_path)  # it would have expired in ten days
    check_certificate(*paths, "localhost")
