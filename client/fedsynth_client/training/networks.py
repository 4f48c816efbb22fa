"""The networks of images at a site: loaded from what was sent and what was kept, and put back into what is kept.

A site keeps the network beside the generator ("model/...", its adapters "adapter/..."), that network's optimiser moments
("exp_avg/...", ...), and nothing of the generator, which starts each round from what was sent.
"""

from __future__ import annotations

import torch
from torch import nn

from fedsynth.models.adapters import adapter_state, load_adapters, plain_state
from fedsynth.models.growth import Stage, active_parameters
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.models.trainable import make_trainable
from fedsynth.plan import StudyPlan
from fedsynth.records import State

Parameters = dict[str, nn.Parameter]


def shared_generator(plan: StudyPlan, weights: State, generator: torch.Generator) -> tuple[ImageGenerator, Parameters]:
    """The generator as it was sent, and the parameters of it that train."""
    model = make_generator(plan)
    model.load_state_dict(weights)
    return model, make_trainable(model, plan.gan.generator_trains, plan.gan.adapter_rank, generator)


def site_network(plan: StudyPlan, local: State, generator: torch.Generator) -> tuple[nn.Module, Parameters]:
    """The discriminator (of a variational autoencoder the encoder), and the parameters of it that train."""
    model = make_companion(plan)
    model.load_state_dict(prefixed(local, "model/"))
    trained = make_trainable(model, plan.gan.discriminator_trains, plan.gan.adapter_rank, generator)
    if adapters := prefixed(local, "adapter/"):
        load_adapters(model, adapters)
    return model, trained


def kept(model: nn.Module) -> State:
    """What the site keeps of the network's weights."""
    return {**named("model/", plain_state(model)), **named("adapter/", adapter_state(model))}


def active(model: nn.Module, trained: Parameters, stage: Stage | None) -> Parameters:
    """Those of the parameters that train which a stage uses."""
    return {name: trained[name] for name in active_parameters(model, stage) if name in trained}


def named(prefix: str, state: State) -> State:
    """The same tensors, the prefix before each name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def prefixed(state: State, prefix: str) -> State:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
