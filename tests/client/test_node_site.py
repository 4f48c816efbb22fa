"""What a hospital lays out, rehearses, starts and audits: folders, keys, processes, records, history."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import Result
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from typer.testing import CliRunner

from fedsynth.deployment.certificates import make_ca
from fedsynth.deployment.keys import make_node_key, public_key_bytes
from fedsynth.deployment.network import Unreachable
from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.plan import Module, StudyPlan, load_plan, save_plan
from fedsynth.records import check_reply
from fedsynth_client.audit import audit
from fedsynth_client.cli import app as site_cli
from fedsynth_client.dry_run import dry_run, render
from fedsynth_client.ledger import Task
from fedsynth_client.node import start as node_start
from fedsynth_client.node.doctor import network_lines, site_lines
from fedsynth_client.node.registration import registered
from fedsynth_client.node.settings import NodeSettings, load_settings, save_settings
from fedsynth_client.node.start import children, local_lines, prepare
from fedsynth_client.node.status import lines_of, node_status
from fedsynth_client.outbox import Outbox
from fedsynth_client.sent import sent
from fedsynth_client.setup import find_plan, init_node
from fedsynth_client.site import Site

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

Ask = Callable[[Site, Module, RecordDict], RecordDict]
Content = Callable[..., RecordDict]
CLOSED = "127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "coordinator-ca.crt"
    path.write_bytes(make_ca("test")[0])
    return path


@pytest.fixture
def node_site(tiny_site: Site, ca: Path) -> Site:
    """Site ``a`` with a node whose gateway is a closed port."""
    init_node(tiny_site.folder, CLOSED, ca, [])
    tiny_site.folder.chmod(0o700)
    return tiny_site


def run(*arguments: object) -> Result:
    """The command line, as far as an exception that the root command would make an exit code of."""
    return CliRunner().invoke(site_cli, [str(each) for each in arguments])


def code_of(result: Result) -> str:
    assert isinstance(result.exception, FedsynthError), result.output
    return result.exception.code


def failed(lines: list[Any]) -> set[str]:
    return {line.code for line in lines if not line.ok}


# --- laying out ----------------------------------------------------------------------------------------------------


def test_a_node_is_laid_out_with_private_keys(tmp_path: Path, ca: Path) -> None:
    folder = tmp_path / "site"
    result = run("init", folder, "--gateway", "study.example:8443", "--ca", ca)
    assert result.exit_code == 0, result.output
    assert "SHA256:" in result.output
    assert load_settings(folder) == NodeSettings(gateway="study.example:8443")
    assert not (folder / "policy.toml").exists()
    for name in ("node.key", "runtime.key", "superexec.secret"):
        assert (folder / "keys" / name).stat().st_mode & 0o077 == 0
    assert (folder.stat().st_mode | (folder / "keys").stat().st_mode) & 0o077 == 0
    assert code_of(run("init", folder, "--gateway", "other.example:1", "--ca", ca)) == "node_settings_exist"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--name", "north"], "options_incomplete"),
        (["--gateway", "study.example:8443"], "options_incomplete"),
        ([], "options_incomplete"),
        (["--gateway", "study.example", "--ca", "CA"], "gateway_invalid"),
        (["--gateway", "study.example:8443", "--ca", "nowhere.crt"], "certificate_missing"),
    ],
)
def test_an_incomplete_init_writes_nothing(tmp_path: Path, ca: Path, options: list[str], code: str) -> None:
    folder = tmp_path / "site"
    result = run("init", folder, *[str(ca) if option == "CA" else option for option in options])
    assert code_of(result) == code
    assert not folder.exists()


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_that_was_shown_is_approved_by_its_digest(tiny_site: Site, tiny_plan: StudyPlan, tmp_path: Path) -> None:
    other = tiny_plan.model_copy(update={"name": "other"})
    save_plan(other, tmp_path / "other.toml")
    assert code_of(run("approve", tiny_site.folder, other.digest, "--yes")) == "plan_not_offered"
    shown = run("plan", "show", tiny_site.folder, tmp_path / "other.toml")
    assert shown.exit_code == 0, shown.output
    assert other.digest in shown.output
    assert other.digest not in tiny_site.policy().approved_plans
    assert run("approve", tiny_site.folder, other.digest, "--yes").exit_code == 0
    assert tiny_site.plan(other.digest) == other
    assert other.digest in tiny_site.policy().approved_plans


def test_an_offered_plan_that_was_changed_is_not_approved(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    offered = tiny_site.offer(tiny_plan.model_copy(update={"name": "other"}))
    digest = load_plan(offered).digest
    offered.write_text(offered.read_text().replace("other", "more"))
    with pytest.raises(Refused) as refused:
        find_plan(tiny_site, digest)
    assert refused.value.code == "plan_altered"


# --- rehearsing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TRAINED)
def test_a_dry_run_lists_exactly_what_leaves(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, module: Module
) -> None:
    (planned,) = [each for each in dry_run(tiny_plan, "a").exchanges if each.module == module]
    reply = ask(tiny_site, module, task_content(tiny_plan, module))
    check_reply(reply, module)
    assert planned.rounds == 2
    listed = {record.name: record for record in planned.leaves}
    assert set(listed) == set(reply)
    for name, record in reply.items():
        assert isinstance(record, ArrayRecord | MetricRecord | ConfigRecord)
        assert listed[name].bytes == record.count_bytes()
        if isinstance(record, ArrayRecord):
            found = [(key, list(array.shape), array.dtype, len(array.data)) for key, array in record.items()]
            assert sorted((a.name, a.shape, a.dtype, a.bytes) for a in listed[name].arrays) == sorted(found)
        else:
            assert listed[name].values == sorted(record)
    (logged,) = sent(tiny_site)
    assert logged.bytes == planned.bytes_leaving


@pytest.mark.parametrize("module", TRAINED)
def test_a_dry_run_lists_what_arrives(tiny_plan: StudyPlan, task_content: Content, module: Module) -> None:
    (planned,) = [each for each in dry_run(tiny_plan, "a").exchanges if each.module == module]
    content = task_content(tiny_plan, module)
    assert {record.name for record in planned.arrives} == set(content)
    for record in planned.arrives:
        if record.kind == "arrays":
            assert [array.name for array in record.arrays] == list(content.array_records[record.name])


def test_a_dry_run_spends_nothing_and_reads_aloud(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    plan = tiny_site.folder / "plans" / f"{tiny_plan.digest}.toml"
    result = run("dry-run", tiny_site.folder, plan)
    assert result.exit_code == 0, result.output
    assert "generator" in result.output
    assert not tiny_site.ledger_path.exists()
    assert "6 answers" in render(dry_run(tiny_plan, "a"), "tiny")


# --- a task carries nothing unknown --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [ConfigRecord({"lr": 9.0}), MetricRecord({"x": 1.0}), ArrayRecord({"x": Array(np.ones(2))})]
)
def test_a_record_that_a_task_does_not_have_is_refused_unread(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, extra: Any
) -> None:
    content = task_content(tiny_plan, "autoencoder")
    content["more"] = extra
    reply = ask(tiny_site, "autoencoder", content)
    assert dict(reply.config_records["refusal"]) == {"code": "task_not_in_closed_list"}
    assert tiny_site.ledger().entries() == []


def test_a_record_of_another_module_is_refused_unread(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    content = task_content(tiny_plan, "autoencoder")
    content["discriminator"] = task_content(tiny_plan, "gan")["discriminator"]
    reply = ask(tiny_site, "autoencoder", content)
    assert dict(reply.config_records["refusal"]) == {"code": "task_not_in_closed_list"}
    assert tiny_site.ledger().entries() == []


# --- starting ------------------------------------------------------------------------------------------------------


def test_the_nodes_process_knows_keys_and_nothing_of_the_data(node_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "PYTHONPATH", "FLWR_TELEMETRY_ENABLED"):
        monkeypatch.setenv(name, "http://elsewhere.example:1")
    settings = load_settings(node_site.folder).model_copy(update={"proxy": "http://proxy.example:3128"})
    supernode, runner = children(node_site.folder, settings)
    for word in supernode.command:
        assert not any(each in word for each in ("cohort", "policy", "ledger", "node-config", "insecure"))
    assert "process" in supernode.command
    assert supernode.environment["HTTPS_PROXY"] == supernode.environment["https_proxy"] == "http://proxy.example:3128"
    assert "127.0.0.1" in supernode.environment["NO_PROXY"]
    assert not any("proxy" in key.lower() and key.lower() != "no_proxy" for key in runner.environment)
    for child in (supernode, runner):
        assert "PYTHONPATH" not in child.environment
        assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert child.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert "-I" in runner.command
    assert [child.name for child in children(node_site.folder, settings, "node")] == ["supernode"]
    assert [child.name for child in children(node_site.folder, settings, "runner")] == ["runner"]


def test_without_a_proxy_in_the_settings_the_node_keeps_the_environments(
    node_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://hospital.example:3128")
    (supernode,) = children(node_site.folder, load_settings(node_site.folder), "node")
    assert supernode.environment["HTTPS_PROXY"] == "http://hospital.example:3128"


def test_a_node_without_data_needs_no_policy_and_a_runner_no_node_key(node_site: Site, tmp_path: Path) -> None:
    settings = load_settings(node_site.folder)
    assert failed(local_lines(node_site.folder, settings)) == set()
    (node_site.folder / "keys" / "node.key").unlink()
    assert failed(local_lines(node_site.folder, settings, "runner")) == set()
    assert "key_missing" in failed(local_lines(node_site.folder, settings, "node"))
    node_site.policy_path.unlink()
    assert "policy_missing" in failed(local_lines(node_site.folder, settings, "runner"))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / "policy.toml").unlink(), "policy_missing"),
        (lambda folder: (folder / "keys" / "node.key").unlink(), "key_missing"),
        (lambda folder: (folder / "keys" / "node.key").chmod(0o644), "key_readable_by_others"),
        (lambda folder: (folder / "keys" / "superexec.secret").write_bytes(b""), "secret_too_short"),
        (lambda folder: (folder / "keys" / "coordinator-ca.crt").write_text("x"), "certificate_unreadable"),
        (lambda folder: (folder / "ledger.sqlite").write_bytes(b"x" * 5000), "ledger_tampered"),
        (lambda folder: (folder / "node.toml").unlink(), "node_settings_missing"),
        (lambda folder: folder.chmod(0o750), "folder_open_to_others"),
    ],
)
def test_what_could_not_work_is_not_started(node_site: Site, spoil: Callable[[Path], object], code: str) -> None:
    spoil(node_site.folder)
    assert code_of(run("start", node_site.folder, "--detach")) == code
    assert not (node_site.folder / "run" / "supervisor.json").exists()


def test_what_a_node_writes_is_for_its_owner_alone(node_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = node_site.folder / "made"
    monkeypatch.setattr(node_start, "supervise", lambda folder, processes: made.touch())
    before = os.umask(0o022)
    try:
        node_start.start(node_site.folder)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_local_certificate_that_is_due_is_renewed_before_the_start(node_site: Site) -> None:
    certificate = node_site.folder / "keys" / "runtime.crt"
    prepare(node_site.folder)
    before = certificate.read_bytes()
    prepare(node_site.folder)
    assert certificate.read_bytes() == before
    certificate.write_text("spoilt")
    prepare(node_site.folder)
    assert b"BEGIN CERTIFICATE" in certificate.read_bytes()


def test_a_node_that_never_ran_says_so(node_site: Site) -> None:
    status = node_status(node_site.folder, ask_coordinator=False)
    assert not status.running
    assert any("never started" in line.what for line in lines_of(status))
    assert run("status", node_site.folder, "--offline").exit_code == 1
    assert code_of(run("stop", node_site.folder)) == "not_running"


# --- the way to the coordinator ------------------------------------------------------------------------------------


def test_behind_the_first_step_that_fails_nothing_is_told(node_site: Site) -> None:
    lines = network_lines(node_site.folder, load_settings(node_site.folder))
    assert [line.code for line in lines if not line.ok] == ["connection_refused"]
    assert not lines[-1].ok


def test_a_site_without_a_node_is_told_so_and_can_be_checked(tiny_site: Site) -> None:
    tiny_site.folder.chmod(0o700)
    lines = site_lines(tiny_site, None, offline=True)
    assert failed(lines) == set()
    assert [line.code for line in lines if line.state == "warn"] == ["node_settings_missing"]
    assert any("left at delta" in line.what for line in lines)


def test_check_contacts_nobody_when_offline(node_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("somebody was contacted")

    monkeypatch.setattr("socket.create_connection", forbidden)
    monkeypatch.setattr("socket.getaddrinfo", forbidden)
    assert failed(site_lines(node_site, None, offline=True)) == set()
    result = run("check", node_site.folder, "--offline", "--json")
    assert result.exit_code == 0, result.output
    node_site.folder.chmod(0o755)
    assert run("check", node_site.folder, "--offline").exit_code == 5


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (400, '{"code": 2003, "detail": "x"}', None),
        (400, '{"code": 2004, "detail": "x"}', "key_not_registered"),
        (401, "{}", "signature_refused"),
        (502, "", "superlink_unreachable"),
        (404, "", "registration_unknown"),
        (200, "", "registration_unknown"),
    ],
)
def test_the_coordinator_is_asked_by_a_signed_question_that_changes_nothing(
    tmp_path: Path, status: int, body: str, outcome: str | None
) -> None:
    make_node_key(tmp_path)
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, text=body)

    client = httpx.Client(base_url="https://study.invalid", transport=httpx.MockTransport(answer))
    if outcome is None:
        assert "registered" in registered(client, (tmp_path / "node.key").read_bytes())
    else:
        with pytest.raises((Refused, Unreachable)) as told:
            registered(client, (tmp_path / "node.key").read_bytes())
        assert told.value.code == outcome
    (request,) = asked
    question = ActivateNodeRequest.FromString(request.content)
    assert request.url.path == "/v1/fleet/activate-node"
    assert question.heartbeat_interval == 0.0
    assert question.public_key == public_key_bytes(tmp_path / "node.pub")
    serialization.load_pem_public_key(question.public_key)
    assert {"flwr-public-key", "flwr-signature", "flwr-timestamp"} <= set(request.headers)


def test_a_key_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        registered(httpx.Client(), b"no key")
    assert refused.value.code == "node_key_invalid"


# --- history -------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy_site(tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content) -> Site:
    """Site ``a`` after a released round that was sent twice and another module's first round."""
    for module in ("autoencoder", "autoencoder", "radiogenomics"):
        ask(tiny_site, module, task_content(tiny_plan, module))  # type: ignore[arg-type]
    return tiny_site


def test_what_was_sent_is_listed_and_what_went_twice_is_marked(busy_site: Site, tiny_plan: StudyPlan) -> None:
    first, second, third = sent(busy_site)
    assert (first.module, second.module, third.module) == ("autoencoder", "autoencoder", "radiogenomics")
    assert (first.again, second.again, third.again) == (False, True, False)
    assert first.sha256 == second.sha256 != third.sha256
    assert first.study == tiny_plan.digest
    assert first.bytes == sum(first.records.values()) > 1000
    result = run("sent", busy_site.folder)
    assert "sent again" in result.output
    assert run("sent", busy_site.folder, "--json").exit_code == 0


def test_a_folder_that_is_no_sites_gets_no_ledger_by_being_asked(tmp_path: Path) -> None:
    for command in (["sent"], ["audit", "verify"]):
        assert code_of(run(*command, tmp_path)) == "policy_missing"
    assert list(tmp_path.iterdir()) == []


def test_an_honest_history_passes_the_audit(busy_site: Site) -> None:
    noted = busy_site.ledger().entries()[2].digest
    assert failed(audit(busy_site, noted)) == set()
    for head, code in ((noted, 0), (noted[:12].upper(), 0), (noted[:11], 5)):
        assert run("audit", "verify", busy_site.folder, "--head", head).exit_code == code


def test_a_head_that_is_not_in_the_chain_fails_the_audit(busy_site: Site) -> None:
    assert failed(audit(busy_site, "ab" * 32)) == {"head_unknown"}
    assert run("audit", "verify", busy_site.folder, "--head", "ab" * 32).exit_code == 5


def test_a_missing_or_altered_answer_fails_the_audit(busy_site: Site) -> None:
    stored = sorted(busy_site.folder.glob("outbox/*/*.safetensors"))[0]
    stored.write_bytes(stored.read_bytes() + b"x")
    assert failed(audit(busy_site)) == {"reply_lost"}


def test_a_changed_entry_fails_the_audit(busy_site: Site) -> None:
    with sqlite3.connect(busy_site.ledger_path) as connection:
        connection.execute("DROP TRIGGER entry_is_never_changed")
        connection.execute("UPDATE entry SET body = replace(body, '\"steps\":3', '\"steps\":1')")
    assert failed(audit(busy_site)) == {"ledger_tampered"}


def test_an_altered_plan_fails_the_audit_and_a_missing_one_is_pointed_out(
    busy_site: Site, tiny_plan: StudyPlan
) -> None:
    plan = busy_site.folder / "plans" / f"{tiny_plan.digest}.toml"
    text = plan.read_text()
    plan.write_text(text.replace('name = "tiny"', 'name = "tinier"'))
    assert failed(audit(busy_site)) == {"plan_altered"}
    plan.unlink()
    lines = audit(busy_site)
    assert failed(lines) == set()
    assert [line.code for line in lines if line.state == "warn"] == ["plan_gone"]


def appended(site: Site, kind: str, body: dict[str, Any]) -> None:
    """An entry that the ledger itself would not write, with a chain that holds."""
    ledger = site.ledger()
    with ledger._connection() as connection:
        connection.execute("BEGIN IMMEDIATE")
        ledger._append(connection, kind, body)


@pytest.mark.parametrize(
    ("kind", "change", "code"),
    [
        ("sent", {"round": 2, "sha256": "0" * 64, "records": {}, "to": "x"}, "result_without_charge"),
        ("sent", {"round": 1, "sha256": "0" * 64, "records": {}, "to": "x"}, "sent_without_release"),
        ("released", {"round": 1, "sha256": "0" * 64}, "released_twice"),
        (
            "charge",
            {"round": 1, "sample_rate": 1, "noise_multiplier": 1, "steps": 1, "max_grad_norm": 1, "private": True},
            "result_without_charge",
        ),
        ("charge", {"round": 1}, "entry_unknown"),
        ("rewritten", {"round": 1}, "entry_unknown"),
    ],
)
def test_a_history_that_could_not_have_been_fails_the_audit(
    busy_site: Site, tiny_plan: StudyPlan, kind: str, change: dict[str, Any], code: str
) -> None:
    appended(busy_site, kind, {"study": tiny_plan.digest, "module": "autoencoder", **change})
    assert failed(audit(busy_site)) == {code}


def test_a_charge_below_its_plans_terms_fails_the_audit(busy_site: Site, tiny_plan: StudyPlan) -> None:
    terms = next(entry.body for entry in busy_site.ledger().entries() if entry.kind == "charge")
    appended(busy_site, "charge", {**terms, "module": "gan", "steps": 1})
    assert failed(audit(busy_site)) == {"charge_differs_from_plan"}


def test_a_tightened_policy_shows_in_the_audit(busy_site: Site) -> None:
    text = busy_site.policy_path.read_text()
    busy_site.policy_path.write_text(text.replace("max_epsilon = 10.0", "max_epsilon = 0.5"))
    assert failed(audit(busy_site)) == {"budget_exceeded"}


def test_an_answer_whose_charge_was_forgotten_fails_the_audit(busy_site: Site, tiny_plan: StudyPlan) -> None:
    stored = busy_site.folder / "outbox" / tiny_plan.digest
    os.link(stored / "autoencoder-0001.safetensors", stored / "gan-0001.safetensors")
    assert failed(audit(busy_site)) == {"ledger_incomplete"}
    assert Outbox(busy_site.folder).reply(Task(tiny_plan.digest, "autoencoder", 1), sent(busy_site)[0].sha256)


def test_settings_saved_by_init_are_those_that_start_reads(node_site: Site) -> None:
    settings = load_settings(node_site.folder)
    save_settings(settings.model_copy(update={"bundles": ["ab" * 32]}), node_site.folder)
    assert load_settings(node_site.folder).bundles == ["ab" * 32]
