"""A federation of real processes on this machine, to be measured: coordinator, gateway and sites over TLS on loopback.

`Federation` lays it out by the commands that a coordinator and the sites' people type. Between each site and the gateway
stands a `Relay` of the benchmark's own, which counts the bytes and can be cut; `Watch` notes when rounds end, how long each
site worked on its task, and what memory and processor time every process takes. What is computed from these notes is in
`fedsynth_simulations.benchmarking.deployment_figures`.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import socket
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import tomli_w
from safetensors.numpy import save_file

from fedsynth.cli import build
from fedsynth.deployment.supervisor import SupervisorStatus, script
from fedsynth.errors import FedsynthError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_client.node.runner import read_runner_status
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.benchmarking.deployment_figures import Checkpoint, Sample, TaskDone, Traffic

STUDY = "study"
# Below the ports that the system gives to outgoing connections, so that nobody takes one between choice and start.
_PORTS = range(26000, 27000)
_LOOK_SECONDS = 0.04
_SAMPLE_SECONDS = 1.0
_CHUNK = 65536
_given: set[int] = set()


class Missed(Exception):
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


def wait_until(happened: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for something; returns how long (s) it took.

    Raises:
        Missed: it did not happen in `seconds`.
    """
    began = time.monotonic()
    while True:
        with suppress(OSError, ValueError, FedsynthError):  # what cannot be read just now has not happened
            if happened():
                return time.monotonic() - began
        if time.monotonic() - began > seconds:
            raise Missed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


class Relay:
    """Carries a site's connections to the gateway, counts what passes, and can be cut.

    ``refuse`` is a gateway that is gone: connections break, new ones are refused. ``hold`` is a line that is gone:
    connections stay, nothing arrives, not even an end. ``hang_up`` is a proxy or balancer without what is behind it:
    connections are taken and closed at once, in the middle of the TLS handshake.
    """

    def __init__(self, listen: int, target: int) -> None:
        self.traffic: list[Traffic] = []
        self._listen, self._target = listen, target
        self._connections = 0
        self._hang_up = False
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._passing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._open())

    def refuse(self) -> None:
        """Break all connections and refuse new ones."""
        self._do(self._shut())

    def hold(self) -> None:
        """Let nothing through, without a word."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def hang_up(self) -> None:
        """Break all connections, and each new one as soon as it is made."""
        self._hang_up = True
        self._do(self._break())

    def restore(self) -> None:
        """Carry everything again."""
        self._hang_up = False
        self._loop.call_soon_threadsafe(self._passing.set)
        self._do(self._open())

    def close(self) -> None:
        """End for good."""
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._listen)

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._break()

    async def _break(self) -> None:
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._hang_up:
            writer.transport.abort()
            return
        await self._passing.wait()
        try:
            onward, out = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the gateway itself is down
            writer.transport.abort()
            return
        self._connections += 1
        ways = ((reader, out, True), (onward, writer, False))
        pumps = [asyncio.create_task(self._pump(*way)) for way in ways]
        self._pumps |= set(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._pumps -= set(pumps)
        writer.transport.abort()
        out.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with suppress(OSError):  # an end that breaks the connection ends it for both
            while data := await reader.read(_CHUNK):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
                size = len(data)
                self.traffic.append(Traffic(time.time(), size if up else 0, 0 if up else size, self._connections))
            await self._passing.wait()  # an end does not arrive either


def write_cohort(folder: Path, plan: StudyPlan, patients: Patients) -> None:
    """Write prepared patients as `fedsynth_client.cohort` reads them; all are training patients."""
    (folder / "patients").mkdir(parents=True)
    keys = [f"p{number:012x}" for number in range(len(patients))]
    for key, images, mask in zip(keys, patients.images, patients.masks, strict=True):
        save_file({"images": images, "mask": mask}, folder / "patients" / f"{key}.safetensors")
    manifest = {
        "image": plan.image.model_dump(),
        "genes": plan.genes.model_dump(),
        "label": plan.label.model_dump(),
        "patients": [{"key": key, "split": "train", "has_images": True, "has_genes": True} for key in keys],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    index = pd.Index(keys, name="key")
    pd.DataFrame(patients.genes, index=index, columns=plan.genes.panel).to_parquet(folder / "expression.parquet")
    clinical = pd.DataFrame(patients.morphology, index=index, columns=plan.morphology.features)
    clinical["label"] = patients.labels
    clinical.to_parquet(folder / "clinical.parquet")


def write_policy(folder: Path, plan: StudyPlan, name: str) -> None:
    """A policy that allows the study of `plan`."""
    declared = plan.site(name).nominal_patients
    policy = SitePolicy(
        site=name,
        max_epsilon=plan.privacy.epsilon,
        max_delta=plan.privacy.delta,
        min_patients=max(declared // 2, 5),
        declared_patients=declared,
        modules=list(plan.modules),
    )
    save_policy(policy, folder / "policy.toml")


@dataclass
class Federation:
    """A coordinator's folder and its sites' folders below `root`, and the processes that work in them."""

    root: Path
    plan: StudyPlan
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    relays: dict[str, Relay] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """Names of the plan's sites."""
        return [site.name for site in self.plan.sites]

    def folder(self, whose: str) -> Path:
        """The folder of the coordinator (``"study"``) or of a site."""
        return self.root / whose

    def lay_out(self, cohorts: Mapping[str, Patients], warm_start: Path | None = None, **study_settings: float) -> None:
        """Make all folders, keys and registrations; start the relays.

        Args:
            cohorts: patients by site.
            warm_start: the plan's public weights, if it names any.
            **study_settings: ``patience_s`` and ``absent_s`` of coordinator.toml.
        """
        plan_path, study, port = self.root / "plan.toml", self.folder(STUDY), free_port()
        save_plan(self.plan, plan_path)
        gateway = f"127.0.0.1:{port}"
        weights = ("--weights", warm_start) if warm_start is not None else ()
        _type("study", "init", study, "--plan", plan_path, "--gateway", gateway, *weights)
        superlink = {"port": free_port(), "health_port": free_port()}
        _edit(study / "coordinator.toml", gateway={"listen": gateway}, superlink=superlink, study=study_settings)
        _type("deploy", "certs", study, "--gateway-name", "127.0.0.1")
        for name in self.sites:
            self._lay_out_site(name, cohorts[name], plan_path, port)
            _type("study", "add-site", study, self.folder(name) / "keys" / "node.pub", "--name", name)

    def _lay_out_site(self, name: str, cohort: Patients, plan_path: Path, gateway: int) -> None:
        folder, door, patients = self.folder(name), free_port(), self.plan.site(name).nominal_patients
        self.relays[name] = Relay(door, gateway)
        ca = self.folder(STUDY) / "keys" / "ca.crt"
        _type(
            *("site", "init", folder, "--name", name, "--declared-patients", patients),
            *("--gateway", f"127.0.0.1:{door}", "--ca", ca),
        )
        runtime, health = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        _edit(folder / "node.toml", runtime_listen=runtime, runtime=runtime, health_listen=health)
        write_policy(folder, self.plan, name)
        write_cohort(folder / "cohort", self.plan, cohort)
        _type("site", "plan", "show", folder, plan_path)
        _type("site", "approve", folder, self.plan.digest, "--yes")

    def start(self, whose: str) -> None:
        """`fedsynth study start` or `fedsynth site start`, in the foreground of a process of its own."""
        log = self.folder(whose) / "logs" / "supervisor.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as stream:
            self.started[whose] = subprocess.Popen(
                script("fedsynth", "study" if whose == STUDY else "site", "start", str(self.folder(whose))),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # ten processes share few cores
                start_new_session=True,
            )

    def pids(self, whose: str) -> dict[str, int]:
        """Processes that `whose` supervisor runs, and itself, by name."""
        found = {"supervisor": self.started[whose].pid} if whose in self.started else {}
        path = self.folder(whose) / "run" / "supervisor.json"
        if path.is_file():
            status = SupervisorStatus.model_validate_json(path.read_text(encoding="utf-8"))
            found |= {child.name: child.pid for child in status.children if child.pid is not None}
        return found

    def done(self) -> dict[str, int]:
        """Completed rounds by module."""
        progress = progress_of(self.folder(STUDY), self.plan)
        return {} if progress is None else {str(module): count for module, count in progress.rounds.items()}

    def charges(self, site: str) -> list[tuple[str, int]]:
        """Rounds (module, number) that a site's ledger was charged for, one entry a charge."""
        entries = Site(self.folder(site)).ledger().entries()
        return [(entry.body["module"], entry.body["round"]) for entry in entries if entry.kind == "charge"]

    def finished(self) -> bool:
        """Whether the coordinator's processes have ended by themselves.

        Raises:
            Missed: they ended with an error.
        """
        self.check_alive(STUDY)
        return self.started[STUDY].poll() == 0

    def check_alive(self, whose: str) -> None:
        """Look whether a command that stays has failed.

        Raises:
            Missed: it has; with the end of its log.
        """
        code = self.started[whose].poll()
        if code:
            log = (self.folder(whose) / "logs" / "supervisor.log").read_text(encoding="utf-8").strip()
            raise Missed(f"start of {whose} ended with {code}: {log[-500:]}")

    def close(self) -> None:
        """End everything that was started here, for certain."""
        known = {pid for whose in self.started for pid in self.pids(whose).values()}
        for process in self.started.values():
            with suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + 40
        for process in self.started.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for pid in known:
            with suppress(ProcessLookupError):
                os.killpg(pid, 9)
        for relay in self.relays.values():
            relay.close()


def _type(*arguments: object) -> None:
    """Run a `fedsynth` command in this process; what it prints is shown only when it fails."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = build()([str(each) for each in arguments], standalone_mode=False)
    if isinstance(code, int) and code:
        raise RuntimeError(f"fedsynth {' '.join(map(str, arguments))} ended with {code}:\n{said.getvalue()}")


def _edit(path: Path, **changes: Any) -> None:
    """Change keys of a TOML file; a table's keys are changed one by one."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


class Watch:
    """Looks at a federation from beside it: checkpoints, tasks, memory and processor time."""

    def __init__(self, federation: Federation) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.tasks: list[TaskDone] = []
        self.samples: list[Sample] = []
        self._federation = federation
        self._seen: dict[str, int] = {}
        self._entries: dict[str, list[float]] = {site: [] for site in federation.sites}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _look(self) -> None:
        sample_at = 0.0
        while not self._stop.wait(_LOOK_SECONDS):
            with suppress(OSError, ValueError, FedsynthError):  # a file that is just being replaced
                self._look_at_files()
            if time.monotonic() >= sample_at:
                sample_at = time.monotonic() + _SAMPLE_SECONDS
                self.samples.append(self._sample())

    def _look_at_files(self) -> None:
        federation = self._federation
        path = federation.folder(STUDY) / "checkpoint.safetensors"
        if self._is_new("checkpoint", path):
            at = path.stat().st_mtime_ns / 1e9
            self.checkpoints.append(Checkpoint(at, federation.done()))
        for site, entries in self._entries.items():
            ledger = federation.folder(site) / "ledger.sqlite"
            if self._is_new(f"{site}'s ledger", ledger):  # a charge, an answer stored, an answer sent
                entries.append(ledger.stat().st_mtime_ns / 1e9)
            if self._is_new(site, federation.folder(site) / "run" / "runner.json"):
                status = read_runner_status(federation.folder(site))
                if status is not None and status.last is not None:
                    last = status.last
                    training = entries[-1] - entries[0] if entries else 0.0
                    self.tasks.append(TaskDone(site, last.what, last.outcome, last.seconds, training))
                entries.clear()

    def _is_new(self, what: str, path: Path) -> bool:
        version = path.stat().st_mtime_ns if path.is_file() else 0
        changed = version != self._seen.get(what, 0)
        self._seen[what] = version
        return changed

    def _sample(self) -> Sample:
        parents: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter(["ppid"]):
            parents.setdefault(process.info["ppid"], []).append(process)
        found: dict[str, tuple[int, float]] = {}
        for whose in list(self._federation.started):
            with suppress(OSError, ValueError):
                pids = self._federation.pids(whose)
                own = set(pids.values())
                for name, pid in pids.items():
                    found[f"{whose}/{name}"] = _usage(pid, parents, own)
        found["benchmark"] = _usage(os.getpid(), {}, set())
        return Sample(time.time(), found)


def _usage(pid: int, children: Mapping[int, Sequence[psutil.Process]], apart: set[int]) -> tuple[int, float]:
    """Resident bytes and processor seconds of a process and its descendants, without those that count by themselves."""
    memory, seconds = 0, 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            memory, seconds = process.memory_info().rss, times.user + times.system
    for child in children.get(pid, ()):
        if child.pid not in apart:
            more = _usage(child.pid, children, apart)
            memory, seconds = memory + more[0], seconds + more[1]
    return memory, seconds
