"""Sweep recipes of private training over epsilon, cohort size and arrangement of sites on simulated hospitals.

``python simulations/benchmarks/sweep.py --cohorts FOLDER --start FILE --out FOLDER`` appends one JSON line a run to
``runs.jsonl`` and skips runs that are there, so it can be stopped and gone on with. Two processes share the work with
``--part 0/2`` and ``--part 1/2``. ``report.py`` turns the lines into a table and a figure.

Recipes:

- ``real``: the yardstick's networks trained on the real training patients: the ceiling;
- ``public``: public weights under public conditions, nothing private: the floor;
- ``conditions``: public weights under private conditions (profiles), on which the whole budget is spent;
- ``scratch``, ``warm``: adversarial, from random or from public weights;
- ``embedding``: public weights fitted to the private mean embedding; ``hybrid``: that, then adversarial refinement.

Arrangements: ``federated`` (three sites of n patients), ``pooled`` (one site of 3 n), ``single`` (one site of n, the
northern one). All are tested on the same held-out patients of all three sites. ``--variant NAME --set gan.rounds=6
embedding.fit_steps=100`` tries the recipes with another plan. Cohorts come from ``cohorts.py``, public weights from
``warm_start.py``. At 32 pixels a run of 3 x 300 patients takes one to three minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedsynth.evaluation.samples import Volumes
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan, WarmStart
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_server.warm_start import load_warm_start
from fedsynth_simulations.benchmarking.cohorts import Patients, concatenate, load_public, load_site
from fedsynth_simulations.benchmarking.grid import Size, benchmark_plan
from fedsynth_simulations.benchmarking.pictures import save_patients_grid
from fedsynth_simulations.benchmarking.recipes import (
    RECIPES,
    Conditions,
    Recipe,
    SiteData,
    check_public,
    pooled,
    recipe_plan,
    run_recipe,
)
from fedsynth_simulations.benchmarking.yardstick import draw_volumes, load_extractor, measure, volumes
from fedsynth_simulations.hospitals.sites import SITES

Arrangement = Literal["federated", "pooled", "single"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("federated", "pooled", "single")
_OF_REAL: tuple[Arrangement, ...] = ("pooled", "single")
NAMES: tuple[str, ...] = tuple(site.name for site in SITES)
_HOLDOUT, _PUBLIC = 100, 300
_EXTRACTOR_SEED = 1


@dataclass(frozen=True)
class Run:
    """One cell of the sweep; its fields are its identity."""

    recipe: Recipe | Literal["real"]
    epsilon: float
    patients: int
    arrangement: Arrangement
    seed: int
    size: int
    conditions: Conditions
    variant: str = ""

    @property
    def key(self) -> str:
        """The identity as text; an infinite epsilon is ``inf``."""
        return "/".join(str(value) for value in asdict(self).values()).rstrip("/")


class Bench:
    """Everything that runs share; loaded once a process, when first needed."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.cohorts: Path = given.cohorts
        self.out: Path = given.out
        self.size: Size = 32 if given.size == 32 else 64
        self.cohort_seed: int = given.cohort_seed
        self.most: int = max(given.patients)
        self.dice: bool = given.dice
        self.drawn: int = given.drawn
        self.changes = _changes(given.set)
        weights, start = load_warm_start(given.start)
        self.weights: dict[str, State] = weights
        self.start: WarmStart = start
        self.plan: StudyPlan = benchmark_plan(self.size, {"any": 1000}, warm_start=start)
        check_public(recipe_plan(self.plan, "embedding", 10.0, weights, start), weights)

    @property
    def extractor(self) -> DomainExtractor:
        """The feature network of the yardstick."""
        path = self.out / f"extractor-{self.size}.safetensors"
        return load_extractor(path, self.public(), self.plan.image.sequences, _EXTRACTOR_SEED)

    @lru_cache(maxsize=1)  # noqa: B019 (one bench a process)
    def public(self) -> Patients:
        """The public cohort."""
        return load_public(self.cohorts, _PUBLIC, self.size)

    @lru_cache(maxsize=1)  # noqa: B019
    def holdout(self) -> Volumes:
        """The held-out patients of all sites."""
        parts = [load_site(self.cohorts, self.cohort_seed, n, "holdout", _HOLDOUT, self.size) for n in NAMES]
        return volumes(concatenate(parts))

    @lru_cache(maxsize=3)  # noqa: B019
    def train(self, site: str) -> Patients:
        """The training patients of a site, as many as the largest run wants."""
        return load_site(self.cohorts, self.cohort_seed, site, "train", self.most, self.size)

    @lru_cache(maxsize=3)  # noqa: B019
    def site(self, name: str) -> SiteData:
        """What the engines take of a site."""
        patients = self.train(name)
        morphology, labels = torch.from_numpy(patients.morphology), torch.from_numpy(patients.labels)
        return SiteData(ImagePatients(patients.slices(), morphology, labels), torch.from_numpy(patients.genes))

    def public_conditions(self) -> SyntheticProfiles:
        """Conditions of the public cohort, without genes."""
        public = self.public()
        return SyntheticProfiles(
            torch.zeros(len(public), 0),
            torch.from_numpy(public.morphology).nan_to_num(0.5),
            torch.from_numpy(public.labels),
        )


def main() -> None:
    """Parse the command line and do what is not done yet."""
    given = _arguments()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "runs.jsonl"
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()
    part, parts = (int(number) for number in given.part.split("/"))
    wanted = [run for run in _runs(given) if run.key not in done and zlib.crc32(run.key.encode()) % parts == part]
    bench = Bench(given)
    for number, run in enumerate(wanted, start=1):
        started = time.process_time()
        line = {"key": run.key, **asdict(run), **_do(bench, run), "seconds": round(time.process_time() - started, 1)}
        line["epsilon"] = str(run.epsilon)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(wanted)} {json.dumps(line)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="public weights, see warm_start.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="which part of how many this process does, e.g. 0/2")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32)
    parser.add_argument("--recipes", nargs="+", choices=("real", *RECIPES), default=["real", *RECIPES])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[10.0, 3.0, 1.0, math.inf])
    parser.add_argument("--patients", nargs="+", type=int, default=[300, 1000, 100], help="at a site")
    parser.add_argument("--arrangements", nargs="+", choices=ARRANGEMENTS, default=list(ARRANGEMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--conditions", choices=("moments", "public"), default="moments")
    parser.add_argument("--cohort-seed", type=int, default=7)
    parser.add_argument("--drawn", type=int, default=300, help="synthetic patients that are measured")
    parser.add_argument("--dice", action="store_true", help="measure a segmentation, too (slow)")
    parser.add_argument("--variant", default="", help="name of what --set changes, part of a run's identity")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes to the plan, e.g. gan.rounds=6"
    )
    given = parser.parse_args()
    if bool(given.set) != bool(given.variant):
        parser.error("--set and --variant go together: a changed plan needs a name")
    return given


def _changes(given: list[str]) -> dict[str, dict[str, object]]:
    """``["gan.rounds=6"]`` -> ``{"gan": {"rounds": 6}}``; values are JSON, or else text."""
    changes: dict[str, dict[str, object]] = {}
    for change in given:
        place, _, value = change.partition("=")
        section, _, key = place.partition(".")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        changes.setdefault(section, {})[key] = parsed
    return changes


def _runs(given: argparse.Namespace) -> Iterator[Run]:
    """The cells, seeds outermost: a whole sweep with one seed comes before the next one."""
    for seed in given.seeds:
        if "public" in given.recipes:
            yield Run("public", math.inf, 0, "pooled", seed, given.size, "public")
        for patients, arrangement in itertools.product(given.patients, _OF_REAL):
            if "real" in given.recipes:  # without noise, federated patients are pooled ones
                yield Run("real", math.inf, patients, arrangement, seed, given.size, "public")
        for epsilon, patients, arrangement, recipe in itertools.product(
            given.epsilons, given.patients, given.arrangements, given.recipes
        ):
            if recipe not in ("real", "public") and (recipe != "conditions" or given.conditions == "moments"):
                yield Run(recipe, epsilon, patients, arrangement, seed, given.size, given.conditions, given.variant)


def _do(bench: Bench, run: Run) -> dict[str, object]:
    if run.recipe == "real":
        names = NAMES if run.arrangement == "pooled" else NAMES[:1]
        drawn = volumes(concatenate([bench.train(name).first(run.patients) for name in names]))
        report: dict[str, float] = {}
        plan, trained = bench.plan, 0.0
    else:
        started = time.process_time()
        plan, drawn, report = _synthesise(bench, run, run.recipe)
        trained = time.process_time() - started
        if run.seed == 1:
            save_patients_grid(bench.out / f"{run.key.replace('/', '-')}.png", drawn.images, drawn.masks)
    score = measure(plan, drawn, bench.holdout(), bench.extractor, run.seed, dice=bench.dice)
    rounded = {name: float(np.float32(value)) for name, value in report.items()}
    return {**score.as_dict(), "report": rounded, "training_seconds": round(trained, 1)}


def _synthesise(bench: Bench, run: Run, recipe: Recipe) -> tuple[StudyPlan, Volumes, dict[str, float]]:
    sites = _sites(bench, run)
    declared = {name: max(len(site.patients.labels), 1) for name, site in sites.items()} or {"none": 1000}
    base = benchmark_plan(bench.size, declared, warm_start=bench.start)
    plan = recipe_plan(base, recipe, run.epsilon, bench.weights, bench.start, bench.changes)
    outcome = run_recipe(
        plan,
        sites,
        bench.weights,
        bench.public_conditions(),
        run.conditions,
        noise=math.isfinite(run.epsilon),
        seed=run.seed,
    )
    model = make_generator(plan)
    model.load_state_dict(outcome.generator)
    draws = torch.Generator().manual_seed(run.seed)
    pool = outcome.conditions
    chosen = torch.randint(len(pool.labels), (bench.drawn,), generator=draws)
    profiles = SyntheticProfiles(pool.genes[chosen], pool.morphology[chosen], pool.labels[chosen])
    return plan, draw_volumes(plan, model, profiles, draws), outcome.report


def _sites(bench: Bench, run: Run) -> dict[str, SiteData]:
    if run.recipe == "public":
        return {}
    names = NAMES[:1] if run.arrangement == "single" else NAMES
    sites = {name: bench.site(name).first(run.patients) for name in names}
    return {"all": pooled(sites)} if run.arrangement == "pooled" else sites


if __name__ == "__main__":
    main()
