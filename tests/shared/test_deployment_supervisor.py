"""The supervisor keeps processes running, gives up where a restart is no use, and leaves nothing behind."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedsynth.deployment import supervisor
from fedsynth.deployment.supervisor import (
    Child,
    flower_environment,
    is_running,
    read_status,
    script,
    start_detached,
    stop,
    supervise,
)
from fedsynth.errors import FedsynthError

ENDURES = "import time; print('here', flush=True); time.sleep(60)"
# Runs `supervise` on the folder and the children (name, code) given as JSON, as a program of its own.
SUPERVISOR = """
import json, os, sys
from pathlib import Path
from fedsynth.deployment import supervisor
supervisor._FIRST_DELAY_SECONDS = 0.1
children = [
    supervisor.Child(name, [sys.executable, "-c", code], dict(os.environ), stop_seconds=5.0)
    for name, code in json.loads(sys.argv[2])
]
supervisor.supervise(Path(sys.argv[1]), children)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "_FIRST_DELAY_SECONDS", 0.05)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a supervisor as a process of its own; whatever it started is ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*children: tuple[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path), json.dumps(children)])
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
    status = read_status(tmp_path)
    for child in status.children if status else []:
        if child.pid is not None and psutil.pid_exists(child.pid):
            psutil.Process(child.pid).kill()


def child(name: str, code: str, **more: object) -> Child:
    return Child(name, [sys.executable, "-c", code], dict(os.environ), **more)  # type: ignore[arg-type]


def until(seen: Callable[[], object], seconds: float = 15.0) -> Callable[[], bool]:
    """A tick that ends the work once `seen()`; a wait that never ends is a failed test."""
    deadline = time.monotonic() + seconds

    def tick() -> bool:
        assert time.monotonic() < deadline, "it never came"
        return not seen()

    return tick


def wait_for(seen: Callable[[], object], seconds: float = 15.0) -> None:
    tick = until(seen, seconds)
    while tick():
        time.sleep(0.05)


def running_pid(folder: Path, name: str = "worker") -> int | None:
    status = read_status(folder)
    found = [each.pid for each in status.children if each.name == name and each.pid] if status else []
    return found[0] if found else None


def test_runs_logs_privately_and_stops(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "worker.log"
    supervise(tmp_path, [child("worker", ENDURES)], until(lambda: log.is_file() and log.read_bytes()))
    assert log.read_text() == "here\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    status = read_status(tmp_path)
    assert status is not None and status.state == "stopped"
    assert [(each.name, each.state, each.exit_code) for each in status.children] == [
        ("worker", "stopped", -signal.SIGTERM)
    ]
    assert not is_running(tmp_path)


def test_starts_again_with_growing_delays(tmp_path: Path) -> None:
    mark = tmp_path / "starts"
    code = f"import time; open({str(mark)!r}, 'a').write(f'{{time.monotonic()}}\\n')"
    supervise(tmp_path, [child("worker", code)], until(lambda: mark.is_file() and len(mark.read_text().split()) >= 5))
    starts = [float(line) for line in mark.read_text().split()]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    # 0.05, 0.1, 0.2, 0.4 s and the start of an interpreter each
    assert all(gap >= 0.05 * 2**number for number, gap in enumerate(gaps[:4]))
    status = read_status(tmp_path)
    assert status is not None and status.children[0].restarts >= 4 and status.children[0].exit_code == 0


def test_a_steady_process_is_restarted_without_the_delay_of_earlier_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "_STEADY_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "_FIRST_DELAY_SECONDS", 0.1)
    mark = tmp_path / "starts"
    code = f"open({str(mark)!r}, 'a').write('x')"
    supervise(tmp_path, [child("worker", code)], until(lambda: mark.is_file() and len(mark.read_text()) >= 4))
    assert "again in 1" not in capfd.readouterr().err  # 0.1 s each time, which is said as 0 s


def test_a_process_that_fails_takes_along_the_one_that_waits_for_it(tmp_path: Path) -> None:
    mark = tmp_path / "starts"
    waits = f"import time; open({str(mark)!r}, 'a').write('x'); time.sleep(60)"
    works = "import time; time.sleep(0.5); raise SystemExit(1)"
    children = [child("waiting", waits), child("working", works, takes_along=frozenset({"waiting"}))]
    supervise(tmp_path, children, until(lambda: mark.is_file() and mark.read_text() == "xx"))
    status = read_status(tmp_path)
    assert status is not None and status.children[0].restarts == 1

    mark.unlink()  # one that ends as it should leaves the other alone
    children = [child("waiting", waits), child("working", "pass", takes_along=frozenset({"waiting"}))]

    def ended_twice() -> bool:
        status = read_status(tmp_path)
        return status is not None and len(status.children) == 2 and status.children[1].restarts >= 2

    supervise(tmp_path, children, until(ended_twice))
    assert mark.read_text() == "x"


def test_a_fatal_code_ends_all_and_says_so(tmp_path: Path) -> None:
    worker = child("worker", ENDURES)
    refused = child("node", "raise SystemExit(7)", fatal_codes=frozenset({7}))
    with pytest.raises(FedsynthError) as caught:
        supervise(tmp_path, [worker, refused], until(lambda: False))
    assert caught.value.code == "child_gave_up"
    status = read_status(tmp_path)
    assert status is not None and status.state == "failed"
    assert {each.name: (each.state, each.exit_code) for each in status.children} == {
        "worker": ("stopped", -signal.SIGTERM),
        "node": ("failed", 7),
    }


def test_stops_the_last_started_first(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def polite(name: str) -> Child:
        return child(
            name,
            "import signal, sys, time\n"
            f"def end(*_):\n    open({str(order)!r}, 'a').write({name + ' '!r}); sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)",
        )

    logs = [tmp_path / "logs" / f"{name}.log" for name in ("first", "second")]
    ready = until(lambda: all(log.is_file() and log.read_bytes() for log in logs))
    supervise(tmp_path, [polite("first"), polite("second")], ready)
    assert order.read_text().split() == ["second", "first"]


def test_kills_what_ignores_the_request_to_end(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "deaf.log"
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    supervise(tmp_path, [child("deaf", code, stop_seconds=0.2)], until(lambda: log.is_file() and log.read_bytes()))
    status = read_status(tmp_path)
    assert status is not None and status.children[0].exit_code == -signal.SIGKILL


def test_workers_of_a_killed_process_do_not_survive_it(tmp_path: Path) -> None:
    """A server whose master was killed leaves workers that hold its port; the restart would fail for ever."""
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, signal, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'a').write(f'{{worker.pid}}\\n')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    supervise(tmp_path, [child("server", code)], until(lambda: pids.is_file() and len(pids.read_text().split()) >= 2))
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")

    pids: list[int] = []
    monkeypatch.setattr(supervisor, "write_atomic", full)
    log = tmp_path / "logs" / "worker.log"
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    supervise(tmp_path, [child("worker", code)], until(lambda: log.is_file() and log.read_bytes()))
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 1 and not psutil.pid_exists(pids[0])


def test_a_second_supervisor_is_refused_and_stop_ends_the_first(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    first = outside(("worker", ENDURES))
    wait_for(lambda: running_pid(tmp_path))
    assert is_running(tmp_path)
    for attempt in (
        lambda: supervise(tmp_path, []),
        lambda: start_detached(tmp_path, [sys.executable, "-c", "pass"]),
    ):
        with pytest.raises(FedsynthError) as caught:
            attempt()
        assert caught.value.code == "already_running"
    worker = running_pid(tmp_path)
    assert worker is not None
    stop(tmp_path, timeout=20)
    assert first.wait(20) == 0
    assert not psutil.pid_exists(worker)
    with pytest.raises(FedsynthError) as caught:
        stop(tmp_path)
    assert caught.value.code == "not_running"


def test_an_impatient_second_signal_leaves_nothing_behind(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    slow = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(1); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)"
    )
    first = outside(("worker", slow))
    log = tmp_path / "logs" / "worker.log"
    wait_for(lambda: running_pid(tmp_path) and log.read_bytes())
    worker = running_pid(tmp_path)
    assert worker is not None
    first.send_signal(signal.SIGINT)
    time.sleep(0.7)
    first.send_signal(signal.SIGINT)
    assert first.wait(20) == 0
    assert not psutil.pid_exists(worker)


def test_the_next_start_ends_what_a_killed_supervisor_left(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    first = outside(("worker", ENDURES))
    wait_for(lambda: running_pid(tmp_path))
    orphan = running_pid(tmp_path)
    assert orphan is not None
    first.kill()
    first.wait(20)
    assert psutil.pid_exists(orphan)
    status = read_status(tmp_path)
    assert status is not None and status.state == "failed" and not is_running(tmp_path)

    second = outside(("worker", ENDURES))
    wait_for(lambda: running_pid(tmp_path) not in (None, orphan))
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    assert second.poll() is None


def test_stop_ends_what_a_killed_supervisor_left(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    first = outside(("worker", ENDURES))
    wait_for(lambda: running_pid(tmp_path))
    orphan = running_pid(tmp_path)
    assert orphan is not None
    first.kill()
    first.wait(20)
    assert psutil.pid_exists(orphan) and not is_running(tmp_path)

    assert stop(tmp_path, 20.0) is False
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    with pytest.raises(FedsynthError) as refused:
        stop(tmp_path, 20.0)
    assert refused.value.code == "not_running"


def test_stopping_a_start_that_still_ends_leftovers_leaves_nothing(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    slow = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(2); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)"
    )
    first = outside(("worker", slow))
    log = tmp_path / "logs" / "worker.log"
    wait_for(lambda: running_pid(tmp_path) and log.read_bytes())
    orphan = running_pid(tmp_path)
    assert orphan is not None
    first.kill()
    first.wait(20)

    second = outside(("worker", slow))
    wait_for(lambda: is_running(tmp_path))
    stop(tmp_path, 20.0)
    assert second.wait(20) == 0
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def test_workers_whose_master_was_killed_with_its_supervisor_are_ended(
    tmp_path: Path, outside: Callable[..., subprocess.Popen[bytes]]
) -> None:
    master = (
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(worker.pid, flush=True); time.sleep(60)"
    )
    first = outside(("worker", master))
    log = tmp_path / "logs" / "worker.log"
    wait_for(lambda: running_pid(tmp_path) and log.read_bytes())
    worker, leader = int(log.read_text()), running_pid(tmp_path)
    assert leader is not None
    first.kill()
    os.kill(leader, signal.SIGKILL)
    first.wait(20)
    assert psutil.pid_exists(worker)

    supervise(tmp_path, [], lambda: False)
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_a_stranger_with_the_number_of_an_old_process_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        supervise(tmp_path, [child("worker", ENDURES)], until(lambda: running_pid(tmp_path)))
        path = tmp_path / "run" / "supervisor.json"
        status = json.loads(path.read_text())
        long_ago = psutil.Process(stranger.pid).create_time() - 3600
        status["children"][0] |= {"pid": stranger.pid, "started": long_ago, "state": "running"}
        path.write_text(json.dumps(status))
        supervise(tmp_path, [], lambda: False)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(20)


def test_detached_goes_on_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), json.dumps([("worker", ENDURES)])]
    pid = start_detached(tmp_path, command)
    try:
        wait_for(lambda: running_pid(tmp_path))
        assert os.getsid(pid) == pid  # a terminal that closes does not take it along
        assert stat.S_IMODE((tmp_path / "logs" / "supervisor.log").stat().st_mode) == 0o600
    finally:
        stop(tmp_path, timeout=20)


def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOG_BYTES", 10)
    log = tmp_path / "logs" / "worker.log"
    log.parent.mkdir()
    log.write_text("what came before")
    supervise(tmp_path, [child("worker", ENDURES)], until(lambda: b"here" in log.read_bytes()))
    assert log.with_name("worker.log.1").read_text() == "what came before"


def test_a_log_stays_small_while_its_process_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOG_BYTES", 2000)
    log = tmp_path / "logs" / "worker.log"
    code = (
        "import time\n"
        "for number in range(1000):\n    print(f'{number:04d} ' + 'x' * 95, flush=True); time.sleep(0.001)\n"
        "print('the end', flush=True); time.sleep(60)"
    )
    turned = log.with_name("worker.log.1")

    def ended() -> bool:  # the last line, too, may be turned over before it is looked for
        return any(each.is_file() and b"the end" in each.read_bytes() for each in (log, turned))

    supervise(tmp_path, [child("worker", code)], until(ended))
    assert log.stat().st_size + turned.stat().st_size < 60_000  # of 101,000 bytes that were written
    assert b"\0" not in log.read_bytes()  # it was appended to, not written to at an old place
    assert stat.S_IMODE(turned.stat().st_mode) == stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_log_on_a_full_disk_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(supervisor, "_LOG_BYTES", 10)
    monkeypatch.setattr(supervisor.shutil, "copyfileobj", full)
    log = tmp_path / "logs" / "worker.log"
    log.parent.mkdir()
    log.write_text("what came before")
    supervise(tmp_path, [child("worker", ENDURES)], until(lambda: b"here" in log.read_bytes()))
    assert log.read_text() == "here\n" and not log.with_name("worker.log.1").exists()


def test_no_switch_of_flower_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_SOMETHING_NEW", "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.invalid")
    environment = flower_environment(tmp_path, EXTRA="kept")
    switches = {name: value for name, value in environment.items() if name.startswith("FLWR_")}
    assert switches == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(tmp_path),
    }
    assert environment["NO_PROXY"] == "intranet.invalid,127.0.0.1,localhost,::1"
    assert environment["no_proxy"].endswith("127.0.0.1,localhost,::1")
    assert environment["HTTPS_PROXY"] == "http://proxy.invalid:3128" and environment["EXTRA"] == "kept"


def test_a_missing_program_is_named() -> None:
    assert Path(script("flower-supernode")[0]).is_file()
    with pytest.raises(FedsynthError) as caught:
        script("no-such-program")
    assert caught.value.code == "program_missing"
