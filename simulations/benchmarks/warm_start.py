"""Pre-train a generator, discriminator and autoencoder on the public simulated cohort, at 32 or 64 pixels.

``python simulations/benchmarks/warm_start.py --cohorts FOLDER --out FOLDER`` reads the ``pretraining`` patients that
``cohorts.py`` drew and writes ``warm-start-<size>.safetensors``. No private data takes part. What is there is not made again. About 0.1 s a step on one core at 32 pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from fedsynth import __version__
from fedsynth_server.warm_start import save_warm_start
from fedsynth_simulations.benchmarking.cohorts import load_public
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.cohort.expression import public_profiles
from fedsynth_simulations.pretrain import PublicPatients, pretrain, pretrain_autoencoder

_PROFILES = 4000


def main() -> None:
    """Parse the command line and make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, choices=(32, 64), default=32)
    parser.add_argument("--patients", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"warm-start-{given.size}.safetensors"
    if path.exists():
        print(f"{path} is there already")
        return
    started = time.monotonic()
    make(path, given.cohorts, given.size, given.patients, given.steps, given.seed)
    print(f"{path}: {time.monotonic() - started:.0f} s")


def make(path: Path, cohorts: Path, size: int, patients: int, steps: int, seed: int) -> None:
    """Pre-train and write the weights with their provenance."""
    plan = benchmark_plan(32 if size == 32 else 64, {"public": patients})
    loaded = load_public(cohorts, patients, size, "pretraining")
    public = PublicPatients(
        loaded.slices(), torch.from_numpy(loaded.morphology).nan_to_num(0.5), torch.from_numpy(loaded.labels)
    )
    draws = torch.Generator().manual_seed(seed)
    generator, discriminator = pretrain(plan, public, steps, draws)
    profiles = torch.from_numpy(public_profiles(plan.genes, _PROFILES, np.random.default_rng([seed, 1])))
    autoencoder = pretrain_autoencoder(plan, profiles, draws)
    provenance = {
        "data": f"{patients} simulated patients drawn from the MNI152 atlas in the public style, no private data",
        "profiles": f"{_PROFILES} simulated profiles of a public population, no batch effect of any site",
        "method": f"VAE-GAN ({steps} steps) and autoencoder, seed {seed}, {size} x {size} pixels",
        "software": f"fedsynth {__version__}, simulations/benchmarks/warm_start.py",
    }
    save_warm_start(
        path, {"generator": generator, "discriminator": discriminator, "autoencoder": autoencoder}, provenance
    )


if __name__ == "__main__":
    main()
