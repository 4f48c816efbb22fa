"""The variational autoencoder of slices: its encoder, its losses, and that its decoder is the generator that travels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsynth.models.condition import TumourMap
from fedsynth.models.dcgan import Generator, initialise
from fedsynth.models.vae import Encoder, ImageVAE, vae_losses

LATENT, CONDITION, CHANNELS = 6, 9, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def model(size: int = 32) -> ImageVAE:
    tumour_map = TumourMap(size, (1, 2, 3), 0, (0.5, 200.0), 3.0, 100.0)
    encoder = Encoder(
        latent_dim=LATENT, condition_dim=CONDITION, channels=CHANNELS, size=size, width=2, tumour_map=tumour_map
    )
    decoder = Generator(
        latent_dim=LATENT, condition_dim=CONDITION, channels=CHANNELS, size=size, width=2, tumour_map=tumour_map
    )
    both = ImageVAE(encoder, decoder)
    initialise(both, torch.Generator().manual_seed(0))
    return both


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@torch.no_grad()
def test_slices_of_every_size_are_coded_and_drawn_again(size: int) -> None:
    both, x, code = model(size), normal(2, CHANNELS, size, size).tanh(), normal(2, CONDITION)
    mean, log_variance = both.encoder(x, code)
    assert mean.shape == log_variance.shape == (2, LATENT)
    reconstruction, kl = both(x, code, normal(2, LATENT))
    assert reconstruction.shape == x.shape
    assert kl.shape == (2,)
    assert float(kl.min()) > 0


@torch.no_grad()
def test_the_latent_is_drawn_with_the_given_noise_and_nothing_else() -> None:
    both, x, code, noise = model(), normal(2, CHANNELS, 32, 32).tanh(), normal(2, CONDITION), normal(2, LATENT)
    mean, log_variance = both.encoder(x, code)
    expected = both.generator(mean + noise * torch.exp(log_variance / 2), code)
    assert torch.equal(both(x, code, noise)[0], expected)
    assert not torch.equal(both(x, code, 2 * noise)[0], expected)


@torch.no_grad()
def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    both, x, code = model(), normal(2, CHANNELS, 32, 32), normal(2, CONDITION)
    mean, log_variance = both.encoder(x, code)
    posterior = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(both(x, code, normal(2, LATENT))[1], expected)


@torch.no_grad()
def test_a_loss_is_the_error_a_pixel_and_the_weighted_divergence_a_dimension() -> None:
    both, x, code, noise = model(), normal(2, CHANNELS, 32, 32), normal(2, CONDITION), normal(2, LATENT)
    reconstruction, kl = both(x, code, noise)
    error = torch.stack([(reconstruction[i] - x[i]).abs().mean() for i in range(2)])
    torch.testing.assert_close(vae_losses(both, x, code, noise, 0.0), error)
    torch.testing.assert_close(vae_losses(both, x, code, noise, 0.3), error + 0.3 * kl / LATENT)


def test_weights_that_would_overflow_leave_the_losses_finite() -> None:
    both = model()
    with torch.no_grad():
        both.encoder.latent.bias[LATENT:] = 1e4
    losses = vae_losses(both, normal(2, CHANNELS, 32, 32), normal(2, CONDITION), normal(2, LATENT), 1.0)
    assert bool(losses.isfinite().all())


def test_the_encoder_sees_image_and_condition() -> None:
    both, x, code = model(), normal(2, CHANNELS, 32, 32).requires_grad_(), normal(2, CONDITION).requires_grad_()
    mean, log_variance = both.encoder(x, code)
    for output in (mean, log_variance):
        for given in torch.autograd.grad(output.sum(), [x, code], retain_graph=True):
            assert float(given.abs().max()) > 0
