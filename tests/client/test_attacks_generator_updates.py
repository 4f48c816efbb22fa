"""A generator with a private gradient of its own is attacked through its updates, at the resolution that a round trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from fedsynth.attacks.rates import roc_area
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.updates import Loss, image_loss, loss_drop, network, update_alignment
from fedsynth.models.growth import active_parameters, stage_at
from fedsynth.plan import StudyPlan
from fedsynth_server.checkpoint import first_state

MEMBERS, OTHERS, SAMPLE = 10, 30, 30
AUXILIARY: dict[str, Any] = {"l1_weight": 5.0, "latent_dim": 2}
GROWN = {**AUXILIARY, "architecture": "progressive", "growth": [1, 1, 1], "rounds": 3}


@pytest.mark.parametrize(
    ("options", "noise", "least", "most"),
    [
        (AUXILIARY, 0.0, 0.68, 1.0),
        (AUXILIARY, 1000.0, 0.3, 0.67),
        (GROWN, 0.0, 0.68, 1.0),
        ({"architecture": "vae", "latent_dim": 2}, 0.0, 0.68, 1.0),
    ],
    ids=["auxiliary", "auxiliary, noise", "grown", "vae"],
)
def test_members_are_told_from_others_by_how_they_pulled_the_generator(
    tiny_plan: StudyPlan, tmp_path: Path, options: dict[str, Any], noise: float, least: float, most: float
) -> None:
    values = tiny_plan.model_dump()
    values["gan"] |= options
    plan = StudyPlan.model_validate(values)
    generator = torch.Generator().manual_seed(1)
    count, features = MEMBERS + OTHERS + SAMPLE, len(plan.morphology.features)
    # Each patient has a coarse pattern of their own, which 8 x 8 pixels still show.
    coarse = torch.randn(count, 4, 4, 4, generator=generator).tanh()
    volumes = interpolate(coarse, scale_factor=8)[:, :, None].expand(-1, -1, plan.image.slices, -1, -1)
    morphology, labels = torch.rand(count, features, generator=generator), torch.arange(count) % 2

    def loss_in(number: int) -> Loss:
        stage = stage_at(plan, number * plan.gan.steps_per_round - 1)
        return image_loss(plan, morphology, labels, volumes, torch.Generator().manual_seed(3), stage)

    model, transcript = network(plan, "gan"), Transcript(tmp_path)
    model.load_state_dict(first_state(plan, None).weights["generator"])
    for number in range(1, plan.gan.rounds + 1):
        transcript.write_sent("gan", number, {"generator": model.state_dict()})
        # One step down the members' gradients, for latent vectors that the coordinator happens to know.
        mean = torch.stack([loss_in(number)(model, row) for row in range(MEMBERS)]).mean()
        moved = [
            model.get_parameter(name)
            for name in active_parameters(model, stage_at(plan, number * plan.gan.steps_per_round - 1))
        ]
        gradients = torch.autograd.grad(mean, moved)
        scale = torch.cat([gradient.flatten() for gradient in gradients]).square().mean().sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter -= 0.1 * (gradient + noise * scale * torch.randn(gradient.shape, generator=generator))
        transcript.write_reply("gan", number, "a", model.state_dict())
    rows, reference = list(range(MEMBERS + OTHERS)), list(range(MEMBERS + OTHERS, count))
    clip, last = plan.gan.max_grad_norm, loss_in(plan.gan.rounds)
    scores = update_alignment(model, last, {"a": rows}, reference, transcript, "gan", clip, loss_in)["a"]
    assert least <= roc_area(scores[:MEMBERS], scores[MEMBERS:]).value <= most
    assert len(loss_drop(model, last, {"a": rows}, transcript, "gan")["a"]) == len(rows)


def test_a_generator_that_sees_patients_through_a_discriminator_has_no_such_loss(tiny_plan: StudyPlan) -> None:
    with pytest.raises(ValueError, match="no patient has a loss"):
        network(tiny_plan, "gan")
