"""Certificates of a federation: one small certificate authority, and server certificates that it vouches for.

Every site trusts this authority alone, and nothing else trusts it. Profiles follow RFC 5280: an authority that signs
leaves only (path length 0), leaves that are for servers only and name every host in the subject alternative name.
Keys are ECDSA P-384.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsynth.deployment.checks import Doubt
from fedsynth.errors import Refused, UsageError

CA_DAYS = 3650
SERVER_DAYS = 365
LONGEST_SERVER_DAYS = 397  # CA/Browser Forum baseline requirements, 6.3.2
SOON_DAYS = 30
_BACKDATED = timedelta(hours=1)  # a site whose clock is a little behind can use a new certificate at once
_LONGEST_CHAIN = 5
_LONGEST_COMMON_NAME = 64  # RFC 5280, ub-common-name


def make_ca(name: str, days: int = CA_DAYS) -> tuple[bytes, bytes]:
    """A new certificate authority.

    Args:
        name: common name, at most 64 bytes; tells people whose authority it is.
        days: how long it is valid.

    Returns:
        Certificate and private key, both PEM (the key PKCS#8, not encrypted).

    Raises:
        UsageError: ``certificate_name_invalid``, ``certificate_days_invalid``.
    """
    if not 1 <= len(name.encode()) <= _LONGEST_COMMON_NAME:
        raise UsageError("certificate_name_invalid", f"An authority's name has 1 to {_LONGEST_COMMON_NAME} bytes.")
    if days < 1:
        raise UsageError("certificate_days_invalid", "A certificate is valid for one day at least.")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return _pem(certificate), _key_pem(key)


def make_server_certificate(
    ca_cert: bytes, ca_key: bytes, names: Sequence[str], days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """A certificate for a server, with a new private key.

    Args:
        ca_cert: the authority's certificate (PEM).
        ca_key: the authority's private key (PEM).
        names: DNS names and IP addresses under which clients call the server; at least one.
        days: how long it is valid, at most 397 and not longer than the authority.

    Returns:
        Certificate and private key (PEM).

    Raises:
        UsageError: ``certificate_without_name``, ``certificate_name_invalid``, ``certificate_days_invalid``,
            ``ca_unreadable``, ``not_a_ca``, ``key_unreadable``, ``key_mismatch``, ``ca_expires_first``.
    """
    hosts = [_general_name(name) for name in names]
    if not hosts:
        raise UsageError("certificate_without_name", "A server certificate names at least one host or address.")
    if not 1 <= days <= LONGEST_SERVER_DAYS:
        raise UsageError(
            "certificate_days_invalid",
            f"A server certificate is valid for 1 to {LONGEST_SERVER_DAYS} days, not {days}.",
        )
    ca = _parse_certificates(ca_cert, "the authority's certificate", "ca_unreadable")[0]
    if not is_ca(ca):
        raise UsageError("not_a_ca", "The authority's certificate is not one of an authority.")
    signer = _parse_key(ca_key, "the authority's private key")
    if _public_bytes(signer.public_key()) != _public_bytes(ca.public_key()):
        raise UsageError("key_mismatch", "The authority's private key does not belong to its certificate.")
    if ca.not_valid_after_utc < datetime.now(UTC) + timedelta(days=days):
        raise UsageError(
            "ca_expires_first",
            f"The authority expires on {_day(ca.not_valid_after_utc)}, before the certificate would.",
            "Ask for fewer days, or change to a new authority.",
        )
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(_name(names[0][:_LONGEST_COMMON_NAME]), ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_authority_key(ca, signer), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return _pem(certificate), _key_pem(key)


def load_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file, in its order.

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``.
    """
    content = _content(path, "certificate", "certificate", "Put the file that you were given there.")
    return _parse_certificates(content, str(path), "certificate_unreadable")


def load_ca(path: Path) -> list[x509.Certificate]:
    """The authorities of a PEM file: one, or the old and the new one while an authority changes.

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``; ``not_a_ca``: a certificate in it is a
            server's.
    """
    found = load_certificates(path)
    if not all(is_ca(certificate) for certificate in found):
        raise UsageError(
            "not_a_ca", f"{path} holds a server's certificate.", "Put the authority's certificate (ca.crt) there."
        )
    return found


def expiry(path: Path) -> datetime:
    """When the first certificate of a PEM file expires (UTC).

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``.
    """
    return load_certificates(path)[0].not_valid_after_utc


def names_of(certificate: x509.Certificate) -> list[str]:
    """DNS names and IP addresses that a certificate is for; empty if it has no subject alternative name."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether a certificate may vouch for others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def check_certificate(cert_path: Path, key_path: Path, ca_path: Path, name: str) -> str:
    """Check a server's certificate before it serves.

    Args:
        cert_path: the certificate, and after it any intermediate ones (PEM).
        key_path: its private key (PEM).
        ca_path: the authorities that clients trust (PEM).
        name: DNS name or IP address that clients call.

    Returns:
        What it is for and until when.

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``, ``key_missing``, ``key_unreadable``,
            ``not_a_ca``.
        Refused: ``key_mismatch``, ``certificate_not_yet_valid``, ``certificate_expired``, ``certificate_wrong_name``,
            ``untrusted_ca``, ``ca_expired``.
        Doubt: ``certificate_expires_soon``, ``ca_expires_soon``: within 30 days.
    """
    leaf, *others = load_certificates(cert_path)
    if _public_bytes(_load_key(key_path).public_key()) != _public_bytes(leaf.public_key()):
        raise Refused(
            "key_mismatch",
            f"The private key {key_path.name} does not belong to the certificate {cert_path.name}.",
            "Put the pair that was made together there.",
        )
    now = datetime.now(UTC)
    check_dates(leaf, cert_path.name, now)
    ca = _anchor(leaf, others, load_ca(ca_path), cert_path.name, ca_path.name, now)
    if not covers(leaf, name):
        raise Refused(
            "certificate_wrong_name",
            f"The certificate {cert_path.name} is for {', '.join(names_of(leaf)) or 'no name'}, not for {name}.",
            "Make one that names it, or correct the address.",
        )
    check_soon(leaf, cert_path.name, now)
    if ca.not_valid_after_utc - now < timedelta(days=SOON_DAYS):
        raise Doubt(
            "ca_expires_soon",
            f"The authority in {ca_path.name} expires on {_day(ca.not_valid_after_utc)}.",
            "Change to a new authority now: every site needs its certificate before the old one ends.",
        )
    return f"certificate {cert_path.name}: for {name}, until {_day(leaf.not_valid_after_utc)}"


def check_dates(certificate: x509.Certificate, label: str, now: datetime) -> None:
    """Refuse a certificate that is not valid at `now`.

    Raises:
        Refused: ``certificate_not_yet_valid``, ``certificate_expired``.
    """
    if now < certificate.not_valid_before_utc:
        raise Refused(
            "certificate_not_yet_valid",
            f"The certificate {label} is valid from {_minute(certificate.not_valid_before_utc)} on; "
            f"here it is {_minute(now)}.",
            "Check this machine's clock; if it is right, wait or make a new certificate.",
        )
    if now > certificate.not_valid_after_utc:
        raise Refused(
            "certificate_expired",
            f"The certificate {label} expired on {_minute(certificate.not_valid_after_utc)}; here it is {_minute(now)}.",
            "Who runs the server renews it with `fedsynth deploy renew`; if the date here is wrong, set the clock.",
        )


def check_soon(certificate: x509.Certificate, label: str, now: datetime) -> None:
    """Doubt a certificate that expires within 30 days.

    Raises:
        Doubt: ``certificate_expires_soon``.
    """
    left = certificate.not_valid_after_utc - now
    if left < timedelta(days=SOON_DAYS):
        raise Doubt(
            "certificate_expires_soon",
            f"The certificate {label} expires in {left.days} days, on {_day(certificate.not_valid_after_utc)}.",
            "Who runs the server renews it with `fedsynth deploy renew`.",
        )


def covers(certificate: x509.Certificate, name: str) -> bool:
    """Whether a certificate is for `name`, a DNS name or an IP address (RFC 6125: a wildcard stands for one label)."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    try:
        return ip_address(name) in found.get_values_for_type(x509.IPAddress)
    except ValueError:
        asked = name.lower().rstrip(".")
    patterns = [pattern.lower().rstrip(".") for pattern in found.get_values_for_type(x509.DNSName)]
    return asked in patterns or any(
        pattern.startswith("*.") and asked.partition(".")[2] == pattern[2:] for pattern in patterns
    )


def _anchor(
    leaf: x509.Certificate,
    others: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
    label: str,
    ca_label: str,
    now: datetime,
) -> x509.Certificate:
    """The authority that vouches for `leaf`, directly or over the intermediate certificates in `others`."""
    current = leaf
    for _ in range(_LONGEST_CHAIN):
        issuers = [ca for ca in authorities if _issued(current, ca)]
        valid = [ca for ca in issuers if ca.not_valid_before_utc <= now <= ca.not_valid_after_utc]
        if valid:
            return max(valid, key=lambda ca: ca.not_valid_after_utc)
        if issuers:
            raise Refused(
                "ca_expired",
                f"The authority in {ca_label} was valid until {_minute(issuers[0].not_valid_after_utc)}; "
                f"here it is {_minute(now)}.",
                "Change to a new authority; if the date here is wrong, set the clock.",
            )
        between = [other for other in others if is_ca(other) and _issued(current, other)]
        if not between:
            break
        current = between[0]
        check_dates(current, f"in the chain of {label}", now)
    raise Refused(
        "untrusted_ca",
        f"The certificate {label} was not issued by an authority in {ca_label}.",
        "Put the authority's certificate there that vouches for it, or make a certificate with that authority.",
    )


def _issued(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key(ca: x509.Certificate, signer: CertificateIssuerPrivateKeyTypes) -> x509.AuthorityKeyIdentifier:
    try:  # an authority that was made elsewhere may name its key in its own way
        found = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        labels = name.rstrip(".").split(".")
    if len(name) > 253 or not all(_is_label(label, first=number == 0) for number, label in enumerate(labels)):
        raise UsageError(
            "certificate_name_invalid",
            f"{name!r} is neither a DNS name nor an IP address.",
            "Give the host alone, without a scheme or port; names in other scripts in their xn-- form.",
        )
    return x509.DNSName(name.rstrip("."))


def _is_label(label: str, first: bool) -> bool:
    if first and label == "*":
        return True
    plain = label.replace("-", "").replace("_", "")  # container networks have names with underscores
    return (
        1 <= len(label) <= 63 and plain.isascii() and plain.isalnum() and not label.startswith("-") and label[-1] != "-"
    )


def _load_key(path: Path) -> CertificateIssuerPrivateKeyTypes:
    return _parse_key(_content(path, "key", "private key", "Put it there, or make a new pair."), str(path))


def _content(path: Path, code: str, what: str, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{code}_missing", f"There is no {what} {path}.", remedy) from None
    except OSError as error:
        raise UsageError(f"{code}_unreadable", f"{path} cannot be read: {error.strerror}.") from None


def _parse_key(content: bytes, label: str) -> CertificateIssuerPrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(content, password=None)  # type: ignore[return-value]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(
            "key_unreadable", f"{label} is no private key in PEM form, or is locked with a passphrase."
        ) from None


def _parse_certificates(content: bytes, label: str, code: str) -> list[x509.Certificate]:
    if not content.isascii():  # Flower reads the file as ASCII
        raise UsageError(code, f"{label} holds characters outside ASCII.", "Keep only the PEM blocks in it.")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise UsageError(code, f"{label} holds no certificate in PEM form.") from None


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
