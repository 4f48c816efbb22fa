"""Facts about conditions, losses, and what is copied or projected."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedsynth.models.condition import condition, condition_dim, slice_positions
from fedsynth.models.dcgan import initialise
from fedsynth.models.gene_autoencoder import GeneAutoencoder, autoencoder_losses, generate_expression
from fedsynth.models.radiogenomic_dnn import (
    RadiogenomicDNN,
    project_nonnegative_output,
    radiogenomic_losses,
    start_from_encoder,
)
from fedsynth.plan import AutoencoderPlan


def autoencoder(genes: int = 10, hidden: tuple[int, ...] = (8, 6), variational: bool = True) -> GeneAutoencoder:
    torch.manual_seed(0)
    plan = AutoencoderPlan(
        rounds=1,
        steps_per_round=1,
        expected_batch=1,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        budget_share=0.5,
        hidden=list(hidden),
        latent_dim=3,
        variational=variational,
    )
    return GeneAutoencoder(genes, plan)


def dnn(hidden: tuple[int, ...] = (8, 6, 4)) -> RadiogenomicDNN:
    torch.manual_seed(1)
    return RadiogenomicDNN(10, 3, 2, hidden=list(hidden), dropout=0.0, activation="tanh")


def test_a_condition_holds_label_morphology_and_position() -> None:
    morphology = torch.tensor([[0.0, 1.0], [0.25, torch.nan]])
    code = condition(torch.tensor([1, -1]), morphology, torch.tensor([-1.0, 0.0]), classes=3)
    assert code.shape == (2, condition_dim(3, 2))
    assert code[:, :3].tolist() == [[0, 1, 0], [0, 0, 0]]  # an unknown label names no class
    assert code[:, 3:5].tolist() == [[-1, 1], [-0.5, 0]]  # what was not measured is the middle of its range
    assert code[:, 5].tolist() == [-1, 0]
    assert bool(code.isfinite().all())


def test_slice_positions_run_from_bottom_to_top() -> None:
    assert slice_positions(1).tolist() == [0]
    assert slice_positions(5).tolist() == [-1, -0.5, 0, 0.5, 1]


def test_a_patient_without_measured_morphology_contributes_its_label_only() -> None:
    model, genes, labels = dnn(), torch.randn(3, 10), torch.tensor([0, 1, 1])
    morphology = torch.tensor([[torch.nan] * 3, [torch.nan] * 3, [0.2, 0.4, 0.6]])
    losses = radiogenomic_losses(model, genes, morphology, labels)
    # A loss on the label, of whatever weight, is a multiple of the cross-entropy: the same for every such patient.
    weights = losses / cross_entropy(model(genes)[1], labels, reduction="none")
    assert float(weights[0].detach()) > 0
    torch.testing.assert_close(weights[0], weights[1])
    assert float((weights[2] - weights[0]).detach()) > 1e-3
    gradients = torch.autograd.grad(losses[1], list(model.morphology.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in gradients)


def test_a_patient_of_unknown_label_contributes_the_mean_error_of_its_measured_features() -> None:
    model, genes = dnn(), torch.randn(1, 10)
    predicted = model(genes)[0].detach()
    off = torch.tensor([[0.1, torch.nan, -0.1]])
    both = radiogenomic_losses(model, genes, predicted + off, torch.tensor([-1]))
    one = radiogenomic_losses(model, genes, predicted + torch.tensor([[0.1] + [torch.nan] * 2]), torch.tensor([-1]))
    twice = radiogenomic_losses(model, genes, predicted + 2 * off, torch.tensor([-1]))
    assert float(both.detach()) > 0
    torch.testing.assert_close(one, both)
    torch.testing.assert_close(twice, 4 * both)
    gradients = torch.autograd.grad(both.sum(), list(model.label.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in gradients)


def test_a_patient_of_whom_nothing_is_known_contributes_nothing() -> None:
    model = dnn()
    loss = radiogenomic_losses(model, torch.randn(1, 10), torch.full((1, 3), torch.nan), torch.tensor([-1]))
    assert loss.tolist() == [0]
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in gradients)


@pytest.mark.parametrize("variational", [True, False])
def test_the_autoencoder_loss_is_finite_and_falls_when_the_reconstruction_is_right(variational: bool) -> None:
    model = autoencoder(variational=variational)
    noise, genes = torch.zeros(2, 3), torch.randn(2, 10)
    exact, _ = model(genes, noise)
    own = autoencoder_losses(lambda *_: (exact, torch.zeros(2)), exact, noise, 0.0)  # type: ignore[arg-type]
    assert own.tolist() == [0, 0]
    assert bool(autoencoder_losses(model, 100 * genes, noise, 0.05).isfinite().all())


def test_the_divergence_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    model = autoencoder()
    with torch.no_grad():
        model.to_latent.weight.zero_()
        model.to_latent.bias.zero_()
    assert model(torch.randn(2, 10), torch.zeros(2, 3))[1].tolist() == [0, 0]
    with torch.no_grad():
        model.to_latent.bias.fill_(0.7)
    assert float(model(torch.randn(2, 10), torch.zeros(2, 3))[1].detach().min()) > 0


def test_generated_profiles_have_unit_variance_where_the_decoder_alone_has_less() -> None:
    model = autoencoder(genes=6)
    last = model.decoder[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight[:3] *= 0.1
        last.weight[3:] *= 20
    generator = torch.Generator().manual_seed(3)
    decoded = model.decode(torch.randn(4000, 3, generator=generator)).detach().var(0)
    variance = generate_expression(model, 4000, generator, clip=1e6).var(0)
    assert float(decoded[:3].max()) < 0.5
    assert float(decoded[3:].min()) > 1.5
    torch.testing.assert_close(variance[:3], torch.ones(3), rtol=0.12, atol=0)
    torch.testing.assert_close(variance[3:], decoded[3:], rtol=0.12, atol=0)


def test_generated_profiles_keep_to_the_clip() -> None:
    profiles = generate_expression(autoencoder(), 500, torch.Generator().manual_seed(3), clip=0.5)
    assert profiles.shape == (500, 10)
    assert float(profiles.abs().max()) == 0.5


def test_the_encoders_layers_are_copied_as_far_as_they_fit() -> None:
    encoder, target = autoencoder(), dnn()
    assert start_from_encoder(target, encoder) == 2
    source = encoder.encoder[0]
    first = target.hidden[0]
    assert isinstance(source, nn.Linear)
    assert isinstance(first, nn.Linear)
    assert torch.equal(first.weight, source.weight)
    with torch.no_grad():
        first.weight.add_(1)
    assert not torch.equal(first.weight, source.weight)  # a copy, not the same weights
    assert start_from_encoder(dnn((8, 5, 4)), encoder) == 1
    assert start_from_encoder(dnn((7, 6, 4)), encoder) == 0


def test_the_projection_touches_negative_weights_of_the_output_layer_only() -> None:
    model = dnn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    project_nonnegative_output(model)
    for name, tensor in model.state_dict().items():
        expected = before[name].clamp(min=0) if name == "morphology.weight" else before[name]
        assert torch.equal(tensor, expected)


def test_fresh_weights_are_drawn_from_the_given_generator_alone() -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Conv2d(8, 32, 4), nn.ConvTranspose2d(32, 8, 4), nn.Flatten(), nn.Linear(400, 50))
        initialise(model, torch.Generator().manual_seed(seed))
        return model.state_dict()

    a, b, c = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for place, std in (("0", 0.02), ("1", 0.02), ("3", 400**-0.5)):
        assert not torch.equal(a[f"{place}.weight"], c[f"{place}.weight"])
        assert float(a[f"{place}.weight"].std()) == pytest.approx(std, rel=0.1)
        assert float(a[f"{place}.bias"].abs().max()) == 0
