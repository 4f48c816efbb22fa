"""SHA256SUMS and its signature, judged by sha256sum and openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth_server.release.manifest import (
    fingerprint,
    generate_key,
    load_key,
    load_public_key,
    manifest_faults,
    read_sums,
    signature_is_valid,
    write_manifest,
)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
needs_sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")

OPENSSL = [
    *("openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "release.pub.pem"),
    *("-sigfile", "SHA256SUMS.sig", "-in", "SHA256SUMS"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed folder of two files."""
    folder = tmp_path / "signed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a file.txt").write_text("one")
    (folder / "sub" / "b.bin").write_bytes(bytes(1000))
    generate_key(tmp_path / "key.pem")
    write_manifest(folder, load_key(tmp_path / "key.pem"))
    return folder


def test_signing_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    printed = generate_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert fingerprint(load_key(path).public_key()) == printed
    before = path.read_bytes()
    with pytest.raises(Refused) as refusal:
        generate_key(path)
    assert refusal.value.code == "signing_key_exists"
    assert path.read_bytes() == before


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    generate_key(path)
    path.chmod(0o640)
    with pytest.raises(UsageError) as refusal:
        load_key(path)
    assert refusal.value.code == "signing_key_exposed"


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(UsageError) as refusal:
        load_key(path)
    assert refusal.value.code == "signing_key_invalid"
    with pytest.raises(UsageError) as refusal:
        load_public_key(path)
    assert refusal.value.code == "public_key_invalid"


@needs_sha256sum
def test_sha256sum_agrees(folder: Path) -> None:
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder).returncode == 0
    (folder / "a file.txt").write_text("two")
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder).returncode != 0


@needs_openssl
def test_openssl_agrees(folder: Path) -> None:
    assert subprocess.run(OPENSSL, cwd=folder).returncode == 0
    with (folder / "SHA256SUMS").open("a") as stream:
        stream.write(f"{'0' * 64}  new\n")
    assert subprocess.run(OPENSSL, cwd=folder).returncode != 0


@needs_openssl
def test_openssl_prints_the_fingerprint(folder: Path) -> None:
    import hashlib

    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", "release.pub.pem", "-outform", "DER"], cwd=folder, capture_output=True
    ).stdout
    assert hashlib.sha256(der).hexdigest() == fingerprint(load_public_key(folder / "release.pub.pem"))


def test_the_list_is_sorted_and_complete(folder: Path) -> None:
    assert list(read_sums(folder)) == ["a file.txt", "release.pub.pem", "sub/b.bin"]
    assert manifest_faults(folder) == []
    assert len((folder / "SHA256SUMS.sig").read_bytes()) == 64


def test_every_difference_is_named(folder: Path) -> None:
    (folder / "sub" / "b.bin").unlink()
    (folder / "a file.txt").write_text("two")
    (folder / "sub" / "SHA256SUMS").write_text("not the one at the top")
    assert manifest_faults(folder) == ["missing: sub/b.bin", "not listed: sub/SHA256SUMS", "altered: a file.txt"]


@pytest.mark.parametrize("target", ["/etc/hostname", "a file.txt"])
def test_links_are_refused_wherever_they_lead(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(Refused, match="link is a link"):
        manifest_faults(folder)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "sub", tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused):
        manifest_faults(folder)


@pytest.mark.parametrize(
    "text",
    [
        f"{'0' * 64}  ../outside\n",
        f"{'0' * 64}  /etc/passwd\n",
        f"{'0' * 64}  twice\n{'1' * 64}  twice\n",
        f"{'0' * 63}  short\n",
        f"{'0' * 64}  no line break",
        f"\\{'0' * 64}  escaped\\nname\n",
    ],
)
def test_a_malformed_list_is_refused(folder: Path, text: str) -> None:
    (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(Refused) as refusal:
        read_sums(folder)
    assert refusal.value.code == "manifest_malformed"


def test_another_key_did_not_sign_it(folder: Path, tmp_path: Path) -> None:
    generate_key(tmp_path / "other.pem")
    assert signature_is_valid(folder, load_public_key(folder / "release.pub.pem"))
    assert not signature_is_valid(folder, load_key(tmp_path / "other.pem").public_key())


@pytest.mark.parametrize("name", ["SHA256SUMS", "SHA256SUMS.sig"])
def test_a_missing_part_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FedsynthError, match=f"has no {name}"):
        signature_is_valid(folder, load_public_key(folder / "release.pub.pem"))
