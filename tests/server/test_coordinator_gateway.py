"""The gateway lets the Fleet API and /health pass, to the right SuperLink only, and nothing else however it is written."""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from fedsynth.deployment.certificates import make_ca, make_server_certificate
from fedsynth.errors import FedsynthError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.coordinator.gateway import check_configuration, command, render, write_configuration
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.coordinator.setup import init_study

GATEWAY, SUPERLINK = 23960, 23961
FLEET = "/v1/fleet/pull-messages"
CLOSED = [
    "/",
    "/docs",
    "/openapi.json",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/a/b",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/x/../../control/start-run",
    "/v1/control/start-run/../../fleet/pull-messages",
    "/v1/control/start-run%23/../../fleet/pull-messages",
    "/v1/control/start-run?/../../fleet/pull-messages",
    "//v1/control/start-run",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet//pull-messages",
    "/v1/fleet/pull-messages?a=b",
    "/v1/fleet/pull-messages;a",
    "/health/",
    "/health?a=b",
]


def keys(folder: Path, names: list[str], ca: tuple[bytes, bytes]) -> None:
    (folder / "ca.crt").write_bytes(ca[0])
    for name in ("gateway", "superlink"):
        certificate, key = make_server_certificate(*ca, names)
        (folder / f"{name}.crt").write_bytes(certificate)
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.key").chmod(0o600)


@pytest.fixture
def study(tiny_plan: StudyPlan, tmp_path: Path) -> Study:
    save_plan(tiny_plan, tmp_path / "plan.toml")
    made = init_study(tmp_path / "study", tmp_path / "plan.toml", f"127.0.0.1:{GATEWAY}", None)
    path = made.folder / "coordinator.toml"
    text = path.read_text().replace("18000", str(SUPERLINK)).replace("0.0.0.0", "127.0.0.1")
    path.write_text(text.replace("max_request_mib = 16", "max_request_mib = 6"))
    keys(made.folder / "keys", ["localhost", "127.0.0.1"], make_ca("test"))
    return made


class Echo(http.server.BaseHTTPRequestHandler):
    """Stands for SuperLink: answers everything, and says which path reached it."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def superlink(study: Study) -> Iterator[None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(study.folder / "keys" / "superlink.crt", study.folder / "keys" / "superlink.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", SUPERLINK), Echo)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield
    server.shutdown()
    server.server_close()


Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def gateway(study: Study) -> Iterator[Ask]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with (study.folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(command(study, write_configuration(study)), stdout=log, stderr=log)
        try:
            _wait_for(GATEWAY)
            trust = ssl.create_default_context(cafile=str(study.folder / "keys" / "ca.crt"))

            def ask(method: str, path: str, content: bytes = b"", announced: int | None = None) -> tuple[int, str]:
                # This client sends a path as it is, where others tidy it up first.
                connection = http.client.HTTPSConnection("127.0.0.1", GATEWAY, context=trust, timeout=10)
                try:
                    length = len(content) if announced is None else announced
                    connection.request(method, path, content, {"Content-Length": str(length)})
                    answer = connection.getresponse()
                    return answer.status, answer.read().decode()
                finally:
                    connection.close()

            yield ask
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int) -> None:
    for _ in range(100):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the gateway does not listen")


@pytest.mark.network
def test_fleet_and_health_pass(study: Study, superlink: None, gateway: Ask) -> None:
    assert gateway("POST", FLEET, b"x" * 5_000_000) == (200, FLEET)
    assert gateway("GET", "/health") == (200, "/health")


@pytest.mark.network
def test_nothing_else_passes(study: Study, superlink: None, gateway: Ask) -> None:
    asked = {(method, path): gateway(method, path)[0] for method in ("POST", "GET") for path in CLOSED}
    assert {call for call, status in asked.items() if status not in (400, 404)} == set()


@pytest.mark.network
def test_methods_sizes_and_logs(study: Study, superlink: None, gateway: Ask) -> None:
    assert gateway("GET", FLEET)[0] == 404
    assert gateway("PUT", FLEET)[0] == 404
    assert gateway("POST", "/health")[0] == 404
    assert gateway("POST", FLEET, announced=6 * 2**20 + 1)[0] == 413
    gateway("POST", "/v1/fleet/push-object", b"the body of a message")
    gateway("GET", "/v1/fleet/push-object?secret=in-the-query")
    text = (study.folder / "gateway.log").read_text()
    assert "POST /v1/fleet/push-object 200 in=" in text
    assert "in-the-query" not in text and "body of a message" not in text


@pytest.mark.network
def test_old_tls_and_plain_http_are_turned_down(study: Study, superlink: None, gateway: Ask) -> None:
    context = ssl.create_default_context(cafile=str(study.folder / "keys" / "ca.crt"))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", GATEWAY)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    assert httpx.get(f"http://127.0.0.1:{GATEWAY}/health", trust_env=False).status_code == 400


@pytest.mark.network
@pytest.mark.parametrize("fault", ["another authority", "another name", "away"])
def test_only_the_right_superlink_is_believed(study: Study, fault: str, request: pytest.FixtureRequest) -> None:
    folder = study.folder / "keys"
    if fault != "away":
        stranger = make_ca("stranger")
        names = ["localhost"] if fault == "another authority" else ["elsewhere.example"]
        authority = stranger if fault == "another authority" else make_ca("test")
        if fault == "another name":
            keys(folder, ["localhost", "127.0.0.1"], authority)
        certificate, key = make_server_certificate(*authority, names)
        (folder / "superlink.crt").write_bytes(certificate)
        (folder / "superlink.key").write_bytes(key)
        request.getfixturevalue("superlink")
    ask: Ask = request.getfixturevalue("gateway")
    assert ask("POST", FLEET)[0] == 502
    assert ask("GET", "/health")[0] == 502


def test_configuration_is_checked_with_its_keys(study: Study) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    check_configuration(study, write_configuration(study))
    (study.folder / "keys" / "gateway.key").unlink()
    with pytest.raises(FedsynthError) as caught:
        check_configuration(study, write_configuration(study))
    assert caught.value.code == "gateway_config_invalid" and "gateway.key" in caught.value.message


def test_a_missing_nginx_is_named(study: Study) -> None:
    path = study.folder / "coordinator.toml"
    path.write_text(path.read_text().replace('nginx = "nginx"', 'nginx = "no-such-program"'))
    with pytest.raises(FedsynthError) as caught:
        command(Study(study.folder), path)
    assert caught.value.code == "nginx_missing"


def test_for_elsewhere(study: Study) -> None:
    text = render(study, elsewhere=Path("/etc/gateway"), superlink="superlink.internal:18000")
    assert 'ssl_certificate_key "/etc/gateway/keys/gateway.key";' in text
    assert "server superlink.internal:18000;" in text
    assert str(study.folder) not in text
    with pytest.raises(FedsynthError) as caught:
        render(study, superlink="superlink:18000; include /etc/passwd")
    assert caught.value.code == "address_invalid"
    with pytest.raises(FedsynthError) as caught:
        render(study, elsewhere=Path('/etc/"gateway'))
    assert caught.value.code == "path_unsuitable"
