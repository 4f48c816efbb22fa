"""The benchmark's recipes and its yardstick, on a handful of patients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.plan import MomentsPlan, StudyPlan, WarmStart
from fedsynth.records import PUBLIC, State, state_digest
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.benchmarking.recipes import (
    Outcome,
    Recipe,
    SiteData,
    check_public,
    pooled,
    recipe_plan,
    run_recipe,
)
from fedsynth_simulations.benchmarking.yardstick import draw_volumes, load_extractor, measure, volumes
from fedsynth_simulations.feature_network import embedding_state
from fedsynth_simulations.gene_basis import public_moments_weights
from fedsynth_simulations.pretrain import PublicPatients

PATIENTS = 12
COMPONENTS = MomentsPlan.model_fields["components"].default


def some_patients(plan: StudyPlan, n: int, seed: int) -> Patients:
    """Noise with a bright square, whose size is the morphology and whose brightness is the label."""
    rng = np.random.default_rng(seed)
    image, size = plan.image, plan.image.size
    labels = rng.integers(0, 2, n)
    images = rng.random((n, len(image.sequences), image.slices, size, size)) * 0.3 + 0.2
    masks = np.zeros((n, image.slices, size, size), dtype=np.uint8)
    masks[:, 4:12, 8:18, 8:18] = 3
    images += (0.3 + 0.2 * labels[:, None, None, None, None]) * (masks[:, None] > 0)
    return Patients(
        images.astype(np.float16),
        masks,
        rng.standard_normal((n, len(plan.genes.panel))).astype(np.float32),
        rng.random((n, len(plan.morphology.features))).astype(np.float32),
        labels.astype(np.int64),
    )


def site_data(patients: Patients) -> SiteData:
    morphology, labels = torch.from_numpy(patients.morphology), torch.from_numpy(patients.labels)
    return SiteData(ImagePatients(patients.slices(), morphology, labels), torch.from_numpy(patients.genes))


@pytest.fixture(scope="module")
def base() -> StudyPlan:
    return benchmark_plan(32, {"a": PATIENTS, "b": PATIENTS})


@pytest.fixture(scope="module")
def weights(base: StudyPlan) -> dict[str, State]:
    draws = torch.Generator().manual_seed(0)
    generator, discriminator = make_generator(base), make_discriminator(base)
    initialise(generator, draws)
    initialise(discriminator, draws)
    public = some_patients(base, 8, 5)
    cohort = PublicPatients(public.slices(), torch.from_numpy(public.morphology), torch.from_numpy(public.labels))
    profiles = np.random.default_rng(0).standard_normal((40, len(base.genes.panel))).astype(np.float32)
    return {
        "generator": generator.state_dict(),
        "discriminator": discriminator.state_dict(),
        PUBLIC["moments"]: public_moments_weights(profiles, public.morphology, COMPONENTS),
        PUBLIC["embedding"]: embedding_state(base, cohort, public.masks, generator, draws, steps=2),
    }


def run(base: StudyPlan, weights: dict[str, State], recipe: Recipe, epsilon: float, seed: int = 1) -> Outcome:
    start = WarmStart(
        generator_sha256=state_digest(weights["generator"]),
        discriminator_sha256=state_digest(weights["discriminator"]),
        provenance="drawn at random for a test",
    )
    rounds = 1 if recipe in ("warm", "hybrid") else 0
    changes = {"gan": {"steps_per_round": 2, "rounds": rounds}, "embedding": {"fit_steps": 2}}
    plan = recipe_plan(base, recipe, epsilon, weights, start, changes)
    sites = {site.name: site_data(some_patients(base, PATIENTS, i)) for i, site in enumerate(base.sites)}
    profiles = SyntheticProfiles(
        torch.zeros(4, 0), torch.full((4, len(base.morphology.features)), 0.5), torch.arange(4) % 2
    )
    return run_recipe(plan, sites, weights, profiles, "moments", noise=math.isfinite(epsilon), seed=seed)


def test_public_weights_are_left_alone_by_a_recipe_without_images(base, weights):
    outcome = run(base, weights, "conditions", 3.0)
    assert outcome.generator is weights["generator"]
    assert outcome.report["epsilon_spent"] <= 3.0
    assert {name for name in outcome.report if name.startswith("sigma_")} == {"sigma_moments"}


def test_all_modules_of_a_hybrid_share_one_budget(base, weights):
    outcome = run(base, weights, "hybrid", 3.0)
    assert 2.9 < outcome.report["epsilon_spent"] <= 3.0
    assert {"sigma_moments", "sigma_embedding", "sigma_gan", "embedding_noise_norm"} <= set(outcome.report)
    assert any(not torch.equal(outcome.generator[name], tensor) for name, tensor in weights["generator"].items())
    assert outcome.conditions.genes.shape[1] == len(base.genes.panel)


def test_a_run_repeats_itself_and_another_seed_does_not(base, weights):
    first, again, other = (run(base, weights, "warm", 10.0, seed).generator for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_public_weights_of_another_version_are_refused(base, weights):
    start = WarmStart(generator_sha256="0" * 64, discriminator_sha256="0" * 64, provenance="none for a test")
    plan = recipe_plan(base, "embedding", 3.0, weights, start)
    check_public(plan, weights)
    name = PUBLIC["embedding"]
    with pytest.raises(ValueError, match="embedding are missing or of another version"):
        check_public(plan, {**weights, name: {**weights[name], "scale": torch.zeros(3)}})
    with pytest.raises(ValueError, match="moments"):
        check_public(plan, {name: weights[name]})


def test_a_change_that_no_section_knows_is_an_error(base, weights):
    start = WarmStart(generator_sha256="0" * 64, discriminator_sha256="0" * 64, provenance="none for a test")
    with pytest.raises(ValidationError, match="fit_stepz"):
        recipe_plan(base, "embedding", 3.0, weights, start, {"embedding": {"fit_stepz": 3}})


def test_without_noise_no_epsilon_is_reported(base, weights):
    assert "epsilon_spent" not in run(base, weights, "embedding", math.inf).report


def test_pooling_puts_all_patients_into_one_site(base):
    sites = {name: site_data(some_patients(base, n, n)) for name, n in (("a", 2), ("b", 3))}
    whole = pooled(sites)
    assert len(whole.patients.labels) == 5
    assert torch.equal(whole.genes[2:], sites["b"].genes)
    assert len(whole.first(4).genes) == 4


@pytest.mark.slow
def test_yardstick_prefers_real_patients_to_noise(base, weights, tmp_path):
    holdout, train, public = (volumes(some_patients(base, 16, seed)) for seed in (11, 12, 13))
    path = tmp_path / "extractor.safetensors"
    trained = load_extractor(path, some_patients(base, 16, 13), base.image.sequences, 1)
    read = load_extractor(path, some_patients(base, 16, 13), base.image.sequences, 1)
    assert trained.name == read.name
    real = measure(base, train, holdout, read, 1, networks=1)
    model = make_generator(base)
    model.load_state_dict(weights["generator"])
    conditions = SyntheticProfiles(
        torch.zeros(16, 0), torch.from_numpy(some_patients(base, 16, 1).morphology), torch.arange(16) % 2
    )
    drawn = draw_volumes(base, model, conditions, torch.Generator().manual_seed(1))
    assert drawn.images.shape == public.images.shape
    fake = measure(base, drawn, holdout, read, 1, networks=1)
    assert real.tumour_auc is not None
    assert real.tumour_auc > 0.9
    assert real.frechet is not None and fake.frechet is not None
    assert real.frechet < fake.frechet
    assert real.dice is None
