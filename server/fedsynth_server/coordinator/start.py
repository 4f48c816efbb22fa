"""Running a study: SuperLink, gateway and runner under supervision, and a run until the study is finished."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedsynth.deployment.checks import show
from fedsynth.deployment.network import split_address
from fedsynth.deployment.supervisor import (
    Child,
    flower_environment,
    is_running,
    python_module,
    script,
    start_detached,
    supervise,
)
from fedsynth.deployment.supervisor import read_status as supervisor_status
from fedsynth.errors import FedsynthError, JobFailed, UsageError
from fedsynth.files import DISK_FULL, write_atomic
from fedsynth.progress import say
from fedsynth_server.coordinator import gateway
from fedsynth_server.coordinator.control import Control, SuperlinkUnreachable, open_control
from fedsynth_server.coordinator.doctor import ready
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.coordinator.registry import FILE as REGISTRY
from fedsynth_server.coordinator.registry import reconcile
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.status import FILE as STATUS
from fedsynth_server.status import StatusFile, read_status

_LOOK_SECONDS = 3.0  # between two looks at SuperLink while there is something to do
_CALM_LOOK_SECONDS = 5.0  # while a run is under way
_RECONCILE_SECONDS = 120.0  # between two comparisons of registrations when sites.json does not change
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 300.0  # before the next run, after one that did not get anywhere
_LAST_REPORT_SECONDS = 15.0  # that the runner has to report the end of its run
_UNUSABLE = 78  # exit code of the runner: `fedsynth_server.coordinator.runner.UNUSABLE`
_UP_SECONDS = 90.0


def children(study: Study) -> list[Child]:
    """The processes of a study, in the order in which they start."""
    settings = study.settings
    superlink = settings.superlink
    # SuperLink is never spoken to through a proxy, wherever it listens.
    environment = flower_environment(study.folder.absolute() / "run" / "flower")
    host = split_address(study.superlink_address)[0]
    environment |= {name: f"{environment[name]},{host}" for name in ("NO_PROXY", "no_proxy")}
    processes = [
        Child(
            "superlink",
            python_module(
                "fedsynth_server.coordinator.superlink",
                *_reply_limit(study),
                *("--host", superlink.listen, "--port", str(superlink.port)),
                *("--ssl-ca-certfile", str(study.path(superlink.ca))),
                *("--ssl-certfile", str(study.path(superlink.certificate))),
                *("--ssl-keyfile", str(study.path(superlink.key))),
                "--enable-supernode-auth",
                *("--isolation", "process"),
                *("--superexec-auth-secret-file", str(study.path(superlink.secret))),
                "--disable-runtime-dependency-installation",
                *("--database", str(study.database_path.absolute())),
                *("--health-server-address", study.health_address),
            ),
            environment,
        )
    ]
    if settings.gateway.managed:
        processes.append(Child("gateway", gateway.command(study, gateway.write_configuration(study)), environment))
    runner = python_module("fedsynth_server.coordinator.runner", str(study.folder.absolute()))
    processes.append(Child("runner", runner, environment, stop_seconds=30.0, fatal_codes=frozenset({_UNUSABLE})))
    return processes


def _reply_limit(study: Study) -> list[str]:
    """Objects and bytes of the largest reply, asked of a process of its own: it needs torch, and this one lives for weeks.

    Raises:
        JobFailed: ``limit_unknown``.
    """
    command = python_module("fedsynth_server.coordinator.bounded_grid", str(study.folder.absolute() / "plan.toml"))
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    limit = asked.stdout.split()
    if asked.returncode != 0 or len(limit) != 2:
        raise JobFailed(
            "limit_unknown", f"How large a reply may be could not be computed: {asked.stderr.strip()[-500:]}"
        )
    return limit


@dataclass
class Conductor:
    """What the supervisor does about twice a second: keeps registrations right and a run going, until the study ends."""

    study: Study
    control: Control
    _look_at: float = 0.0
    _reconcile_at: float = 0.0
    _registry_seen: int = -1
    _run: int | None = None
    _checkpoint_then: int = 0
    _start_at: float = 0.0
    _fruitless: int = 0
    _over_since: float | None = None
    _said: str = field(default="")

    def __call__(self) -> bool:
        """Whether the processes are to go on."""
        now = time.monotonic()
        if now < self._look_at:
            return True
        self._look_at = now + _LOOK_SECONDS
        try:
            return self._step(now)
        except SuperlinkUnreachable:
            self._tell("waiting for SuperLink")
        except FedsynthError as error:  # e.g. a run that SuperLink does not take: it is asked again
            self._tell(str(error))
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._tell("the disk is full; free some space, and the study goes on by itself")
        return self._over_since is None or now - self._over_since < _LAST_REPORT_SECONDS

    def _step(self, now: float) -> bool:
        status = read_status(self.study.folder)
        if status is not None and status.phase in ("finished", "failed"):
            if self._over_since is None:
                self._over_since = now
            working = any(run.claimed for run in self.control.runs())
            return working and now - self._over_since < _LAST_REPORT_SECONDS
        self._keep_registered(now)
        self._keep_running(now)
        return True

    def _keep_registered(self, now: float) -> None:
        version = _version(self.study.folder / REGISTRY)
        if version == self._registry_seen and now < self._reconcile_at:
            return
        self._reconcile_at = now + _RECONCILE_SECONDS
        self._registry_seen = version  # what is written meanwhile, by whomever, is compared at the next look
        try:
            done = reconcile(self.study, self.control)
        except SuperlinkUnreachable:
            self._registry_seen = -1
            raise
        except FedsynthError as error:  # a registration that is refused must not keep the others from their study
            self._tell(str(error))
            return
        for record in done.register:
            _speak(f"site {record.name} is registered ({record.fingerprint})")
        for node in done.unregister:
            _speak(f"site {node.name or node.id} is registered no longer")

    def _keep_running(self, now: float) -> None:
        runs = self.control.runs()
        active = sorted((run for run in runs if run.active), key=lambda run: not run.claimed)
        for surplus in active[1:]:
            _speak(f"ending run {surplus.id}: a study has one run at a time")
            self.control.stop_run(surplus.id)
        if active:
            if self._run != active[0].id:
                self._run, self._checkpoint_then = active[0].id, self._checkpoint()
            self._look_at = now + _CALM_LOOK_SECONDS
            return
        if self._run is not None:
            ended = next((run for run in runs if run.id == self._run), None)
            self._note_end(now, f"{ended.outcome} {ended.details}".strip() if ended else "unknown to SuperLink")
        if now >= self._start_at:
            self._checkpoint_then = self._checkpoint()
            self._run = self.control.start_run()
            self._tell(f"run {self._run} is started")

    def _note_end(self, now: float, outcome: str) -> None:
        """Plan the next run: soon after one that got somewhere, later and later after those that did not."""
        self._fruitless = 0 if self._checkpoint() != self._checkpoint_then else self._fruitless + 1
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** max(0, self._fruitless - 1))
        self._start_at = now + pause
        _speak(
            f"run {self._run} ended ({outcome}); the next one goes on from the checkpoint in {pause:.0f} s"
            + ("; logs/runner.log says why it ends again and again" if self._fruitless > 2 else "")
        )
        self._run = None

    def _checkpoint(self) -> int:
        return _version(self.study.folder / "checkpoint.safetensors")

    def _tell(self, line: str) -> None:
        if line != self._said:
            self._said = line
            _speak(line)


def _speak(line: str) -> None:
    try:
        say(line)
    except OSError as error:
        if error.errno not in DISK_FULL:  # what is said goes into a log on the disk that is full
            raise


def _version(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def prepare(study: Study) -> bool:
    """Check what the processes need and say where the study goes on; returns whether anything is left to do.

    Raises:
        UsageError: ``already_running``, ``study_not_ready``; of plan, settings or checkpoint.
    """
    if is_running(study.folder):
        raise UsageError(
            "already_running", f"{study.folder} is running already.", "See `fedsynth study status`, or stop it first."
        )
    progress = progress_of(study.folder, study.plan)
    if progress is None:
        say(f"study {study.plan.name} starts at its first round")
    elif progress.finished(study.plan):
        say(f"study {study.plan.name} is finished ({progress.summary(study.plan)}); nothing is left to do")
        return False
    else:
        say(f"study {study.plan.name} goes on from its checkpoint: {progress.summary(study.plan)}")
    study.database_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    faults = [line for line in ready(study) if not line.ok]
    if faults:
        show(faults)
        raise UsageError(
            "study_not_ready", f"{len(faults)} things keep the study from starting.", "Mend them and start again."
        )
    return True


def run_supervised(study: Study) -> None:
    """Run the study until it is finished, has failed, or a signal comes.

    Raises:
        UsageError: ``already_running``.
        JobFailed: the study's own code (see status.json), ``child_gave_up``.
    """
    earlier = os.umask(0o077)  # SuperLink's state and everybody's logs are for the owner's eyes
    try:
        _begin(study)
        with open_control(study) as control:
            supervise(study.folder, children(study), Conductor(study, control))
    finally:
        os.umask(earlier)
    status = read_status(study.folder)
    if status is not None and status.phase == "failed":
        raise JobFailed(status.code, status.message, "Mend the cause; `fedsynth study start` goes on from there.")
    say("the study is finished" if status is not None and status.phase == "finished" else "stopped")


def _begin(study: Study) -> None:
    """Take an earlier start's verdict back, since this start may end differently."""
    status = read_status(study.folder)
    if status is None or status.study != study.plan.digest:
        StatusFile(study.folder, study.plan).phase("waiting", "The processes are starting.")
    else:
        message = "The processes are starting."
        again = {"phase": "waiting", "code": "", "message": message, "since": datetime.now(UTC)}
        write_atomic(study.folder / STATUS, status.model_copy(update=again).model_dump_json(indent=2).encode())


def run_detached(study: Study) -> None:
    """Start the study in the background and wait until SuperLink answers.

    Raises:
        UsageError: ``already_running``.
        JobFailed: ``start_failed``, ``start_timed_out``.
    """
    log = study.folder / "logs" / "supervisor.log"
    pid = start_detached(study.folder, script("fedsynth", "study", "start", str(study.folder.absolute())))
    deadline = time.monotonic() + _UP_SECONDS
    with open_control(study) as control:
        while time.monotonic() < deadline:
            # What a killed supervisor left behind may still answer while the new one ends it.
            state = supervisor_status(study.folder)
            if state is not None and state.pid == pid and state.state == "running" and _answers(control):
                say(f"started (process {pid}); see `fedsynth study status {study.folder}`")
                return
            time.sleep(0.5)
            if _gone(pid):
                raise JobFailed("start_failed", "The processes ended at once.", f"{log} says why.")
    raise JobFailed(
        "start_timed_out",
        f"SuperLink does not answer after {_UP_SECONDS:.0f} s.",
        f"The processes go on trying; {log} and its neighbours tell more.",
    )


def _answers(control: Control) -> bool:
    try:
        control.nodes()
    except SuperlinkUnreachable:
        return False
    return True


def _gone(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
