"""Keeps a few processes of one folder running: starts them, logs them, starts them again with back-off, stops them together.

One supervisor a folder: a lock on ``run/supervisor.lock`` says so and falls with the process that holds it. What a
supervisor did is in ``run/supervisor.json``, what its processes printed in ``logs/NAME.log``. Should the supervisor
itself be killed, the next one ends the processes that it left behind before it starts its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Literal

import psutil
from pydantic import BaseModel

from fedsynth.errors import JobFailed, UsageError
from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.progress import say as say_line

_TICK_SECONDS = 0.5
_FIRST_DELAY_SECONDS = 2.0
_LONGEST_DELAY_SECONDS = 60.0
_STEADY_SECONDS = 120.0  # a process that ran this long starts again without the delay of earlier failures
_LEFTOVER_SECONDS = 10.0
_CLAIM_ATTEMPTS = 5
_LOADERS = frozenset({"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"})
_LOG_BYTES = 20 * 2**20

ChildState = Literal["running", "waiting", "stopped", "failed"]
SupervisorState = Literal["running", "stopping", "stopped", "failed"]


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Attributes:
        name: what it is called in status and log files.
        command: program and arguments.
        environment: its whole environment (see `flower_environment`).
        stop_seconds: how long it may take to end after SIGTERM before it is killed.
        fatal_codes: exit codes after which a restart would only repeat the failure; they end all processes.
        takes_along: processes that are started anew, too, when this one ends with an error, because they would wait for an
            answer that it took with it.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    stop_seconds: float = 15.0
    fatal_codes: frozenset[int] = frozenset()
    takes_along: frozenset[str] = frozenset()


class ChildStatus(BaseModel):
    """What is known of one process; `started` is the operating system's time of creation, in seconds."""

    name: str
    state: ChildState
    pid: int | None = None
    started: float | None = None
    restarts: int = 0
    exit_code: int | None = None


class SupervisorStatus(BaseModel):
    """What ``run/supervisor.json`` holds."""

    pid: int
    since: datetime
    state: SupervisorState
    children: list[ChildStatus]


@dataclass
class _Running:
    child: Child
    log: BinaryIO
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    status: ChildStatus = field(init=False)

    def __post_init__(self) -> None:
        self.status = ChildStatus(name=self.child.name, state="waiting")


def flower_environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a Flower process: the present one without Flower's switches, then ours.

    Settings that somebody left in the environment could turn reporting, tracing, other databases or experimental interfaces
    on, so nothing that begins with ``FLWR_`` is inherited; nor is what could put other code before the installed one.
    Local calls never go through a proxy.

    Args:
        home: Flower's own folder (its configuration and log).
        **extra: further variables.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_") and key not in _LOADERS}
    local = "127.0.0.1,localhost,::1"
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = f"{kept[name]},{local}" if kept.get(name) else local
    return kept | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs an installed module in this very Python environment.

    Isolated (``-I``): neither the working folder nor ``PYTHONPATH`` nor a user's own packages are on the import path.
    """
    return [sys.executable, "-I", "-u", "-m", module, *arguments]


def script(name: str, *arguments: str) -> list[str]:
    """The command of a console script that is installed beside this Python.

    Raises:
        UsageError: ``program_missing``.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UsageError("program_missing", f"{name} is not installed beside this Python.", "Install fedsynth anew.")
    return [str(path), *arguments]


def supervise(folder: Path, children: Sequence[Child], tick: Callable[[], bool] = lambda: True) -> None:
    """Run `children` until a signal (SIGTERM, SIGINT) comes or `tick` returns False; then stop them, the last one first.

    Args:
        folder: whose ``run/`` and ``logs/`` are used.
        children: in the order in which they start.
        tick: called about twice a second; False ends the work.

    Raises:
        UsageError: ``already_running``.
        JobFailed: ``child_gave_up``: a process ended with a code after which a restart is no use.
    """
    with _claimed(folder):
        since = datetime.now(UTC)
        stop = _Signals()
        state: SupervisorState = "failed"
        # Also while leftovers and processes end: a signal that came then would leave them behind.
        with stop:
            _end_leftovers(folder)
            logs = folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            running = [_Running(child, _open_log(logs / f"{child.name}.log")) for child in children]
            try:
                while not stop.seen and tick():
                    for each in running:
                        if _keep(each):
                            _restart([other for other in running if other.child.name in each.child.takes_along])
                        _turn_log(Path(each.log.name))
                    _write(folder, "running", since, running)
                    time.sleep(_TICK_SECONDS)
                state = "stopped"
            finally:
                _write(folder, "stopping", since, running)
                for each in reversed(running):
                    _end(each)
                    each.log.close()
                _write(folder, state, since, running)


def read_status(folder: Path) -> SupervisorStatus | None:
    """What the folder's supervisor last wrote; ``stopped`` if it no longer runs. None when none ever ran."""
    path = _run(folder) / "supervisor.json"
    if not path.is_file():
        return None
    status = SupervisorStatus.model_validate_json(path.read_text(encoding="utf-8"))
    if status.state in ("running", "stopping") and not is_running(folder):
        gone = [child.model_copy(update={"state": "stopped"}) for child in status.children]
        return status.model_copy(update={"state": "failed", "children": gone})
    return status


def is_running(folder: Path) -> bool:
    """Whether a supervisor holds the folder's lock."""
    path = _run(folder) / "supervisor.lock"
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def start_detached(folder: Path, command: Sequence[str], name: str = "supervisor") -> int:
    """Start `command` (which calls `supervise` on `folder`) in a session of its own; returns its process id.

    Raises:
        UsageError: ``already_running``.
    """
    if is_running(folder):
        raise _already_running(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with _open_log(folder / "logs" / f"{name}.log") as log:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return process.pid


def stop(folder: Path, timeout: float = 60.0) -> bool:
    """Ask the folder's supervisor to stop, and wait until it has; returns whether there was one.

    Without one, the processes that a killed one left behind, which work on, are ended.

    Raises:
        UsageError: ``not_running``: neither is there.
        JobFailed: ``stop_timed_out``.
    """
    if not is_running(folder):
        status = read_status(folder)
        if status is None or not any(processes_of(child) for child in status.children):
            raise UsageError("not_running", f"Nothing runs in {folder}.")
        supervise(folder, [], tick=lambda: False)  # ends what an earlier supervisor left behind, and starts nothing
        return False
    asked = False
    deadline = time.monotonic() + timeout
    while is_running(folder):
        holder = (_run(folder) / "supervisor.lock").read_bytes()
        if holder and not asked:  # empty while a supervisor is just starting
            asked = True
            with suppress(ProcessLookupError):  # it ended between the question and the signal
                os.kill(int(holder), signal.SIGTERM)
        if time.monotonic() > deadline:
            raise JobFailed(
                "stop_timed_out", f"The processes of {folder} are still ending.", "Wait, then ask for status."
            )
        time.sleep(0.2)
    return True


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    path = _run(folder) / "supervisor.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        for attempt in range(_CLAIM_ATTEMPTS):  # somebody who asks for the status holds the lock for a moment
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == _CLAIM_ATTEMPTS:
                    raise _already_running(folder) from None
                time.sleep(0.1)
        # The status file may still name an earlier supervisor while its leftovers are ended; the lock never does.
        stream.truncate(0)
        stream.write(str(os.getpid()).encode())
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def _already_running(folder: Path) -> UsageError:
    return UsageError("already_running", f"{folder} is running already.", "Ask for its status, or stop it first.")


def processes_of(child: ChildStatus) -> list[psutil.Process]:
    """What runs of a recorded process: itself and its group, also when the process itself is gone.

    A number is not given to a new process while a group bears it, so a group without its leader is still the recorded
    one's; one whose leader, or whose members, have other start times is a stranger's.
    """
    if child.pid is None or child.started is None:
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != child.pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            late = process.create_time() - child.started
            if late < -1.0 or (process.pid == child.pid and late > 1.0):
                return []
            found.append(process)
    return found


def _end_leftovers(folder: Path) -> None:
    """End the processes of a supervisor that was killed, the last one first; a stranger's are left alone."""
    status = read_status(folder)
    for child in reversed(status.children) if status is not None else []:
        family = processes_of(child)
        if not family:
            continue
        _say(f"{child.name} of an earlier start still runs; ending it")
        leader = [process for process in family if process.pid == child.pid]
        for process in leader or family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(family, _LEFTOVER_SECONDS)
        for process in processes_of(child):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, _LEFTOVER_SECONDS)


def _keep(each: _Running) -> bool:
    """Start the process if it is due; note if it ended, and return whether it did so with an error."""
    if each.process is None:
        if time.monotonic() >= each.start_at:
            _start(each)
        return False
    code = each.process.poll()
    if code is None:
        return False
    name = each.child.name
    _end_group(each.process.pid)
    each.process = None
    each.status = each.status.model_copy(update={"exit_code": code, "pid": None, "started": None})
    if code in each.child.fatal_codes:
        each.status = each.status.model_copy(update={"state": "failed"})
        raise JobFailed("child_gave_up", f"{name} ended with code {code}.", f"logs/{name}.log says why.")
    if time.monotonic() - each.started > _STEADY_SECONDS:
        each.failures = 0
    delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**each.failures)
    each.failures += 1
    each.start_at = time.monotonic() + delay
    each.status = each.status.model_copy(update={"state": "waiting", "restarts": each.status.restarts + 1})
    _say(f"{name} ended with code {code}; starting it again in {delay:.0f} s")
    return code != 0


def _restart(others: Sequence[_Running]) -> None:
    """End processes that run, to be started again at once."""
    for each in others:
        if each.process is not None:
            _say(f"starting {each.child.name} anew")
            restarts = each.status.restarts + 1
            _end(each)
            each.process, each.start_at = None, time.monotonic()
            each.status = each.status.model_copy(update={"state": "waiting", "restarts": restarts})


def _start(each: _Running) -> None:
    # A session of its own: Ctrl-C at a terminal reaches the supervisor only, which ends its processes in order.
    each.process = subprocess.Popen(
        list(each.child.command),
        stdin=subprocess.DEVNULL,
        stdout=each.log,
        stderr=subprocess.STDOUT,
        env=each.child.environment,
        start_new_session=True,
    )
    each.started = time.monotonic()
    created = psutil.Process(each.process.pid).create_time()
    each.status = each.status.model_copy(update={"state": "running", "pid": each.process.pid, "started": created})


def _end_group(pid: int) -> None:
    """Kill what an ended process left of its group: workers of its own that would hold its port or its memory."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _end(each: _Running) -> None:
    if each.process is not None:
        each.process.terminate()
        try:
            code = each.process.wait(each.child.stop_seconds)
        except subprocess.TimeoutExpired:
            _say(f"{each.child.name} does not end; killing it")
            each.process.kill()
            code = each.process.wait()
        _end_group(each.process.pid)
        each.status = each.status.model_copy(update={"exit_code": code})
    if each.status.state != "failed":
        each.status = each.status.model_copy(update={"state": "stopped"})
    each.status = each.status.model_copy(update={"pid": None, "started": None})


def _write(folder: Path, state: SupervisorState, since: datetime, running: Sequence[_Running]) -> None:
    path = _run(folder) / "supervisor.json"
    status = SupervisorStatus(pid=os.getpid(), since=since, state=state, children=[each.status for each in running])
    if status == read_raw(path):
        return
    try:
        write_atomic(path, status.model_dump_json(indent=2).encode())
    except OSError as error:
        # A full disk must neither end the processes nor keep them from being ended; the next tick writes again.
        if error.errno not in DISK_FULL:
            raise


def _say(line: str) -> None:
    try:
        say_line(line)
    except OSError as error:
        if error.errno not in DISK_FULL:  # standard error is often a log on the disk that is full
            raise


def read_raw(path: Path) -> SupervisorStatus | None:
    """The status as it was written, without a look at whether its writer still runs."""
    return SupervisorStatus.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _run(folder: Path) -> Path:
    return folder / "run"


def _open_log(path: Path) -> BinaryIO:
    """A log to append to, for its owner's eyes."""
    _turn_log(path)
    return open(path, "ab", buffering=0, opener=_private)


def _turn_log(path: Path) -> None:
    """Put the content of a log that grew large under ``.1``, in place of what was there.

    The file itself stays, as the process that writes to it has it open; it only appends, so it goes on at the new end.
    """
    if not path.is_file() or path.stat().st_size <= _LOG_BYTES:
        return
    before = path.with_name(f"{path.name}.1")
    before.unlink(missing_ok=True)
    try:
        with path.open("rb") as source, open(before, "wb", opener=_private) as sink:
            shutil.copyfileobj(source, sink)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        before.unlink(missing_ok=True)  # on a full disk an old log is worth less than room
    os.truncate(path, 0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class _Signals:
    """Notes SIGTERM and SIGINT instead of dying of them."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
