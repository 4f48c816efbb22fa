"""What the supervisor does between two looks: registrations, one run at a time, back-off, and the end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedsynth.deployment.certificates import make_ca, make_server_certificate
from fedsynth.deployment.keys import make_node_key, make_secret
from fedsynth.errors import JobFailed, UsageError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.coordinator import start
from fedsynth_server.coordinator.control import Control, Node, Run, SuperlinkUnreachable
from fedsynth_server.coordinator.registry import add_site, read_registry
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.coordinator.setup import init_study
from fedsynth_server.coordinator.start import Conductor, children, prepare, run_supervised
from fedsynth_server.coordinator.stopping import stop_study
from fedsynth_server.status import StatusFile, read_status


@dataclass
class Superlink(Control):
    """Runs and registrations of a SuperLink that does what it is told."""

    made: list[Run] = field(default_factory=list)
    known: list[Node] = field(default_factory=list)
    away: bool = False
    looks: int = 0

    def nodes(self) -> list[Node]:
        return list(self.known)

    def register(self, public_key: bytes, name: str) -> int:
        self.known.append(Node(len(self.known) + 1, name, public_key, False, None))
        return self.known[-1].id

    def runs(self) -> list[Run]:
        self.looks += 1
        if self.away:
            raise SuperlinkUnreachable("superlink_unreachable", "away")
        return list(reversed(self.made))

    def start_run(self) -> int:
        self.made.append(Run(len(self.made) + 1, "pending", "", ""))
        return self.made[-1].id

    def stop_run(self, run_id: int) -> None:
        self.set(run_id, "finished", "stopped")

    def set(self, run_id: int, status: str, outcome: str = "", details: str = "") -> None:
        self.made[run_id - 1] = Run(run_id, status, outcome, details)


@pytest.fixture
def study(tiny_plan: StudyPlan, tmp_path: Path) -> Study:
    save_plan(tiny_plan, tmp_path / "plan.toml")
    made = init_study(tmp_path / "study", tmp_path / "plan.toml", "127.0.0.1:23951", None)
    text = (made.folder / "coordinator.toml").read_text()
    text = text.replace("18000", "23950").replace("18001", "23952").replace("0.0.0.0", "127.0.0.1")
    (made.folder / "coordinator.toml").write_text(text)
    return made


@pytest.fixture
def keys(study: Study) -> Path:
    folder = study.folder / "keys"
    ca, ca_key = make_ca("test")
    (folder / "ca.crt").write_bytes(ca)
    for name in ("gateway", "superlink"):
        certificate, key = make_server_certificate(ca, ca_key, ["localhost", "127.0.0.1"])
        (folder / f"{name}.crt").write_bytes(certificate)
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.key").chmod(0o600)
    make_secret(folder / "superexec.secret")
    return folder


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(start, "time", made)
    return made


def test_one_run_at_a_time_and_a_new_one_when_it_ended(study: Study, clock: Clock) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    assert conductor() and len(superlink.made) == 1
    for _ in range(5):
        clock.now += 10
        assert conductor()
    superlink.set(1, "running")
    clock.now += 10
    assert conductor() and len(superlink.made) == 1
    superlink.set(1, "finished", "failed", "No heartbeat received from the task")
    clock.now += 10
    assert conductor() and len(superlink.made) == 1  # a moment's pause
    clock.now += 10
    assert conductor() and len(superlink.made) == 2


def test_runs_that_get_nowhere_are_started_later_and_later(
    study: Study, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    started: list[float] = []
    while len(started) < 12:
        assert conductor()
        if len(superlink.made) > len(started):
            started.append(clock.now)
            superlink.set(len(started), "finished", "failed", "internal_error")
        clock.now += 1
    pauses = [b - a for a, b in itertools.pairwise(started)]
    assert pauses == sorted(pauses) and pauses[-1] <= 310 and pauses[-1] >= 300
    assert "failed internal_error" in (said := capsys.readouterr().err) and "runner.log says why" in said

    (study.folder / "checkpoint.safetensors").write_bytes(b"a round was completed")
    superlink.start_run()
    while superlink.looks and len(superlink.made) < 14:
        assert conductor()
        superlink.set(13, "finished", "failed")
        clock.now += 1
    assert clock.now - started[-1] < 700


def test_it_looks_seldom(study: Study, clock: Clock) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    for _ in range(200):  # 100 s of ticks
        assert conductor()
        clock.now += 0.5
    assert superlink.looks < 30


def test_surplus_runs_are_ended(study: Study, clock: Clock) -> None:
    superlink = Superlink()
    for _ in range(3):
        superlink.start_run()
    superlink.set(2, "running")
    Conductor(study, superlink)()
    assert [run.status for run in superlink.made] == ["finished", "running", "finished"]


def test_superlink_away_is_waited_for(study: Study, clock: Clock) -> None:
    superlink = Superlink(away=True)
    conductor = Conductor(study, superlink)
    for _ in range(10):
        assert conductor()
        clock.now += 60
    superlink.away = False
    assert conductor() and len(superlink.made) == 1


def test_a_site_that_is_added_meanwhile_is_registered(study: Study, clock: Clock) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    conductor()
    make_node_key(study.folder / "node")
    add_site(study, study.folder / "node" / "node.pub", "a")
    clock.now += 10
    conductor()
    assert [node.name for node in superlink.known] == ["a"]
    assert read_registry(study.folder).valid()["a"].node_id == 1


def test_a_registry_that_cannot_be_read_keeps_nobody_from_the_study(
    study: Study, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    (study.folder / "sites.json").write_text("{")
    superlink = Superlink()
    assert Conductor(study, superlink)()
    assert len(superlink.made) == 1
    assert "registry_unreadable" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["finished", "failed"])
def test_it_ends_with_the_study_once_the_runner_has_reported(study: Study, clock: Clock, phase: str) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    conductor()
    superlink.set(1, "running")
    StatusFile(study.folder, study.plan).phase(phase, "so it is", "a_code")  # type: ignore[arg-type]
    clock.now += 10
    assert conductor()
    superlink.set(1, "finished", "completed")
    clock.now += 10
    assert not conductor()


def test_a_runner_that_never_reports_does_not_keep_a_finished_study_open(study: Study, clock: Clock) -> None:
    superlink = Superlink()
    conductor = Conductor(study, superlink)
    conductor()
    superlink.set(1, "running")
    StatusFile(study.folder, study.plan).phase("finished")
    for _ in range(4):
        clock.now += 4
        assert conductor()
    superlink.away = True
    clock.now += 20
    assert not conductor()


def test_prepare_says_what_is_missing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(study)
    assert caught.value.code == "study_not_ready"
    said = capsys.readouterr().out
    assert "superlink.crt" in said and "superexec.secret" in said and "gateway.crt" in said


def test_prepare_passes_with_keys_and_names_a_foreign_port(
    study: Study, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(study)
    import socket

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 23950))
        other.listen()
        with pytest.raises(UsageError):
            prepare(study)
    assert "port_in_use" in capsys.readouterr().out


def test_superlink_is_started_closed(study: Study, keys: Path) -> None:
    superlink, gateway, runner = children(study)
    command = list(superlink.command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--enable-supernode-auth" in command and "--disable-runtime-dependency-installation" in command
    assert command[command.index("--isolation") + 1] == "process"
    assert "--insecure" not in command
    for child in (superlink, gateway, runner):
        assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert "127.0.0.1" in child.environment["NO_PROXY"]
    assert [child.name for child in (superlink, gateway, runner)] == ["superlink", "gateway", "runner"]


def test_no_gateway_is_started_that_runs_elsewhere(study: Study, keys: Path) -> None:
    path = study.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("managed = true", "managed = false"))
    assert [child.name for child in children(Study(study.folder))] == ["superlink", "runner"]


def test_a_failed_study_ends_the_processes_with_its_cause(
    study: Study, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StatusFile(study.folder, study.plan).phase("failed", "of an earlier start", "old")

    def supervise(folder: Path, processes: object, tick: object) -> None:
        assert (now := read_status(folder)) is not None and now.phase == "waiting"  # the old verdict is taken back
        StatusFile(study.folder, study.plan).phase("failed", "Too few sites.", "too_few_sites")

    monkeypatch.setattr(start, "supervise", supervise)
    with pytest.raises(JobFailed) as caught:
        run_supervised(study)
    assert caught.value.code == "too_few_sites" and caught.value.message == "Too few sites."


def test_stop_says_when_nothing_runs(study: Study) -> None:
    with pytest.raises(UsageError) as caught:
        stop_study(study)
    assert caught.value.code == "not_running"
