"""Each fault on the way to the gateway is planted for real, and named by its own code."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedsynth.deployment import certificates, health, network
from fedsynth.deployment.certificates import make_ca, make_server_certificate
from fedsynth.deployment.checks import Doubt
from fedsynth.deployment.network import (
    CLOSED_PATHS,
    clock_skew,
    closed_paths,
    connect,
    gateway_health,
    handshake,
    proxy_for,
    resolve,
    split_address,
)
from fedsynth.errors import ExitCode, FedsynthError

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind((HOST, 0))
        return int(trial.getsockname()[1])


def code_of(probe: Callable[[], object]) -> str:
    with pytest.raises(FedsynthError) as caught:
        probe()
    assert caught.value.hint
    return caught.value.code


@contextmanager
def at(moment: timedelta) -> Iterator[None]:
    """Make certificates as if this were another time."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + moment

    with pytest.MonkeyPatch.context() as then:
        then.setattr(certificates, "datetime", Shifted)
        yield


class Answers(BaseHTTPRequestHandler):
    """A gateway: /health and an open path or none."""

    protocol_version = "HTTP/1.1"
    health_status = 200
    ahead = timedelta()
    dated = True
    open_path = ""

    def do_GET(self) -> None:
        found = self.health_status if self.path == "/health" else 405 if self.path == self.open_path else 404
        self.send_response_only(found)
        if self.dated:
            self.send_header("Date", format_datetime(datetime.now(UTC) + self.ahead, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Quiet(ThreadingHTTPServer):
    """Faulty clients are what is tested here."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class Place:
    """A folder with an authority, in which servers are started."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.authority = make_ca("the federation")
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(self.authority[0])

    def gateway(self, pair: tuple[bytes, bytes] | None = None, tls: bool = True, **answers: object) -> tuple[str, int]:
        port = free_port()
        server = Quiet((HOST, port), type("Chosen", (Answers,), answers))
        if tls:
            for name, content in zip(("crt", "key"), pair or self.pair(), strict=True):
                (self.folder / f"{port}.{name}").write_bytes(content)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.folder / f"{port}.crt", self.folder / f"{port}.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.stack.enter_context(serving(server))
        return HOST, port

    def pair(self, *names: str, days: int = 365) -> tuple[bytes, bytes]:
        return make_server_certificate(*self.authority, names or (HOST, "localhost"), days)

    def proxy(self, status: int = 200, login: str = "") -> str:
        port = free_port()
        server = Proxy((HOST, port), Connects)
        server.status, server.login = status, login
        self.stack.enter_context(serving(server))
        return f"http://{HOST}:{port}"

    def raw(self, answer: bytes, ends: bool = True) -> tuple[str, int]:
        """A server that says the same thing to everybody; one that does not end keeps the connection open."""
        port = free_port()

        class Says(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(5)
                self.request.recv(4096)
                self.request.sendall(answer)
                if not ends:
                    self.request.recv(4096)

        server = socketserver.ThreadingTCPServer((HOST, port), Says)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.stack.enter_context(serving(server))
        return HOST, port


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that answers every CONNECT with `status`, and carries bytes to and fro when that is 200."""

    daemon_threads = True
    status = 200
    login = ""
    carried = 0

    def handle_error(self, *_: object) -> None:
        """Say nothing."""


class Connects(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split()
        headers = dict(iter(lambda: self.rfile.readline().decode().strip().partition(": ")[::2], ("", "")))
        status = self.server.status
        if self.server.login and headers.get("Proxy-Authorization") != self.server.login:
            status = 407
        self.wfile.write(f"HTTP/1.1 {status} As told\r\nX-Via: test\r\n\r\n".encode())
        self.wfile.flush()
        if status != 200 or method != "CONNECT":
            return
        self.server.carried += 1
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as onward:
            back = threading.Thread(target=carry, args=(onward, self.connection), daemon=True)
            back.start()
            carry(self.connection, onward)
            back.join(5)


def carry(source: socket.socket, sink: socket.socket) -> None:
    try:
        while part := source.recv(4096):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


def test_a_good_gateway_passes_every_probe(place: Place) -> None:
    host, port = place.gateway()
    assert "localhost is " in resolve("localhost")
    assert f"{HOST}:{port} answers" in connect(host, port)
    until = datetime.now(UTC) + timedelta(days=365)
    assert f"{until:%Y-%m}" in handshake(host, port, place.ca)
    gateway = f"{host}:{port}"
    assert "healthy" in gateway_health(gateway, place.ca)
    assert "agrees" in clock_skew(gateway, place.ca)
    assert "hides" in closed_paths(gateway, place.ca)


def test_names_and_ports_that_lead_nowhere(place: Place) -> None:
    assert code_of(lambda: resolve("gateway.invalid")) == "name_not_resolved"
    assert code_of(lambda: connect("gateway.invalid", 443)) == "name_not_resolved"
    closed = free_port()
    assert code_of(lambda: connect(HOST, closed)) == "connection_refused"
    assert code_of(lambda: gateway_health(f"{HOST}:{closed}", place.ca)) == "connection_refused"
    with pytest.raises(FedsynthError) as caught:
        handshake(HOST, closed, place.ca)
    assert caught.value.exit_code == ExitCode.CONNECTION


def test_a_port_that_swallows_everything(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_SECONDS", 0.3)
    with socket.socket() as full:  # nobody accepts, and the queue of one is full: further connections hang
        port = free_port()
        full.bind((HOST, port))
        full.listen(0)
        waiting = []
        try:
            for _ in range(4):
                each = socket.socket()
                each.setblocking(False)
                each.connect_ex((HOST, port))
                waiting.append(each)
            assert code_of(lambda: connect(HOST, port)) == "connection_timed_out"
        finally:
            for each in waiting:
                each.close()


def test_an_authority_that_is_not_ours(place: Place) -> None:
    """As when a hospital's proxy opens the encryption: the message names who issued the certificate."""
    host, port = place.gateway(make_server_certificate(*make_ca("Inspection Appliance"), [HOST]))
    with pytest.raises(FedsynthError) as caught:
        handshake(host, port, place.ca)
    assert caught.value.code == "untrusted_ca" and "CN=Inspection Appliance" in caught.value.message
    assert code_of(lambda: gateway_health(f"{host}:{port}", place.ca)) == "untrusted_ca"


def test_a_certificate_for_another_name(place: Place) -> None:
    host, port = place.gateway(place.pair("gateway.example"))
    with pytest.raises(FedsynthError) as caught:
        handshake(host, port, place.ca)
    assert caught.value.code == "certificate_wrong_name" and "gateway.example" in caught.value.message
    host, port = place.gateway(place.pair(HOST))
    assert code_of(lambda: handshake("localhost", port, place.ca)) == "certificate_wrong_name"


def test_an_expired_certificate_and_one_of_tomorrow(place: Place) -> None:
    with at(timedelta(days=-20)):
        old = place.pair(HOST, days=10)
    with at(timedelta(days=2)):
        coming = place.pair(HOST, days=10)
    for pair, code in ((old, "certificate_expired"), (coming, "certificate_not_yet_valid")):
        host, port = place.gateway(pair)
        with pytest.raises(FedsynthError) as caught:
            handshake(host, port, place.ca)
        assert caught.value.code == code and "clock" in caught.value.hint
        assert code_of(lambda: clock_skew(f"{HOST}:{port}", place.ca)) == code  # noqa: B023


def test_an_expired_authority(place: Place) -> None:
    with at(timedelta(days=-20)):
        place.authority = make_ca("the federation, once", days=19)
        place.ca.write_bytes(place.authority[0])
        pair = _outliving(place)
    host, port = place.gateway(pair)
    assert code_of(lambda: handshake(host, port, place.ca)) == "ca_expired"


def _outliving(place: Place) -> tuple[bytes, bytes]:
    """A certificate that outlives its authority, which `make_server_certificate` refuses to make."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    signer = serialization.load_pem_private_key(place.authority[1], None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    made, key = make_server_certificate(*place.authority, [HOST], days=5)
    leaf = x509.load_pem_x509_certificate(made)
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .public_key(leaf.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc + timedelta(days=300))
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM), key


def test_a_certificate_that_expires_soon_is_doubted(place: Place) -> None:
    host, port = place.gateway(place.pair(HOST, days=10))
    with pytest.raises(Doubt) as caught:
        handshake(host, port, place.ca)
    assert caught.value.code == "certificate_expires_soon"
    assert "healthy" in gateway_health(f"{host}:{port}", place.ca)


def test_what_does_not_speak_tls(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = place.gateway(tls=False)
    assert code_of(lambda: handshake(*plain, place.ca)) == "plain_http"
    assert code_of(lambda: gateway_health(f"{HOST}:{plain[1]}", place.ca)) == "plain_http"
    other = place.raw(b"220 mail.example ready, what do you want\r\n")
    assert code_of(lambda: handshake(*other, place.ca)) == "not_tls"
    deaf = place.raw(b"")
    assert code_of(lambda: handshake(*deaf, place.ca)) == "tls_broken_off"
    monkeypatch.setattr(network, "_SECONDS", 0.3)
    silent = place.raw(b"", ends=False)
    assert code_of(lambda: handshake(*silent, place.ca)) == "tls_broken_off"


def test_a_wrong_file_in_place_of_the_authority(place: Place) -> None:
    host, port = place.gateway()
    place.ca.write_bytes(place.pair()[0])
    assert code_of(lambda: handshake(host, port, place.ca)) == "not_a_ca"
    place.ca.unlink()
    assert code_of(lambda: gateway_health(f"{host}:{port}", place.ca)) == "certificate_missing"


@pytest.mark.parametrize(
    ("status", "code"), [(502, "superlink_unreachable"), (504, "superlink_unreachable"), (404, "health_not_ok")]
)
def test_a_gateway_without_superlink(place: Place, status: int, code: str) -> None:
    host, port = place.gateway(health_status=status)
    assert code_of(lambda: gateway_health(f"{host}:{port}", place.ca)) == code


@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        (130, "clock_skewed"),  # the gateway is ahead: this machine is behind
        (40, "clock_drifts"),
        (20, ""),
        (0, ""),
        (-4, "clock_drifts"),
        (-8, "clock_skewed"),  # a signature from the future is refused much sooner than an old one
    ],
)
def test_a_clock_that_is_wrong(place: Place, seconds: int, code: str) -> None:
    host, port = place.gateway(ahead=timedelta(seconds=seconds))
    if code:
        assert code_of(lambda: clock_skew(f"{host}:{port}", place.ca)) == code
    else:
        assert clock_skew(f"{host}:{port}", place.ca) == "clock agrees with the gateway's"


def test_the_clocks_limits_are_inside_those_of_flower() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert network._MOST_AHEAD_SECONDS <= SYSTEM_TIME_TOLERANCE
    assert network._MOST_BEHIND_SECONDS <= TIMESTAMP_TOLERANCE / 2


def test_a_gateway_that_does_not_tell_its_time(place: Place) -> None:
    host, port = place.gateway(dated=False)
    assert code_of(lambda: clock_skew(f"{host}:{port}", place.ca)) == "clock_not_compared"


@pytest.mark.parametrize("path", [CLOSED_PATHS[0], CLOSED_PATHS[3], CLOSED_PATHS[-1], "/docs"])
def test_a_gateway_that_lets_too_much_through(place: Place, path: str) -> None:
    host, port = place.gateway(open_path=path)
    with pytest.raises(FedsynthError) as caught:
        closed_paths(f"{host}:{port}", place.ca)
    assert caught.value.code == "gateway_open" and f"{path} (405)" in caught.value.message


def test_the_closed_paths_are_ones_that_flower_serves() -> None:
    from flwr.supercore.routers.runtime.router import router as runtime
    from flwr.superlink.routers.control.router import router as control

    served = {route.path for router in (runtime, control) for route in router.routes}
    assert {path for path in CLOSED_PATHS if path.startswith(("/v1/control", "/v1/runtime"))} <= served


def test_over_a_proxy_everything_works_as_without(place: Place) -> None:
    host, port = place.gateway()
    proxy, gateway = place.proxy(), f"{host}:{port}"
    assert f"over the proxy {proxy.removeprefix('http://')}" in connect(host, port, proxy)
    handshake(host, port, place.ca, proxy)
    for probe in (gateway_health, clock_skew, closed_paths):
        assert probe(gateway, place.ca, proxy)
        assert probe(gateway, place.ca, proxy.removeprefix("http://"))  # as many write it


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "proxy_refuses"), (405, "proxy_refuses"), (407, "proxy_wants_login"), (502, "proxy_cannot_reach")],
)
def test_a_proxy_that_does_not_connect(place: Place, status: int, code: str) -> None:
    host, port = place.gateway()
    proxy = place.proxy(status)
    assert code_of(lambda: connect(host, port, proxy)) == code
    assert code_of(lambda: handshake(host, port, place.ca, proxy)) == code
    assert code_of(lambda: gateway_health(f"{host}:{port}", place.ca, proxy)) == code


def test_a_proxy_that_is_none(place: Place) -> None:
    host, port = place.gateway()
    absent, other = free_port(), place.raw(b"220 mail.example\r\n")
    for proxy, code in (
        (f"http://{HOST}:{absent}", "proxy_unreachable"),
        ("http://proxy.invalid:3128", "proxy_unreachable"),
        (f"http://{HOST}:{other[1]}", "proxy_not_http"),
        (f"https://{HOST}:{absent}", "proxy_not_probed"),
        ("socks5://127.0.0.1:1080", "proxy_invalid"),
        ("http://:3128", "proxy_invalid"),
        ("http://proxy.example:port", "proxy_invalid"),
    ):
        assert code_of(lambda: connect(host, port, proxy)) == code  # noqa: B023


def test_a_proxy_with_a_login_that_is_never_printed(place: Place) -> None:
    host, port = place.gateway()
    address = place.proxy(login="Basic dXNlcjpwQHNz").removeprefix("http://")  # user:p@ss
    good = f"http://user:p%40ss@{address}"
    said = connect(host, port, good)
    assert "p@ss" not in said and "p%40ss" not in said
    gateway_health(f"{host}:{port}", place.ca, good)
    with pytest.raises(FedsynthError) as caught:
        connect(host, port, f"http://user:wrong@{address}")
    assert caught.value.code == "proxy_wants_login" and "wrong" not in str(caught.value)


def test_which_proxy_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_for("gateway.example") == ""
    monkeypatch.setenv("ALL_PROXY", "http://all.example:1")
    assert proxy_for("gateway.example") == "http://all.example:1"
    monkeypatch.setenv("HTTPS_PROXY", "http://upper.example:1")
    assert proxy_for("gateway.example") == "http://upper.example:1"
    monkeypatch.setenv("https_proxy", "http://lower.example:1")
    assert proxy_for("gateway.example") == "http://lower.example:1"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.example")
    assert proxy_for("gateway.example") == "" and proxy_for("127.0.0.1") == ""
    assert proxy_for("gateway.other") == "http://lower.example:1"
    assert proxy_for("gateway.example", "http://configured.example:1") == "http://configured.example:1"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("gateway.example:8443", ("gateway.example", 8443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:8443", ("::1", 8443)),
    ],
)
def test_addresses(address: str, found: tuple[str, int]) -> None:
    assert split_address(address) == found


@pytest.mark.parametrize(
    "address",
    ["", "gateway", ":8443", "gateway:", "gateway:0", "gateway:65536", "https://gateway:1", "::1:8443", "a:²"],
)
def test_addresses_that_are_none(address: str) -> None:
    assert code_of(lambda: split_address(address)) == "address_invalid"


def test_the_health_service() -> None:
    from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

    address = f"{HOST}:{free_port()}"
    assert code_of(lambda: health.serving(address)) == "health_unreachable"
    server = run_health_server_grpc_no_tls(address)
    try:
        assert health.serving(address) == f"{address} serves"
    finally:
        server.stop(0).wait(5)


def test_a_health_service_that_does_not_serve_and_one_that_is_none(place: Place) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from grpc_health.v1 import health as service
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    starting = service.HealthServicer()
    starting.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    address, other = f"{HOST}:{free_port()}", f"{HOST}:{free_port()}"
    servers = [grpc.server(ThreadPoolExecutor(1)), grpc.server(ThreadPoolExecutor(1))]
    health_pb2_grpc.add_HealthServicer_to_server(starting, servers[0])
    for server, where in zip(servers, (address, other), strict=True):
        server.add_insecure_port(where)
        server.start()
    try:
        assert code_of(lambda: health.serving(address)) == "not_serving"
        assert code_of(lambda: health.serving(other)) == "health_not_grpc"
    finally:
        for server in servers:
            server.stop(0).wait(5)
