"""Fitting the linear-Gaussian model: exact without noise, public with infinite noise, usable in between."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsynth.engines.moments import SHAPE_POINTS, Sizes, layout, public_template, row_size, rows, rows_of_size, unpack
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, linear_gaussian_template, public_prior
from fedsynth.plan import StudyPlan
from fedsynth_server.fitting.moments import attenuation, estimate_counts, fit_moments, fit_sum, link_noise, shrink

GENES, COMPONENTS = 40, 3
FEATURES = ["volume", "enhancing_fraction", "sphericity"]
SIZE = Sizes(classes=2, components=COMPONENTS, features=len(FEATURES))


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    training = {"rounds": 0, "steps_per_round": 1, "expected_batch": 5, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    return StudyPlan.model_validate(
        {
            "name": "moments",
            "purpose": "A plan with moments for tests",
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [-2.0, 2.0],
                "center": [0.0] * GENES,
                "scale": [1.0] * GENES,
            },
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": 5.0},
            "moments": {
                "components": COMPONENTS,
                "budget_share": 0.5,
                "public": {"sha256": "0" * 64, "provenance": "made up for tests"},
            },
            "autoencoder": {**training, "budget_share": 0.1},
            "radiogenomics": {**training, "budget_share": 0.1},
            "gan": {**training, "rounds": 1, "budget_share": 0.3},
            "sites": [{"name": "a", "nominal_patients": 40}],
        }
    )


def normal_shape(features: int) -> Tensor:
    """The quantile function of a standard normal, as public weights hold it."""
    probabilities = (torch.arange(SHAPE_POINTS, dtype=torch.float64) + 0.5) / SHAPE_POINTS
    values = torch.special.ndtri(probabilities)
    return (values / values.std(correction=0)).expand(features, -1).to(torch.float32).contiguous()


@pytest.fixture(scope="module")
def public(plan: StudyPlan) -> dict[str, Tensor]:
    basis, _ = torch.linalg.qr(torch.randn(GENES, COMPONENTS, generator=torch.Generator().manual_seed(3)))
    found = {
        "basis": basis,
        "genes_scale": torch.tensor([2.0, 1.5, 1.0]),
        "morphology_centre": torch.tensor([0.5, 0.4, 0.6]),
        "morphology_scale": torch.tensor([0.05, 0.06, 0.04]),
        "morphology_shape": normal_shape(3),
        "morphology_by_class": torch.zeros(2, 3),
    }
    assert {name: t.shape for name, t in public_template(plan).items()} == {name: t.shape for name, t in found.items()}
    return found


# A model as varied as the public population: total variances are about 1.
TRUTH = {
    "class_prior": torch.tensor([0.7, 0.3]),
    "means": torch.tensor([[-0.15, 0.1, 0.0, -0.15, 0.05, 0.0], [0.35, -0.25, 0.0, 0.35, -0.1, 0.0]]),
    "covariance": torch.tensor(
        [
            [0.95, 0.2, 0.0, 0.4, 0.0, 0.0],
            [0.2, 1.0, 0.0, 0.0, 0.3, 0.0],
            [0.0, 0.0, 0.95, 0.0, 0.2, 0.0],
            [0.4, 0.0, 0.0, 0.95, 0.0, 0.0],
            [0.0, 0.3, 0.2, 0.0, 1.0, 0.2],
            [0.0, 0.0, 0.0, 0.0, 0.2, 1.0],
        ]
    ),
}


def draw_truth(public: dict[str, Tensor], count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patients of the known model: genes (N, G) that lie in the basis, morphology (N, F), labels (N,)."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(TRUTH["class_prior"], count, replacement=True, generator=draws)
    root = torch.linalg.cholesky(TRUTH["covariance"])
    both = TRUTH["means"][labels] + torch.randn(count, 6, generator=draws) @ root.T
    genes = (both[:, :COMPONENTS] * public["genes_scale"]) @ public["basis"].T
    return genes, public["morphology_centre"] + public["morphology_scale"] * both[:, COMPONENTS:], labels


def total_of(plan: StudyPlan, public: dict[str, Tensor], *patients: Tensor) -> Tensor:
    return rows(plan, public, *patients).double().sum(0)


def test_without_noise_a_known_model_is_recovered(plan: StudyPlan, public: dict[str, Tensor]) -> None:
    total = total_of(plan, public, *draw_truth(public, 60_000, 1))
    state, report = fit_moments(plan, public, total, 0.0, 60_000)
    assert state["class_prior"] == pytest.approx(TRUTH["class_prior"], abs=0.01)
    torch.testing.assert_close(state["means"], TRUTH["means"], atol=0.02, rtol=0)
    # Shortened rows make second moments a little rounder: attenuation is corrected for as if there were no correlation.
    torch.testing.assert_close(state["covariance"], TRUTH["covariance"], atol=0.05, rtol=0)
    assert report["noise_to_signal"] == 0.0
    assert report["kept_link"] == pytest.approx(1.0, abs=0.05)


def test_a_fit_has_the_names_shapes_and_types_of_the_template(plan: StudyPlan, public: dict[str, Tensor]) -> None:
    state, report = fit_moments(plan, public, total_of(plan, public, *draw_truth(public, 50, 1)), 1.0, 50)
    template = linear_gaussian_template(plan)
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in template.items()
    }
    assert all(math.isfinite(value) for value in report.values())


@pytest.mark.parametrize("noise_sd", [1e6, 1e12])
def test_overwhelming_noise_leaves_the_public_model(
    plan: StudyPlan, public: dict[str, Tensor], noise_sd: float
) -> None:
    total = total_of(plan, public, *draw_truth(public, 300, 2))
    noisy = total + noise_sd * torch.randn(total.shape, generator=torch.Generator().manual_seed(0))
    state, report = fit_moments(plan, public, noisy, noise_sd, 300)
    for name, expected in public_prior(SIZE, public).items():
        torch.testing.assert_close(state[name], expected, atol=0.2 if name == "covariance" else 0.02, rtol=0)
    assert report["kept_link"] < 0.05


@pytest.mark.parametrize("noise_sd", [0.3, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_any_sum_gives_a_usable_model(plan: StudyPlan, public: dict[str, Tensor], noise_sd: float, count: int) -> None:
    for seed in range(10):
        total = total_of(plan, public, *(values[:count] for values in draw_truth(public, 40, seed)))
        noisy = total + noise_sd * torch.randn(total.shape, generator=torch.Generator().manual_seed(seed))
        state, _ = fit_moments(plan, public, noisy, noise_sd, 40)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
        assert float(state["class_prior"].sum()) == pytest.approx(1.0, abs=1e-5)
        assert float(state["class_prior"].min()) > 0.0
        assert float(torch.linalg.eigvalsh(state["covariance"].double()).min()) > 0.01
        drawn = LinearGaussianProfiles(state, clip=4.0).draw(5, torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(drawn.genes).all())
        assert bool(torch.isfinite(drawn.morphology).all())


def test_shrinkage_beats_the_raw_moments_on_average(plan: StudyPlan, public: dict[str, Tensor]) -> None:
    total = total_of(plan, public, *draw_truth(public, 300, 5))
    target = TRUTH["covariance"][:COMPONENTS, COMPONENTS:] + torch.zeros(1)
    middle = TRUTH["class_prior"] @ TRUTH["means"]
    apart = TRUTH["means"] - middle
    target = target + (apart.T @ (TRUTH["class_prior"][:, None] * apart))[:COMPONENTS, COMPONENTS:]
    fitted_error = raw_error = 0.0
    for seed in range(20):
        noisy = total + 30.0 * torch.randn(total.shape, generator=torch.Generator().manual_seed(seed))
        state, _ = fit_moments(plan, public, noisy, 30.0, 300)
        fitted_middle = state["class_prior"] @ state["means"]
        fitted_apart = state["means"] - fitted_middle
        fitted = state["covariance"] + fitted_apart.T @ (state["class_prior"][:, None] * fitted_apart)
        fitted_error += float((fitted[:COMPONENTS, COMPONENTS:] - target).square().sum())
        raw_error += float(
            (unpack(SIZE, noisy)["link"] / 300 / attenuation(COMPONENTS).mean ** 2 - target).square().sum()
        )
    assert fitted_error < 0.6 * raw_error


def test_a_missing_block_does_not_bias_the_others(plan: StudyPlan, public: dict[str, Tensor]) -> None:
    genes, morphology, labels = draw_truth(public, 60_000, 6)
    genes[:20_000] = torch.nan  # a third without a profile
    morphology[15_000:30_000] = torch.nan  # others without images
    morphology[30_000:45_000, 1] = torch.nan  # others without one feature
    labels[::4] = -1
    state, _ = fit_moments(plan, public, total_of(plan, public, genes, morphology, labels), 0.0, 60_000)
    assert state["class_prior"] == pytest.approx(TRUTH["class_prior"], abs=0.01)
    torch.testing.assert_close(state["means"], TRUTH["means"], atol=0.03, rtol=0)
    torch.testing.assert_close(state["covariance"], TRUTH["covariance"], atol=0.06, rtol=0)


def test_counts_are_found_without_noise_and_declared_ones_kept_with_it(
    plan: StudyPlan, public: dict[str, Tensor]
) -> None:
    genes, morphology, labels = draw_truth(public, 1000, 7)
    genes[:200] = torch.nan
    total = total_of(plan, public, genes, morphology, labels)
    nothing = {name: torch.zeros_like(block) for name, block in unpack(SIZE, total).items()}
    exact = estimate_counts(unpack(SIZE, total), nothing, 900)
    assert float(exact.genes) == pytest.approx(800, rel=1e-3)
    assert exact.features == pytest.approx([1000.0] * 3, rel=1e-3)
    assert exact.both == pytest.approx([800.0] * 3, rel=1e-3)
    endless = {name: torch.full_like(block, 1e18) for name, block in nothing.items()}
    declared = estimate_counts(unpack(SIZE, total), endless, 900)
    assert float(declared.genes) == pytest.approx(900, rel=1e-3)
    assert declared.prior == pytest.approx([0.5, 0.5], abs=1e-3)


def test_attenuation_is_what_shortening_leaves_of_normal_vectors(plan: StudyPlan, public: dict[str, Tensor]) -> None:
    draws = torch.Generator().manual_seed(8)
    u = torch.randn(200_000, COMPONENTS, generator=draws)
    mixing = torch.linalg.cholesky(torch.eye(COMPONENTS) * 0.9 + 0.1)
    m = torch.randn(200_000, COMPONENTS, generator=draws) @ mixing.T
    u = 0.1 * m + 0.995 * u
    genes = (0.2 + u) * public["genes_scale"] @ public["basis"].T
    labels = torch.zeros(len(u), dtype=torch.int64)
    found = unpack(
        SIZE, total_of(plan, public, genes, public["morphology_centre"] + public["morphology_scale"] * m, labels)
    )
    left = attenuation(COMPONENTS)
    assert float(found["class_genes"][0].mean()) / 200_000 / 0.2 == pytest.approx(left.mean, abs=0.03)
    assert float(found["link"].diagonal().mean()) / 200_000 / 0.1 == pytest.approx(left.mean**2, abs=0.03)
    assert float(found["morphology"].diagonal().mean()) / 200_000 == pytest.approx(left.variance, abs=0.005)
    assert float(found["morphology"][0, 1]) / 200_000 / 0.1 == pytest.approx(left.correlation, abs=0.03)
    assert 0.3 < left.correlation < left.variance < left.mean < 1.0


def test_noise_of_the_link_is_foretold(plan: StudyPlan) -> None:
    length = row_size(plan)
    found = []
    for seed in range(300):
        noise = 20.0 * torch.randn(length, generator=torch.Generator().manual_seed(seed))
        found.append(unpack(SIZE, noise)["link"] / 500 / attenuation(COMPONENTS).mean ** 2)
    assert float(torch.stack(found).std()) == pytest.approx(link_noise(SIZE, 20.0, 500), rel=0.05)


def test_shrinkage_keeps_a_signal_and_removes_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    truth = torch.randn(2000, generator=draws, dtype=torch.float64)
    variance = torch.full_like(truth, 0.25)
    noisy = truth + 0.5 * torch.randn(2000, generator=draws, dtype=torch.float64)
    found = shrink(noisy, variance)
    assert float((found - truth).square().mean()) == pytest.approx(0.2, abs=0.03)  # 1 * 0.25 / 1.25
    nothing = 0.5 * torch.randn(2000, generator=draws, dtype=torch.float64)
    assert float(shrink(nothing, variance).abs().max()) < 0.1


def test_where_noise_leaves_nothing_the_classes_differ_as_in_public(public: dict[str, Tensor]) -> None:
    by_class = torch.tensor([[-0.6, 0.3, 0.0], [0.6, -0.3, 0.1]])
    told = {**public, "morphology_by_class": by_class}
    genes, morphology, labels = draw_truth(public, 300, 4)
    total = rows_of_size(SIZE, told, genes, morphology, labels).double().sum(0)
    noise = torch.randn(len(total), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drowned, _ = fit_sum(SIZE, told, total + 1e4 * noise, 1e4, 300)
    apart = drowned["means"][1, COMPONENTS:] - drowned["means"][0, COMPONENTS:]
    torch.testing.assert_close(apart, by_class[1] - by_class[0], atol=0.02, rtol=0)
    # Many patients without noise say more than any belief.
    genes, morphology, labels = draw_truth(public, 60_000, 4)
    total = rows_of_size(SIZE, told, genes, morphology, labels).double().sum(0)
    heard, _ = fit_sum(SIZE, told, total, 0.0, 60_000)
    torch.testing.assert_close(heard["means"][:, COMPONENTS:], TRUTH["means"][:, COMPONENTS:], atol=0.05, rtol=0)


def test_genes_and_labels_alone_are_fitted_too(public: dict[str, Tensor]) -> None:
    size = Sizes(classes=2, components=COMPONENTS, features=0)
    genes_only = {
        **public,
        "morphology_centre": torch.zeros(0),
        "morphology_scale": torch.zeros(0),
        "morphology_shape": torch.zeros(0, SHAPE_POINTS),
        "morphology_by_class": torch.zeros(2, 0),
    }
    genes, _, labels = draw_truth(public, 60_000, 9)
    found = rows_of_size(size, genes_only, genes, torch.zeros(60_000, 0), labels)
    assert float(found.norm(dim=1).max()) <= 1.0
    state, _ = fit_sum(size, genes_only, found.double().sum(0), 0.0, 60_000)
    torch.testing.assert_close(state["means"], TRUTH["means"][:, :COMPONENTS], atol=0.02, rtol=0)
    torch.testing.assert_close(state["covariance"], TRUTH["covariance"][:COMPONENTS, :COMPONENTS], atol=0.05, rtol=0)
    drawn = LinearGaussianProfiles(state, clip=4.0).draw(7, torch.Generator().manual_seed(0))
    assert drawn.genes.shape == (7, GENES)
    assert drawn.morphology.shape == (7, 0)


def test_a_sum_of_another_length_is_refused(public: dict[str, Tensor]) -> None:
    length = sum(math.prod(block.shape) for block in layout(SIZE).values())
    with pytest.raises(ValueError, match="expected a sum"):
        fit_sum(SIZE, public, torch.zeros(length + 1), 1.0, 40)
