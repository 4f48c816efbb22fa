"""What is computed from the notes of a measured federation, and how it is shown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

_TASK = re.compile(r"'?train\.(?P<module>\w+)'? round (?P<round>\d+)")


class Traffic(NamedTuple):
    """Bytes that passed a relay: when, to the coordinator, to the site, and which connection it was (counted from 1)."""

    at: float
    up: int
    down: int
    connection: int


class Sample(NamedTuple):
    """Resident bytes and processor seconds since start, by process."""

    at: float
    usage: dict[str, tuple[int, float]]


class Checkpoint(NamedTuple):
    """When a checkpoint was written, and the rounds by module that are complete in it."""

    at: float
    rounds: dict[str, int]


class TaskDone(NamedTuple):
    """A site's runner is done with a task: what, how it ended, seconds in all, seconds from the charge to the answer."""

    site: str
    what: str
    outcome: str
    seconds: float
    training: float


@dataclass(frozen=True)
class Round:
    """One round, from the checkpoint before it to its own (Unix time, s)."""

    module: str
    number: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """Length (s)."""
        return self.ended - self.began


def rounds_of(checkpoints: Sequence[Checkpoint]) -> list[Round]:
    """Rounds between successive checkpoints; a checkpoint that completes none (of a fit) only ends what is before it.

    >>> notes = [Checkpoint(1.0, {"gan": 0}), Checkpoint(3.0, {"gan": 0}), Checkpoint(8.0, {"gan": 1})]
    >>> rounds_of(notes)
    [Round(module='gan', number=1, began=3.0, ended=8.0)]
    """
    found = []
    for before, after in pairwise(checkpoints):
        for module, count in after.rounds.items():
            if count == before.rounds.get(module, 0) + 1:
                found.append(Round(module, count, before.at, after.at))
    return found


def task_round(what: str) -> tuple[str, int] | None:
    """Module and round that a line of a runner names; None for anything else.

    >>> task_round("'train.gan' round 3")
    ('gan', 3)
    """
    named = _TASK.search(what)
    return (named["module"], int(named["round"])) if named else None


def slowest(tasks: Iterable[TaskDone]) -> dict[tuple[str, int], TaskDone]:
    """The answer that took longest, by module and round."""
    found: dict[tuple[str, int], TaskDone] = {}
    for task in tasks:
        named = task_round(task.what)
        if named is not None and task.outcome == "answered":
            found[named] = max(found.get(named, task), task, key=lambda each: each.seconds)
    return found


def passed(traffic: Iterable[Traffic], began: float, ended: float) -> tuple[int, int]:
    """Bytes (up, down) that passed a relay in (began, ended].

    >>> passed([Traffic(1.0, 5, 0, 1), Traffic(2.0, 0, 7, 1), Traffic(3.0, 1, 1, 2)], 1.0, 2.5)
    (0, 7)
    """
    inside = [each for each in traffic if began < each.at <= ended]
    return sum(each.up for each in inside), sum(each.down for each in inside)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest and count.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0, 'count': 3}
    """
    return {
        "median": round(median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "count": len(values),
    }


def usage_between(samples: Sequence[Sample], began: float, ended: float) -> dict[str, dict[str, float]]:
    """By process, in a window: mean and greatest resident memory (MiB) and processor time (percent of one core)."""
    inside = [sample for sample in samples if began <= sample.at <= ended]
    found = {}
    for name in sorted({name for sample in inside for name in sample.usage}):
        seen = [(sample.at, *sample.usage[name]) for sample in inside if sample.usage.get(name, (0, 0.0))[0]]
        if len(seen) < 2:
            continue
        memory = [each[1] / 2**20 for each in seen]
        busy = (seen[-1][2] - seen[0][2]) / (seen[-1][0] - seen[0][0])
        found[name] = {
            "mean_mib": round(mean(memory), 1),
            "peak_mib": round(max(memory), 1),
            "cpu_percent": round(100 * max(busy, 0.0), 1),
        }
    return found


def charged_twice(charges: Mapping[str, Iterable[tuple[str, int]]]) -> dict[str, list[str]]:
    """Rounds that a site's ledger holds more than one charge for, by site; sites without any are left out.

    >>> charged_twice({"a": [("gan", 1), ("gan", 2)], "b": [("gan", 1), ("gan", 1)]})
    {'b': ['gan 1']}
    """
    found = {}
    for site, made in charges.items():
        twice = [f"{module} {number}" for (module, number), count in Counter(made).items() if count > 1]
        if twice:
            found[site] = sorted(twice)
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _spread(found: Mapping[str, float], digits: int = 1) -> str:
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def start_up_table(started: Mapping[str, Mapping[str, float]]) -> str:
    """What answers how long after its command."""
    rows = [(command, what, f"{seconds:.1f}") for command, each in started.items() for what, seconds in each.items()]
    return table(("command", "until", "seconds"), rows)


def usage_table(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Memory and processor time by process: idle and in a study."""
    idle, study = parts["idle"], parts["study"]
    rows = []
    for name in sorted(study, key=lambda each: (each == "benchmark", not each.startswith("study/"), each)):
        quiet, busy = idle.get(name), study[name]
        rest = (f"{quiet['mean_mib']:.0f}", f"{quiet['cpu_percent']:.1f}") if quiet else ("", "")
        rows.append((name, *rest, f"{busy['peak_mib']:.0f}", f"{busy['cpu_percent']:.1f}"))
    return table(("process", "idle MiB", "idle CPU %", "peak MiB in the study", "CPU % in the study"), rows)


def rounds_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds a round: deployed and in one process."""
    rows = []
    for name, part in parts.items():
        for module, found in part["rounds"].items():
            here, there = found["in_process"], found["deployed"]
            rows.append(
                (
                    name,
                    f"{module}, {there['seconds']['count']:.0f}",
                    _spread(here["seconds"], 2),
                    _spread(here["site_seconds"], 2),
                    _spread(there["seconds"], 2),
                    _spread(there["training_seconds"], 2),
                    _spread(there["handling_seconds"], 2),
                    _spread(there["rest_seconds"], 2),
                    f"{found['overhead_seconds']:.2f}",
                )
            )
    head = (
        "plan",
        "module, rounds",
        "in process: a round",
        "of it, work of all sites",
        "deployed: a round",
        "of it, slowest site: training",
        "slowest site: fetch, hand over",
        "the rest",
        "overhead",
    )
    return table(head, rows)


def bytes_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Bytes a round and site, on the wire and of the message itself."""
    rows = []
    for name, part in parts.items():
        for module, found in part["bytes"].items():
            cells = (
                found["wire_down"],
                found["message_down"],
                found["wire_up"],
                found["message_up"],
                found["records_up"],
            )
            rows.append((name, module, *(_bytes(each) for each in cells)))
    head = (
        "plan",
        "module",
        "wire, to the site",
        "message, to the site",
        "wire, to the coordinator",
        "message, to the coordinator",
        "its records (`site sent`)",
    )
    return table(head, rows)


def faults_table(faults: Iterable[Mapping[str, Any]]) -> str:
    """What was broken and how long the study took to complete the round that was under way."""
    rows = [
        (
            each["fault"],
            f"{each['down_seconds']:.0f}" if each["down_seconds"] else "",
            f"{each['recovery_seconds']:.1f}",
            f"{each['sites_in_round']} of {each['sites']}",
            "none" if not each["charged_twice"] else f"**{each['charged_twice']}**",
        )
        for each in faults
    ]
    head = ("fault, while all sites train", "down, s", "until the round is complete, s", "sites in it", "new charges")
    return table(head, rows)


def runs_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """When and how each part was measured."""
    rows = [(part, r["date"], r["cores"], f"{r['load']:.1f}", f"`{r['command']}`") for part, r in runs.items()]
    return table(("part", "date", "CPU cores", "load before", "command"), rows)


def _software(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    names = ("version", "flower", "python")
    return {name: ", ".join(sorted({str(run[name]) for run in runs.values()})) for name in names}


def page(found: Mapping[str, Any]) -> str:
    """The whole page, `docs/deployment.md`."""
    parts = found.get("plans", {})
    sections = [_HEAD.format(**_software(found["runs"])), runs_table(found["runs"]), _MEANING]
    if parts:
        main = parts["main"]
        idle = mean(each["up"] + each["down"] for each in main["idle_bytes_a_minute"].values())
        sections += [
            _START.format(seconds=main["idle_seconds"]),
            start_up_table(main["started"]),
            _MEMORY.format(seconds=main["idle_seconds"]),
            usage_table(main["usage"]),
            _ROUNDS,
            rounds_table(parts),
            _BYTES.format(idle=_bytes(idle), connections=main["connections"]),
            bytes_table(parts),
        ]
    for part, title in (("outages", "Outages"), ("kills", "Killed processes")):
        if part in found:
            sections += [f"## {title}", *_fault_sections(found[part])]
    return "\n\n".join(sections) + "\n"


def _fault_sections(part: Mapping[str, Any]) -> list[str]:
    """What was broken, the table, and the verdict."""
    left = [what for what in part["tried"] if what not in {each["fault"] for each in part["faults"]}]
    if left:
        verdict = f"**The study did not go on within the benchmark's patience after: {left[0]}**"
    elif part["finished"]:
        verdict = "The study then finished"
    else:
        verdict = "**The study did not finish**"
    charges = (
        f"**rounds were charged twice: {part['charged_twice']}**"
        if part["charged_twice"]
        else "no round was charged twice"
    )
    longest = max((each["down_seconds"] for each in part["faults"]), default=0)
    survived = f" Longest outage survived: {longest:.0f} s; longer ones were not tried." if longest else ""
    return [
        _FAULTS.format(normal=_spread(part["undisturbed_seconds"]), timeout=part["round_timeout_s"]),
        faults_table(part["faults"]),
        f"{verdict}, and {charges} ({part['rounds']} rounds, {part['charges']} charges over the sites).{survived}",
    ]


_HEAD = """\
# What a deployment costs, and what it survives

Measured with fedsynth {version}, Flower {flower}, Python {python}:"""

_MEANING = """\
Load before: processes that wanted a core just before the start, by what else ran on the machine; anything above 0 makes all
seconds below longer.

A coordinator (SuperLink, nginx gateway, study runner) and three sites (SuperNode, site runner) run as separate processes,
started by `fedsynth study start` and `fedsynth site start`, over TLS with registered keys. **Everything runs on one machine
over loopback**: these processes and the benchmark share its cores, and the network has no delay and loses nothing. Seconds
of work say little about a hospital's machine; bytes, memory, and the seconds that come from polling and time limits carry
over. Patients are simulated."""

_START = """\
## Start-up

From the command to the first answer (plan `main`); files of Python and its libraries had been read before. The first
site starts while nothing else does; the second shares the cores with the first's first task; the last one starts after
{seconds} s of quiet."""

_MEMORY = """\
## Memory and processor time

Plan `main` (64 pixels). Idle: {seconds} s in which the sites that were up had answered and waited for the last one. Resident
memory of a process and its descendants, sampled every second; libraries that several processes map are counted in each.
100 % is one core; `benchmark` is the relay and the sampling."""

_ROUNDS = """\
## Seconds a round

The same plan in one process (`fedsynth simulate`'s grid: no network, no other process, sites one after another) and deployed
(sites side by side). Median (least to greatest). Training: from the charge in the ledger to the answer that is ready. Fetch,
hand over: the rest of the site's task, in which its runner gets task and weights from its SuperNode, looks at cohort and
ledger, and gives the answer back. The rest: the round without its slowest site's task: polling, TLS, gateway, SuperLink,
aggregation, checkpoint. **Overhead**: a deployed round without its slowest site's training, less what a round in one
process takes beside its sites' work.

`small`: 32 pixels, narrow networks. `main`: the networks of `fedsynth simulate` (64 pixels, packaged public weights) with
`gan` rounds of few steps, so that the benchmark stays short: a real round has more steps, and the same rest."""

_BYTES = """\
## Bytes a round and site

On the wire: everything that passed between a site and the gateway in the round, TLS, HTTP and questions for work included,
counted by a relay between the two; mean over rounds and sites. The first module's is of the site that came last, from the
moment it was online. Message: the same round's message in one process, serialised whole. Idle, a site's heartbeats and
questions for work cost {idle} a minute, both ways together. TCP connections that each site opened in the whole study:
{connections}."""

_FAULTS = """\
`small` networks with longer rounds; an undisturbed round takes {normal} s. Each fault strikes while all sites have charged
their ledgers and train. Seconds count from the end of an outage, or from the kill, until the checkpoint of the round that
was hit: the rest of its training included. `Refused`: the gateway's door is closed, connections break. `Silent`:
connections stay, nothing passes. `Hung up`: connections are taken and closed within the TLS handshake. `New charges`:
entries of any site's ledger that charge a round for a second time. The plan's `round_timeout_s` is {timeout:.0f}."""
