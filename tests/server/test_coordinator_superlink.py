"""The contract with Flower: its Control API as `control` uses it, and runs as the study runner does them."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.control import ControlHttpClient
from flwr.superlink.grid import HttpGrid

from fedsynth.deployment.certificates import make_ca, make_server_certificate
from fedsynth.deployment.keys import make_node_key, make_secret, public_key_bytes
from fedsynth.deployment.runtime import RuntimeDoor, heartbeat
from fedsynth.errors import FedsynthError, JobFailed, UsageError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.coordinator.control import Control, Run, SuperlinkUnreachable, open_control
from fedsynth_server.coordinator.runner import COMPONENT, Runner, Stopped, end_orphans, make_runner
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.coordinator.setup import init_study
from fedsynth_server.coordinator.start import children
from fedsynth_server.status import read_status

PORT, HEALTH = 23970, 23971


def make_study(plan: StudyPlan, folder: Path) -> Study:
    save_plan(plan, folder / "plan.toml")
    made = init_study(folder / "study", folder / "plan.toml", "127.0.0.1:23972", None)
    path = made.folder / "coordinator.toml"
    text = path.read_text().replace("18000", str(PORT)).replace("18001", str(HEALTH))
    path.write_text(text.replace("managed = true", "managed = false"))
    keys = made.folder / "keys"
    ca, ca_key = make_ca("test")
    (keys / "ca.crt").write_bytes(ca)
    certificate, key = make_server_certificate(ca, ca_key, ["localhost", "127.0.0.1"])
    (keys / "superlink.crt").write_bytes(certificate)
    (keys / "superlink.key").write_bytes(key)
    (keys / "superlink.key").chmod(0o600)
    make_secret(keys / "superexec.secret")
    return Study(made.folder)


@pytest.fixture
def study(tiny_plan: StudyPlan, tmp_path: Path) -> Study:
    return make_study(tiny_plan, tmp_path)


@pytest.fixture(scope="module")
def served(tiny_plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A study whose SuperLink runs, as the supervisor would start it."""
    study = make_study(tiny_plan, tmp_path_factory.mktemp("served"))
    child = children(study)[0]
    with (study.folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(list(child.command), env=child.environment, stdout=log, stderr=log)
        try:
            _until(lambda: _answers(study), 60.0)
            yield study
        finally:
            process.terminate()
            process.wait(20)


def _answers(study: Study) -> bool:
    try:
        with open_control(study) as control:
            control.nodes()
    except SuperlinkUnreachable:
        return False
    return True


def _until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def _newest(control: Control) -> Run:
    return control.runs()[0]


@pytest.mark.network
def test_nodes_are_registered_listed_and_unregistered(served: Study, tmp_path: Path) -> None:
    make_node_key(tmp_path)
    key = public_key_bytes(tmp_path / "node.pub")
    with open_control(served) as control:
        node_id = control.register(key, "a")
        (node,) = control.nodes()
        assert (node.id, node.name, node.public_key, node.online) == (node_id, "a", key, False)
        with pytest.raises(UsageError) as caught:
            control.register(key, "a")
        assert caught.value.code == "key_in_use"
        control.unregister(node_id)
        assert control.nodes() == []
        with pytest.raises(UsageError) as caught:
            control.unregister(node_id)
        assert caught.value.code == "node_unknown"
        with pytest.raises(UsageError) as caught:
            control.register(b"no key", "a")
        assert caught.value.code == "key_not_valid"


@pytest.mark.network
def test_a_proxy_in_the_environment_is_not_used(served: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert _answers(served)


@pytest.mark.network
def test_runs_start_and_end(served: Study) -> None:
    with open_control(served) as control:
        run_id = control.start_run()
        run = _newest(control)
        assert (run.id, run.status, run.active, run.claimed) == (run_id, "pending", True, False)
        control.stop_run(run_id)
        run = _newest(control)
        assert (run.status, run.outcome, run.active) == ("finished", "stopped", False)
        control.stop_run(run_id)  # once more does no harm


def do_one_run(study: Study, main: Callable[[Grid, Context], None], fab: bytes | None = None) -> Run:
    """Start a run and let the study runner do it with an app of the test's."""
    app = ServerApp()
    app.main()(main)
    runner = make_runner(study)
    runner = Runner(study, runner.door, app, runner.bundle)
    with open_control(study) as control:
        if fab is None:
            run_id = control.start_run()
        else:
            run_id = control._client.StartRun(StartRunRequest(fab=Fab(content=fab))).run_id
        _take_one(runner)
        run = _newest(control)
    assert run.id == run_id
    return run


def _take_one(runner: Runner) -> None:
    from fedsynth.deployment.runtime import take_tasks

    done: list[str] = []

    def work(token: str) -> None:
        runner.work(token)
        done.append(token)

    take_tasks(runner.door, COMPONENT, work, stopped=lambda: bool(done))


@pytest.mark.network
def test_the_runner_runs_the_installed_app_in_its_own_folder(served: Study) -> None:
    seen: list[dict[str, object]] = []

    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, HttpGrid)
        seen.append(dict(context.run_config))
        assert list(grid.get_nodes()) == []

    assert do_one_run(served, main).outcome == "completed"
    assert seen == [{}]


@pytest.mark.network
def test_what_cannot_be_cured_is_told_as_a_code_and_ends_the_study(served: Study) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise JobFailed("too_few_sites", "a sentence about hospitals", "a remedy")

    run = do_one_run(served, main)
    assert (run.outcome, run.details) == ("failed", "too_few_sites")
    status = read_status(served.folder)
    assert status is not None and (status.phase, status.code) == ("failed", "too_few_sites")
    (served.folder / "status.json").unlink()


@pytest.mark.network
def test_an_unforeseen_error_is_told_as_a_code_and_can_be_tried_again(served: Study) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise ValueError("text that stays here")

    run = do_one_run(served, main)
    assert (run.outcome, run.details) == ("failed", "internal_error")
    assert read_status(served.folder) is None


@pytest.mark.network
def test_a_bundle_that_is_not_ours_is_not_even_unpacked(served: Study) -> None:
    from flwr.cli.build import build_fab_from_files

    project = (
        b'[project]\nname = "study"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n'
        b'[tool.flwr.app]\npublisher = "fedsynth"\n[tool.flwr.app.components]\n'
        b'serverapp = "evil:app"\nclientapp = "evil:app"\n'
    )
    fab = build_fab_from_files({"pyproject.toml": project, "evil.py": b"raise SystemExit('ran')\n"})[0]

    def main(grid: Grid, context: Context) -> None:
        raise AssertionError("the app ran")

    run = do_one_run(served, main, fab)
    assert (run.outcome, run.details) == ("failed", "bundle_not_allowed")


@pytest.mark.network
def test_orphans_are_ended(served: Study) -> None:
    runner = make_runner(served)
    with open_control(served) as control:
        control.start_run()

        class Died(BaseException):
            pass

        def die(token: str) -> None:
            with runner.door.task_client(token, COMPONENT) as client:
                from flwr.proto.runtime_pb2 import PullTaskInputRequest

                client.PullTaskInput(PullTaskInputRequest())
            raise Died

        from fedsynth.deployment.runtime import take_tasks

        with pytest.raises(Died):
            take_tasks(runner.door, COMPONENT, die, stopped=lambda: False)
        assert _newest(control).claimed
        end_orphans(served)
        assert not _newest(control).active


@pytest.mark.network
def test_sigterm_ends_the_run_at_once(served: Study) -> None:
    def main(grid: Grid, context: Context) -> None:
        time.sleep(60)

    before = signal.signal(signal.SIGTERM, _raise_stopped)
    timer = threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(Stopped):
            do_one_run(served, main)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - started < 10
    with open_control(served) as control:
        assert _newest(control).outcome == "stopped"


def _raise_stopped(number: int, frame: object) -> None:
    raise Stopped


@pytest.mark.network
def test_the_runner_ends_when_told_to(served: Study) -> None:
    child = children(served)[-1]
    with (served.folder / "runner.log").open("wb") as log:
        process = subprocess.Popen(list(child.command), env=child.environment, stdout=log, stderr=log)
    try:
        _until(lambda: "ready; study tiny" in (served.folder / "runner.log").read_text(), 60.0)
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_without_superlink_the_control_api_says_so(study: Study) -> None:
    with open_control(study) as control, pytest.raises(SuperlinkUnreachable) as caught:
        control.runs()
    assert caught.value.code == "superlink_unreachable" and caught.value.exit_code == 3


def test_without_a_ca_nothing_is_trusted(study: Study) -> None:
    (study.folder / "keys" / "ca.crt").write_text("no certificate")
    with pytest.raises(UsageError) as caught, open_control(study):
        pass
    assert caught.value.code == "ca_unreadable"


def test_without_a_secret_the_runner_says_so(study: Study) -> None:
    (study.folder / "keys" / "superexec.secret").unlink()
    with pytest.raises(FedsynthError) as caught:
        make_runner(study)
    assert caught.value.code == "keys_unreadable"


def test_a_heartbeat_ends_though_superlink_is_away(study: Study) -> None:
    door = RuntimeDoor(study.superlink_address, (study.folder / "keys" / "ca.crt").read_bytes(), b"s" * 32)
    started = time.monotonic()
    with door.task_client("token", COMPONENT) as client, heartbeat(client):
        time.sleep(1.0)
    assert time.monotonic() - started < 5.0


def test_flower_has_the_names_that_the_coordinator_uses() -> None:
    """If this fails, Flower's internals changed: read `control` and `runner` beside the new version."""
    for method in ("StartRun", "StopRun", "ListRuns", "RegisterNode", "UnregisterNode", "ListNodes", "close"):
        assert callable(getattr(ControlHttpClient, method))
    assert {"base_url", "interceptors", "verify", "timeout"} <= set(inspect.signature(ControlHttpClient).parameters)
    assert {"runtime_api_address", "root_certificates", "token"} <= set(inspect.signature(HttpGrid).parameters)
    grid = HttpGrid("127.0.0.1:1", token="t")
    assert grid._retry_invoker.max_time is None
    assert hasattr(HttpGrid, "_runtime_client") and callable(grid.set_run) and callable(grid.close)
