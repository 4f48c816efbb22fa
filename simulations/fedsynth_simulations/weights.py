"""The warm start that the package carries, and how it was made (`fedsynth simulate pretrain`)."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch

from fedsynth import __version__
from fedsynth.recommend import PublicStarts
from fedsynth_server.warm_start import save_warm_start
from fedsynth_simulations.cohort.expression import public_profiles
from fedsynth_simulations.cohort.public import public_cohort
from fedsynth_simulations.plans import simulated_genes, study_plan
from fedsynth_simulations.pretrain import pretrain, pretrain_autoencoder, public_patients

PACKAGED = "packaged"
_FILE = "warm-start-64.safetensors"
_PROFILES = 4000


def packaged_warm_start() -> Path:
    """The file of the packaged weights."""
    with as_file(files("fedsynth_simulations") / _FILE) as path:
        return path


def make_warm_start(out: Path, patients: int, steps: int, seed: int) -> None:
    """Pre-train on `patients` public simulated patients and write the weights with their provenance to `out`."""
    plan = study_plan(
        "public-pretraining",
        "Fixes the architecture and the grid of the warm start.",
        {"public": patients},
        genes=simulated_genes(),
        epsilon=1.0,
        starts=PublicStarts(),
    )
    public = public_cohort(plan, patients, np.random.default_rng(seed))
    cohort = public_patients(plan, public.images, public.masks, public.morphology, public.labels)
    draws = torch.Generator().manual_seed(seed)
    generator, discriminator = pretrain(plan, cohort, steps, draws)
    profiles = public_profiles(plan.genes, _PROFILES, np.random.default_rng([seed, 1]))
    autoencoder = pretrain_autoencoder(plan, torch.from_numpy(profiles), draws)
    provenance = {
        "data": f"{patients} simulated patients drawn from the MNI152 atlas in the public style, no private data",
        "profiles": f"{_PROFILES} simulated profiles of a public population, no batch effect of any site",
        "method": f"VAE-GAN ({steps} steps) and autoencoder, seed {seed}",
        "software": f"fedsynth {__version__}, `fedsynth simulate pretrain`",
    }
    weights = {"generator": generator, "discriminator": discriminator, "autoencoder": autoencoder}
    save_warm_start(out, weights, provenance)
