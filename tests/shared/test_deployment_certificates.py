"""Certificates that were made are accepted by OpenSSL, and each fault is named by its own code."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsynth.deployment.certificates import (
    check_certificate,
    covers,
    expiry,
    load_ca,
    load_certificates,
    make_ca,
    make_server_certificate,
    names_of,
)
from fedsynth.deployment.checks import Doubt
from fedsynth.errors import FedsynthError

NAMES = ["gateway.example", "127.0.0.1"]


@pytest.fixture(scope="module")
def ca() -> tuple[bytes, bytes]:
    return make_ca("a study's authority")


@pytest.fixture
def folder(tmp_path: Path, ca: tuple[bytes, bytes]) -> Path:
    certificate, key = make_server_certificate(*ca, NAMES)
    return lay(tmp_path, certificate, key, ca[0])


def lay(folder: Path, certificate: bytes, key: bytes, authority: bytes) -> Path:
    (folder / "server.crt").write_bytes(certificate)
    (folder / "server.key").write_bytes(key)
    (folder / "ca.crt").write_bytes(authority)
    return folder


def look(folder: Path, name: str = "gateway.example") -> str:
    return check_certificate(folder / "server.crt", folder / "server.key", folder / "ca.crt", name)


def code_of(folder: Path, name: str = "gateway.example") -> str:
    with pytest.raises(FedsynthError) as caught:
        look(folder, name)
    assert caught.value.hint
    return caught.value.code


def dated(
    ca: tuple[bytes, bytes], start: timedelta, end: timedelta, names: Sequence[str] = ("gateway.example",)
) -> tuple[bytes, bytes]:
    """A server certificate of any dates, which `make_server_certificate` would not make."""
    signer = serialization.load_pem_private_key(ca[1], None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    authority = x509.load_pem_x509_certificate(ca[0])
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway.example")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


def test_openssl_accepts_what_was_made_under_its_strictest_rules(folder: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(folder / "ca.crt")]
    for name in (["-verify_hostname", "gateway.example"], ["-verify_ip", "127.0.0.1"]):
        done = subprocess.run([*command, *name, str(folder / "server.crt")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    wrong = [*command, "-verify_hostname", "other.example", str(folder / "server.crt")]
    assert subprocess.run(wrong, capture_output=True).returncode != 0


def test_the_profile(folder: Path) -> None:
    authority, leaf = load_ca(folder / "ca.crt")[0], load_certificates(folder / "server.crt")[0]
    limits = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical and limits.value.ca and limits.value.path_length == 0
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert isinstance(authority.public_key(), ec.EllipticCurvePublicKey)
    assert names_of(leaf) == NAMES
    purposes = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [x509.ExtendedKeyUsageOID.SERVER_AUTH]
    year = expiry(folder / "server.crt") - datetime.now(UTC)
    assert timedelta(days=364) < year <= timedelta(days=365)
    assert expiry(folder / "ca.crt") - datetime.now(UTC) > timedelta(days=3640)


def test_a_good_one_passes_under_each_of_its_names(folder: Path) -> None:
    for name in NAMES:
        assert f"for {name}, until " in look(folder, name)


def test_an_expired_one(tmp_path: Path, ca: tuple[bytes, bytes]) -> None:
    pair = dated(ca, timedelta(days=-10), timedelta(minutes=-1))
    assert code_of(lay(tmp_path, *pair, ca[0])) == "certificate_expired"


def test_one_that_is_not_valid_yet(tmp_path: Path, ca: tuple[bytes, bytes]) -> None:
    pair = dated(ca, timedelta(minutes=5), timedelta(days=90))
    assert code_of(lay(tmp_path, *pair, ca[0])) == "certificate_not_yet_valid"


def test_one_that_expires_soon_is_doubted(tmp_path: Path, ca: tuple[bytes, bytes]) -> None:
    lay(tmp_path, *make_server_certificate(*ca, NAMES, days=29), ca[0])
    with pytest.raises(Doubt) as caught:
        look(tmp_path)
    assert caught.value.code == "certificate_expires_soon"
    lay(tmp_path, *make_server_certificate(*ca, NAMES, days=31), ca[0])
    look(tmp_path)


def test_a_wrong_name(folder: Path) -> None:
    assert code_of(folder, "other.example") == "certificate_wrong_name"
    assert code_of(folder, "127.0.0.2") == "certificate_wrong_name"


def test_a_key_of_another_certificate(folder: Path, ca: tuple[bytes, bytes]) -> None:
    (folder / "server.key").write_bytes(make_server_certificate(*ca, NAMES)[1])
    assert code_of(folder) == "key_mismatch"


def test_an_authority_of_the_same_name_and_another_key(folder: Path) -> None:
    (folder / "ca.crt").write_bytes(make_ca("a study's authority")[0])
    assert code_of(folder) == "untrusted_ca"


def test_a_server_certificate_in_place_of_the_authority(folder: Path) -> None:
    (folder / "ca.crt").write_bytes((folder / "server.crt").read_bytes())
    assert code_of(folder) == "not_a_ca"


def test_an_authority_that_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsynth.deployment import certificates

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) - timedelta(days=20)

    with monkeypatch.context() as then:
        then.setattr(certificates, "datetime", Earlier)
        old = make_ca("an old authority", days=10)
    pair = dated(old, timedelta(days=-10), timedelta(days=90))
    assert code_of(lay(tmp_path, *pair, old[0])) == "ca_expired"


def test_an_authority_that_expires_soon_is_doubted(tmp_path: Path) -> None:
    short = make_ca("a short authority", days=20)
    pair = dated(short, timedelta(days=-1), timedelta(days=90))
    lay(tmp_path, *pair, short[0])
    with pytest.raises(Doubt) as caught:
        look(tmp_path)
    assert caught.value.code == "ca_expires_soon"


def test_a_bundle_of_two_authorities_accepts_certificates_of_both(tmp_path: Path, ca: tuple[bytes, bytes]) -> None:
    new = make_ca("the next authority")
    for issuer in (ca, new):
        look(lay(tmp_path, *make_server_certificate(*issuer, NAMES), ca[0] + new[0]))


def test_an_intermediate_authority_is_followed(tmp_path: Path) -> None:
    """A hospital group's own authority usually signs through an intermediate one, sent along with the certificate."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    middle_cert, middle_key = make_ca("an intermediate authority")
    middle = x509.load_pem_x509_certificate(middle_cert)
    root_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a group's root")])

    def signed(subject: x509.Name, key: object) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(key)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=4000))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(root_key, hashes.SHA256())
        )

    pem = serialization.Encoding.PEM
    root = signed(root_name, root_key.public_key()).public_bytes(pem)
    crossed = signed(middle.subject, middle.public_key()).public_bytes(pem)
    leaf, key = make_server_certificate(middle_cert, middle_key, NAMES)
    look(lay(tmp_path, leaf + crossed, key, root))
    assert code_of(lay(tmp_path, leaf, key, root)) == "untrusted_ca"


def test_files_that_are_missing_or_something_else(folder: Path) -> None:
    for name, missing, garbled in (
        ("server.crt", "certificate_missing", "certificate_unreadable"),
        ("server.key", "key_missing", "key_unreadable"),
        ("ca.crt", "certificate_missing", "certificate_unreadable"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(FedsynthError) as caught:
            look(folder)
        assert caught.value.code == missing
        (folder / name).write_bytes(b"not PEM")
        with pytest.raises(FedsynthError) as caught:
            look(folder)
        assert caught.value.code == garbled
        (folder / name).write_bytes(content)
    look(folder)


@pytest.mark.parametrize(
    ("names", "days", "code"),
    [
        ([], 365, "certificate_without_name"),
        (["https://gateway.example"], 365, "certificate_name_invalid"),
        (["gateway.example:8443"], 365, "certificate_name_invalid"),
        (["-gateway.example"], 365, "certificate_name_invalid"),
        ([""], 365, "certificate_name_invalid"),
        (["krankenhäuser.example"], 365, "certificate_name_invalid"),
        (NAMES, 398, "certificate_days_invalid"),
        (NAMES, 0, "certificate_days_invalid"),
    ],
)
def test_what_is_not_made(ca: tuple[bytes, bytes], names: list[str], days: int, code: str) -> None:
    with pytest.raises(FedsynthError) as caught:
        make_server_certificate(*ca, names, days)
    assert caught.value.code == code


def test_not_made_by_a_wrong_or_short_lived_authority(ca: tuple[bytes, bytes]) -> None:
    leaf, leaf_key = make_server_certificate(*ca, NAMES)
    other = make_ca("another authority")
    short = make_ca("a short authority", days=100)
    for cert, key, code in (
        (leaf, leaf_key, "not_a_ca"),
        (ca[0], other[1], "key_mismatch"),
        (b"nothing", ca[1], "ca_unreadable"),
        (ca[0], b"nothing", "key_unreadable"),
        (*short, "ca_expires_first"),
    ):
        with pytest.raises(FedsynthError) as caught:
            make_server_certificate(cert, key, NAMES)
        assert caught.value.code == code


def test_names_are_compared_as_browsers_do(ca: tuple[bytes, bytes]) -> None:
    names = ["Gateway.Example", "*.sites.example", "2001:db8::1"]
    certificate = x509.load_pem_x509_certificate(make_server_certificate(*ca, names)[0])
    for name in ("gateway.example", "GATEWAY.example.", "a.sites.example", "2001:db8:0::1"):
        assert covers(certificate, name)
    for name in ("sites.example", "a.b.sites.example", "example", "2001:db8::2", ""):
        assert not covers(certificate, name)
