"""The networks that make images, by the plan's architecture: a shared generator, and what stays at a site beside it."""

from __future__ import annotations

from fedsynth.models.condition import condition_dim, tumour_map
from fedsynth.models.dcgan import Discriminator, Generator
from fedsynth.plan import StudyPlan


def make_generator(plan: StudyPlan) -> Generator:
    """The generator that `plan` names, with fresh weights."""
    return Generator(
        latent_dim=plan.gan.latent_dim,
        condition_dim=condition_dim(len(plan.label.classes), len(plan.morphology.features)),
        channels=len(plan.image.sequences) + 1,
        size=plan.image.size,
        width=plan.gan.generator_width,
        tumour_map=tumour_map(plan),
    )


def make_discriminator(plan: StudyPlan) -> Discriminator:
    """The discriminator that `plan` names, with fresh weights."""
    return Discriminator(
        condition_dim=condition_dim(len(plan.label.classes), len(plan.morphology.features)),
        channels=len(plan.image.sequences) + 1,
        size=plan.image.size,
        width=plan.gan.discriminator_width,
        tumour_map=tumour_map(plan),
    )
