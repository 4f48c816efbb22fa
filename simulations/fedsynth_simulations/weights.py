"""The public weights that the package carries, and how they were made (`fedsynth simulate pretrain`)."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedsynth import __version__
from fedsynth.models.images import make_generator
from fedsynth.morphology import normalise
from fedsynth.plan import MomentsPlan, StudyPlan
from fedsynth.recommend import PublicStarts
from fedsynth.records import PUBLIC, State
from fedsynth_server.warm_start import load_warm_start, save_warm_start
from fedsynth_simulations.cohort.expression import public_profiles
from fedsynth_simulations.cohort.public import PublicCohort, public_cohort
from fedsynth_simulations.feature_network import embedding_state
from fedsynth_simulations.gene_basis import public_moments_weights
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
    """Make all public weights from `patients` public simulated patients and write them with their provenance to `out`."""
    plan = _plan(patients)
    public, profiles = _public(plan, patients, seed)
    cohort = public_patients(plan, public.images, public.masks, public.morphology, public.labels)
    draws = torch.Generator().manual_seed(seed)
    generator, discriminator = pretrain(plan, cohort, steps, draws)
    autoencoder = pretrain_autoencoder(plan, torch.from_numpy(profiles), draws)
    networks = {"generator": generator, "discriminator": discriminator, "autoencoder": autoencoder}
    provenance = {
        "data": f"{patients} simulated patients drawn from the MNI152 atlas in the public style, no private data",
        "profiles": f"{_PROFILES} simulated profiles of a public population, no batch effect of any site",
        "method": f"VAE-GAN ({steps} steps) and autoencoder, seed {seed}",
        "software": f"fedsynth {__version__}, `fedsynth simulate pretrain`",
    }
    _save(out, plan, networks, public, profiles, seed, provenance)


def renew_statistics(out: Path, networks_from: Path, patients: int, seed: int) -> None:
    """Take the networks of another file of public weights, and make anew what private statistics are computed with."""
    plan = _plan(patients)
    weights, start = load_warm_start(networks_from)
    networks = {name: state for name, state in weights.items() if name not in PUBLIC.values()}
    public, profiles = _public(plan, patients, seed)
    _save(out, plan, networks, public, profiles, seed, {"networks": start.provenance})


def _plan(patients: int) -> StudyPlan:
    return study_plan(
        "public-pretraining",
        "Fixes the architecture and the grid of the public weights.",
        {"public": patients},
        genes=simulated_genes(),
        epsilon=1.0,
        starts=PublicStarts(),
    )


def _public(plan: StudyPlan, patients: int, seed: int) -> tuple[PublicCohort, NDArray[np.float32]]:
    public = public_cohort(plan, patients, np.random.default_rng(seed))
    return public, public_profiles(plan.genes, _PROFILES, np.random.default_rng([seed, 1]))


def _save(
    out: Path,
    plan: StudyPlan,
    networks: dict[str, State],
    public: PublicCohort,
    profiles: NDArray[np.float32],
    seed: int,
    provenance: dict[str, str],
) -> None:
    model = make_generator(plan)
    model.load_state_dict(networks["generator"])
    cohort = public_patients(plan, public.images, public.masks, public.morphology, public.labels)
    morphology = normalise(public.morphology, plan.morphology.features)
    components = int(MomentsPlan.model_fields["components"].default)
    draws = torch.Generator().manual_seed(seed + 1)
    statistics = {
        PUBLIC["moments"]: public_moments_weights(
            profiles, morphology, components, public.labels, len(plan.label.classes)
        ),
        PUBLIC["embedding"]: embedding_state(plan, cohort, public.masks, model.eval(), draws),
    }
    described = f"directions, scales and feature network of the statistics from {len(public.labels)} simulated patients"
    provenance |= {"statistics": f"{described}, seed {seed}"}
    save_warm_start(out, networks | statistics, provenance, plan)
