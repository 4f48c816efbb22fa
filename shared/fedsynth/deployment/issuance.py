"""Making and renewing the key material of a study's or a site's folder.

A study's folder holds ``keys/`` (what its processes need) and, until it is carried away, ``ca/`` (the authority, whose
private key belongs on a medium in a safe). What is replaced is kept in ``keys/old/`` under the day it expires.

Sites trust the authority only, so a new server certificate concerns nobody but the coordinator. A new *authority* takes
three steps: the sites get old and new together (`begin_ca`), the servers change over (`switch_ca`), the old one is
dropped (`finish_ca`). At no moment does a site meet a certificate that it does not trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsynth.deployment.certificates import (
    CA_DAYS,
    SERVER_DAYS,
    SOON_DAYS,
    check_certificate,
    is_ca,
    load_ca,
    load_certificates,
    make_ca,
    make_server_certificate,
    names_of,
)
from fedsynth.deployment.checks import Doubt
from fedsynth.deployment.keys import (
    LOCAL_NAMES,
    check_private,
    fingerprint,
    make_node_key,
    make_runtime_tls,
    make_secret,
    write_private,
)
from fedsynth.errors import Refused, UsageError
from fedsynth.files import write_atomic

_SERVERS = ("gateway", "superlink")
_ENDINGS = (".crt", ".pem")
_OLD = "old"


@dataclass(frozen=True)
class Authority:
    """Where a certificate authority lies."""

    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes]:
        """Certificate and private key (PEM).

        Raises:
            UsageError: ``certificate_missing``, ``certificate_unreadable``, ``not_a_ca``, ``key_missing``.
            Refused: ``key_readable_by_others``, ``key_of_other_owner``.
        """
        load_ca(self.certificate)
        check_private(self.key)
        return self.certificate.read_bytes(), self.key.read_bytes()

    @property
    def next(self) -> Authority:
        """The one that is to follow it, beside it."""
        return Authority(self.certificate.with_name("ca-next.crt"), self.key.with_name("ca-next.key"))


@dataclass(frozen=True)
class Found:
    """A certificate in a file.

    Attributes:
        path: the file.
        subject: whose it is.
        authority: whether it vouches for others.
        names: hosts that it is for.
        expires: until when (UTC).
        days_left: whole days until then; negative when it is past.
        sha256: fingerprint, to compare by telephone.
    """

    path: Path
    subject: str
    authority: bool
    names: list[str]
    expires: datetime
    days_left: int
    sha256: str

    @property
    def state(self) -> str:
        """``expired``, ``soon`` (within 30 days) or ``ok``."""
        if self.expires < datetime.now(UTC):
            return "expired"
        return "soon" if self.days_left < SOON_DAYS else "ok"


def home(folder: Path) -> Authority:
    """The authority that lies in a study's own folder."""
    return Authority(folder / "ca" / "ca.crt", folder / "ca" / "ca.key")


def issue_study(
    folder: Path,
    gateway_names: Sequence[str],
    superlink_names: Sequence[str] = (),
    authority: Authority | None = None,
    days: int = SERVER_DAYS,
    name: str = "",
) -> Authority:
    """Make all that a coordinator needs: authority, certificates of gateway and SuperLink, the runner's secret.

    Args:
        folder: the study's folder.
        gateway_names: DNS names and IP addresses under which sites reach the gateway.
        superlink_names: names of SuperLink beside this machine's local ones, for a container network.
        authority: one that exists already; None makes one in ``ca/``.
        days: how long the server certificates are valid.
        name: name of a new authority; tells of the day if empty.

    Raises:
        UsageError: ``key_exists``: there is material already, and none of it was touched; and as `make_ca`,
            `make_server_certificate`, `Authority.read`.
        Refused: as `Authority.read`.
    """
    keys, own = folder / "keys", home(folder)
    fresh = [keys / "ca.crt", keys / "superexec.secret"]
    fresh += [keys / f"{server}.{ending}" for server in _SERVERS for ending in ("crt", "key")]
    _absent([*fresh, own.certificate, own.key] if authority is None else fresh)
    ca_cert, ca_key = make_ca(name or _dated_name(), CA_DAYS) if authority is None else authority.read()
    named = {"gateway": list(gateway_names), "superlink": [*LOCAL_NAMES, *superlink_names]}
    pairs = {server: make_server_certificate(ca_cert, ca_key, names, days) for server, names in named.items()}
    if authority is None:
        write_private(own.key, ca_key)
        write_atomic(own.certificate, ca_cert)
    for server, (certificate, key) in pairs.items():
        write_private(keys / f"{server}.key", key)
        write_atomic(keys / f"{server}.crt", certificate)
    write_atomic(keys / "ca.crt", ca_cert)
    make_secret(keys / "superexec.secret")
    return authority or own


def renew_servers(
    folder: Path,
    authority: Authority,
    gateway_names: Sequence[str] = (),
    superlink_names: Sequence[str] = (),
    days: int = SERVER_DAYS,
) -> list[Path]:
    """New certificates and keys for gateway and SuperLink; returns where the old ones were put.

    Args:
        folder: the study's folder.
        authority: who vouches; sites must trust it already.
        gateway_names: new names of the gateway; those of its present certificate if empty.
        superlink_names: new names of SuperLink beside the local ones; those of its present certificate if empty.
        days: how long they are valid.

    Raises:
        UsageError: as `make_server_certificate`, `Authority.read`; ``certificate_missing``: there is none to renew.
        Refused: ``authority_not_trusted``: the authority is not among those in ``keys/ca.crt``; as `Authority.read`.
    """
    keys = folder / "keys"
    ca_cert, ca_key = authority.read()
    if load_ca(authority.certificate)[0] not in load_ca(keys / "ca.crt"):
        raise Refused(
            "authority_not_trusted",
            f"The authority {authority.certificate} is not among those of {keys / 'ca.crt'}, which sites trust.",
            "Take the authority that made the present certificates, or begin a change: --what ca-begin.",
        )
    asked = {"gateway": list(gateway_names), "superlink": [*LOCAL_NAMES, *superlink_names] if superlink_names else []}
    present = [server for server in _SERVERS if (keys / f"{server}.crt").is_file()]
    if not present:
        raise UsageError(
            "certificate_missing", f"{keys} holds no certificate to renew.", "See `fedsynth deploy certs`."
        )
    pairs = {
        server: make_server_certificate(
            ca_cert, ca_key, asked[server] or names_of(load_certificates(keys / f"{server}.crt")[0]), days
        )
        for server in present
    }
    aside = []
    for server, (certificate, key) in pairs.items():
        aside += _set_aside(keys / f"{server}.crt", keys / f"{server}.key")
        write_private(keys / f"{server}.key", key, replace=True)
        write_atomic(keys / f"{server}.crt", certificate)
    return aside


def begin_ca(folder: Path, authority: Authority, name: str = "") -> Authority:
    """Make the next authority and let ``keys/ca.crt`` hold both; that file goes to every site.

    Raises:
        UsageError: ``key_exists``: a change was begun already; as `make_ca`, `load_ca`.
    """
    trusted = folder / "keys" / "ca.crt"
    load_ca(trusted)
    following = authority.next
    _absent([following.certificate, following.key])
    certificate, key = make_ca(name or _dated_name(), CA_DAYS)
    write_private(following.key, key)
    write_atomic(following.certificate, certificate)
    before = trusted.read_bytes()
    _set_aside(trusted)
    write_atomic(trusted, before.rstrip(b"\n") + b"\n" + certificate)
    return following


def switch_ca(folder: Path, authority: Authority, days: int = SERVER_DAYS) -> list[Path]:
    """Let the next authority vouch for the servers and take the place of the present one; returns what was put aside.

    Raises:
        UsageError: ``ca_change_not_begun``; as `renew_servers`.
        Refused: as `renew_servers`.
    """
    following = authority.next
    if not following.certificate.is_file():
        raise UsageError(
            "ca_change_not_begun", f"There is no {following.certificate}.", "Begin the change with --what ca-begin."
        )
    aside = renew_servers(folder, following, days=days)
    aside += _set_aside(authority.certificate, *([authority.key] if authority.key.is_file() else []))
    following.key.replace(authority.key)
    following.certificate.replace(authority.certificate)
    return aside


def finish_ca(folder: Path, authority: Authority) -> list[Path]:
    """Let ``keys/ca.crt`` hold the present authority alone; returns where the bundle was put.

    Raises:
        UsageError: ``ca_change_not_switched``; as `load_ca`, `check_certificate`.
        Refused: ``untrusted_ca`` and others of `check_certificate`: a server still has a certificate of the old one.
    """
    keys = folder / "keys"
    if authority.next.certificate.is_file():
        raise UsageError(
            "ca_change_not_switched",
            "The servers have not changed to the next authority yet.",
            "First: --what ca-switch.",
        )
    for server in _SERVERS:
        path = keys / f"{server}.crt"
        if path.is_file():
            try:
                check_certificate(path, path.with_suffix(".key"), authority.certificate, names_of_file(path)[0])
            except Doubt:  # that it expires soon is no reason to trust the old authority any longer
                continue
    aside = _set_aside(keys / "ca.crt")
    write_atomic(keys / "ca.crt", authority.certificate.read_bytes())
    return aside


def renew_node_key(folder: Path) -> tuple[str, list[Path]]:
    """A new node key for a site; returns its fingerprint and where the old one was put.

    The node cannot join until the coordinator has registered the new key in place of the old one.

    Raises:
        UsageError: ``node_key_missing``, ``node_key_invalid``.
    """
    keys = folder / "keys"
    fingerprint(keys / "node.key")
    aside = _set_aside(keys / "node.pub", keys / "node.key")
    return make_node_key(keys, replace=True), aside


def renew_runtime(folder: Path) -> list[Path]:
    """A new local certificate for a site's node, with the names of the present one; returns where that was put.

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``.
    """
    keys = folder / "keys"
    names = [name for name in names_of_file(keys / "runtime.crt") if name not in LOCAL_NAMES]
    aside = _set_aside(keys / "runtime.crt", keys / "runtime.key")
    make_runtime_tls(keys, names, replace=True)
    return aside


def names_of_file(path: Path) -> list[str]:
    """The hosts that the first certificate of a file is for.

    Raises:
        UsageError: ``certificate_missing``, ``certificate_unreadable``, ``certificate_without_name``.
    """
    found = names_of(load_certificates(path)[0])
    if not found:
        raise UsageError("certificate_without_name", f"{path} names no host.", "Make one with `fedsynth deploy`.")
    return found


def survey(paths: Sequence[Path]) -> list[Found]:
    """Every certificate in files, and in folders with what is below them; what was put aside as old is left out.

    Raises:
        UsageError: ``no_certificates``, ``certificate_missing``, ``certificate_unreadable``.
    """
    found = [_found(file, each) for path in paths for file in _files(path) for each in load_certificates(file)]
    if not found:
        raise UsageError(
            "no_certificates", "There are no certificates there.", "Name a file, or a study's or site's folder."
        )
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = (file for ending in _ENDINGS for file in path.rglob(f"*{ending}"))
    return sorted(file for file in below if _OLD not in file.relative_to(path).parts)


def _found(path: Path, certificate: x509.Certificate) -> Found:
    expires = certificate.not_valid_after_utc
    digest = certificate.fingerprint(hashes.SHA256()).hex(":").upper()
    left = (expires - datetime.now(UTC)) // timedelta(days=1)
    subject = certificate.subject.rfc4514_string()
    return Found(path, subject, is_ca(certificate), names_of(certificate), expires, left, digest)


def _dated_name() -> str:
    """So that people can tell two authorities of one study apart."""
    return f"fedsynth study {datetime.now(UTC):%Y-%m-%d}"


def _absent(paths: Sequence[Path]) -> None:
    there = [path for path in paths if path.exists()]
    if there:
        raise UsageError(
            "key_exists",
            f"{there[0]} exists already; nothing was changed.",
            "Renew with `fedsynth deploy renew`, or choose another folder.",
        )


def _set_aside(first: Path, *others: Path) -> list[Path]:
    """Copy a file, and what belongs to it, into ``old/``, under the day on which its certificate expires.

    What is no certificate is put under the present moment: until then it was used.
    """
    if first.suffix in _ENDINGS:
        certificate = load_certificates(first)[0]
        mark = f"until-{certificate.not_valid_after_utc:%Y-%m-%d}-{certificate.serial_number:x}"[:25]
    else:
        mark = f"used-until-{datetime.now(UTC):%Y-%m-%dT%H%M%S}"
    written = []
    for path in (first, *others):
        copy = path.parent / _OLD / f"{path.stem}.{mark}{path.suffix}"
        write_private(copy, path.read_bytes(), replace=True)
        written.append(copy)
    return written
