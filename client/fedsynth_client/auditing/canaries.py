"""One run of a module with canaries: who was in, by fair coins, and what an auditor makes of what was released.

The auditor sees more than the coordinator does: of a network every round's weights from start to end, of the GAN the
discriminator, which never leaves a site. It knows all canaries and everything but the coins, the draws and the noise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import softplus

from fedsynth.auditing.one_run import Flags, Floats, Look
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.gene_autoencoder import autoencoder_losses, make_autoencoder
from fedsynth.models.images import make_discriminator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, radiogenomic_losses
from fedsynth.plan import Activity, StudyPlan
from fedsynth.records import State
from fedsynth_client.auditing.standins import (
    IMAGES,
    Noiseless,
    Patients,
    SameFakes,
    StandIn,
    canary_patients,
    has_default_options,
    proportional_gan,
    released,
    stand_in,
)
from fedsynth_client.training.statistic import TOTAL

_AT_ONCE = 64  # images whose gradients are computed together
_MOST_STEPS = 64  # of a stand-in over images that steps by gradient descent: patients' gradients are taken one by one
_SEEDS = (0.0, 0.5)
_NEARLY_EXACT = 1e-9  # of the largest eigenvalue: what steadies a least-squares fit without bending it


def run_with_canaries(
    plan: StudyPlan,
    module: Activity,
    block: Mechanism,
    rounds: int,
    members: Flags,
    guesses: tuple[int, ...],
    randomness: Randomness,
) -> list[Look]:
    """Run the client's training of `module` on the canaries that are in, and score all canaries.

    Args:
        plan: the plan.
        module: one of its modules.
        block: the mechanism of one round at a site.
        rounds: how many rounds there are.
        members: (m,) the coins.
        guesses: the numbers of guesses, fixed before.
        randomness: of draws and noise.

    Returns:
        One look for each number of guesses.
    """
    canaries = canary_patients(module, plan, len(members))
    drawn = canaries[torch.from_numpy(np.flatnonzero(members))]
    if module == "gan" and has_default_options(plan.gan):
        return _looks_at_gan(plan, canaries, drawn, block, rounds, guesses, randomness)
    if module in IMAGES:
        return _looks_at_networks(plan, module, canaries, drawn, block, rounds, guesses, randomness)
    stand = stand_in(plan, module, len(members), block.noise_multiplier)
    if not stand.weights:
        scores = stand.block(drawn, block, randomness).weights[TOTAL].double().numpy()
    else:
        scores = _alignment(stand, canaries, _moved(stand, drawn, block, rounds, randomness))
    return [Look(scores, count) for count in guesses]


def _moved(stand: StandIn, drawn: Patients, block: Mechanism, rounds: int, randomness: Randomness) -> State:
    """By how much the weights moved in all rounds together, each of which started from the same weights."""
    moved = {name: torch.zeros_like(tensor) for name, tensor in stand.weights.items()}
    for _ in range(rounds):
        result = stand.block(drawn, block, randomness)
        for name, tensor in result.weights.items():
            moved[name] += tensor - stand.weights[name]
    return moved


def _alignment(stand: StandIn, canaries: Patients, moved: State) -> Floats:
    """(m,) how far the weights moved down each canary's gradient at the weights that were sent.

    All canaries' gradients have one length there, so clipping them changes no order. The inner products with one
    direction are a derivative along it, which takes one pass for all canaries.
    """
    plan = stand.plan
    model: nn.Module = make_autoencoder(plan) if stand.module == "autoencoder" else make_radiogenomic_dnn(plan)
    model.eval()

    def losses(weights: State) -> Tensor:
        def network(*inputs: Tensor) -> Tensor:
            result: Tensor = functional_call(model, weights, inputs)
            return result

        if stand.module == "autoencoder":
            noise = torch.zeros(len(canaries), plan.autoencoder.latent_dim)
            return autoencoder_losses(network, canaries.rows, noise, plan.autoencoder.kl_weight)  # type: ignore[arg-type]
        return radiogenomic_losses(network, canaries.rows, canaries.morphology, canaries.labels)  # type: ignore[arg-type]

    slopes = jvp(losses, (stand.weights,), (moved,))[1]
    return -slopes.detach().double().numpy()


def _looks_at_gan(
    plan: StudyPlan,
    canaries: Patients,
    drawn: Patients,
    block: Mechanism,
    rounds: int,
    guesses: tuple[int, ...],
    randomness: Randomness,
) -> list[Look]:
    """Looks at the discriminator's weights, the canaries' gradients having been told apart.

    Images overlap in a discriminator's features. What it learned is a sum over canaries of their gradients times how
    often each was drawn, plus noise; the scores are the best linear estimate of these numbers. A look at all canaries
    is for a mechanism whose noise is missing: it takes the sum as exact.
    """
    stand = proportional_gan(plan, block.noise_multiplier)
    local = stand.local
    for _ in range(rounds):
        local = stand.block(drawn, block, randomness, local).local
    gradients = _clipped_gradients(stand, canaries)
    moved = torch.cat([(local[name] - start).flatten() for name, start in stand.local.items()]).double()
    observed = -moved * stand.unit / stand.plan.gan.max_grad_norm
    return _told_apart(gradients, observed, replace(block, steps=block.steps * rounds), guesses)


def watched(plan: StudyPlan, module: Activity, block: Mechanism, rounds: int) -> tuple[Mechanism, int]:
    """The rounds that are run with canaries, and the mechanism of one: all, or the first steps of what takes long.

    To see less of a mechanism bounds it as well, only lower.
    """
    if module not in IMAGES or (module == "gan" and has_default_options(plan.gan)):
        return block, rounds
    return replace(block, steps=1), min(block.steps * rounds, _MOST_STEPS)


def _looks_at_networks(
    plan: StudyPlan,
    module: Activity,
    canaries: Patients,
    drawn: Patients,
    block: Mechanism,
    rounds: int,
    guesses: tuple[int, ...],
    randomness: Randomness,
) -> list[Look]:
    """Looks at all that patients moved, of what was released and of what stayed, less what the same fakes moved.

    Each step starts from the same weights. A canary's gradient is what the training itself releases of it without noise.
    """
    stand = stand_in(plan, module, 0, 0.0)
    assert stand.trained is not None
    names = sorted(stand.trained)
    if module == "gan":  # one slice a patient: nothing is left to chance that need not be
        image = stand.plan.image.model_copy(update={"slices": 1})
        stand = replace(stand, plan=stand.plan.model_copy(update={"image": image}))
        canaries, drawn = (replace(patients, rows=patients.rows[:, :, :1]) for patients in (canaries, drawn))

    def moved(patients: Patients, mechanism: Mechanism, source: Randomness, seed: float = 0.0) -> Tensor:
        found = released(stand, stand.block(patients, mechanism, SameFakes(source, seed)))
        return torch.cat([found[name].flatten() for name in names])

    alone = replace(block, sample_rate=1.0)
    public = moved(canaries[:0], alone, Noiseless())
    observed = torch.stack([moved(drawn, block, randomness) - public for _ in range(rounds)]).sum(0)
    # Interpolates and latent vectors are drawn anew for whoever is drawn, so a canary has a gradient on average only.
    ways = []
    for seed in _SEEDS if _has_chance(stand.plan, module) else _SEEDS[:1]:
        without = moved(canaries[:0], alone, Noiseless(), seed)
        each = [moved(canaries[i : i + 1], alone, Noiseless(), seed) - without for i in range(len(canaries))]
        ways.append(torch.stack(each))
    gradients = torch.stack(ways).mean(0)
    chance = float((torch.stack(ways) - gradients).square().sum(-1).mean()) * len(ways) / max(len(ways) - 1, 1)
    return _told_apart(gradients, observed, replace(block, steps=rounds), guesses, chance)


def _has_chance(plan: StudyPlan, module: Activity) -> bool:
    penalised = plan.gan.lipschitz == "gradient_penalty" and plan.gan.penalty_at == "interpolates"
    return module == "gan" and (penalised or plan.gan.generator_is_private)


def _told_apart(
    gradients: Tensor, observed: Tensor, whole: Mechanism, guesses: tuple[int, ...], chance: float = 0.0
) -> list[Look]:
    """Looks at `observed` (d,), a noisy sum of canaries' clipped `gradients` (m, d) over the steps of `whole`.

    `chance` is by how much, squared, a canary's gradient differs from its mean whenever it is drawn.
    """
    # What all have in common says nothing of one of them.
    common = gradients.mean(0)
    common = common / common.norm()
    apart = gradients - (gradients @ common)[:, None] * common
    overlap, projected = apart @ apart.T, apart @ (observed - (observed @ common) * common)
    steps, rate = whole.steps, whole.sample_rate
    mean, spread = steps * rate, steps * rate * (1 - rate)
    unlike = chance * mean * len(gradients) / 2 / gradients.shape[1]
    noise = (steps * whole.noise_multiplier**2 + unlike) / (mean**2 / 4 + spread / 2)
    exact = _NEARLY_EXACT * float(torch.linalg.eigvalsh(overlap)[-1]) + unlike / (mean**2 / 4 + spread / 2)
    return [
        Look(_estimated(overlap, projected, exact if count == len(gradients) else noise), count) for count in guesses
    ]


def _estimated(overlap: Tensor, projected: Tensor, ridge: float) -> Floats:
    result: Floats = torch.linalg.solve(
        overlap + ridge * torch.eye(len(overlap), dtype=overlap.dtype), projected
    ).numpy()
    return result


def _clipped_gradients(stand: StandIn, canaries: Patients) -> Tensor:
    """(m, d) float64 gradients of the real-image loss at the first discriminator, shortened to norm 1."""
    model = make_discriminator(stand.plan)
    weights = {name.removeprefix("model/"): tensor for name, tensor in stand.local.items()}
    place = slice_positions(stand.plan.image.slices)[:1].expand(len(canaries))
    codes = condition(canaries.labels, canaries.morphology, place, len(stand.plan.label.classes))
    images = canaries.rows[:, :, 0].float()

    def loss(weights: State, image: Tensor, code: Tensor) -> Tensor:
        logit: Tensor = functional_call(model, weights, (image[None], code[None]))
        return softplus(-logit).sum()

    found = []
    for rows in torch.arange(len(canaries)).split(_AT_ONCE):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images[rows], codes[rows])
        found.append(torch.cat([gradients[name].flatten(1) for name in weights], dim=1).double())
    gradients = torch.cat(found)
    return gradients / gradients.norm(dim=1, keepdim=True).clamp(min=math.ulp(0.0))
