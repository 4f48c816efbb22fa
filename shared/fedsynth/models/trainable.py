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
from fedsynth.models.images import make_discriminator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Module, StudyPlan, Trains

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
_HEADS: dict[type[nn.Module], tuple[str, ...]] = {Discriminator: ("score", "projection"), Generator: ("last",)}


def make_trainable(model: nn.Module, trains: Trains, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Let a part of `model` train and freeze the rest, in place.

    Args:
        model: a network with its public weights loaded.
        trains: ``"all"``; ``"norms"``: scales and shifts of norms and all biases (the biases of a generator's
            modulations are the scales and shifts of its norms); ``"head"``: a discriminator's score and projection, a
            generator's last convolution; ``"adapters"``: see `fedsynth.models.adapters.adapt`.
        rank: of adapters.
        generator: of the adapters' first weights; nothing is drawn from it otherwise.

    Returns:
        The parameters that train, by their names in the model, in the model's order.

    Raises:
        ValueError: ``"head"`` of a network that has none.
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
    """Number of parameters that receive noise when `module` trains.

    Raises:
        ValueError: `module` is a statistic, which trains nothing.
    """
    if module == "autoencoder":
        model: nn.Module = make_autoencoder(plan)
    elif module == "radiogenomics":
        model = make_radiogenomic_dnn(plan)
    elif module == "gan":
        model = make_discriminator(plan)
    else:
        raise ValueError(f"{module} is a statistic: it has coordinates, not parameters")
    trains: Trains = plan.gan.discriminator_trains if module == "gan" else "all"
    # Adapters draw their first weights, which are of no interest here.
    trained = make_trainable(model, trains, plan.gan.adapter_rank, torch.Generator())
    return sum(parameter.numel() for parameter in trained.values())
