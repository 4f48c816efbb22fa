"""What a deployment costs and what it survives: a coordinator and three sites as real processes on this machine.

``python simulations/benchmarks/deployment.py --out FOLDER [--docs docs/deployment.md]`` lays out federations over TLS on
loopback with registered keys (it needs nginx), runs them, and writes ``deployment.json`` and ``deployment.md``:

- seconds from `study start` and `site start` until each part answers; memory and processor time by process, idle and busy;
- seconds a round beside the same plan in one process, at two sizes, the sites' own work apart;
- bytes a round and site on the wire, counted by a relay between node and gateway, beside those of the records;
- what happens when the line is cut for a while (``--outages``) or a process is killed (``--kills``) during a round.

About 15 minutes on two cores with the defaults: 4 for ``--parts plans``, 6 for ``outages``, 5 for ``kills``. A part that is
run again replaces its own figures in ``deployment.json`` and leaves the others.
"""

from __future__ import annotations

import os

# Flower reports use and looks for updates unless told otherwise before it is imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import argparse
import json
import platform
import shutil
import signal
import ssl
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from flwr.app import Message

from fedsynth import __version__
from fedsynth.deployment.health import serving
from fedsynth.errors import FedsynthError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_client.app import app as client_app
from fedsynth_client.node.settings import load_settings
from fedsynth_client.sent import sent
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import load_state
from fedsynth_server.coordinator.control import open_control
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.status import read_status
from fedsynth_server.warm_start import public_starts
from fedsynth_simulations.benchmarking.cohorts import Patients, at_size, draw_site
from fedsynth_simulations.benchmarking.deployment import (
    STUDY,
    Federation,
    Missed,
    Relay,
    Watch,
    wait_until,
    write_cohort,
    write_policy,
)
from fedsynth_simulations.benchmarking.deployment_figures import (
    Round,
    charged_twice,
    page,
    passed,
    rounds_of,
    slowest,
    spread,
    usage_between,
)
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.grid import InProcessGrid, run_in_process
from fedsynth_simulations.hospitals.sites import SITES
from fedsynth_simulations.plans import simulated_genes, study_plan
from fedsynth_simulations.weights import packaged_warm_start

_PATIENTS = 20
_SEED = 5
_ROUNDS = 7  # of the adversarial module; the first, which loads a cohort, is left out of the medians
_IDLE_SECONDS = 20.0
_FIT_STEPS = 10  # not 150: fitting is the coordinator's own work and the same in both
_PARTS = ("plans", "outages", "kills")
_ONLINE = "the coordinator sees it online"
_ROUND_TIMEOUT_SECONDS = 240.0  # not 3600: what only its end mends must show in the time of a benchmark
_UP_SECONDS, _ROUND_SECONDS, _STUDY_SECONDS = 120.0, 400.0, 900.0


@dataclass(frozen=True)
class _Kill:
    """SIGKILL to one process and to nothing else; its supervisor starts it again."""

    what: str
    whose: str
    which: str

    def __call__(self, federation: Federation) -> None:
        os.kill(federation.pids(self.whose)[self.which], signal.SIGKILL)


@dataclass(frozen=True)
class _Fault:
    """Something that is broken, left so for some seconds, and mended."""

    what: str
    seconds: float
    begin: Callable[[Federation], None]
    end: Callable[[Federation], None]


_KILLS = {
    "superlink": _Kill("SuperLink killed", STUDY, "superlink"),
    "study-runner": _Kill("study runner killed", STUDY, "runner"),
    "gateway": _Kill("gateway killed", STUDY, "gateway"),
    "site-runner": _Kill("runner of one site killed", SITES[0].name, "runner"),
    "supernode": _Kill("SuperNode of one site killed", SITES[0].name, "supernode"),
}


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="write the page here, too")
    parser.add_argument(
        "--parts", default=",".join(_PARTS), help="any of plans, outages, kills; empty: write the page anew"
    )
    parser.add_argument("--outages", default="30,120", help="seconds that no site reaches the gateway")
    parser.add_argument("--kills", default=",".join(_KILLS), help=f"any of {','.join(_KILLS)}; may be empty")
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing that was started is left behind
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "deployment.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts, kills = _listed(parser, given.parts, _PARTS), _listed(parser, given.kills, _KILLS)
    outages = [float(each) for each in given.outages.split(",") if each]
    cohorts = _cohorts() if parts else {}
    for part in parts:
        run = {**_machine(), "command": _command()}
        with tempfile.TemporaryDirectory(prefix="fedsynth-deployment-") as folder:
            root = Path(folder)
            if part == "plans":
                found[part] = {name: _plan_part(root / name, name, cohorts) for name in ("small", "main")}
            elif part == "outages":
                found[part] = _faults_part(root / part, cohorts, _outages(outages))
            else:
                found[part] = _faults_part(
                    root / part, cohorts, [_Fault(_KILLS[name].what, 0.0, _KILLS[name], _nothing) for name in kills]
                )
        found["runs"] = {**found.get("runs", {}), part: run}
        _write(path, found)
    text = page(found)
    for target in (given.out / "deployment.md", given.docs):
        if target is not None:
            target.write_text(text, encoding="utf-8")
    print(text)


def _listed(parser: argparse.ArgumentParser, given: str, known: Collection[str]) -> list[str]:
    names = [each for each in given.split(",") if each]
    unknown = [each for each in names if each not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)} is none of {', '.join(known)}")
    return names


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "version": __version__,
        "flower": version("flwr"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def _command() -> str:
    options = list(sys.argv[1:])
    for name in ("--out", "--docs"):  # folders of whoever ran it
        if name in options:
            options[options.index(name) + 1] = {"--out": "FOLDER", "--docs": "docs/deployment.md"}[name]
    return " ".join(["python simulations/benchmarks/deployment.py", *options])


# Plans and patients.


def _plan(name: str) -> StudyPlan:
    """The plan of a size: ``main`` is that of `fedsynth simulate` with rounds of the adversarial module, of few steps."""
    genes = simulated_genes()
    plan = study_plan(
        f"deployment-{name}",
        "Measure a deployment on one machine.",
        {site.name: _PATIENTS for site in SITES},
        genes=genes,
        epsilon=10.0,
        starts=public_starts(packaged_warm_start(), genes),
    ).model_dump(mode="json", exclude_none=True)
    plan["gan"] |= {"rounds": _ROUNDS, "steps_per_round": 2, "expected_batch": 10}
    if name == "main":
        plan["moments"]["budget_share"] = plan["embedding"]["budget_share"] = 0.3
        plan["gan"]["budget_share"] = 0.4
        plan["embedding"]["fit_steps"] = _FIT_STEPS
        return StudyPlan.model_validate(plan)
    del plan["moments"], plan["embedding"], plan["gan"]["warm_start"]
    plan["autoencoder"].pop("warm_start", None)
    plan["image"] |= {"size": 32, "pixel_spacing_mm": 6.0}
    few = {"steps_per_round": 3, "expected_batch": 10}
    plan["autoencoder"] |= {**few, "rounds": 1, "hidden": [16, 8], "latent_dim": 4, "budget_share": 0.3}
    plan["radiogenomics"] |= {**few, "rounds": 1, "hidden": [16, 8], "budget_share": 0.2}
    plan["gan"] |= {
        **{"latent_dim": 8, "generator_width": 4, "discriminator_width": 4, "generator_batch": 8, "budget_share": 0.5},
        **{"discriminator_trains": "all", "generator_trains": "all"},
    }
    if name == "faults":
        plan["gan"] |= {"steps_per_round": 60, "generator_batch": 64}
        plan["aggregation"]["round_timeout_s"] = _ROUND_TIMEOUT_SECONDS
    return StudyPlan.model_validate(plan)


def _with_rounds(plan: StudyPlan, rounds: int) -> StudyPlan:
    content = plan.model_dump(mode="json", exclude_none=True)
    content["gan"]["rounds"] = rounds
    return StudyPlan.model_validate(content)


def _cohorts() -> dict[str, Patients]:
    """A small simulated cohort a site, at 64 pixels."""
    _say("drawing patients")
    plan, anatomy = _plan("main"), Anatomy.load()
    return {site.name: draw_site(plan, site, _SEED, "train", range(_PATIENTS), anatomy) for site in SITES}


def _sized(cohorts: Mapping[str, Patients], plan: StudyPlan) -> dict[str, Patients]:
    return {name: at_size(patients, plan.image.size) for name, patients in cohorts.items()}


# One plan: in one process, and deployed.


def _plan_part(root: Path, name: str, cohorts: Mapping[str, Patients]) -> dict[str, Any]:
    plan = _plan(name)
    patients, start = _sized(cohorts, plan), packaged_warm_start() if name == "main" else None
    _say(f"{name}: in one process")
    in_process = _in_process(root / "in-process", plan, patients, start)
    _say(f"{name}: deployed")
    federation = Federation(root / "deployed", plan)
    federation.root.mkdir(parents=True)
    with closing(federation):
        federation.lay_out(patients, start, absent_s=_STUDY_SECONDS)  # the first round waits for all
        with Watch(federation) as watch:
            started, idle, online = _start_all(federation)
            wait_until(federation.finished, _STUDY_SECONDS, "the study")
            ended = time.time()
    return {
        "started": started,
        "idle_seconds": round(idle[1] - idle[0]),
        "idle_bytes_a_minute": _idle_bytes(federation, idle),
        "usage": {
            "idle": usage_between(watch.samples, *idle),
            "study": usage_between(watch.samples, online, ended),
        },
        "rounds": _round_figures(plan, watch, in_process),
        "bytes": _byte_figures(federation, watch, in_process, online),
        "connections": ", ".join(str(relay.traffic[-1].connection) for relay in federation.relays.values()),
    }


class _TimedGrid(InProcessGrid):
    """Notes when each task was delivered and answered, and the bytes of both messages."""

    def __init__(self, folders: dict[int, Path]) -> None:
        self.notes: list[dict[str, Any]] = []
        super().__init__(client_app, folders, wiretap=self._note)

    def _note(self, direction: str, node: int, content: bytes) -> None:
        self.notes[-1]["down" if direction == "to site" else "up"] = len(content)

    def _deliver(self, message: Message) -> str:
        kind = message.metadata.message_type
        if not kind.startswith("train."):
            self.notes.append({})
            name = super()._deliver(message)
            self.notes.pop()
            return name
        number = int(message.metadata.group_id)
        self.notes.append({"module": kind.removeprefix("train."), "round": number, "began": time.time()})
        name = super()._deliver(message)
        self.notes[-1]["ended"] = time.time()
        return name


def _in_process(
    root: Path, plan: StudyPlan, cohorts: Mapping[str, Patients], warm_start: Path | None
) -> list[dict[str, Any]]:
    """Tasks of the plan's rounds over the in-process grid, with times and bytes; the last note only ends the study."""
    study = root / "study"
    study.mkdir(parents=True)
    save_plan(plan, study / "plan.toml")
    if warm_start is not None:
        shutil.copyfile(warm_start, study / "warm-start.safetensors")
    for name, patients in cohorts.items():
        write_cohort(root / name / "cohort", plan, patients)
        write_policy(root / name, plan, name)
        Site(root / name).approve(plan)
    grid = _TimedGrid({node: root / name for node, name in enumerate(cohorts, start=1)})
    run_in_process(server_app, grid, {"study-folder": str(study)})
    return [*grid.notes, {"module": "", "round": 0, "began": time.time()}]


def _start_all(federation: Federation) -> tuple[dict[str, dict[str, float]], tuple[float, float], float]:
    """Start everybody; returns seconds until each part answered, a quiet window, and when the last site came online."""
    study, sites = Study(federation.folder(STUDY)), federation.sites
    context = ssl.create_default_context(cafile=str(federation.folder(STUDY) / "keys" / "ca.crt"))
    log = federation.folder(STUDY) / "logs" / "runner.log"

    # Whatever proxy the environment names: this call stays on this machine.
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))

    def gateway() -> bool:
        with browser.open(f"https://{study.gateway_local_address}/health", timeout=2) as answer:
            return bool(answer.status == 200)

    started = {
        "study start": _started(
            federation,
            STUDY,
            {
                "SuperLink serves (gRPC health)": lambda: bool(serving(study.health_address)),
                "the gateway answers /health with SuperLink's word": gateway,
                "the study runner takes tasks": lambda: "ready" in log.read_text(encoding="utf-8"),
            },
        )
    }
    with open_control(study) as control:
        for name in sites:
            folder = federation.folder(name)
            health = load_settings(folder).health_listen
            if name == sites[-1]:  # those that are there have answered, and the round waits for this one
                wait_until(lambda: _have_answered(study, sites[:-1]), _ROUND_SECONDS, "the first answers")
                quiet = time.time() + 2
                time.sleep(2 + _IDLE_SECONDS)
                idle = (quiet, time.time())
            probes: dict[str, Callable[[], bool]] = {
                "SuperNode serves (gRPC health)": lambda health=health: bool(serving(health)),  # type: ignore[misc]
                "the runner is ready": lambda folder=folder: (folder / "run" / "runner.json").is_file(),  # type: ignore[misc]
                _ONLINE: lambda name=name: any(  # type: ignore[misc]
                    node.name == name and node.online for node in control.nodes()
                ),
            }
            started[f"site start ({name})"] = _started(federation, name, probes)
    last = started[f"site start ({sites[-1]})"]
    return started, idle, time.time() - max(last.values()) + last[_ONLINE]


def _have_answered(study: Study, sites: list[str]) -> bool:
    status = read_status(study.folder)
    return status is not None and all(status.sites[site].state == "answered" for site in sites)


def _started(federation: Federation, whose: str, probes: Mapping[str, Callable[[], bool]]) -> dict[str, float]:
    """Start `whose` processes; returns seconds until each probe succeeded."""
    began, open_probes, found = time.monotonic(), dict(probes), dict[str, float]()
    federation.start(whose)

    def look() -> bool:
        federation.check_alive(whose)
        for what, probe in list(open_probes.items()):
            with suppress(OSError, FedsynthError):  # it does not answer yet
                if probe():
                    found[what] = round(time.monotonic() - began, 1)
                    del open_probes[what]
        return not open_probes

    wait_until(look, _UP_SECONDS, f"everything of {whose} to answer")
    return {what: found[what] for what in probes}


def _idle_bytes(federation: Federation, idle: tuple[float, float]) -> dict[str, dict[str, int]]:
    """Bytes a minute, each way, of the sites that were up and had nothing to do."""
    found = {}
    for name in federation.sites[:-1]:
        up, down = passed(federation.relays[name].traffic, *idle)
        minutes = (idle[1] - idle[0]) / 60
        found[name] = {"up": round(up / minutes), "down": round(down / minutes)}
    return found


def _measured(plan: StudyPlan) -> list[str]:
    """Modules with enough rounds for a median."""
    return [module for module in plan.modules if plan.training(module).rounds >= _ROUNDS]


def _round_figures(plan: StudyPlan, watch: Watch, in_process: list[dict[str, Any]]) -> dict[str, Any]:
    work, figures = slowest(watch.tasks), {}
    for module in _measured(plan):
        here: dict[str, list[float]] = {"seconds": [], "site_seconds": []}
        firsts = [n for n, note in enumerate(in_process) if n == 0 or _key(in_process[n - 1]) != _key(note)]
        for first, after in pairwise(firsts):
            notes = in_process[first:after]
            if notes[0]["module"] == module and notes[0]["round"] > 1:
                here["seconds"].append(in_process[after]["began"] - notes[0]["began"])
                here["site_seconds"].append(sum(note["ended"] - note["began"] for note in notes))
        rounds = [r for r in rounds_of(watch.checkpoints) if r.module == module and r.number > 1]
        done = [work[module, r.number] for r in rounds]
        here_rest = [a - b for a, b in zip(here["seconds"], here["site_seconds"], strict=True)]
        deployed = {
            "seconds": [r.seconds for r in rounds],
            "training_seconds": [task.training for task in done],
            "handling_seconds": [task.seconds - task.training for task in done],
            "rest_seconds": [r.seconds - task.seconds for r, task in zip(rounds, done, strict=True)],
        }
        overhead = [r.seconds - task.training for r, task in zip(rounds, done, strict=True)]
        figures[module] = {
            "in_process": {name: spread(values) for name, values in (here | {"rest_seconds": here_rest}).items()},
            "deployed": {name: spread(values) for name, values in deployed.items()},
            "overhead_seconds": round(spread(overhead)["median"] - spread(here_rest)["median"], 3),
        }
    return figures


def _key(note: Mapping[str, Any]) -> tuple[str, int]:
    return note["module"], note["round"]


def _byte_figures(
    federation: Federation, watch: Watch, in_process: list[dict[str, Any]], online: float
) -> dict[str, dict[str, int]]:
    """Bytes a round and site, mean over sites and rounds."""
    figures: dict[str, dict[str, int]] = {}
    rounds = rounds_of(watch.checkpoints)
    logs = {name: sent(Site(federation.folder(name))) for name in federation.sites}
    for module in federation.plan.modules:
        wire = [passed_in(federation, each, online) for each in rounds if each.module == module]
        ways = [way for each in wire for way in each.values()]
        tasks = [note for note in in_process if note["module"] == module]
        records = [each.bytes for log in logs.values() for each in log if each.module == module and not each.again]
        figures[module] = {
            "wire_up": round(mean(up for up, _ in ways)),
            "wire_down": round(mean(down for _, down in ways)),
            "message_up": round(mean(note["up"] for note in tasks)),
            "message_down": round(mean(note["down"] for note in tasks)),
            "records_up": round(mean(records)),
        }
    return figures


def passed_in(federation: Federation, each: Round, online: float) -> dict[str, tuple[int, int]]:
    """Bytes (up, down) by site in a round; in the round in which the last site came, that site's since it was online."""
    sites = federation.sites
    if each.began < online < each.ended:
        return {sites[-1]: passed(federation.relays[sites[-1]].traffic, online, each.ended)}
    return {site: passed(federation.relays[site].traffic, each.began, each.ended) for site in sites}


# Faults.


def _outages(seconds: list[float]) -> list[_Fault]:
    """The way to the gateway is broken for all sites: each length refused, the first also in other ways."""
    where = "gateway out of reach of all sites"
    faults = [
        _Fault(f"{where}, {each:.0f} s, refused", each, _all(Relay.refuse), _all(Relay.restore)) for each in seconds
    ]
    for each in seconds[:1]:
        faults.append(_Fault(f"{where}, {each:.0f} s, silent", each, _all(Relay.hold), _all(Relay.restore)))
        faults.append(_Fault(f"{where}, {each:.0f} s, hung up", each, _all(Relay.hang_up), _all(Relay.restore)))
    return faults


def _faults_part(root: Path, cohorts: Mapping[str, Patients], faults: Sequence[_Fault]) -> dict[str, Any]:
    # Three rounds before, one for each fault and some that it may miss, the rest to go on undisturbed.
    plan = _with_rounds(_plan("faults"), 3 + len(faults) + max(3, len(faults) // 2))
    federation = Federation(root, plan)
    root.mkdir(parents=True)
    found, hit, finished = list[dict[str, Any]](), set[int](), False
    with closing(federation):
        federation.lay_out(_sized(cohorts, plan))
        with Watch(federation) as watch:
            for whose in (STUDY, *federation.sites):
                federation.start(whose)
            wait_until(lambda: federation.done().get("gan", 0) >= 3, _STUDY_SECONDS, "the third round")
            try:
                for fault in faults:
                    found.append(_one_fault(federation, fault))
                    hit |= {found[-1]["round"], found[-1]["round"] + 1}
                    _say(json.dumps(found[-1]))
                wait_until(federation.finished, _STUDY_SECONDS, "the end of the study")
                finished = True
            except Missed as error:  # a finding, too
                _say(f"the study did not go on: {error}")
    charges = {site: federation.charges(site) for site in federation.sites}
    calm = [r.seconds for r in rounds_of(watch.checkpoints) if r.module == "gan" and r.number not in hit | {1}]
    return {
        "faults": found,
        "tried": [fault.what for fault in faults],
        "undisturbed_seconds": spread(calm),
        "finished": finished,
        "round_timeout_s": plan.aggregation.round_timeout_s,
        "rounds": sum(federation.done().values()),
        "charges": sum(map(len, charges.values())),
        "charged_twice": charged_twice(charges),
    }


def _one_fault(federation: Federation, fault: _Fault) -> dict[str, Any]:
    """Break something while all sites train, mend it, and wait until the round that was hit is complete.

    Raises:
        Missed: it never is.
    """
    number = 0

    def training() -> bool:
        nonlocal number
        number = federation.done()["gan"] + 1
        return all(("gan", number) in federation.charges(site) for site in federation.sites)

    wait_until(training, _ROUND_SECONDS, "a round that all sites train in")
    fault.begin(federation)
    _say(f"{fault.what}: begun in round {number}")
    time.sleep(fault.seconds)
    fault.end(federation)
    recovery = wait_until(
        lambda: federation.done()["gan"] >= number, _ROUND_SECONDS + fault.seconds, f"{fault.what}: round {number}"
    )
    return {
        "fault": fault.what,
        "down_seconds": fault.seconds,
        "recovery_seconds": round(recovery, 1),
        "round": number,
        "sites_in_round": _answered(federation, number),
        "sites": len(federation.sites),
        "charged_twice": charged_twice({site: federation.charges(site) for site in federation.sites}),
    }


def _answered(federation: Federation, number: int) -> int:
    """Sites whose answer the coordinator took in a round."""
    state = load_state(federation.folder(STUDY), federation.plan)
    rows = state.curves["gan"] if state is not None else []
    return sum(row["round"] == number for row in rows)


def _all(what: Callable[[Relay], None]) -> Callable[[Federation], None]:
    def act(federation: Federation) -> None:
        for relay in federation.relays.values():
            what(relay)

    return act


def _nothing(federation: Federation) -> None:
    """A killed process is started again by its supervisor."""


if __name__ == "__main__":
    main()
