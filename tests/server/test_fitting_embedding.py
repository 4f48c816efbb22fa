"""The fit of the generator to a mean embedding: it learns what is there, stops at the noise, and repeats itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsynth.engines.embedding import Embedding, embedding_from
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.dcgan import Generator, initialise
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_server.fitting.embedding import FitResult, FitSettings, Target, fit, read_total
from fedsynth_simulations.feature_network import embedding_state
from fedsynth_simulations.pretrain import PublicPatients

State = dict[str, Tensor]
PATIENTS = 60


def make_model(plan: StudyPlan) -> Generator:
    """A generator whose patients differ visibly."""
    model = make_generator(plan)
    initialise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in (*model.ups, model.last):
            layer.weight.mul_(6.0)
    return model.eval().requires_grad_(False)


def draw(plan: StudyPlan, count: int, seed: int, brighter: float = 0.0) -> PublicPatients:
    """Patients of that generator, with noise of the scanner's."""
    model, draws, depth = make_model(plan), torch.Generator().manual_seed(seed), plan.image.slices
    morphology, labels = torch.rand(count, 9, generator=draws), torch.randint(0, 2, (count,), generator=draws)
    many = torch.arange(count).repeat_interleave(depth)
    code = condition(labels[many], morphology[many], slice_positions(depth).repeat(count), 2)
    z = torch.randn(count, model.latent_dim, generator=draws)[many]
    volumes = model(z, code).reshape(count, depth, -1, plan.image.size, plan.image.size).transpose(1, 2).contiguous()
    volumes[:, :-1] += brighter + 0.02 * torch.randn(volumes[:, :-1].shape, generator=draws)
    return PublicPatients(volumes.clamp(-1, 1).half(), morphology, labels)


@pytest.fixture(scope="module")
def start(tiny_plan: StudyPlan) -> State:
    return make_model(tiny_plan).state_dict()


@pytest.fixture(scope="module")
def public(tiny_plan: StudyPlan, start: State) -> State:
    patients = draw(tiny_plan, 200, 2)
    parts = (patients.volumes[:, -1] > 0).to(torch.uint8).numpy()
    model = make_model(tiny_plan)
    return embedding_state(tiny_plan, patients, parts, model, torch.Generator().manual_seed(3), steps=20)


@pytest.fixture(scope="module")
def pool(tiny_plan: StudyPlan) -> SyntheticProfiles:
    draws = torch.Generator().manual_seed(4)
    return SyntheticProfiles(
        torch.zeros(200, 1), torch.rand(200, 9, generator=draws), torch.randint(0, 2, (200,), generator=draws)
    )


def site_total(plan: StudyPlan, embedding: Embedding, count: int, seed: int = 5) -> Tensor:
    """The sum over patients who look like the public ones, but brighter."""
    patients = draw(plan, count, seed, brighter=0.3)
    return embedding.rows(patients.volumes, patients.morphology, patients.labels).sum(0)


def run(
    plan: StudyPlan, start: State, embedding: Embedding, target: Target, pool: SyntheticProfiles, steps: int = 60
) -> FitResult:
    settings = FitSettings(steps=steps, batch=32, learning_rate=2e-3)
    return fit(plan, start, embedding, target, pool, settings, torch.Generator().manual_seed(6))


def moved(start: State, after: State) -> float:
    return math.sqrt(sum(float((after[name] - start[name]).square().sum()) for name in start))


def test_without_noise_the_distance_falls(
    tiny_plan: StudyPlan, start: State, public: State, pool: SyntheticProfiles
) -> None:
    embedding = embedding_from(public, 2, 40, PATIENTS, 0.05)
    target = read_total(embedding, site_total(tiny_plan, embedding, PATIENTS), 0.05, PATIENTS)
    result = run(tiny_plan, start, embedding, target, pool)
    assert result.residual_before > 3 * result.noise_norm
    assert result.residual_after < 0.75 * result.residual_before
    assert moved(start, result.state) > 0


def test_a_study_without_privacy_is_fitted_to_within_the_error_of_sampling(
    tiny_plan: StudyPlan, start: State, public: State, pool: SyntheticProfiles
) -> None:
    embedding = embedding_from(public, 2, 40, PATIENTS, 0.0)
    assert bool(torch.isfinite(embedding.weight).all()) and int((embedding.weight > 0).sum()) == 40
    nearly = embedding_from(public, 2, 40, PATIENTS, 1e-6)
    torch.testing.assert_close(embedding.weight, nearly.weight, rtol=1e-3, atol=1e-6)  # what vanishing noise leads to
    target = read_total(embedding, site_total(tiny_plan, embedding, PATIENTS), 0.0, PATIENTS)
    assert target.patients == pytest.approx(PATIENTS)
    assert bool((target.noise > 0).all())
    result = run(tiny_plan, start, embedding, target, pool, steps=20)
    assert math.isfinite(result.residual_before) and result.residual_after < result.residual_before
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.state.values())


def test_pure_noise_leaves_the_generator_as_it_was(
    tiny_plan: StudyPlan, start: State, public: State, pool: SyntheticProfiles
) -> None:
    """A sum in which no patient is, under noise that is larger than any generator's distance."""
    noise_sd = 3000.0
    embedding = embedding_from(public, 2, 40, PATIENTS, noise_sd)
    for seed in range(3):
        total = noise_sd * torch.randn(embedding.size, generator=torch.Generator().manual_seed(seed))
        result = run(tiny_plan, start, embedding, read_total(embedding, total, noise_sd, PATIENTS), pool)
        assert result.steps == 0
        assert all(torch.equal(result.state[name], start[name]) for name in start)


def test_the_fit_stops_where_only_noise_is_left(
    tiny_plan: StudyPlan, start: State, public: State, pool: SyntheticProfiles
) -> None:
    """Sites like the public generator: its distance from their noisy mean is the noise's, while without noise it is more."""
    noise_sd = 4.0
    embedding = embedding_from(public, 2, 40, PATIENTS, noise_sd)
    patients = draw(tiny_plan, PATIENTS, 5)
    total = embedding.rows(patients.volumes, patients.morphology, patients.labels).sum(0)
    noise = noise_sd * torch.randn(embedding.size, generator=torch.Generator().manual_seed(7))
    result = run(tiny_plan, start, embedding, read_total(embedding, total + noise, noise_sd, PATIENTS), pool)
    assert result.steps == 0
    assert result.residual_after == pytest.approx(result.noise_norm, rel=0.35)
    precise = run(tiny_plan, start, embedding, read_total(embedding, total, 0.01, PATIENTS), pool, steps=3)
    assert precise.steps == 3


def test_the_noise_norm_is_that_of_the_noise(tiny_plan: StudyPlan, public: State) -> None:
    noise_sd = 2.0
    embedding = embedding_from(public, 2, 40, PATIENTS, noise_sd)
    clean = site_total(tiny_plan, embedding, PATIENTS)
    exact = read_total(embedding, clean, 1e-6, PATIENTS)
    draws = torch.Generator().manual_seed(8)
    norms = []
    for _ in range(300):
        noise = noise_sd * torch.randn(embedding.size, generator=draws)
        noise[: embedding.counts] = 0  # the count's own error is no part of the norm
        target = read_total(embedding, clean + noise, noise_sd, PATIENTS)
        used = torch.isfinite(target.noise)
        norms.append(float((((target.mean - exact.mean) / target.noise)[used] ** 2).sum()))
    assert sum(norms) / len(norms) == pytest.approx(target.used, rel=0.1)


def test_the_number_of_patients_is_read_from_the_counts(tiny_plan: StudyPlan, public: State) -> None:
    embedding = embedding_from(public, 2, 40, PATIENTS, 0.5)
    total = site_total(tiny_plan, embedding, PATIENTS)
    assert read_total(embedding, total, 0.01, 2 * PATIENTS).patients == pytest.approx(PATIENTS, rel=0.01)
    assert read_total(embedding, total, 1e4, 100).patients == pytest.approx(100, rel=0.05)


def test_unknown_labels_do_not_shrink_what_the_label_explains(tiny_plan: StudyPlan, public: State) -> None:
    embedding = embedding_from(public, 2, 400, 10_000, 0.1)
    patients = draw(tiny_plan, 60, 9)
    half = patients.labels.clone()
    half[::2] = -1
    known = embedding.rows(patients.volumes, patients.morphology, patients.labels)
    partly = embedding.rows(patients.volumes, patients.morphology, half)
    target = read_total(embedding, partly.sum(0), 1e-3, 60)
    expected = known[1::2, embedding.counts :].mean(0)[embedding.of_label]
    assert embedding.of_label.any()
    assert torch.allclose(target.mean[embedding.of_label], expected, atol=1e-3)


def test_labels_that_hardly_anybody_has_are_not_read(tiny_plan: StudyPlan, public: State) -> None:
    embedding = embedding_from(public, 2, 400, 10_000, 0.1)
    patients = draw(tiny_plan, 20, 9)
    rows = embedding.rows(patients.volumes, patients.morphology, torch.full((20,), -1))
    target = read_total(embedding, rows.sum(0), 1e-3, 20)
    assert torch.isinf(target.noise[embedding.of_label]).all()
    assert torch.isfinite(target.noise[~embedding.of_label]).any()


def test_equal_draws_give_equal_generators(
    tiny_plan: StudyPlan, start: State, public: State, pool: SyntheticProfiles
) -> None:
    embedding = embedding_from(public, 2, 40, PATIENTS, 0.05)
    target = read_total(embedding, site_total(tiny_plan, embedding, PATIENTS), 0.05, PATIENTS)
    first, second = (run(tiny_plan, start, embedding, target, pool, steps=5) for _ in range(2))
    assert all(torch.equal(first.state[name], second.state[name]) for name in start)
    assert (first.residual_before, first.residual_after) == (second.residual_before, second.residual_after)
