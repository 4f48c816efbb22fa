"""What a row of the mean embedding promises: the norm, one patient a row, sums that add up, public weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsynth.engines.embedding import (
    COUNT_WEIGHT,
    DEVIATIONS,
    Embedding,
    allocate_weights,
    embedding_from,
    public_template,
)
from fedsynth.models.features import describe_slices, features_size, make_feature_network
from fedsynth.plan import StudyPlan

State = dict[str, Tensor]
FEATURES = 9


@pytest.fixture(scope="module")
def state(tiny_plan: StudyPlan) -> State:
    """A public state of random numbers, of the scales that real ones have."""
    draws = torch.Generator().manual_seed(1)
    template = public_template(tiny_plan)
    found = {name: 0.3 * torch.randn(tensor.shape, generator=draws) for name, tensor in template.items()}
    for name in ("directions", "rotation"):
        found[name] = torch.linalg.qr(found[name])[0]
    for name in ("scale", "spread", "variance", "morphology_scale"):
        found[name] = found[name].abs() + 0.1
    found["expected"] *= 0.1
    found["label_share"] = torch.tensor([0.4, 0.6])
    return found


@pytest.fixture(scope="module")
def embedding(state: State) -> Embedding:
    return embedding_from(state, classes=2, dimensions=30, patients=100, noise_sd=1.0)


def cohort(patients: int, seed: int = 0, slices: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    volumes = (2 * torch.rand(patients, 4, slices, 32, 32, generator=draws) - 1).half()
    morphology = torch.rand(patients, FEATURES, generator=draws)
    return volumes, morphology, torch.randint(-1, 2, (patients,), generator=draws)


@settings(max_examples=25, deadline=None)
@given(
    fill=st.sampled_from([0.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 6e4]),
    label=st.integers(-1, 1),
    feature=st.sampled_from([0.0, 1.0, 1e30, -math.inf, math.nan]),
    share=st.floats(0, 1),
)
def test_a_row_has_norm_at_most_one_whatever_the_patient_holds(
    embedding: Embedding, fill: float, label: int, feature: float, share: float
) -> None:
    volumes, morphology, _ = cohort(1, seed=3)
    volumes = volumes.float()
    volumes[torch.rand(volumes.shape, generator=torch.Generator().manual_seed(5)) < share] = fill
    row = embedding.rows(volumes, torch.where(morphology > 0.5, feature, morphology), torch.tensor([label]))
    assert torch.isfinite(row).all()
    assert float(row.double().norm()) <= 1 + 1e-6


def test_a_row_can_reach_the_clip_and_no_further(state: State) -> None:
    loud = {**state, "regression": 100 * state["regression"]}
    rows = embedding_from(loud, 2, 30, 100, 1.0).rows(*cohort(6))
    assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-5)


def test_one_patient_more_changes_the_sum_by_at_most_one(embedding: Embedding) -> None:
    volumes, morphology, labels = cohort(9)
    whole = embedding.rows(volumes, morphology, labels).sum(0)
    for left_out in range(9):
        rest = torch.arange(9) != left_out
        without = embedding.rows(volumes[rest], morphology[rest], labels[rest]).sum(0)
        assert float((whole - without).norm()) <= 1 + 1e-5


def test_a_row_does_not_depend_on_the_other_patients(embedding: Embedding) -> None:
    volumes, morphology, labels = cohort(19)
    together = embedding.rows(volumes, morphology, labels)
    alone = torch.cat([embedding.rows(volumes[i : i + 1], morphology[i : i + 1], labels[i : i + 1]) for i in range(19)])
    assert torch.equal(together, alone)


def test_sums_of_sites_add_up_to_the_pooled_sum(embedding: Embedding) -> None:
    volumes, morphology, labels = cohort(12)
    pooled = embedding.rows(volumes, morphology, labels).sum(0)
    sites = [
        embedding.rows(volumes[part], morphology[part], labels[part]).sum(0)
        for part in (slice(0, 5), slice(5, 5), slice(5, 12))
    ]
    assert torch.allclose(sum(sites), pooled, atol=1e-5)


def test_the_first_coordinates_count_patients_by_label(embedding: Embedding) -> None:
    volumes, morphology, _ = cohort(6)
    total = embedding.rows(volumes, morphology, torch.tensor([0, 1, 1, -1, 1, 0])).sum(0)
    assert (total[: embedding.counts] / COUNT_WEIGHT).tolist() == pytest.approx([2, 3, 1], abs=1e-4)


def test_a_patient_without_label_leaves_the_coordinates_of_the_label_at_zero(state: State) -> None:
    volumes, morphology, _ = cohort(1)
    embedding = embedding_from(state, 2, 400, 10_000, 0.1)
    row = embedding.rows(volumes, morphology, torch.tensor([-1]))[0, embedding.counts :]
    assert embedding.of_label.any() and (row[embedding.of_label] == 0).all() and (row[~embedding.of_label] != 0).any()


def test_features_are_as_many_as_announced_and_have_a_gradient(tiny_plan: StudyPlan, state: State) -> None:
    network = make_feature_network(
        {k.removeprefix("network/"): t for k, t in state.items() if k.startswith("network/")}
    )
    slices = cohort(1)[0].float()[0].transpose(0, 1).requires_grad_()
    described = describe_slices(network, slices)
    assert described.shape == (4, features_size(len(tiny_plan.image.sequences)))
    described.sum().backward()
    assert slices.grad is not None and torch.isfinite(slices.grad).all()


def test_weights_spend_the_public_norm_and_drop_what_noise_hides() -> None:
    variance = torch.logspace(0, -4, DEVIATIONS)
    budget = (1 - COUNT_WEIGHT**2) / 2
    kept = []
    for noise in (0.001, 0.01, 0.1):
        weights = allocate_weights(variance, 0.16 * variance, noise, 200)
        assert float((weights**2 * variance).sum()) == pytest.approx(budget, rel=1e-3)
        kept.append(int((weights > 0).sum()))
    assert kept[0] > kept[1] > kept[2] >= 1


def test_weights_are_the_best_of_those_that_spend_as_much() -> None:
    variance, noise = torch.logspace(0, -2, 20, dtype=torch.float64), 0.02
    residual = 0.16 * variance

    def error(weights: Tensor) -> float:
        return float((residual / (1 + weights.double() ** 2 * residual / noise**2)).sum())

    best = allocate_weights(variance, residual, noise, 20)
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = (best**2 * torch.exp(0.3 * torch.randn(20, generator=draws))).double()
        other = (other * ((best.double() ** 2 * variance).sum() / (other * variance).sum())).sqrt()
        assert error(best) <= error(other) * (1 + 1e-6)


def test_no_more_coordinates_than_asked_for_get_a_weight(state: State) -> None:
    assert int((embedding_from(state, 2, 7, 10_000, 0.1).weight > 0).sum()) == 7


def test_both_sides_choose_the_same_coordinates_under_any_noise(state: State) -> None:
    few = embedding_from(state, 2, 20, 100, 1.0)
    many = embedding_from(state, 2, 50, 5000, 0.5)
    assert torch.equal(few.chosen, many.chosen[:20])
