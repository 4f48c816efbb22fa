"""A coordinator and its sites as separate processes on this machine, started and looked at as their people do.

Use in a test (the fixtures are in ``conftest.py``)::

    def test_something(new_federation, network_plan):
        federation = new_federation(network_plan())        # folders, keys, certificates, registrations; nothing runs yet
        federation.start_study()                           # `fedsynth study start`: SuperLink, gateway, study runner
        federation.start_site("a")                         # `fedsynth site start`: SuperNode, site runner
        federation.wait_until(lambda: federation.done() >= 1, 60, "the first round")
        federation.kill("study", "superlink")              # SIGKILL; also "gateway", "runner", "supervisor"
        federation.kill("a", "runner", signal.SIGSTOP)     # also "supernode", "supervisor"
        federation.status().phase, federation.entries("a"), federation.sent("a"), federation.receipts()

Whoever is called ``"study"`` is the coordinator, every other name is a site's. Commands that end are typed by
`Federation.command` in a process of their own, or quickly, in this one, by `Federation.type`. Everything that a federation
started carries its folder in the environment, by which `close` finds and ends it, whatever a test left behind.

All ports are free ones of 127.0.0.1, below those that the system gives to outgoing connections, so that nobody takes them
between the choice and the start.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from typer.testing import CliRunner

from fedsynth.cli import build
from fedsynth.deployment.supervisor import SupervisorStatus, is_running, script
from fedsynth.errors import FedsynthError
from fedsynth.plan import MODULES, Module, StudyPlan, save_plan
from fedsynth_client.ledger import Entry
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.sent import Sent
from fedsynth_client.sent import sent as sent_by
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import Receipt, load_state
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.coordinator.registry import read_registry
from fedsynth_server.status import StudyStatus, read_status

STUDY = "study"
MARK = "FEDSYNTH_TEST_FEDERATION"
_PORTS = range(25000, 26000)
_POLL_SECONDS = 0.2
_LOG_LINES = 12
_PR_SET_PDEATHSIG = 1
_given: set[int] = set()


class Missed(AssertionError):
    """Something did not happen in time."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody holds and that was not given out before."""
    for port in random.sample(_PORTS, len(_PORTS)):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError("no port is free")


@dataclass
class Federation:
    """A coordinator's folder and its sites' folders below `root`, and the processes that work in them.

    Attributes:
        root: everything lies below it.
        plan: the study plan.
        environment: further variables for every process.
        mounted: folders that are small disks of their own (`small_disk`).
        host: address of the gateway; where it is another one, the parties' network is made elsewhere (`parted`).
        started: the commands that stay (`fedsynth study start`, `fedsynth site start`), by whom; the newest of each.
    """

    root: Path
    plan: StudyPlan
    host: str = "127.0.0.1"
    environment: Mapping[str, str] = field(default_factory=dict)
    mounted: list[Path] = field(default_factory=list)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """Names of the plan's sites."""
        return [site.name for site in self.plan.sites]

    def folder(self, whose: str) -> Path:
        """The folder of the coordinator (``"study"``) or of a site."""
        return self.root / whose

    # Laying out.

    def lay_out(self, cohorts: Mapping[str, Path], **study_settings: float) -> None:
        """Make all folders by the commands that a coordinator and the sites' people type.

        Args:
            cohorts: a prepared cohort by site; it is copied.
            **study_settings: ``patience_s`` and ``absent_s`` of coordinator.toml.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        plan_path, gateway, study = self.root / "plan.toml", f"{self.host}:{free_port()}", self.folder(STUDY)
        save_plan(self.plan, plan_path)
        self.type("study", "init", study, "--plan", plan_path, "--gateway", gateway)
        self.edit(study / "coordinator.toml", gateway={"listen": gateway})
        self.edit(study / "coordinator.toml", superlink={"port": free_port(), "health_port": free_port()})
        self.edit(study / "coordinator.toml", study=study_settings)
        self.type("deploy", "certs", study, "--gateway-name", self.host)
        for name in self.sites:
            self.lay_out_site(name, cohorts[name], plan_path, gateway)
            self.type("study", "add-site", study, self.folder(name) / "keys" / "node.pub", "--name", name)

    def lay_out_site(self, name: str, cohort: Path, plan_path: Path, gateway: str) -> None:
        """One site: policy, node, cohort, and the plan approved by its digest."""
        folder, patients = self.folder(name), self.plan.site(name).nominal_patients
        ca = self.folder(STUDY) / "keys" / "ca.crt"
        self.type(
            *("site", "init", folder, "--name", name, "--declared-patients", patients),
            *("--gateway", gateway, "--ca", ca),
        )
        runtime, health = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.edit(folder / "node.toml", runtime_listen=runtime, runtime=runtime, health_listen=health)
        policy = SitePolicy(
            site=name,
            max_epsilon=10,
            max_delta=1e-5,
            min_patients=20,
            declared_patients=patients,
            modules=list(MODULES),
        )
        save_policy(policy, folder / "policy.toml")
        shutil.copytree(cohort, folder / "cohort")
        self.type("site", "plan", "show", folder, plan_path)
        self.type("site", "approve", folder, self.plan.digest, "--yes")

    def small_disk(self, whose: str, mebibytes: int) -> bool:
        """Give a folder that is not laid out yet a disk of its own, in memory; returns whether this user may mount one."""
        folder = self.folder(whose)
        folder.mkdir(parents=True, mode=0o700)
        options = f"size={mebibytes}m,mode=0700"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode == 0:
            self.mounted.append(folder)
        return done.returncode == 0

    @contextmanager
    def full_disk(self, whose: str) -> Iterator[None]:
        """Fill a small disk to its last byte while the block runs."""
        ballast = self.folder(whose) / "ballast"
        with ballast.open("wb", buffering=0) as stream:
            with suppress(OSError):  # until there is no room
                while True:
                    stream.write(bytes(2**20))
            with suppress(OSError):
                while True:
                    stream.write(bytes(512))
        try:
            yield
        finally:
            ballast.unlink()

    @staticmethod
    def edit(path: Path, **changes: Any) -> None:
        """Change keys of a TOML file; a table's keys are changed one by one."""
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        path.write_text(tomli_w.dumps(content), encoding="utf-8")

    # Commands.

    def type(self, *arguments: object) -> str:
        """Run a `fedsynth` command in this process; returns what it prints.

        Raises:
            AssertionError: it did not end with 0.
        """
        done = CliRunner().invoke(build(), [str(each) for each in arguments])
        assert done.exit_code == 0, f"fedsynth {' '.join(map(str, arguments))}: {done.exception!r}\n{done.output}"
        return done.output

    def command(self, *arguments: object, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a `fedsynth` command in a process of its own, whatever its exit code."""
        return subprocess.run(
            script("fedsynth", *map(str, arguments)),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=self._environment(),
            check=False,
        )

    def told(self, *arguments: object) -> Any:
        """What a command with ``--json`` says (its exit code may be any)."""
        done = self.command(*arguments, "--json")
        assert done.stdout, f"fedsynth {' '.join(map(str, arguments))} says nothing:\n{done.stderr}"
        return json.loads(done.stdout)["data"]

    # Processes.

    def start(self, *whose: str) -> None:
        """Start coordinator or sites in the foreground of processes of their own; does not wait until they are ready."""
        for name in whose:
            role = "study" if name == STUDY else "site"
            log = self.folder(name) / "logs" / "supervisor.log"
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as stream:
                self.started[name] = subprocess.Popen(
                    script("fedsynth", role, "start", str(self.folder(name))),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )

    def start_study(self) -> None:
        """`fedsynth study start`."""
        self.start(STUDY)

    def start_site(self, name: str) -> None:
        """`fedsynth site start`."""
        self.start(name)

    def is_open(self) -> bool:
        """Whether SuperLink knows the keys of all sites that were added: a node that asks earlier comes back later."""
        return all(record.node_id is not None for record in read_registry(self.folder(STUDY)).valid().values())

    def stop(self, whose: str) -> int:
        """`fedsynth study|site stop`; returns the exit code of the process that was stopped."""
        role = "study" if whose == STUDY else "site"
        done = self.command(role, "stop", self.folder(whose))
        assert done.returncode == 0, done.stderr
        return self.started[whose].wait(30)

    def process(self, whose: str, which: str) -> psutil.Process:
        """A running process: ``supervisor``, or one that it supervises, by name.

        Raises:
            psutil.NoSuchProcess: it does not run.
        """
        if which == "supervisor":
            return psutil.Process(self.started[whose].pid)
        pid = self._pids(whose).get(which)
        if pid is None:
            raise psutil.NoSuchProcess(-1, which)
        return psutil.Process(pid)

    def kill(self, whose: str, which: str, number: int = signal.SIGKILL) -> int:
        """Send a signal, SIGKILL unless told otherwise, to one process and to nothing else; returns its pid."""
        process = self.process(whose, which)
        process.send_signal(number)
        if number == signal.SIGKILL and which == "supervisor":
            self.started[whose].wait(10)
        return process.pid

    def is_back(self, whose: str, which: str, before: int) -> bool:
        """Whether a process of that name runs that is not the one with pid `before`."""
        pid = self._pids(whose).get(which)
        return pid is not None and pid != before and psutil.pid_exists(pid)

    def _pids(self, whose: str) -> dict[str, int]:
        path = self.folder(whose) / "run" / "supervisor.json"
        if not path.is_file():
            return {}
        status = SupervisorStatus.model_validate_json(path.read_text(encoding="utf-8"))
        return {child.name: child.pid for child in status.children if child.pid is not None}

    def _environment(self) -> dict[str, str]:
        # One thread a process: ten of them share few cores.
        return {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, MARK: str(self.root)}

    # Looking.

    def status(self) -> StudyStatus:
        """The study's ``status.json``."""
        status = read_status(self.folder(STUDY))
        assert status is not None, "the study has no status.json"
        return status

    def done(self, module: Module | None = None) -> int:
        """Rounds that the checkpoint says are complete: of a module, or of all together."""
        progress = progress_of(self.folder(STUDY), self.plan)
        if progress is None:
            return 0
        return sum(count for name, count in progress.rounds.items() if module in (None, name))

    def receipts(self) -> dict[str, dict[Module, Receipt]]:
        """The coordinator's receipts by site and module."""
        state = load_state(self.folder(STUDY), self.plan)
        assert state is not None, "the study has no checkpoint"
        return state.receipts

    def answered(self, site: str) -> list[tuple[str, int]]:
        """Rounds (module, number) in which the coordinator took a site's answer."""
        state = load_state(self.folder(STUDY), self.plan)
        if state is None:
            return []
        return [(m, int(row["round"])) for m, rows in state.curves.items() for row in rows if row["site"] == site]

    def entries(self, site: str, kind: str | None = None) -> list[Entry]:
        """Entries of a site's ledger (all, or of one kind), after its chain was checked."""
        return [entry for entry in Site(self.folder(site)).ledger().entries() if kind in (None, entry.kind)]

    def sent(self, site: str) -> list[Sent]:
        """A site's outbox log."""
        return sent_by(Site(self.folder(site)))

    def wait_until(self, happened: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait for something; returns how long (s) it took.

        Raises:
            Missed: it did not happen; with the status and the ends of all logs.
        """
        began = time.monotonic()
        while not _holds(happened):
            if time.monotonic() - began > seconds:
                raise Missed(f"{what}: not within {seconds:.0f} s.\n{self.describe()}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - began

    def wait_for_round(self, seconds: float = 60.0, rounds: int = 1) -> float:
        """Wait until the checkpoint holds so many more rounds; returns how long (s) it took."""
        goal = self.done() + rounds
        return self.wait_until(lambda: self.done() >= goal, seconds, f"round {goal} of the study")

    def wait_for_answers(self, sites: Iterable[str], seconds: float = 60.0) -> float:
        """Wait until the coordinator has taken one more answer of each site; returns how long (s) it took."""
        before = {site: len(self.answered(site)) for site in sites}
        return self.wait_until(
            lambda: all(len(self.answered(site)) > count for site, count in before.items()),
            seconds,
            f"an answer of {', '.join(before)}",
        )

    def describe(self) -> str:
        """Status, processes and the ends of all logs, for a failure's message."""
        status = read_status(self.folder(STUDY))
        parts = [status.model_dump_json(indent=1) if status else "no status.json"]
        for whose in (STUDY, *self.sites):
            parts.append(
                f"{whose}: supervisor {'runs' if is_running(self.folder(whose)) else 'gone'}, {self._pids(whose)}"
            )
            logs = [*sorted((self.folder(whose) / "logs").glob("*.log")), self.folder(whose) / "site.log"]
            for path in logs:
                if path.is_file():
                    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
                    parts += [f"--- {path.relative_to(self.root)}", *lines]
        return "\n".join(parts)

    # The end.

    def close(self) -> None:
        """End everything that was started here, for certain; nothing is asked of it."""
        left = self._left()
        for process in left:
            _signal(process, signal.SIGCONT)
            _signal(process, signal.SIGTERM)
        psutil.wait_procs(left, timeout=5.0)
        left = self._left()
        for process in left:
            _signal(process, signal.SIGKILL)
        for command in self.started.values():
            command.wait(10)
        psutil.wait_procs(left, timeout=5.0)
        for folder in reversed(self.mounted):
            subprocess.run(["umount", "-l", str(folder)], check=True)
        self.mounted.clear()
        remaining = self._left()
        assert not remaining, f"still running: {remaining}"

    def _left(self) -> list[psutil.Process]:
        """Processes that carry this federation's mark or folder, their descendants, and their process groups' members."""
        known = {command.pid for command in self.started.values()}
        for whose in (STUDY, *self.sites):
            known |= set(self._pids(whose).values())
        found = []
        for process in psutil.process_iter():
            try:
                ours = (
                    process.environ().get(MARK) == str(self.root)
                    or str(self.root) in " ".join(process.cmdline())
                    or os.getpgid(process.pid) in known
                )
                if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):  # it ended in the meantime, or is none of ours to look at
                continue
        return found


def _holds(happened: Callable[[], bool]) -> bool:
    """Whether it has happened; what cannot be read just now has not."""
    try:
        return happened()
    except (OSError, ValueError, FedsynthError, psutil.NoSuchProcess):
        return False


def _end_with_parent() -> None:
    """Ask the system to send this process SIGTERM when the tests' process dies, were it killed (Linux, prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
