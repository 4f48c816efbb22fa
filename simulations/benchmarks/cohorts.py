"""Draw the simulated cohorts that the other benchmarks read: three hospitals and a public cohort, at 64 pixels.

``python simulations/benchmarks/cohorts.py --out FOLDER`` writes, in blocks of 100 patients,

- ``seed<seed>-<site>-train-000.npz`` ... and ``seed<seed>-<site>-holdout-000.npz``,
- ``public-000.npz`` ... (evaluation: extractor and public conditions; without genes), and
- ``pretraining-000.npz`` ... (for a warm start; other patients than those of ``public``).

Blocks that are there are not drawn again. About 0.1 s a patient and process: ten minutes for the defaults with two.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from fedsynth_simulations.benchmarking.cohorts import Split, draw_site, from_public, save_patients
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.public import public_cohort
from fedsynth_simulations.hospitals.sites import SITES

BLOCK = 100
_PUBLIC_SEEDS = {"public": 3, "pretraining": 11}


def main() -> None:
    """Parse the command line and draw what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=int, default=1000, help="training patients a site")
    parser.add_argument("--holdout", type=int, default=100, help="held-out patients a site")
    parser.add_argument("--public", type=int, default=300)
    parser.add_argument("--pretraining", type=int, default=1600)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    blocks = [block for block in _blocks(given) if not _path(given.out, given.seed, block).exists()]
    draw = partial(_draw, given.out, given.seed)
    started = time.monotonic()
    # Children inherit the variable before they import anything that would start threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        for block, seconds in zip(blocks, pool.map(draw, blocks), strict=True):
            print(f"{block}: {seconds:.1f} s; {time.monotonic() - started:.0f} s in all", file=sys.stderr, flush=True)


Block = tuple[str, str, int, int]  # group (site or public), split, number, patients


def _blocks(given: argparse.Namespace) -> Iterator[Block]:
    """Blocks in an order that lets others begin early: a first block of everything, then the rest."""
    wanted: list[tuple[str, str, int]] = [(site.name, "train", given.train) for site in SITES]
    wanted += [(site.name, "holdout", given.holdout) for site in SITES]
    wanted += [("public", "", given.public), ("pretraining", "", given.pretraining)]
    for number in range(max(-(-count // BLOCK) for *_, count in wanted)):
        for group, split, count in wanted:
            left = count - number * BLOCK
            if left > 0:
                yield group, split, number, min(BLOCK, left)


def _path(out: Path, seed: int, block: Block) -> Path:
    group, split, number, _ = block
    return out / (f"seed{seed}-{group}-{split}-{number:03d}.npz" if split else f"{group}-{number:03d}.npz")


@cache
def _anatomy() -> Anatomy:
    return Anatomy.load()


def _draw(out: Path, seed: int, block: Block) -> float:
    group, split, number, count = block
    started = time.monotonic()
    plan = benchmark_plan(64, {"any": 1000})
    if split:
        site = next(site for site in SITES if site.name == group)
        named: Split = "train" if split == "train" else "holdout"
        rows = range(number * BLOCK, number * BLOCK + count)
        patients = draw_site(plan, site, seed, named, rows, _anatomy())
    else:
        rng = np.random.default_rng([_PUBLIC_SEEDS[group], number])
        patients = from_public(plan, public_cohort(plan, count, rng, _anatomy()))
    save_patients(_path(out, seed, block), patients)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
