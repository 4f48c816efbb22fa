"""Probes of the way to the gateway, each one step further: name, connection, TLS, health, clock.

Each returns what was found, or raises the true cause and what to do. A probe sends nothing but its own greeting, and
takes seconds at most. Only the federation's own authority is trusted, as Flower does it.
"""

from __future__ import annotations

import base64
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from cryptography import x509

from fedsynth.deployment.certificates import check_dates, check_soon, load_ca, names_of
from fedsynth.deployment.checks import Doubt
from fedsynth.errors import ExitCode, FedsynthError, Refused, UsageError

if TYPE_CHECKING:
    import httpx

_SECONDS = 5.0
_LARGEST_ANSWER = 2**14
_OUT_OF_DATE = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH

# A node signs the time of each request. SuperLink takes a signature that is less than 305 s old or less than 5 s in the
# future (flwr 1.41, superlink/routers/fleet/node_auth.py), so a clock that is ahead is refused much sooner. Requests
# wait in queues, hence the margin on the other side.
_MOST_BEHIND_SECONDS = 120.0
_MOST_AHEAD_SECONDS = 5.0
_DOUBTED_BEHIND_SECONDS = 30.0
_DOUBTED_AHEAD_SECONDS = 2.0

# What SuperLink serves on the same port and only the coordinator may reach, by its names in flwr 1.41; and two ways of
# writing such a path that a careless gateway takes for one below /v1/fleet/.
CLOSED_PATHS = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/docs",
    "/openapi.json",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
)


class Unreachable(FedsynthError):
    """The other end cannot be reached, or is not what was expected there."""

    exit_code = ExitCode.CONNECTION


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``"host:port"`` (an IPv6 address in brackets).

    Raises:
        UsageError: ``address_invalid``.
    """
    host, separator, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bare_ipv6 = ":" in host and not address.startswith("[")
    if not separator or not host or bare_ipv6 or "/" in address or not (port.isascii() and port.isdigit()):
        raise UsageError("address_invalid", f"{address!r} is not host:port.", "E.g. gateway.example:8443")
    if not 1 <= int(port) <= 65535:
        raise UsageError("address_invalid", f"{address!r} names no port.", "A port is between 1 and 65535.")
    return host, int(port)


def proxy_for(host: str, configured: str = "") -> str:
    """The proxy over which `host` is reached: the configured one, else that of the environment; empty for none.

    ``HTTPS_PROXY``, ``https_proxy`` and ``ALL_PROXY`` are read, and ``NO_PROXY`` is honoured.
    """
    if configured:
        return configured
    if proxy_bypass(host):
        return ""
    found = getproxies_environment()
    return found.get("https") or found.get("all") or ""


def resolve(host: str) -> str:
    """Look a name up.

    Raises:
        Unreachable: ``name_not_resolved``.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise Unreachable(
            "name_not_resolved",
            f"The name {host} is not known to this machine's DNS.",
            "Check the spelling of the gateway and the machine's name servers; behind a proxy this may be as it should.",
        ) from None
    return f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}"


def connect(host: str, port: int, proxy: str = "") -> str:
    """Open a TCP connection, directly or by the CONNECT of an HTTP proxy, and close it.

    Raises:
        UsageError: ``proxy_invalid``.
        Unreachable: ``name_not_resolved``, ``connection_refused``, ``connection_timed_out``, ``no_route``;
            of the proxy ``proxy_unreachable``, ``proxy_wants_login``, ``proxy_refuses``, ``proxy_cannot_reach``,
            ``proxy_not_http``.
        Doubt: ``proxy_not_probed``: it is spoken to over TLS, which this probe does not do.
    """
    started = time.monotonic()
    _open(host, port, proxy).close()
    way = f" over the proxy {_proxy_label(_parse_proxy(proxy))}" if proxy else ""
    return f"{host}:{port} answers{way} ({(time.monotonic() - started) * 1000:.0f} ms)"


def handshake(host: str, port: int, ca_path: Path, proxy: str = "") -> str:
    """Speak TLS with a server that must have a certificate of the authorities in `ca_path` for `host`.

    Raises:
        UsageError: as `load_ca` and `connect`.
        Unreachable: as `connect`; ``plain_http``, ``not_tls``, ``tls_broken_off``.
        Refused: ``untrusted_ca``, ``certificate_wrong_name``, ``certificate_expired``, ``certificate_not_yet_valid``.
        Doubt: ``certificate_expires_soon``: within 30 days; ``proxy_not_probed``.
    """
    certificate = _certificate(host, port, ca_path, proxy)
    check_soon(certificate, f"of {host}", datetime.now(UTC))
    return f"TLS with {host}:{port}: certificate until {certificate.not_valid_after_utc:%Y-%m-%d}"


def gateway_health(gateway: str, ca_path: Path, proxy: str = "") -> str:
    """Ask the gateway whether SuperLink behind it lives.

    Raises:
        UsageError: ``address_invalid`` and as `handshake`.
        Unreachable, Refused: as `handshake`; ``superlink_unreachable``: the gateway answers, SuperLink does not;
            ``health_not_ok``: any other answer than 200.
    """
    status = _ask(gateway, "/health", ca_path, proxy).status_code
    if status in (502, 503, 504):
        raise Unreachable(
            "superlink_unreachable",
            f"The gateway answers, but SuperLink behind it does not (HTTP {status}).",
            "The coordinator should look at `fedsynth study status`; a site can only wait.",
        )
    if status != 200:
        raise Unreachable(
            "health_not_ok",
            f"{gateway} answers /health with HTTP {status}.",
            "Is this the federation's gateway? Check address and port.",
        )
    return f"gateway {gateway} is healthy"


def clock_skew(gateway: str, ca_path: Path, proxy: str = "", now: Callable[[], datetime] | None = None) -> str:
    """Compare this machine's clock with that of the gateway.

    Args:
        gateway: host:port.
        ca_path: the authorities that are trusted.
        proxy: URL of an HTTP proxy, or empty.
        now: tells the local time (UTC); the clock if None.

    Raises:
        UsageError, Unreachable, Refused: as `gateway_health`; Refused ``clock_skewed``: a signature would be refused.
        Doubt: ``clock_drifts``; ``clock_not_compared``: the answer bears no date.
    """
    local = now or (lambda: datetime.now(UTC))
    # A connection that is open already makes the exchange short, and half of it is the error of the measurement.
    with _client(gateway, ca_path, proxy) as client:
        _answer(client, gateway, "/health", ca_path, proxy)
        before = local()
        date = _answer(client, gateway, "/health", ca_path, proxy).headers.get("date", "")
        after = local()
    try:
        remote = parsedate_to_datetime(date)
    except ValueError:
        raise Doubt(
            "clock_not_compared",
            f"{gateway} does not tell its time, so the clocks were not compared.",
            "Make sure that this machine keeps its time by NTP.",
        ) from None
    if remote.tzinfo is None:
        remote = remote.replace(tzinfo=UTC)
    # The header is cut to whole seconds.
    ahead = (before + (after - before) / 2 - remote).total_seconds() - 0.5
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the gateway's"
    if ahead > _MOST_AHEAD_SECONDS or -ahead > _MOST_BEHIND_SECONDS:
        raise Refused(
            "clock_skewed",
            f"This machine's clock is {found}: the coordinator refuses what the node signs.",
            f"Set it by NTP (timedatectl set-ntp true). At most {_MOST_AHEAD_SECONDS:.0f} s ahead or "
            f"{_MOST_BEHIND_SECONDS:.0f} s behind works.",
        )
    if ahead > _DOUBTED_AHEAD_SECONDS or -ahead > _DOUBTED_BEHIND_SECONDS:
        raise Doubt("clock_drifts", f"This machine's clock is {found}.", "Set it by NTP before it drifts further.")
    return "clock agrees with the gateway's"


def closed_paths(gateway: str, ca_path: Path, proxy: str = "") -> str:
    """Make sure that the gateway hides what only the coordinator may reach: Control and Runtime API, documentation.

    The requests are GETs of paths that take POSTs, so they do nothing even where a path is open: SuperLink would answer
    405 where the gateway says 404.

    Raises:
        UsageError, Unreachable, Refused: as `gateway_health`; Refused ``gateway_open``: anything but 404 came back.
    """
    with _client(gateway, ca_path, proxy) as client:
        answers = {path: _answer(client, gateway, path, ca_path, proxy).status_code for path in CLOSED_PATHS}
    shown = [f"{path} ({status})" for path, status in answers.items() if status not in _refusals(path)]
    if shown:
        raise Refused(
            "gateway_open",
            f"The gateway {gateway} lets through {', '.join(shown)}.",
            "Stop it: anybody with the authority's certificate could start runs. Only /v1/fleet/ and /health may pass.",
        )
    return f"gateway {gateway} hides Control API, Runtime API and documentation"


def _refusals(path: str) -> tuple[int, ...]:
    return (400, 404) if "%" in path else (404,)  # 400 is how a gateway may turn down a path written in disguise


def _certificate(host: str, port: int, ca_path: Path, proxy: str) -> x509.Certificate:
    """The certificate that the server shows and OpenSSL accepts."""
    context = _context(ca_path)
    with _open(host, port, proxy) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secured:
                shown = secured.getpeercert(binary_form=True)
        except ssl.SSLCertVerificationError as error:
            raise _not_accepted(error, host, port, ca_path, proxy) from None
        except ssl.SSLError as error:
            raise _no_tls(error, host, port, proxy) from None
        except OSError as error:  # a reset, an end, or no answer in time
            raise _broken_off(host, port, error.strerror or "no answer") from None
    if shown is None:
        raise _broken_off(host, port, "no certificate")
    return x509.load_der_x509_certificate(shown)


def _not_accepted(
    error: ssl.SSLCertVerificationError, host: str, port: int, ca_path: Path, proxy: str
) -> FedsynthError:
    """Why OpenSSL did not accept the certificate, with what the certificate itself says."""
    shown = _shown(host, port, proxy)
    if error.verify_code in _OUT_OF_DATE:
        try:
            if shown is not None:
                check_dates(shown, f"of {host}", datetime.now(UTC))
        except Refused as dates:
            return dates
        return Refused(
            "ca_expired",
            f"The authority of {host}'s certificate is not valid now ({datetime.now(UTC):%Y-%m-%d %H:%M} UTC).",
            f"Put the coordinator's new authority into {ca_path.name}; if the date here is wrong, set the clock.",
        )
    if error.verify_code in _OTHER_NAME:
        named = f"is for {', '.join(names_of(shown)) or 'no name'}, not" if shown is not None else "is not"
        return Refused(
            "certificate_wrong_name",
            f"The certificate of {host}:{port} {named} for {host}.",
            "Call the gateway by a name in its certificate, or let the coordinator make one with this name.",
        )
    issuer = f", but by {shown.issuer.rfc4514_string()}" if shown is not None else ""
    return Refused(
        "untrusted_ca",
        f"The certificate of {host}:{port} was not issued by the authority in {ca_path.name}{issuer}.",
        "Either another server answers here, or a proxy opens the encryption: let the firewall pass this host unopened. "
        "Or the coordinator's authority changed: ask for its certificate.",
    )


def _shown(host: str, port: int, proxy: str) -> x509.Certificate | None:
    """The certificate that a server shows, unchecked; to explain a refusal with, never to trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with _open(host, port, proxy) as plain, context.wrap_socket(plain, server_hostname=host) as secured:
            shown = secured.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(shown) if shown else None
    except (OSError, FedsynthError, ValueError):  # the refusal stands without the explanation
        return None


def _no_tls(error: ssl.SSLError, host: str, port: int, proxy: str) -> FedsynthError:
    if _speaks_http(host, port, proxy):
        return Unreachable(
            "plain_http",
            f"{host}:{port} speaks plain HTTP, not TLS.",
            "Check the port; the gateway must be reached over TLS.",
        )
    if isinstance(error, ssl.SSLEOFError) or (error.reason or "") in ("UNEXPECTED_EOF_WHILE_READING", ""):
        return _broken_off(host, port, "the connection ended")
    if (error.reason or "") in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"):
        return Unreachable("not_tls", f"{host}:{port} does not speak TLS.", "Check address and port of the gateway.")
    return _broken_off(host, port, (error.reason or "").lower().replace("_", " "))


def _speaks_http(host: str, port: int, proxy: str) -> bool:
    try:
        with _open(host, port, proxy) as plain:
            plain.sendall(f"HEAD /health HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            return plain.recv(16).startswith(b"HTTP/")
    except (OSError, FedsynthError):
        return False


def _broken_off(host: str, port: int, why: str) -> Unreachable:
    return Unreachable(
        "tls_broken_off",
        f"{host}:{port} was reached, but broke off the TLS handshake ({why}).",
        "Often a firewall that lets the connection open and nothing through: ask for this host and port.",
    )


def _open(host: str, port: int, proxy: str) -> socket.socket:
    """A connected socket to the target; over a proxy its CONNECT has succeeded."""
    if not proxy:
        return _dial(host, port)
    parts = _parse_proxy(proxy)
    label = _proxy_label(parts)
    if parts.scheme == "https":
        raise Doubt(
            "proxy_not_probed",
            f"The proxy {label} is spoken to over TLS; whether it passes {host}:{port} was not tried here.",
            "See whether the gateway's health is asked successfully.",
        )
    try:
        connected = _dial(parts.hostname or "", parts.port or 80)
    except Unreachable as error:
        raise Unreachable(
            "proxy_unreachable", f"The proxy {label} cannot be reached: {error.message}", "Check the proxy's address."
        ) from None
    try:
        _tunnel(connected, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", parts, label)
    except BaseException:
        connected.close()
        raise
    return connected


def _dial(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), _SECONDS)
    except (socket.gaierror, UnicodeError):
        raise Unreachable(
            "name_not_resolved", f"The name {host} is not known here.", "Check its spelling and the name servers."
        ) from None
    except TimeoutError:
        raise Unreachable(
            "connection_timed_out",
            f"{host}:{port} does not answer within {_SECONDS:.0f} s.",
            "Usually a firewall: outbound TCP to this host and port must be allowed, or a proxy configured.",
        ) from None
    except ConnectionRefusedError:
        raise Unreachable(
            "connection_refused",
            f"{host}:{port} refuses the connection.",
            "Nothing listens there, or a firewall rejects it: check host and port.",
        ) from None
    except OSError as error:
        raise Unreachable(
            "no_route", f"{host}:{port} cannot be reached: {error.strerror}.", "Check this machine's network."
        ) from None


def _tunnel(connected: socket.socket, target: str, proxy: SplitResult, label: str) -> None:
    login = ""
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        login = f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}\r\n"
    try:
        connected.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n".encode())
        status = _status(connected)
    except TimeoutError:
        raise Unreachable(
            "proxy_cannot_reach",
            f"The proxy {label} does not say within {_SECONDS:.0f} s whether it reaches {target}.",
            "Ask the proxy's administrators whether it may reach this host and port.",
        ) from None
    except OSError:
        status = 0
    if status == 200:
        return
    if status == 407:
        raise Unreachable(
            "proxy_wants_login",
            f"The proxy {label} wants a login.",
            "Write the proxy as http://USER:PASSWORD@HOST:PORT, or have this host exempted.",
        )
    if status in (502, 503, 504):
        raise Unreachable(
            "proxy_cannot_reach",
            f"The proxy {label} works, but does not reach {target} (HTTP {status}).",
            "Check the gateway's name and port; the proxy's network must know them.",
        )
    if status == 0:
        raise Unreachable(
            "proxy_not_http", f"{label} does not answer as an HTTP proxy does.", "Check the proxy's address and port."
        )
    raise Unreachable(
        "proxy_refuses",
        f"The proxy {label} refuses to connect to {target} (HTTP {status}).",
        "Ask the proxy's administrators to allow CONNECT to this host and port.",
    )


def _status(connected: socket.socket) -> int:
    """Status of the answer to a CONNECT, read to the end of its header; 0 if it is none."""
    deadline = time.monotonic() + _SECONDS
    answer = b""
    while b"\r\n\r\n" not in answer:
        if time.monotonic() > deadline:
            raise TimeoutError
        part = connected.recv(1024)
        answer += part
        if not part or len(answer) > _LARGEST_ANSWER:
            break
    words = answer.split(b"\r\n", 1)[0].split()
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 0


def _parse_proxy(proxy: str) -> SplitResult:
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:  # the value is not printed: it may hold a password
        raise UsageError(
            "proxy_invalid", "The proxy is not of the form http://HOST:PORT.", "Correct it; SOCKS does not work."
        )
    return parts


def _proxy_label(proxy: SplitResult) -> str:
    """Host and port, without the login."""
    return f"{proxy.hostname}:{proxy.port or (443 if proxy.scheme == 'https' else 80)}"


def _context(ca_path: Path) -> ssl.SSLContext:
    load_ca(ca_path)  # names what is wrong with the file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca_path.read_text(encoding="ascii"))
    return context


def _ask(gateway: str, path: str, ca_path: Path, proxy: str) -> httpx.Response:
    with _client(gateway, ca_path, proxy) as client:
        return _answer(client, gateway, path, ca_path, proxy)


def _client(gateway: str, ca_path: Path, proxy: str) -> httpx.Client:
    import httpx

    split_address(gateway)
    if proxy:
        parts = _parse_proxy(proxy)
        proxy = proxy if "://" in proxy else parts.geturl()
    return httpx.Client(
        base_url=f"https://{gateway}", verify=_context(ca_path), proxy=proxy or None, trust_env=False, timeout=_SECONDS
    )


def _answer(client: httpx.Client, gateway: str, path: str, ca_path: Path, proxy: str) -> httpx.Response:
    import httpx

    try:
        return client.get(path)
    except httpx.HTTPError:
        _certificate(*split_address(gateway), ca_path, proxy)  # names the cause where there is a lower one
        raise Unreachable(
            "gateway_no_answer",
            f"{gateway} speaks TLS, but does not answer an HTTP request.",
            "Is this the federation's gateway? Check address and port.",
        ) from None
