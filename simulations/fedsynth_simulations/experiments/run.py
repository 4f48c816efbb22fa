"""Running an experiment: what a runner is given, what it gives back, and how finished work is kept for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fedsynth.errors import UsageError
from fedsynth.files import read_json, write_atomic, write_json
from fedsynth.plan import Section
from fedsynth.progress import say
from fedsynth_simulations.experiments.rendering import write_charts, write_table
from fedsynth_simulations.experiments.spec import Column, Spec, load_spec, runner_module
from fedsynth_simulations.experiments.values import Cell, Curves, Picture, Result, Row, Table

RESULT = "result.json"


@dataclass(frozen=True)
class Kept:
    """Finished work that a later run takes up: named arrays, and facts that JSON can hold."""

    arrays: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What a runner gives back; the rest of a `Result` is known without it.

    `ran` is the specification that the columns trained by, where a search changed it.
    """

    data: str
    tables: list[Table]
    curves: list[Curves] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ran: Spec | None = None


@dataclass(frozen=True)
class Experiment:
    """What a runner is given.

    Attributes:
        spec: the specification; of a quick run, as changed for it.
        data: folder of real data, where one was named.
        out: folder of the run; pictures are written here.
        quick: whether this only shows that all works.
    """

    spec: Spec
    data: Path | None
    out: Path
    quick: bool

    def options(self) -> Section:
        """The runner's options."""
        return runner_module(self.spec.runner).Options.model_validate(self.spec.options)

    def column_options(self, column: Column) -> Section:
        """The runner's options of one column."""
        return runner_module(self.spec.runner).ColumnOptions.model_validate(column.options)

    def real_data(self, what: str) -> Path:
        """The folder of real data.

        Args:
            what: how it must look, for the error.

        Raises:
            UsageError: ``data_missing``: none was named, or it is not there.
        """
        if self.data is None or not self.data.is_dir():
            named = "no folder was named" if self.data is None else f"there is no folder {self.data}"
            raise UsageError(
                "data_missing",
                f"The experiment needs real data and {named}.",
                f"Name it with --data: {what} Or try --quick, which takes simulated data.",
            )
        return self.data

    def kept(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Kept]) -> Kept:
        """What `make` gives: read from the folder of an earlier run where its `inputs` were the same, else made and kept.

        Args:
            name: of a folder below ``parts``, e.g. a column's slug.
            inputs: everything that the work depends on, as JSON can hold it; another value makes it anew.
            make: the work.
        """
        where = self.out / "parts" / name
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if (where / "facts.json").is_file():
            stored = read_json(where / "facts.json")
            if stored["inputs"] == digest:
                say(f"{name}: done before")
                return Kept(load_file(where / "arrays.safetensors"), stored["facts"])
        started = time.monotonic()
        say(f"{name}: at work")
        made = make()
        where.mkdir(parents=True, exist_ok=True)
        # Those of other inputs must not stand beside these arrays.
        (where / "facts.json").unlink(missing_ok=True)
        contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in made.arrays.items()}
        write_atomic(where / "arrays.safetensors", save(contiguous))
        facts = made.facts | {"seconds": round(time.monotonic() - started, 1)}
        # Written last: without it the folder is not taken up.
        write_json(where / "facts.json", {"inputs": digest, "facts": facts})
        say(f"{name}: done in {facts['seconds']:.0f} s")
        return Kept(contiguous, facts)

    def row(self, key: str, what: str, cells: dict[str, Cell], note: str = "") -> Row:
        """A row with what the specification publishes under `key`."""
        published = self.spec.published.get(key)
        if published is None:
            return Row(what=what, cells=cells, note=note)
        together = ". ".join(part.rstrip(".") for part in (note, published.why) if part)
        return Row(what=what, cells=cells, paper=published.value, comparable=published.comparable, note=together)


def run_experiment(path: Path, data: Path | None, out: Path, *, quick: bool) -> Result:
    """Run the specification at `path` into `out`; what an interrupted run had finished there is taken up.

    Raises:
        UsageError: ``experiment_*`` of the file, ``data_missing``.
    """
    spec = load_spec(path)
    experiment = Experiment(spec.quickened() if quick else spec, data, out, quick)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    findings: Findings = runner_module(spec.runner).run(experiment)
    result = _result(path.stem, experiment, findings, time.monotonic() - started)
    return write_result(out, result)


def write_result(out: Path, result: Result) -> Result:
    """Write result, table and charts into `out`, and return the result with its charts named."""
    charts = write_charts(out, result.curves)
    known = {picture.file for picture in charts}
    others = [picture for picture in result.pictures if picture.file not in known]
    whole = result.model_copy(update={"pictures": [*others, *charts]})
    write_table(out / "table.md", whole)
    write_json(out / RESULT, whole.model_dump(mode="json"))
    return whole


def load_result(folder: Path) -> Result:
    """The result of a finished run.

    Raises:
        UsageError: ``result_missing``.
    """
    if not (folder / RESULT).is_file():
        raise UsageError("result_missing", f"There is no finished experiment in {folder}.")
    return Result.model_validate_json((folder / RESULT).read_text(encoding="utf-8"))


def _result(name: str, experiment: Experiment, findings: Findings, seconds: float) -> Result:
    spec = experiment.spec
    worked = sum(read_json(path)["facts"]["seconds"] for path in sorted(experiment.out.glob("parts/*/facts.json")))
    notes = [*spec.notes, *findings.notes]
    if experiment.quick:
        notes = ["A quick run on simulated data: it shows that all works, its figures mean nothing.", *notes]
    return Result(
        name=name,
        title=spec.title,
        system=spec.system,
        paper=spec.paper,
        data=findings.data,
        not_private=[column.name for column in spec.columns if not column.private],
        settings=_settings(findings.ran or spec),
        seed=spec.seed,
        machine=machine(),
        date=datetime.now(UTC).date().isoformat(),
        seconds=round(max(seconds, worked), 1),
        tables=findings.tables,
        curves=findings.curves,
        pictures=findings.pictures,
        notes=notes,
    )


def _settings(spec: Spec) -> dict[str, str]:
    found = {f"{section}.{key}": _text(value) for section, keys in spec.plan.items() for key, value in keys.items()}
    found |= {"sites": str(spec.sites)} | {f"options.{key}": _text(value) for key, value in spec.options.items()}
    for column in spec.columns:
        own = [
            f"{section}.{key} = {_text(value)}" for section, keys in column.plan.items() for key, value in keys.items()
        ]
        own += [f"{key} = {_text(value)}" for key, value in column.options.items()]
        own += [] if column.sites is None else [f"sites = {column.sites}"]
        found[f"column {column.name}"] = "; ".join([f"epsilon = {column.epsilon:g}", *own])
    return found


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def machine() -> str:
    """Cores that this process may use, and the threads that it computes with; never a machine's name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s) used, no accelerator"
