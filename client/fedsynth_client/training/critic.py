"""What a discriminator learns from patients, what from fakes, and what a generator learns from it.

The losses are the plan's (`fedsynth.losses`). A gradient penalty at interpolates of a patient's slice and a fake (Gulrajani
et al. 2017) is part of the patient's gradient. One at fakes alone is public; it is R2 of Mescheder, Geiger, Nowozin
(2018), half the squared norm of the slope, which pulls it to 0: a target of 1 would need the reals on the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsynth import losses
from fedsynth.dp.functional import PatientLosses, gradient_penalties, input_gradients
from fedsynth.dp.step import PatientTensors, PublicLoss
from fedsynth.models.growth import Stage
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.plan import GanPlan
from fedsynth_client.training.images import Drawn, Showing


def penalised_at(gan: GanPlan) -> str:
    """Where the discriminator's slope is penalised: ``"interpolates"``, ``"fakes"`` or ``""``."""
    return gan.penalty_at if gan.lipschitz == "gradient_penalty" else ""


def critic_tensors(show: Showing, drawn: Drawn, generator: ImageGenerator, stage: Stage | None) -> PatientTensors:
    """What the discriminator's loss of drawn patients is computed from, each (p, k, ...).

    Slices and conditions; with a penalty at interpolates also the interpolates, made with fakes for the patient's own
    condition. The generator is a constant here.
    """
    interpolating = penalised_at(show.plan.gan) == "interpolates"
    if interpolating:
        z, share = show.noise(drawn, show.plan.gan.latent_dim), show.shares(drawn)

    def tensors(positions: Tensor) -> Sequence[Tensor]:
        real, code = show.slices(drawn, positions, stage)
        shown, shown_code = show.changed(drawn, positions, real, code, stage)
        found = [shown, shown_code]
        if interpolating:
            with torch.no_grad():
                fake = generator(z[positions].flatten(0, 1), code, stage)
            fake, _ = show.changed(drawn, positions, fake, code, stage)
            of_real = share[positions].flatten()[:, None, None, None]
            found.append(of_real * shown + (1 - of_real) * fake)
        return [tensor.unflatten(0, (len(positions), -1)) for tensor in found]

    return tensors


def critic_losses(gan: GanPlan, stage: Stage | None) -> PatientLosses:
    """The discriminator's losses (n,) on items of `critic_tensors`."""

    def of_items(model: nn.Module, shown: Tensor, code: Tensor, *interpolates: Tensor) -> Tensor:
        found = losses.real_losses(gan.loss, model(shown, code, stage))
        for points in interpolates:
            found = found + gan.penalty_weight * gradient_penalties(lambda x: model(x, code, stage), points)
        return found

    return of_items


def fakes_to_reject(show: Showing, generator: ImageGenerator, stage: Stage | None) -> tuple[Tensor, Tensor]:
    """A public batch, of the expected size of a private one, as the discriminator is shown it; and its conditions."""
    count = show.plan.gan.expected_batch
    code = show.synthetic_condition(count)
    with torch.no_grad():
        fake = generator(show.latent(count), code, stage)
        return show.shown(fake, code, show.changes_of_fakes(count, stage), stage)


def fake_loss(gan: GanPlan, fake: Tensor, code: Tensor, stage: Stage | None) -> PublicLoss:
    """The discriminator's loss on fakes, which touches no patient."""

    def loss(model: nn.Module) -> Tensor:
        found = losses.fake_losses(gan.loss, model(fake, code, stage)).mean()
        if penalised_at(gan) == "fakes":
            slopes = input_gradients(lambda x: model(x, code, stage), fake).flatten(1)
            found = found + gan.penalty_weight / 2 * slopes.square().sum(1).mean()
        return found

    return loss


def scores_of_new_fakes(
    show: Showing, generator: ImageGenerator, discriminator: nn.Module, stage: Stage | None
) -> Tensor:
    """(generator_batch,) what the discriminator thinks of fakes, for the generator to learn from."""
    count = show.plan.gan.generator_batch
    code = show.synthetic_condition(count)
    changes = show.changes_of_fakes(count, stage)
    scores: Tensor = discriminator(*show.shown(generator(show.latent(count), code, stage), code, changes, stage), stage)
    return scores


@dataclass
class Tally:
    """What a discriminator thought of the fakes of a block's generator steps: post-processing of noisy states."""

    loss: float = 0.0
    score: float = 0.0
    steps: int = 0

    def count(self, gan: GanPlan, scores: Tensor) -> None:
        """Take in the scores of one generator step, as they were before it."""
        with torch.no_grad():
            self.loss += float(losses.generator_losses(gan.loss, scores).mean())
            self.score += float(scores.mean())
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Over the steps; 0 without any."""
        count = max(self.steps, 1)
        return {"generator_loss": self.loss / count, "fake_score": self.score / count}
