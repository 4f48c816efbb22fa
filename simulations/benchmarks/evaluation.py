"""Time and peak memory of an evaluation: the fidelity section for many synthetic slices, and the other sections.

``python simulations/benchmarks/evaluation.py --out FOLDER [--images 10000]`` writes ``evaluation.json`` and
``evaluation.md``. ``--sections`` leaves some out.

An image is a slice of all sequences, 64 x 64 pixels; a patient has 16. Patients are a few simulated ones, varied by mirror,
brightness and noise: neither time nor memory depends on what a picture shows. There are as many held-out as synthetic
patients and twice as many training patients, so that every column of the fidelity section has the asked number of
slices. Each measurement runs in a process of its own: time is the process's CPU time and the wall time of the section
alone, memory the peak of the resident set over what it was before the section, when the patients were in memory already
(Linux). Threads are those of the environment (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.detection import detection
from fedsynth.evaluation.fidelity import fidelity
from fedsynth.evaluation.fidelity_distances import GroupNames
from fedsynth.evaluation.genes import genes
from fedsynth.evaluation.samples import Profiles, Volumes
from fedsynth.evaluation.utility import utility
from fedsynth.evaluation.values import Section
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.metrics.feature_network import domain_ensemble
from fedsynth.plan import StudyPlan
from fedsynth.recommend import PublicStarts
from fedsynth_simulations.cohort.public import public_cohort
from fedsynth_simulations.plans import simulated_genes, study_plan

SECTIONS = ("fidelity", "recognisability", "utility", "genes")
SITES = ("north", "south", "east")
DRAWN = 40  # simulated patients, of whom the others are variations
FACTORS = 20  # behind the profiles


@dataclass(frozen=True)
class Task:
    """What is measured: a section on so many synthetic slices, and for fidelity the number of domain networks."""

    section: str
    images: int
    networks: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        networks = f", {self.networks} networks" if self.section == "fidelity" else ""
        return f"{self.section}{networks}".replace("1 networks", "1 network")


@dataclass(frozen=True)
class Measurement:
    """One row: seconds of the section, and memory in MB."""

    section: str
    images: int
    patients: int
    wall_seconds: float
    cpu_seconds: float
    patients_mb: float
    extra_mb: float


def main() -> None:
    """Parse the command line, measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="synthetic slices of the large runs")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    small = min(2000, given.images)
    every = [
        Task("fidelity", given.images),
        Task("fidelity", small),
        Task("fidelity", small, 3),
        Task("recognisability", given.images),
        Task("utility", given.images),
        Task("genes", given.images),
    ]
    tasks = [task for task in every if task.section in given.sections]
    rows = []
    for task in tasks:
        rows.append(_apart(task))
        print(rows[-1], flush=True)
        described = {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "cores": os.cpu_count()}
        text = json.dumps({**described, "rows": [asdict(row) for row in rows]}, indent=1)
        (given.out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        (given.out / "evaluation.md").write_text(table(rows), encoding="utf-8")


def table(rows: list[Measurement]) -> str:
    """The rows in Markdown."""
    lines = [
        "| section | synthetic images (patients) | CPU s | wall s | patients in memory, MB | peak above that, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.section} | {row.images:,} ({row.patients:,}) | {row.cpu_seconds:.0f} | {row.wall_seconds:.0f} "
        f"| {row.patients_mb:,.0f} | {row.extra_mb:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def measure(task: Task) -> Measurement:
    """Make the patients, run the section, and say what it took."""
    plan = study_plan(
        "benchmark",
        "Measure an evaluation.",
        dict.fromkeys(SITES, 100),
        genes=simulated_genes(),
        epsilon=10.0,
        starts=PublicStarts(),
        reproducible_seed=None,
    )
    rng = np.random.default_rng(7)
    patients = max(30, round(task.images / plan.image.slices))
    section = _section(task, plan, patients, rng)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    held = _memory_mb("VmRSS")
    wall, cpu = time.monotonic(), time.process_time()
    found = section()
    gaps = [figure.metric for figure in found.figures if figure.synthetic is None]
    if gaps:  # what was not measured took no time
        raise RuntimeError(f"{task.name}: no value for {', '.join(gaps)}")
    return Measurement(
        section=task.name,
        images=task.images,
        patients=patients,
        wall_seconds=time.monotonic() - wall,
        cpu_seconds=time.process_time() - cpu,
        patients_mb=held,
        extra_mb=_memory_mb("VmHWM") - held,
    )


def _section(task: Task, plan: StudyPlan, patients: int, rng: np.random.Generator) -> Callable[[], Section]:
    """The call that is measured, its input made before."""
    if task.section == "genes":
        sides = [_profiles(plan, n, rng) for n in (patients, 2 * patients, patients)]
        return lambda: genes(plan, Columns(sides[0], sides[1]), sides[2], rng)
    drawn = public_cohort(plan, DRAWN, rng)
    images, masks = drawn.images, drawn.masks > 0
    synthetic, train, holdout = (_varied(images, masks, n, rng) for n in (patients, 2 * patients, patients))
    volumes = Columns(Volumes(synthetic.images, synthetic.masks, synthetic.labels, np.full(patients, -1)), train)
    networks = tuple(DomainExtractor(images.shape[1], 6, "nothing") for _ in range(task.networks))
    if task.section == "recognisability":
        return lambda: detection(volumes, holdout, rng)
    if task.section == "utility":
        return lambda: utility(plan, volumes, holdout, networks[0], rng)
    names = GroupNames(tuple(plan.label.classes), tuple(plan.image.sequences), SITES)
    spacing_mm = (plan.image.slice_spacing_mm, plan.image.pixel_spacing_mm, plan.image.pixel_spacing_mm)
    ensembles = [domain_ensemble(networks)]
    return lambda: fidelity(volumes, holdout, ensembles, names, spacing_mm, rng, max_slices=task.images)


def _varied(images: np.ndarray[Any, Any], masks: np.ndarray[Any, Any], n: int, rng: np.random.Generator) -> Volumes:
    """`n` patients like those given: mirrored, brighter or darker, with noise inside the head."""
    pictures = np.empty((n, *images.shape[1:]), dtype=np.float16)
    outlines = np.empty((n, *masks.shape[1:]), dtype=bool)
    for i, row in enumerate(rng.integers(len(images), size=n)):
        flip = -1 if rng.random() < 0.5 else 1
        picture = images[row, ..., ::flip].astype(np.float32)
        noise = rng.normal(0, 0.03, size=picture.shape).astype(np.float32) * (picture > 0.05)
        pictures[i] = np.clip(picture ** rng.uniform(0.8, 1.25) + noise, 0, 1)
        outlines[i] = masks[row, ..., ::flip]
    return Volumes(pictures, outlines, rng.integers(2, size=n), rng.integers(len(SITES), size=n))


def _profiles(plan: StudyPlan, n: int, rng: np.random.Generator) -> Profiles:
    """Profiles of a few factors that also tell the class."""
    panel = len(plan.genes.panel)
    loadings = np.random.default_rng(0).normal(size=(FACTORS, panel))
    factors = rng.normal(size=(n, FACTORS))
    values = 0.2 * factors @ loadings + 0.5 * rng.normal(size=(n, panel))
    return Profiles(
        values.astype(np.float32),
        rng.random((n, len(plan.morphology.features))).astype(np.float32),
        (factors[:, 0] > 0).astype(np.int64),
        rng.integers(len(SITES), size=n),
    )


def _apart(task: Task) -> Measurement:
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (task,))


def _memory_mb(kind: str) -> float:
    """The resident set of this process (``VmRSS``), or its peak (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell the resident set of a process")


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
