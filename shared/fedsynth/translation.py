"""The four networks of a translation between two domains, and a patient's losses of them (CycleGAN, Zhu et al. 2017).

With generators G: X -> Y, F: Y -> X and discriminators D_X, D_Y, all losses least squares (Mao et al. 2017):

    generators      (D_Y(G(x)) - 1)^2 / 2  +  cycle |F(G(x)) - x|  +  identity |F(x) - x|     and the same of y the other way
    discriminators  (D_X(x) - 1)^2 / 2  +  D_Y(G(x))^2 / 2                                    and the same of y the other way

Each term is of a slice of one domain alone, so a patient who lacks a domain still has the losses of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsynth.domains import section_of
from fedsynth.dp.functional import held
from fedsynth.losses import fake_losses, generator_losses, real_losses
from fedsynth.models.dcgan import initialise
from fedsynth.models.translator import make_domain_discriminators, make_translators
from fedsynth.plan import StudyPlan, TranslationPlan
from fedsynth.records import State

TO_TARGET, TO_SOURCE = "to_target", "to_source"  # the generators
SOURCE, TARGET = "source", "target"  # the discriminators


def make_networks(plan: StudyPlan) -> nn.ModuleDict:
    """``translators`` and ``discriminators``, with weights that the plan's digest determines: all sites start alike.

    Raises:
        ValueError: the plan has no section translation.
    """
    section_of(plan)
    networks = nn.ModuleDict(
        {"translators": make_translators(plan), "discriminators": make_domain_discriminators(plan)}
    )
    initialise(networks, torch.Generator().manual_seed(int(plan.digest[:15], 16)))
    return networks


def translator_template(plan: StudyPlan) -> State:
    """Names, shapes and types of the generators' weights."""
    return dict(make_translators(plan).state_dict())


def make_translator(plan: StudyPlan, weights: State) -> nn.Module:
    """The generator from source to target, of the `weights` of both."""
    both = make_translators(plan)
    both.load_state_dict(weights)
    return both[TO_TARGET].eval()


def translation_losses(
    section: TranslationPlan, networks: nn.Module, source: Tensor, in_source: Tensor, target: Tensor, in_target: Tensor
) -> Tensor:
    """The losses of all four networks of n pairs of slices, whose gradient is that of each player's own loss.

    Args:
        section: of the plan.
        networks: of `make_networks`.
        source: (n, C, H, W) in [-1, 1].
        in_source: (n,) 1, or 0 where there is no slice of the source.
        target, in_target: the same of the target.

    Returns:
        (n,), each pair's from that pair alone.
    """
    of_source = _one_way(section, networks, source, TO_TARGET, SOURCE)
    of_target = _one_way(section, networks, target, TO_SOURCE, TARGET)
    return in_source * of_source + in_target * of_target


def _one_way(section: TranslationPlan, networks: nn.Module, x: Tensor, direction: str, domain: str) -> Tensor:
    """Losses (n,) of slices x (n, C, H, W) of `domain`, which go the way `direction` and back."""
    here = networks.get_submodule(f"discriminators.{domain}")
    there = networks.get_submodule(f"discriminators.{TARGET if domain == SOURCE else SOURCE}")
    translators = networks.get_submodule("translators")
    fake = translators.get_submodule(direction)(x)
    # The generators must fool the discriminator, not change it.
    fooled = generator_losses("least_squares", held(there, lambda judge: judge(fake)))
    kept = cycle_and_identity_losses(section, translators, x, fake, direction)
    judged = real_losses("least_squares", here(x)) + fake_losses("least_squares", there(fake.detach()))
    return fooled + kept + judged


def cycle_and_identity_losses(
    section: TranslationPlan, translators: nn.Module, x: Tensor, fake: Tensor, direction: str
) -> Tensor:
    """The weighted losses (n,) that hold a slice against itself: come back from `fake`, and left alone.

    Args:
        section: of the plan.
        translators: the two generators.
        x: (n, C, H, W) of the domain that `direction` leads away from.
        fake: its translation.
        direction: which of the generators made it.
    """
    back = translators.get_submodule(TO_SOURCE if direction == TO_TARGET else TO_TARGET)
    cycle = (back(fake) - x).abs().flatten(1).mean(1)
    identity = (back(x) - x).abs().flatten(1).mean(1)
    return section.cycle_weight * cycle + section.identity_weight * identity
