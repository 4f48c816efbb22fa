"""Membership inference from the weights that a site sent back of the networks that are averaged, round by round.

White-box attacks of the server on its federation (Nasr et al., 2019). In each round the server knows the weights that it
sent and those that came back. A patient who was trained on pulled the weights down its own gradient; the inner product of
the update with that direction, summed over rounds, tells (Li et al., 2022, who call it the cosine attack).

Of a generator that is held against patients' slices (auxiliary losses, a variational autoencoder) the coordinator can
compute how far it is from a slice; what the discriminator's features or the encoder add stays at the site.

Of a translation the coordinator has the generators alone. A patient's cycle and identity losses are all that it can compute
of them: the adversarial loss needs the discriminators, which stay at the site.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsynth.attacks.transcript import Transcript
from fedsynth.domains import section_of, source_and_target
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.gene_autoencoder import autoencoder_losses, make_autoencoder
from fedsynth.models.growth import Stage, at_stage
from fedsynth.models.images import make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, radiogenomic_losses
from fedsynth.models.translator import make_translators
from fedsynth.plan import Module, StudyPlan
from fedsynth.records import WEIGHTS, State
from fedsynth.translation import TO_SOURCE, TO_TARGET, cycle_and_identity_losses

_DRAWS = 4  # of the autoencoder's latent noise, the same for all patients
_SLICES = 3  # of each domain of a translation, spread over the patient's
_MOST_REFERENCES = 100
_TINY = 1e-12

# Model and row number of a patient -> the patient's loss.
Loss = Callable[[nn.Module, int], Tensor]
Scores = NDArray[np.float64]


def network(plan: StudyPlan, module: Module) -> nn.Module:
    """The network that `module` trains.

    Raises:
        ValueError: its networks are not those that are averaged.
    """
    if module == "autoencoder":
        return make_autoencoder(plan).eval()
    if module == "radiogenomics":
        return make_radiogenomic_dnn(plan).eval()
    if module == "translation":
        return make_translators(plan).eval()
    if module == "gan" and plan.gan.generator_is_private:
        return make_generator(plan).eval()
    raise ValueError(f"no patient has a loss of {module} that a coordinator could compute")


def patient_loss(
    plan: StudyPlan, module: Module, genes: Tensor, morphology: Tensor, labels: Tensor, generator: torch.Generator
) -> Loss:
    """The training loss of one patient, without dropout and averaged over a few draws of the latent noise.

    Args:
        plan: the study plan.
        module: autoencoder or radiogenomic DNN.
        genes: (N, G).
        morphology: (N, F) in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
        generator: of the latent noise, the same for all patients and rounds.
    """
    noise = torch.randn(_DRAWS, plan.autoencoder.latent_dim, generator=generator)

    def of_autoencoder(model: nn.Module, row: int) -> Tensor:
        profiles = genes[row].expand(_DRAWS, -1)
        return autoencoder_losses(model, profiles, noise, plan.autoencoder.kl_weight).mean()

    def of_dnn(model: nn.Module, row: int) -> Tensor:
        some = slice(row, row + 1)
        return radiogenomic_losses(model, genes[some], morphology[some], labels[some])[0]

    return of_autoencoder if module == "autoencoder" else of_dnn


def translation_loss(plan: StudyPlan, volumes: Tensor) -> Loss:
    """The cycle and identity losses of one patient, averaged over a few slices of each domain that the patient has.

    Args:
        plan: the study plan.
        volumes: (N, C + 1, S, H, W) in [-1, 1], image channels and mask channel.
    """
    section, directions = section_of(plan), (TO_TARGET, TO_SOURCE)
    domains = source_and_target(plan, volumes)

    def of_translators(model: nn.Module, row: int) -> Tensor:
        losses = []
        for domain, direction in zip(domains, directions, strict=True):
            places = domain.member[row].nonzero().flatten()
            if len(places):
                some = places[torch.linspace(0, len(places) - 1, min(_SLICES, len(places))).round().long()]
                x = domain.slices[row][:, some].transpose(0, 1).float()
                fake = model.get_submodule(direction)(x)
                losses.append(cycle_and_identity_losses(section, model, x, fake, direction).mean())
        return torch.stack(losses).sum()

    return of_translators


def image_loss(
    plan: StudyPlan,
    morphology: Tensor,
    labels: Tensor,
    volumes: Tensor,
    generator: torch.Generator,
    stage: Stage | None = None,
) -> Loss:
    """How far (mean absolute difference) what the generator makes for a patient's condition is from the patient's slices.

    Over a few slices, each with a latent vector of its own.

    Args:
        plan: the study plan.
        morphology: (N, F) in [0, 1], NaN where not measured.
        labels: (N,) class codes, -1 where unknown.
        volumes: (N, C + 1, S, H, W) in [-1, 1], image channels and mask channel.
        generator: of the latent vectors, the same for all patients and rounds.
        stage: of a growing generator; None is the full size.
    """
    depth = plan.image.slices
    places = torch.linspace(0, depth - 1, min(_SLICES, depth) + 2)[1:-1].round().long()
    z = torch.randn(len(places), plan.gan.latent_dim, generator=generator)
    positions, classes = slice_positions(depth)[places], len(plan.label.classes)

    def of_generator(model: nn.Module, row: int) -> Tensor:
        count = len(places)
        code = condition(labels[row].expand(count), morphology[row].expand(count, -1), positions, classes)
        real = at_stage(volumes[row][:, places].transpose(0, 1).float(), stage, plan.image.size)
        distance: Tensor = (model(z, code, stage) - real).abs().mean()
        return distance

    return of_generator


def update_alignment(
    model: nn.Module,
    loss: Loss,
    rows: dict[str, list[int]],
    reference: list[int],
    transcript: Transcript,
    module: Module,
    clip: float,
    loss_in: Callable[[int], Loss] | None = None,
) -> dict[str, Scores]:
    """Alignment of each site's updates with the patients' own gradients, summed over all rounds.

    Gradients are taken at the weights that were sent, and clipped as in training. What all patients have in common says
    nothing of one of them, so directions count less the more the gradients of reference patients vary along them, as in a
    matched filter (their second moment, with its mean eigenvalue added to all).

    Args:
        model: the network, whose weights are overwritten.
        loss: of a patient.
        rows: by site, the patients to be scored.
        reference: patients of no interest, who are neither members nor non-members.
        transcript: what was sent and came back.
        module: of which network.
        clip: norm to which training clipped a patient's gradient.
        loss_in: the loss in a round (from 1), where it is not the same in all: a growing generator's.

    Returns:
        Scores by site, in the order of its `rows`.
    """
    scores = {site: np.zeros(len(numbers)) for site, numbers in rows.items()}
    rounds = sorted({number for site in rows for number in transcript.rounds(module, site)})
    for number in rounds:
        sent = transcript.sent(module, number)[WEIGHTS[module]]
        model.load_state_dict(sent)
        loss = loss if loss_in is None else loss_in(number)
        weigh = _whitener([_gradient(model, loss, row) for row in reference[:_MOST_REFERENCES]])
        for site, numbers in rows.items():
            if number not in transcript.rounds(module, site):
                continue
            direction = weigh(_update(model, sent, transcript.reply(module, number, site)))
            direction = direction / direction.norm().clamp(min=_TINY)
            for place, row in enumerate(numbers):
                gradient = _gradient(model, loss, row)
                scores[site][place] -= float(direction @ gradient) / max(float(gradient.norm()), clip)
    return scores


def loss_drop(
    model: nn.Module, loss: Loss, rows: dict[str, list[int]], transcript: Transcript, module: Module
) -> dict[str, Scores]:
    """By how much the site's last reply lowered each patient's loss against what the study started from.

    Yeom et al. (2018) score by the loss; its value before training takes out how hard a patient is to begin with (Watson et
    al., 2022). Arguments and result as of `update_alignment`.
    """
    found: dict[str, Scores] = {}
    for site, numbers in rows.items():
        rounds = transcript.rounds(module, site)
        values = []
        for state in (
            transcript.sent(module, rounds[0])[WEIGHTS[module]],
            transcript.reply(module, rounds[-1], site),
        ):
            model.load_state_dict(state)
            with torch.no_grad():
                values.append(np.array([float(loss(model, row)) for row in numbers]))
        found[site] = values[0] - values[1]
    return found


def _gradient(model: nn.Module, loss: Loss, row: int) -> Tensor:
    """(P,) the gradient of one patient's loss by all parameters."""
    # What a growing generator does not use at a stage has no part in the loss.
    gradients = torch.autograd.grad(
        loss(model, row), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _update(model: nn.Module, sent: State, received: State) -> Tensor:
    return torch.cat([(received[name] - sent[name]).reshape(-1) for name, _ in model.named_parameters()])


def _whitener(gradients: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Multiplies (P,) by the inverse of the second moment of R gradients, regularised; by a constant factor.

    There are far more parameters than gradients, so the inverse is that of a matrix of size R (Woodbury).
    """
    if not gradients:
        return lambda update: update
    rows = torch.stack(gradients)
    gram = rows @ rows.T
    inverse = torch.linalg.inv(gram + gram.diagonal().mean() * torch.eye(len(rows)))
    return lambda update: update - rows.T @ (inverse @ (rows @ update))
