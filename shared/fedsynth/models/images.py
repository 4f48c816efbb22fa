"""The networks that make images, by the plan's architecture: a shared generator, and what stays at a site beside it."""

from __future__ import annotations

from torch import nn

from fedsynth.models.condition import condition_dim, tumour_map
from fedsynth.models.dcgan import Discriminator, Generator
from fedsynth.models.interfaces import ImageDiscriminator, ImageGenerator
from fedsynth.models.progressive import ProgressiveDiscriminator, ProgressiveGenerator
from fedsynth.models.vae import Encoder
from fedsynth.plan import StudyPlan


def make_generator(plan: StudyPlan) -> ImageGenerator:
    """The generator that `plan` names, with fresh weights; of a variational autoencoder the decoder."""
    if plan.gan.grows:
        return ProgressiveGenerator(
            latent_dim=plan.gan.latent_dim,
            condition_dim=_condition_dim(plan),
            channels=_channels(plan),
            size=plan.image.size,
            width=plan.gan.generator_width,
            tumour_map=tumour_map(plan),
            attention=plan.gan.architecture == "enhanced",
        )
    return Generator(
        latent_dim=plan.gan.latent_dim,
        condition_dim=_condition_dim(plan),
        channels=_channels(plan),
        size=plan.image.size,
        width=plan.gan.generator_width,
        tumour_map=tumour_map(plan),
    )


def make_discriminator(plan: StudyPlan) -> ImageDiscriminator:
    """The discriminator that `plan` names, with fresh weights.

    Raises:
        ValueError: a variational autoencoder has none.
    """
    if plan.gan.architecture == "vae":
        raise ValueError("a variational autoencoder has an encoder and no discriminator")
    if plan.gan.grows:
        return ProgressiveDiscriminator(
            condition_dim=_condition_dim(plan),
            channels=_channels(plan),
            size=plan.image.size,
            width=plan.gan.discriminator_width,
            tumour_map=tumour_map(plan),
            attention=plan.gan.architecture == "enhanced",
            spectral_norm=plan.gan.architecture == "enhanced" or plan.gan.spectral_norm,
        )
    return Discriminator(
        condition_dim=_condition_dim(plan),
        channels=_channels(plan),
        size=plan.image.size,
        width=plan.gan.discriminator_width,
        tumour_map=tumour_map(plan),
        norm=plan.gan.discriminator_norm,
        spectral_norm=plan.gan.spectral_norm,
    )


def make_encoder(plan: StudyPlan) -> Encoder:
    """The encoder of a variational autoencoder, as wide as the plan's discriminator, with fresh weights."""
    return Encoder(
        latent_dim=plan.gan.latent_dim,
        condition_dim=_condition_dim(plan),
        channels=_channels(plan),
        size=plan.image.size,
        width=plan.gan.discriminator_width,
        tumour_map=tumour_map(plan),
    )


def make_companion(plan: StudyPlan) -> nn.Module:
    """What stays at a site beside the generator: the discriminator, or of a variational autoencoder the encoder."""
    return make_encoder(plan) if plan.gan.architecture == "vae" else make_discriminator(plan)


def _condition_dim(plan: StudyPlan) -> int:
    return condition_dim(len(plan.label.classes), len(plan.morphology.features))


def _channels(plan: StudyPlan) -> int:
    return len(plan.image.sequences) + 1  # and the mask
