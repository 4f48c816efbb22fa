"""The linear-Gaussian model: its draws have its moments, its predictions are the best linear ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsynth.engines.moments import SHAPE_POINTS, Sizes
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, public_prior

GENES, SIZE = 30, Sizes(classes=3, components=2, features=2)


def normal_shape(features: int) -> Tensor:
    """The quantile function of a standard normal, as public weights hold it."""
    probabilities = (torch.arange(SHAPE_POINTS, dtype=torch.float64) + 0.5) / SHAPE_POINTS
    values = torch.special.ndtri(probabilities)
    return (values / values.std(correction=0)).expand(features, -1).to(torch.float32).contiguous()


def make_state() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(GENES, 2, generator=draws))
    public = {
        "basis": basis,
        "genes_scale": torch.tensor([2.0, 1.0]),
        "morphology_centre": torch.tensor([0.5, 0.4]),
        "morphology_scale": torch.tensor([0.04, 0.05]),
        "morphology_shape": normal_shape(2),
        "morphology_by_class": torch.zeros(3, 2),
    }
    root = 0.5 * torch.randn(4, 4, generator=draws) + torch.eye(4)
    return {
        **public_prior(SIZE, public),
        "class_prior": torch.tensor([0.5, 0.3, 0.2]),
        "means": 0.8 * torch.randn(3, 4, generator=draws),
        "covariance": root @ root.T / 2,
    }


STATE = make_state()
MODEL = LinearGaussianProfiles(STATE, clip=8.0)


def standardised(model_draw: object, genes: Tensor, morphology: Tensor) -> Tensor:
    u = genes @ STATE["basis"] / STATE["genes_scale"]
    return torch.cat([u, (morphology - STATE["morphology_centre"]) / STATE["morphology_scale"]], dim=1)


def test_drawn_morphology_has_the_public_shape_and_the_models_mean_and_spread() -> None:
    points = torch.arange(SHAPE_POINTS, dtype=torch.float32)
    halves = torch.where(points < 50, -1.0, 1.0) + 0.05 * (points / 50 - 1)  # two peaks and nothing between them
    halves = (halves - halves.mean()) / halves.std(correction=0)
    model = LinearGaussianProfiles({**STATE, "morphology_shape": torch.stack([halves, normal_shape(1)[0]])}, clip=8.0)
    drawn = model.draw(100_000, torch.Generator().manual_seed(1)).morphology
    plain = MODEL.draw(100_000, torch.Generator().manual_seed(1)).morphology
    # A mixture of classes is not quite normal over all, so mean and spread are met nearly.
    torch.testing.assert_close(drawn.mean(0), plain.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.std(0), plain.std(0), atol=0, rtol=0.05)
    apart = ((drawn - drawn.mean(0)) / drawn.std(0)).abs()
    assert float((apart[:, 0] < 0.5).float().mean()) < 0.03
    assert float((apart[:, 1] < 0.5).float().mean()) > 0.3
    assert float(torch.corrcoef(torch.stack([drawn[:, 0], plain[:, 0]]))[0, 1]) > 0.75


def test_draws_have_the_shares_means_and_covariance_of_the_model() -> None:
    drawn = MODEL.draw(200_000, torch.Generator().manual_seed(1))
    both = standardised(drawn, drawn.genes, drawn.morphology)
    # The residual of the genes that the basis sees, too: it lies in every direction.
    explained = STATE["basis"] * STATE["genes_scale"]
    middle = STATE["class_prior"] @ STATE["means"]
    apart = STATE["means"] - middle
    total = STATE["covariance"] + apart.T @ (STATE["class_prior"][:, None] * apart)
    residual = (1 - ((explained @ total[:2, :2]) * explained).sum(1)).clamp(min=0.1)
    seen = (STATE["basis"].T @ (residual[:, None] * STATE["basis"])) / torch.outer(
        STATE["genes_scale"], STATE["genes_scale"]
    )
    expected = STATE["covariance"].clone()
    expected[:2, :2] += seen
    for label, share in enumerate(STATE["class_prior"]):
        chosen = both[drawn.labels == label]
        assert len(chosen) / 200_000 == pytest.approx(float(share), abs=0.005)
        torch.testing.assert_close(chosen.mean(0), STATE["means"][label], atol=0.03, rtol=0)
        torch.testing.assert_close(torch.cov(chosen.T), expected, atol=0.05, rtol=0.05)


def test_every_gene_gets_at_least_the_variance_of_the_scale() -> None:
    genes = MODEL.draw(50_000, torch.Generator().manual_seed(2)).genes
    variances = genes.var(0)
    assert float(variances.min()) > 0.97
    prior = LinearGaussianProfiles(public_prior(SIZE, STATE), clip=8.0).draw(50_000, torch.Generator().manual_seed(2))
    assert prior.genes.var(0).numpy() == pytest.approx(1.0, abs=0.35)  # a direction of sd 2 may exceed 1 in a gene


def test_draws_stay_in_their_ranges_and_repeat_with_their_seed() -> None:
    wide = {**STATE, "covariance": 100 * STATE["covariance"]}
    first = LinearGaussianProfiles(wide, clip=4.0).draw(100, torch.Generator().manual_seed(3))
    again = LinearGaussianProfiles(wide, clip=4.0).draw(100, torch.Generator().manual_seed(3))
    assert torch.equal(first.genes, again.genes)
    assert float(first.genes.abs().max()) <= 4.0
    assert float(first.morphology.min()) >= 0.0
    assert float(first.morphology.max()) <= 1.0
    assert (first.genes.shape, first.morphology.shape, first.labels.shape) == ((100, GENES), (100, 2), (100,))
    assert first.genes.dtype == first.morphology.dtype == torch.float32


def test_morphology_is_predicted_as_least_squares_on_noiseless_coordinates_would() -> None:
    draws = torch.Generator().manual_seed(4)
    labels = torch.multinomial(STATE["class_prior"], 400_000, replacement=True, generator=draws)
    root = torch.linalg.cholesky(STATE["covariance"])
    both = STATE["means"][labels] + torch.randn(len(labels), 4, generator=draws) @ root.T
    design = torch.cat([both[:, :2], torch.ones(len(both), 1)], dim=1).double()
    slopes = torch.linalg.lstsq(design, both[:, 2:].double()).solution
    genes = (both[:1000, :2] * STATE["genes_scale"]) @ STATE["basis"].T
    predicted, _ = MODEL.predict(genes)
    expected = STATE["morphology_centre"] + STATE["morphology_scale"] * (design[:1000] @ slopes)
    torch.testing.assert_close(predicted, expected.float().clamp(0, 1), atol=0.003, rtol=0)


def test_labels_are_predicted_by_bayes_rule() -> None:
    genes = torch.randn(50, GENES, generator=torch.Generator().manual_seed(5))
    _, logits = MODEL.predict(genes)
    u = genes @ STATE["basis"] / STATE["genes_scale"]
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean[:2], STATE["covariance"][:2, :2]).log_prob(u)
            for mean in STATE["means"]
        ],
        dim=1,
    )
    expected = torch.softmax(densities + STATE["class_prior"].log(), dim=1)
    torch.testing.assert_close(torch.softmax(logits, dim=1), expected, atol=1e-4, rtol=1e-3)


def test_the_public_prior_predicts_the_public_middle() -> None:
    morphology, logits = LinearGaussianProfiles(public_prior(SIZE, STATE), clip=4.0).predict(torch.randn(5, GENES))
    torch.testing.assert_close(morphology, STATE["morphology_centre"].expand(5, 2))
    torch.testing.assert_close(torch.softmax(logits, 1), torch.full((5, 3), 1 / 3))
