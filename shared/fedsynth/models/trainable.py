"""Which parameters of a network train: fewer private parameters, less noise (Yu et al. 2022; Bu et al. 2022, DP-BiTFiT).

The noise of a private step has norm sigma C sqrt(d) over d trained parameters, while the clip bounds the signal whatever d
is. From public weights, a small part of the network may say most of what a site's patients add.
"""

from __future__ import annotations

import torch
from torch import nn

from fedsynth.models.adapters import adapt
from fedsynth.models.dcgan import Discriminator, Generator
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.growth import active_parameters
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.progressive import ProgressiveDiscriminator, ProgressiveGenerator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.models.translator import make_domain_discriminators, make_translators
from fedsynth.models.vae import Encoder
from fedsynth.plan import Module, StudyPlan, Trains

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
_HEADS: dict[type[nn.Module], tuple[str, ...]] = {
    Discriminator: ("score", "projection"),
    Generator: ("last",),
    ProgressiveDiscriminator: ("score", "projection"),
    ProgressiveGenerator: ("to_images",),
    Encoder: ("latent",),
}


def make_trainable(model: nn.Module, trains: Trains, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Let a part of `model` train and freeze the rest, in place.

    Args:
        model: a network with its public weights loaded.
        trains: ``"all"``; ``"norms"``: scales and shifts of norms and all biases (the biases of a generator's
            modulations are the scales and shifts of its norms); ``"head"``: a discriminator's score and projection, a
            generator's last convolution (a growing one's layer to images of each resolution), an encoder's layer to the
            latent; ``"adapters"``: see `fedsynth.models.adapters.adapt`.
        rank: of adapters.
        generator: of the adapters' first weights; nothing is drawn from it otherwise.

    Returns:
        The parameters that train, by their names in the model, in the model's order.

    Raises:
        ValueError: ``"head"`` of a network that has none; ``"adapters"`` beside spectrally normalised weights.
    """
    if trains == "adapters":
        adapt(model, rank, generator)
    elif trains == "all":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        for parameter in _part(model, trains):
            parameter.requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _part(model: nn.Module, trains: Trains) -> list[nn.Parameter]:
    if trains == "norms":
        of_norms = [p for layer in model.modules() if isinstance(layer, _NORMS) for p in layer.parameters()]
        return of_norms + [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if type(model) not in _HEADS:
        raise ValueError(f"{type(model).__name__} has no head")
    return [p for name in _HEADS[type(model)] for p in model.get_submodule(name).parameters()]


def trainable_parameters(plan: StudyPlan, module: Module) -> int:
    """Number of parameters that receive noise in a private step of `module`; of growing networks, at the full size.

    Raises:
        ValueError: `module` is a statistic, which trains nothing.
    """
    if module == "autoencoder":
        return _trained(make_autoencoder(plan), "all", plan)
    if module == "radiogenomics":
        return _trained(make_radiogenomic_dnn(plan), "all", plan)
    if module == "gan":
        companion = _trained(make_companion(plan), plan.gan.discriminator_trains, plan)
        if not plan.gan.generator_is_private:
            return companion
        return companion + _trained(make_generator(plan), plan.gan.generator_trains, plan)
    if module == "translation":
        return _trained(make_translators(plan), "all", plan) + _trained(make_domain_discriminators(plan), "all", plan)
    raise ValueError(f"{module} is a statistic: it has coordinates, not parameters")


def _trained(model: nn.Module, trains: Trains, plan: StudyPlan) -> int:
    # Adapters draw their first weights, which are of no interest here.
    trained = make_trainable(model, trains, plan.gan.adapter_rank, torch.Generator())
    active = set(active_parameters(model, None))
    return sum(parameter.numel() for name, parameter in trained.items() if name in active)
