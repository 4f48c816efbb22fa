"""Private translation between two domains of slices: dual GAN with cycle and identity losses (Zhu et al. 2017).

The fakes of a GAN come from noise; here a fake is a translated *private* slice, a cycle comes back to it, and an identity
loss compares with it. So no term is public, and nothing is added beside the noise: a patient's gradient is one vector over
the two generators and the two discriminators, clipped as one, noised as one, charged once.

In that vector the two players stay apart: the losses of the generators see the discriminators as constants, those of the
discriminators see translated slices as constants. One step moves all four networks at once, by the gradients at the same
weights. The original keeps a buffer of former fakes for its discriminators; it would carry patients from one step to the
next, and is left out.

The generators are shared; the discriminators and the moments of the optimiser stay at the site.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedsynth.domains import Domain, DrawnSlices, draw_slices, section_of
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.functional import PatientLosses
from fedsynth.dp.plain import make_plain, plain_step_of
from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth.dp.step import PatientTensors, make_private, private_step_of
from fedsynth.plan import StudyPlan, TranslationPlan
from fedsynth.records import State
from fedsynth.schedules import set_learning_rate
from fedsynth.translation import make_networks, translation_losses
from fedsynth_client.training.block import BlockResult, detached, public_generator, update_norm

_BETAS = (0.5, 0.999)  # as in CycleGAN
_MODEL, _MOMENTS = "model/", "moments/"

Step = Callable[[int, PatientTensors, PatientLosses], None]


def train_translation(
    plan: StudyPlan,
    translators: State,
    local: State,
    domains: tuple[Domain, Domain],
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int = 0,
) -> BlockResult:
    """One block: `mechanism.steps` private steps of all four networks.

    Args:
        plan: the study plan.
        translators: the two shared generators.
        local: the site's discriminators ("model/...") and the moments of its optimiser ("moments/..."), as a former block
            returned them; empty before the first: the discriminators then start as the plan's digest says.
        domains: slices of source and target (`fedsynth.domains.source_and_target`), one row a training patient.
        mechanism: sampling, noise and number of steps.
        randomness: of draws and noise.
        first_step: how many steps of the module came before, over all rounds; the learning rate depends on it.
    """
    section = section_of(plan)
    networks = make_networks(plan)
    networks["translators"].load_state_dict(translators)
    if local:
        networks["discriminators"].load_state_dict(_prefixed(local, _MODEL))
    trained = dict(networks.named_parameters())
    optimizer = _optimizer(section, list(trained.values()))
    _restore_moments(optimizer, trained, _prefixed(local, _MOMENTS))
    step_on = _stepper(plan, networks, optimizer, mechanism, randomness)
    # A stream of its own: what it gives out depends on how many patients were drawn.
    of_patients = public_generator(randomness)
    losses = partial(translation_losses, section)
    for step in range(first_step, first_step + mechanism.steps):
        set_learning_rate(optimizer, section.learning_rate, section, step)
        drawn = poisson_draw(len(domains[0].slices), mechanism.sample_rate, randomness)
        # Unpaired: the slices of the two domains lie at places of their own.
        source, target = (draw_slices(domain, drawn, section.slices_per_patient, of_patients) for domain in domains)
        step_on(len(drawn), partial(_tensors, source, target), losses)
    after = detached(networks["translators"].state_dict())
    discriminators = detached(networks["discriminators"].state_dict())
    return BlockResult(
        after,
        {"update_norm": update_norm(translators, after)},
        {**_named(_MODEL, discriminators), **_named(_MOMENTS, _moments(optimizer, trained))},
    )


def _tensors(source: DrawnSlices, target: DrawnSlices, positions: Tensor) -> tuple[Tensor, ...]:
    return (*source.at(positions), *target.at(positions))


def _stepper(
    plan: StudyPlan,
    networks: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    randomness: Randomness,
) -> Step:
    """The private step, or the plain one of a study without privacy."""
    section = section_of(plan)
    if plan.privacy.private:
        private = make_private(
            networks,
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=section.max_grad_norm,
            expected_batch=section.expected_batch,
            randomness=randomness,
            backend="functional",
        )
        return partial(private_step_of, private)
    if mechanism.noise_multiplier:
        raise ValueError("a study without privacy adds no noise, so none may be charged")
    return partial(plain_step_of, make_plain(networks, optimizer, plan.privacy))


def _optimizer(section: TranslationPlan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if section.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=section.learning_rate, momentum=section.momentum)
    return torch.optim.Adam(parameters, lr=section.learning_rate, betas=_BETAS)


def _moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> State:
    return {
        f"{moment}/{name}": value.detach().clone()
        for name, parameter in trained.items()
        for moment, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _restore_moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], kept: State) -> None:
    for full_name, value in kept.items():
        moment, _, name = full_name.partition("/")
        optimizer.state[trained[name]][moment] = value.clone()


def _named(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _prefixed(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
