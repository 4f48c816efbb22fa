"""Peers that do not keep to the rules: strangers at the gateway, a registered site, and somebody who has the coordinator.

One federation is attacked from all sides: sites a and b are honest and keep a study going; a `Peer` has the key of c;
in the second half the coordinator is stopped and a `Master` has its SuperLink. What counts is what is seen from the outside:
HTTP codes, status, ledgers, logs, files.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from fastapi import FastAPI
from federation import MARK, STUDY, Federation, free_port
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.routers.runtime import create_runtime_router, responses_router
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.routers.control import router as control_router
from peer import Peer, master, start_run

from fedsynth.deployment.bundle import _PYPROJECT, bundle_bytes
from fedsynth.deployment.certificates import make_ca, make_server_certificate
from fedsynth.deployment.keys import make_node_key
from fedsynth.plan import StudyPlan
from fedsynth.records import State, refusal, task_record, to_record
from fedsynth_server.checkpoint import load_state
from fedsynth_server.coordinator.control import open_control
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.coordinator.start import children

pytestmark = pytest.mark.network

BACK_S = 60.0


@pytest.fixture(scope="module")
def federation(
    new_federation: Callable[..., Federation], network_plan: Callable[..., StudyPlan]
) -> Iterator[Federation]:
    made = new_federation(network_plan(rounds={"autoencoder": 100, "radiogenomics": 1, "gan": 1}), absent_s=0.0)
    made.start(STUDY, "a", "b")
    made.wait_until(lambda: made.done() >= 1, 120, "the first round")
    yield made
    made.close()


@pytest.fixture(scope="module")
def study(federation: Federation) -> Study:
    return Study(federation.folder(STUDY))


@pytest.fixture(scope="module")
def gateway(study: Study) -> str:
    return study.settings.gateway.address


@pytest.fixture(scope="module")
def ca(study: Study) -> Path:
    return study.path(study.settings.superlink.ca)


@pytest.fixture(scope="module")
def node_key(federation: Federation) -> Path:
    return federation.folder("c") / "keys" / "node.key"


@pytest.fixture
def peer(gateway: str, ca: Path, node_key: Path) -> Iterator[Peer]:
    made = Peer(gateway, ca, node_key)
    yield made
    made.leave()


def superlink_log(federation: Federation) -> str:
    return (federation.folder(STUDY) / "logs" / "superlink.log").read_text(errors="replace")


# At the gateway's door.


def raw(address: str, ca: Path, request: bytes) -> bytes:
    """Send bytes over TLS as they are; returns what comes back until the other side closes, or is silent."""
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        tls.settimeout(1.5)
        tls.sendall(request)
        got = b""
        try:
            while part := tls.recv(65536):
                got += part
        except (TimeoutError, ssl.SSLError, ConnectionResetError):
            pass  # kept open, or cut off
        return got


def codes(answer: bytes) -> list[int]:
    """HTTP codes of all answers in what came back."""
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]


def closed_paths() -> list[str]:
    """Every path that SuperLink serves beside the Fleet API and /health, as Flower declares them."""
    app = FastAPI()
    for router in (control_router, create_runtime_router("SuperLink"), responses_router):
        app.include_router(router)
    declared = list(app.openapi()["paths"])
    assert len(declared) > 60
    return [*declared, "/docs", "/redoc", "/openapi.json", "/", "/v1", "/v1/control", "/v1/runtime", "/metrics"]


def test_nothing_but_fleet_calls_and_health_passes_the_gateway(
    federation: Federation, study: Study, gateway: str, ca: Path
) -> None:
    trust = ssl.create_default_context(cafile=str(ca))
    with httpx.Client(verify=trust, trust_env=False) as client:
        assert client.get(f"https://{gateway}/health").status_code == 200
        for path in closed_paths():
            for method in ("GET", "POST"):
                answer = client.request(method, f"https://{gateway}{path}?from=outside")
                assert answer.status_code == 404, (method, path, answer.status_code)
        assert client.post(f"https://{gateway}/v1/fleet/pull-messages").status_code in (400, 401, 415, 422)
        # The paths are real: SuperLink's own port, which only this machine reaches, answers on them.
        inside = f"https://{study.superlink_address}"
        assert client.post(f"{inside}/v1/control/list-runs?from=inside").status_code != 404
        assert client.post(f"{inside}/v1/runtime/acquire-task?from=inside").status_code != 404
        assert client.get(f"{inside}/openapi.json?from=inside").status_code in (200, 404)
    federation.wait_until(lambda: superlink_log(federation).count("from=inside") == 3, 5, "SuperLink's log")
    assert "from=outside" not in superlink_log(federation)


TRICKS = [
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/..%252fcontrol/list-runs",
    "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/.%00./control/list-runs",
    "/v1/%63ontrol/list-runs",
    "/V1/Control/list-runs",
    "/health/../v1/control/list-runs",
    "/health%2f..%2fv1/control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/pull-messages#/../../control/list-runs",
    "https://localhost/v1/control/list-runs",
    "http://127.0.0.1/v1/fleet/../control/list-runs",
]


def test_no_spelling_of_a_path_gets_past_the_gateway(federation: Federation, gateway: str, ca: Path) -> None:
    for trick in TRICKS:
        for version, host in (("1.1", "Host: localhost\r\n"), ("1.0", "")):
            head = f"POST {trick}?from=trick HTTP/{version}\r\n{host}Content-Length: 0\r\nConnection: close\r\n\r\n"
            answered = codes(raw(gateway, ca, head.encode()))
            assert answered and set(answered) <= {400, 404}, (trick, version, answered)
    assert "from=trick" not in superlink_log(federation)


def test_nothing_is_smuggled_through_the_gateway(federation: Federation, gateway: str, ca: Path) -> None:
    inner = b"POST /v1/control/list-runs?from=smuggled HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    fleet = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n"
    chunked = b"0\r\n\r\n" + inner
    length = b"Content-Length: %d\r\n" % len(chunked)
    requests = {
        "both lengths": fleet + length + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        "both, the other way": fleet + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunked,
        "a space before the colon": fleet + length + b"Transfer-Encoding : chunked\r\n\r\n" + chunked,
        "another coding": fleet + length + b"Transfer-Encoding: xchunked\r\n\r\n" + chunked,
        "two lengths": fleet + b"Content-Length: 0\r\n" + length + b"\r\n" + chunked,
        "two hosts": fleet + b"Host: other\r\nContent-Length: 0\r\n\r\n",
        "one after the other": fleet + b"Content-Length: 0\r\n\r\n" + inner,
        "a negative length": fleet + b"Content-Length: -1\r\n\r\n" + inner,
        "a folded header": fleet + b"X: y\r\n Transfer-Encoding: chunked\r\n" + length + b"\r\n" + chunked,
        "an upgrade": fleet
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n"
        + inner,
        "a tunnel": b"CONNECT 127.0.0.1:18000 HTTP/1.1\r\nHost: localhost\r\n\r\n" + inner,
    }
    for name, request in requests.items():
        answered = codes(raw(gateway, ca, request))
        assert set(answered) <= {400, 401, 404, 405, 415, 422, 501}, (name, answered)
    assert "from=smuggled" not in superlink_log(federation)


def test_a_client_without_tls_or_with_an_old_one_is_refused(gateway: str, ca: Path) -> None:
    host, port = gateway.split(":")
    assert httpx.get(f"http://{gateway}/health", trust_env=False).status_code == 400
    outcome = {}
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(ca))
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with socket.create_connection((host, int(port)), 5) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host) as tls:
                    outcome[version.name] = tls.version()
            except (ssl.SSLError, ConnectionResetError):
                outcome[version.name] = None
    assert outcome == {"TLSv1": None, "TLSv1_1": None, "TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}


def test_only_the_gateway_listens_to_others_and_sites_listen_to_nobody(federation: Federation, study: Study) -> None:
    def listening(whose: str, which: str) -> set[str]:
        found = federation.process(whose, which).net_connections("inet")
        ports = {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}
        return {f"{ip.removeprefix('::ffff:')}:{port}" for ip, port in ports}  # IPv4 as an IPv6 socket writes it

    assert listening(STUDY, "superlink") == {study.superlink_address, study.health_address}
    assert listening(STUDY, "gateway") == {study.settings.gateway.listen}
    assert listening(STUDY, "runner") == listening(STUDY, "supervisor") == set()
    for site in ("a", "b"):
        assert {each.rpartition(":")[0] for each in listening(site, "supernode")} == {"127.0.0.1"}
        assert listening(site, "runner") == listening(site, "supervisor") == set()


# Keys.


def status_of(call: Callable[[], object]) -> int:
    """The HTTP code with which a call is refused."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def test_an_unregistered_key_is_refused(federation: Federation, gateway: str, ca: Path, tmp_path: Path) -> None:
    make_node_key(tmp_path)
    stranger = Peer(gateway, ca, tmp_path / "node.key")
    assert status_of(stranger.activate) == 412
    stranger.node = Node(node_id=1)
    assert status_of(stranger.pull) == 401


def test_a_request_counts_for_its_signer_and_for_its_time(peer: Peer, federation: Federation, study: Study) -> None:
    mine = peer.activate()
    with open_control(study) as control:
        (other,) = [node.id for node in control.nodes() if node.name == "a"]
    now = datetime.now(UTC)
    pull = "/v1/fleet/pull-messages"
    assert peer.say(pull, PullMessagesRequest(node=Node(node_id=mine)), at=now.isoformat()) == 200
    assert peer.say(pull, PullMessagesRequest(node=Node(node_id=other)), at=now.isoformat()) == 401
    for offset in (-310, -3600, 30, 3600):
        when = (now + timedelta(seconds=offset)).isoformat()
        assert peer.say(pull, PullMessagesRequest(node=Node(node_id=mine)), at=when) == 401, offset
    assert peer.say(pull, PullMessagesRequest(node=Node(node_id=mine)), at="yesterday") == 401


# A registered site.


def honest(plan: StudyPlan, federation: Federation) -> dict[str, Any]:
    """Records of a reply of an autoencoder round that would be taken, by name."""
    state = load_state(federation.folder(STUDY), plan)
    assert state is not None
    receipt = {"head": "0" * 64, "epsilon": 1.0, "epsilon_lifetime": 1.0, "steps": 3, "private": True}
    return {
        "autoencoder": to_record(state.weights["autoencoder"]),
        "progress": MetricRecord({"update_norm": 1.0}),
        "receipt": ConfigRecord(receipt),  # type: ignore[arg-type]
    }


def changed(records: dict[str, Any], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """The records with one array changed."""
    arrays = ArrayRecord(dict(records["autoencoder"]))
    name = max(arrays, key=lambda key: arrays[key].numpy().size)
    arrays[name] = Array(change(arrays[name].numpy().copy()))
    return {**records, "autoencoder": arrays}


def with_nan(array: np.ndarray) -> np.ndarray:
    array.flat[3] = np.nan
    return array


def test_what_a_site_sends_is_taken_only_if_it_can_be_a_result(peer: Peer, federation: Federation) -> None:
    plan, before = federation.plan, federation.done()
    peer.activate()
    wrong: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
        ("arrays_not_finite", lambda records: changed(records, with_nan)),
        ("arrays_too_large", lambda records: changed(records, lambda array: array + 1e6)),
        ("reply_not_in_closed_list", lambda records: {**records, "notes": ConfigRecord({"text": "hello"})}),
    ]
    for code, make in wrong:
        peer.push(peer.reply(peer.task(30), RecordDict(make(honest(plan, federation)))))
        expect(federation, code)

    # A reply that inside answers somebody else's task.
    task = peer.task(30)
    forged = peer.reply(task, RecordDict(honest(plan, federation)))
    forged.metadata.__dict__["_reply_to_message_id"] = "f" * 64
    forged.metadata.__dict__["_message_id"] = forged.object_id
    peer.push(forged, reply_to_message_id=task.metadata.message_id)
    expect(federation, "reply_differs")

    # More objects than a reply can have: SuperLink does not keep them.
    task = peer.task(30)
    tree = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=f"{i:064x}") for i in range(5000)])
    assert status_of(lambda: peer.push(peer.reply(task, refusal("x")), tree)) == 403
    peer.push(peer.reply(task, refusal("enough")))
    expect(federation, "enough")
    peer.leave()

    federation.wait_for_round(BACK_S)
    assert federation.answered("c") == [] and "c" not in federation.receipts()
    assert federation.done() >= before + len(wrong)


def expect(federation: Federation, code: str) -> None:
    federation.wait_until(lambda: federation.status().sites["c"].code == code, 20, f"{code} of c")


def test_a_request_that_is_too_large_does_not_pass_the_gateway(peer: Peer) -> None:
    node = peer.activate()
    body = PushObjectRequest(node=Node(node_id=node), object_content=bytes(17 * 2**20))
    assert peer.say("/v1/fleet/push-object", body, at=datetime.now(UTC).isoformat()) == 413


def test_a_request_that_is_sent_again_changes_nothing(peer: Peer, federation: Federation) -> None:
    peer.activate()
    task = peer.task(30)
    taken = peer.kept.requests[-1]
    reply = peer.reply(task, refusal("harmless"))
    peer.push(reply)
    pushes = [each for each in peer.kept.requests if "push" in str(each.url)][-4:]
    expect(federation, "harmless")
    answers = federation.answered("c"), federation.receipts()
    # Somebody who could read the wire has 300 s to say the same again.
    assert b"autoencoder" not in peer.again(taken).content
    for request in pushes:
        peer.again(request)
    federation.wait_for_round(BACK_S)
    assert federation.answered("c") == answers[0] and federation.receipts().get("c") is None


def test_a_site_cannot_give_another_site_a_task(peer: Peer, federation: Federation, study: Study) -> None:
    """Flower 1.41 believes whatever sender a message names: a node could speak to others in the coordinator's name."""
    peer.activate()
    with open_control(study) as control:
        (victim,) = [node.id for node in control.nodes() if node.name == "a"]
    run = peer.task(30).metadata.run_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1
    last = federation.plan.autoencoder
    assert last is not None
    content = task_content(federation, "autoencoder", last.rounds)
    message = Message(content, dst_node_id=victim, message_type="train.autoencoder", group_id="1", ttl=60)
    message.metadata.__dict__["_message_id"] = message.object_id
    assert status_of(lambda: peer.push(message)) == 403
    time.sleep(3)
    assert all(entry.body.get("round") != last.rounds for entry in federation.entries("a", "charge"))


def task_content(federation: Federation, module: str, number: int, **changes: Any) -> RecordDict:
    """A task as the coordinator would send it to a, with keys of the task changed or added."""
    state = load_state(federation.folder(STUDY), federation.plan)
    assert state is not None
    task = task_record(federation.plan.digest, module, number, "a", "")  # type: ignore[arg-type]
    for key, value in changes.items():
        task[key] = value
    return RecordDict({"task": task, "autoencoder": to_record(state.weights["autoencoder"])})


def test_a_revoked_key_is_refused_and_the_site_comes_back_with_another(
    peer: Peer, federation: Federation, gateway: str, ca: Path
) -> None:
    peer.activate()
    assert status_of(peer.pull) == 200
    federation.type("study", "revoke", federation.folder(STUDY), "c", "--yes")
    assert status_of(peer.pull) == 401
    assert status_of(peer.activate) == 412
    keys = federation.folder("c") / "keys"
    again = federation.command("study", "add-site", federation.folder(STUDY), keys / "node.pub", "--name", "c")
    assert again.returncode != 0 and "revoked" in again.stderr

    (keys / "new").mkdir()
    make_node_key(keys / "new")
    federation.type("study", "add-site", federation.folder(STUDY), keys / "new" / "node.pub", "--name", "c")
    fresh = Peer(gateway, ca, keys / "new" / "node.key")
    assert fresh.activate() != peer.node.node_id and status_of(fresh.pull) == 200
    fresh.leave()


# A site at a wrong door.


@pytest.fixture
def other_door(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """A TLS server with a certificate of another authority, and how many bytes each visitor told it."""
    ca, ca_key = make_ca("another")
    certificate, key = make_server_certificate(ca, ca_key, ["127.0.0.1"])
    (tmp_path / "other.crt").write_bytes(certificate)
    (tmp_path / "other.key").write_bytes(key)
    (tmp_path / "other-ca.crt").write_bytes(ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "other.crt", tmp_path / "other.key")
    told: list[int] = []
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            while True:
                try:
                    visitor, _ = server.accept()
                except OSError:
                    return
                with visitor:
                    visitor.settimeout(5)
                    try:
                        with context.wrap_socket(visitor, server_side=True) as tls:
                            told.append(len(tls.recv(65536)))
                    except OSError:  # the visitor did not like the certificate
                        told.append(0)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{port}", told
        server.shutdown(socket.SHUT_RDWR)


def test_a_site_tells_nothing_to_a_gateway_of_another_authority(
    federation: Federation, other_door: tuple[str, list[int]], tmp_path: Path
) -> None:
    address, told = other_door
    folder = tmp_path / "site"
    shutil.copytree(federation.folder("c"), folder, ignore=shutil.ignore_patterns("run", "logs", "cohort"))
    federation.edit(folder / "node.toml", gateway=address)
    looked = federation.command("site", "check", folder)
    assert looked.returncode != 0 and "untrusted_ca" in looked.stdout + looked.stderr, looked
    seen = len(told)
    assert seen and sum(told) == 0
    node = subprocess.Popen(
        [*federation_command("site", "start", folder, "--only", "node")],
        env=federation._environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        federation.wait_until(lambda: len(told) > seen, 30, "the node at the wrong door")
        time.sleep(1)
    finally:
        node.terminate()
        node.wait(30)
    assert sum(told) == 0


def federation_command(*arguments: object) -> list[str]:
    from fedsynth.deployment.supervisor import script

    return script("fedsynth", *map(str, arguments))


# Somebody who took the coordinator over. From here on the study runner is gone.


@pytest.fixture(scope="module")
def taken_over(federation: Federation, study: Study) -> Iterator[int]:
    """SuperLink and gateway without the study's supervisor and runner; gives the node id of a."""
    federation.stop(STUDY)
    started = []
    for child in children(study)[:2]:
        log = (federation.folder(STUDY) / "logs" / f"{child.name}.log").open("ab")
        environment = {**child.environment, MARK: str(federation.root)}
        started.append(subprocess.Popen(list(child.command), env=environment, stdout=log, stderr=log))
        log.close()

    def connected() -> bool:
        with open_control(study) as control:
            return {node.name for node in control.nodes() if node.online} >= {"a", "b"}

    federation.wait_until(connected, 90, "sites that come back")
    with open_control(study) as control:
        (node,) = [node.id for node in control.nodes() if node.name == "a"]
    yield node
    for process in started:
        process.terminate()
        process.wait(30)


def other_plans(plan: StudyPlan) -> dict[str, str]:
    """Digests of plans that ask for more than the approved one, by what they ask for."""

    def digest(section: str, **changes: Any) -> str:
        dumped = plan.model_dump(mode="json", exclude_none=True)
        dumped[section] = {**dumped[section], **changes}
        return StudyPlan.model_validate(dumped).digest

    return {
        "epsilon": digest("privacy", epsilon=50.0),
        "steps and rounds": digest("autoencoder", steps_per_round=30, rounds=500),
        "clip": digest("autoencoder", max_grad_norm=100.0),
    }


def wrong_weights(state: State) -> dict[str, tuple[str, ArrayRecord]]:
    """Records of weights that are none of the plan's, with the code of their refusal."""
    name = max(state, key=lambda key: state[key].numel())
    tensor = state[name]
    holes = tensor.clone()
    holes.view(-1)[0] = torch.nan
    renamed = {("x" if key == name else key): value for key, value in state.items()}
    lying = to_record(state)
    lying[name] = Array("float32", tuple(tensor.shape), "numpy.ndarray", Array(np.zeros((3, 3), np.float32)).data)
    return {
        "names": ("arrays_differ", to_record(renamed)),
        "lies": ("arrays_differ", lying),
        "nan": ("arrays_not_finite", to_record({**state, name: holes})),
        "norm": ("arrays_too_large", to_record({**state, name: tensor + 1e6})),
        # 80 MiB of zeros are a few chunks on the wire
        "size": ("message_too_large", to_record({**state, name: torch.zeros(20 * 2**20)})),
    }


def test_a_site_does_nothing_that_its_approved_plan_does_not_name(
    federation: Federation, study: Study, taken_over: int
) -> None:
    module = "autoencoder"
    state = load_state(federation.folder(STUDY), federation.plan)
    assert state is not None
    number = max(int(str(entry.body["round"])) for entry in federation.entries("a", "charge")) + 1
    good = task_content(federation, module, number)
    asked: dict[str, tuple[str, RecordDict, str]] = {
        name: ("plan_not_approved", task_content(federation, module, number, study=digest), "train.autoencoder")
        for name, digest in other_plans(federation.plan).items()
    }
    asked |= {
        f"weights: {name}": (code, RecordDict({"task": good["task"], module: record}), "train.autoencoder")
        for name, (code, record) in wrong_weights(state.weights["autoencoder"]).items()
    }
    asked |= {
        "a round beyond": ("round_not_in_plan", task_content(federation, module, 101), "train.autoencoder"),
        "another key": ("task_malformed", task_content(federation, module, number, epsilon=99.0), "train.autoencoder"),
        "another record": (
            "task_not_in_closed_list",
            RecordDict({**good, "config": ConfigRecord({"max_grad_norm": 1e6})}),
            "train.autoencoder",
        ),
        "another site's": (
            "task_of_another_site",
            task_content(federation, module, number, site="b"),
            "train.autoencoder",
        ),
        "another ledger": (
            "ledger_set_back",
            task_content(federation, module, number, head="f" * 64),
            "train.autoencoder",
        ),
        "another type": ("message_type_not_allowed", good, "train.files"),
        "a type that differs": ("task_malformed", good, "train.gan"),
    }
    before = federation.entries("a")
    with open_control(study) as control:  # our bundle has no settings, so a run cannot be given any
        assert status_of(lambda: start_run(control, bundle_bytes(), epsilon=99.0)) == 412
    with master(study, bundle_bytes()) as taken:
        messages = [
            Message(content, dst_node_id=taken_over, message_type=kind, group_id="1", ttl=120)
            for _, content, kind in asked.values()
        ]
        got = dict(zip(asked, taken.ask(100, *messages), strict=True))
        assert got == {name: code for name, (code, _, _) in asked.items()}
        assert federation.entries("a") == before
        # The way is real: a task that the plan names is done, on the plan's terms.
        assert taken.ask(60, _message(good, taken_over)) == ["answered"]
    charges = federation.entries("a", "charge")
    terms = {
        key: value for key, value in charges[0].body.items() if key in ("noise_multiplier", "sample_rate", "steps")
    }
    assert len(charges) == len([each for each in before if each.kind == "charge"]) + 1
    assert {key: charges[-1].body[key] for key in terms} == terms


def _message(content: RecordDict, node: int) -> Message:
    return Message(content, dst_node_id=node, message_type="train.autoencoder", group_id="1", ttl=120)


def hostile_bundle(trace: Path) -> bytes:
    """A bundle whose code, were it ever on the import path, would run in place of the installed one."""
    code = f"open({str(trace)!r}, 'a').write(__name__)\n".encode()
    files = [
        "torch.py",
        "sitecustomize.py",
        "fedsynth_client/__init__.py",
        "fedsynth_client/app.py",
        "fedsynth/__init__.py",
    ]
    return build_fab_from_files({"pyproject.toml": _PYPROJECT.encode(), **dict.fromkeys(files, code)})[0]


def test_code_in_a_bundle_reaches_no_site(
    federation: Federation, study: Study, taken_over: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    bundle = hostile_bundle(trace)
    before = {name: federation.entries(name) for name in ("a", "b")}
    with open_control(study) as control:
        nodes = {node.name: node.id for node in control.nodes()}
    state = load_state(federation.folder(STUDY), federation.plan)
    assert state is not None
    content = task_content(federation, "autoencoder", 50)
    with master(study, bundle) as taken:
        asked = [_message(content, nodes[name]) for name in ("a", "b")]
        assert taken.ask(60, *asked) == ["bundle_not_allowed"] * 2
    for name in ("a", "b"):
        assert federation.entries(name) == before[name]
        assert "bundle_not_allowed" in (federation.folder(name) / "site.log").read_text()
    assert not trace.exists()
    strays = [path for pattern in ("torch.py", "sitecustomize.py", "*.fab") for path in federation.root.rglob(pattern)]
    assert strays == []


def test_code_in_a_bundle_does_not_reach_the_study_runner(
    federation: Federation, study: Study, taken_over: int, tmp_path: Path
) -> None:
    """The study's own runner, beside a SuperLink at which somebody started a run of another bundle."""
    trace = tmp_path / "trace"
    (child,) = [each for each in children(study) if each.name == "runner"]
    with open_control(study) as control:
        run_id = start_run(control, hostile_bundle(trace))
        process = subprocess.Popen(
            list(child.command),
            env={**child.environment, MARK: str(federation.root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            federation.wait_until(
                lambda: any(run.id == run_id and not run.active for run in control.runs()), 40, "the end of the run"
            )
        finally:
            process.terminate()
            process.wait(30)
        (run,) = [each for each in control.runs() if each.id == run_id]
    assert (run.outcome, run.details) == ("failed", "bundle_not_allowed")
    assert not trace.exists()
