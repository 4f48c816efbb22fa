"""Private training of the two networks over expression profiles: autoencoder and radiogenomic DNN.

A block draws, clips and noises whole patients and steps with the plan's optimiser; in a study without privacy it draws
them and takes the mean gradient. The optimiser's moments start anew in every block: they could be kept, but averaging over
sites moves the weights away from where they were gathered. The learning rate goes on from block to block, since it depends
on the step's number alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.plain import make_plain, plain_step
from fedsynth.dp.randomness import Randomness, poisson_draw
from fedsynth.dp.step import PrivateLosses, make_private, private_step
from fedsynth.models.gene_autoencoder import autoencoder_losses, make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, project_nonnegative, radiogenomic_losses
from fedsynth.plan import StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth.schedules import set_learning_rate
from fedsynth_client.training.block import BlockResult, detached, public_generator, update_norm

# Rows of the drawn patients and the module -> one loss a patient.
PatientLosses = Callable[[Tensor, nn.Module], Tensor]
# Number of drawn patients and their losses -> one step.
Step = Callable[[int, PrivateLosses], None]


def train_autoencoder(
    plan: StudyPlan,
    weights: State,
    genes: Tensor,
    mechanism: Mechanism,
    randomness: Randomness,
    *,
    first_step: int = 0,
) -> BlockResult:
    """One block of the autoencoder on profiles `genes` (N, G), one row a training patient.

    `first_step` is the number of this block's first step over all rounds, for the plan's schedule.
    """
    model = make_autoencoder(plan)
    generator = public_generator(randomness)

    def losses(drawn: Tensor, module: nn.Module) -> Tensor:
        noise = torch.randn(len(drawn), plan.autoencoder.latent_dim, generator=generator)
        return autoencoder_losses(module, genes[drawn], noise, plan.autoencoder.kl_weight)

    return _train(plan, plan.autoencoder, model, weights, len(genes), losses, mechanism, randomness, first_step)


def train_radiogenomics(
    plan: StudyPlan,
    weights: State,
    genes: Tensor,
    morphology: Tensor,
    labels: Tensor,
    mechanism: Mechanism,
    randomness: Randomness,
    *,
    first_step: int = 0,
) -> BlockResult:
    """One block of the radiogenomic DNN.

    Args:
        plan: the study plan.
        weights: the DNN's weights to start from.
        genes: (N, G), one row a training patient with a profile and images.
        morphology: (N, F) in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
        mechanism: sampling, noise and number of steps.
        randomness: of draws and noise.
        first_step: number of this block's first step over all rounds, for the plan's schedule.
    """
    model = make_radiogenomic_dnn(plan)

    def losses(drawn: Tensor, module: nn.Module) -> Tensor:
        return radiogenomic_losses(module, genes[drawn], morphology[drawn], labels[drawn])

    def project() -> None:
        project_nonnegative(model, plan.radiogenomics)

    # Dropout draws from torch's global stream; its masks need no secrecy, only independence of the data.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(public_generator(randomness).initial_seed())
        section = plan.radiogenomics
        return _train(
            plan, section, model, weights, len(genes), losses, mechanism, randomness, first_step, after_step=project
        )


def _train(
    plan: StudyPlan,
    training: TrainingPlan,
    model: nn.Module,
    weights: State,
    patients: int,
    losses: PatientLosses,
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int,
    after_step: Callable[[], None] = lambda: None,
) -> BlockResult:
    model.load_state_dict(weights)
    model.train()
    optimizer = _optimizer(model, training)
    step_on = _stepper(plan, training, model, optimizer, mechanism, randomness)
    for step in range(first_step, first_step + mechanism.steps):
        set_learning_rate(optimizer, training.learning_rate, training, step)
        drawn = poisson_draw(patients, mechanism.sample_rate, randomness)
        step_on(len(drawn), partial(_at, losses, drawn))
        after_step()
    after = detached(model.state_dict())
    return BlockResult(after, {"update_norm": update_norm(weights, after)}, {})


def _stepper(
    plan: StudyPlan,
    training: TrainingPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    randomness: Randomness,
) -> Step:
    """The private step, or the plain one of a study without privacy."""
    if plan.privacy.private:
        private = make_private(
            model,
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=training.max_grad_norm,
            expected_batch=training.expected_batch,
            randomness=randomness,
        )
        return partial(private_step, private)
    if mechanism.noise_multiplier:
        raise ValueError("a study without privacy adds no noise, so none may be charged")
    return partial(plain_step, make_plain(model, optimizer, plan.privacy))


def _optimizer(model: nn.Module, training: TrainingPlan) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=training.learning_rate, momentum=training.momentum)
    return torch.optim.Adam(model.parameters(), lr=training.learning_rate)


def _at(losses: PatientLosses, drawn: Tensor, module: nn.Module, positions: Tensor) -> Tensor:
    return losses(drawn[positions], module)
