"""Adversarial losses are the formulas of their papers, and split into a real and a fake part."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from fedsynth.losses import fake_losses, generator_losses, real_losses, taken_for_real
from fedsynth.plan import AdversarialLoss

LOSSES: tuple[AdversarialLoss, ...] = get_args(AdversarialLoss)
SCORES = torch.tensor([-30.0, -2.5, -1.0, -0.3, 0.0, 0.4, 0.5, 1.0, 2.5, 30.0], dtype=torch.float64)
PARTS = {"real": real_losses, "fake": fake_losses, "generator": generator_losses}


def log_sigmoid(s: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-s))


# As the papers write them, D being the sigmoid of a score in the first.
FORMULAS: dict[tuple[str, AdversarialLoss], Callable[[Tensor], Tensor]] = {
    ("real", "bce"): lambda s: -log_sigmoid(s),
    ("fake", "bce"): lambda s: -log_sigmoid(-s),  # -log(1 - D)
    ("generator", "bce"): lambda s: -log_sigmoid(s),  # -log D, not log(1 - D)
    ("real", "wasserstein"): lambda s: -s,
    ("fake", "wasserstein"): lambda s: s,
    ("generator", "wasserstein"): lambda s: -s,
    ("real", "least_squares"): lambda s: 0.5 * (s - 1) ** 2,
    ("fake", "least_squares"): lambda s: 0.5 * s**2,
    ("generator", "least_squares"): lambda s: 0.5 * (s - 1) ** 2,
    ("real", "hinge"): lambda s: -torch.minimum(torch.zeros_like(s), s - 1),
    ("fake", "hinge"): lambda s: -torch.minimum(torch.zeros_like(s), -s - 1),
    ("generator", "hinge"): lambda s: -s,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_the_formula_of_its_paper_item_by_item(loss: AdversarialLoss, part: str) -> None:
    torch.testing.assert_close(PARTS[part](loss, SCORES), FORMULAS[part, loss](SCORES))


@pytest.mark.parametrize("loss", LOSSES)
def test_real_and_fake_parts_add_up_to_the_discriminators_loss(loss: AdversarialLoss) -> None:
    """Against the loss of both halves at once, the labels being 1 and 0 or the signs 1 and -1."""
    real, fake = SCORES[:5], SCORES[5:]
    scores, labels = torch.cat([real, fake]), torch.tensor([1.0] * 5 + [0.0] * 5, dtype=torch.float64)
    signs = 2 * labels - 1
    whole = {
        "bce": lambda: torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum"),
        "wasserstein": lambda: -(signs * scores).sum(),
        "least_squares": lambda: torch.nn.functional.mse_loss(scores, labels, reduction="sum") / 2,
        "hinge": lambda: (1 - signs * scores).clamp(min=0).sum(),
    }[loss]()
    torch.testing.assert_close(real_losses(loss, real).sum() + fake_losses(loss, fake).sum(), whole)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_a_finite_slope_at_scores_of_any_size(loss: AdversarialLoss, part: str) -> None:
    scores = torch.tensor([-1e4, -30.0, 0.1, 30.0, 1e4], requires_grad=True)
    values = PARTS[part](loss, scores)
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_networks_pull_scores_apart_and_the_generator_pulls_the_other_way(loss: AdversarialLoss) -> None:
    scores = torch.tensor([0.25], requires_grad=True)
    slope = {part: float(torch.autograd.grad(PARTS[part](loss, scores).sum(), scores)[0]) for part in PARTS}
    assert slope["real"] < 0 < slope["fake"]
    assert slope["generator"] < 0


@pytest.mark.parametrize(
    ("loss", "middle"), [("bce", 0.0), ("wasserstein", 0.0), ("least_squares", 0.5), ("hinge", 0.0)]
)
def test_what_scores_above_the_middle_of_both_targets_is_taken_for_real(loss: AdversarialLoss, middle: float) -> None:
    scores = torch.tensor([middle - 0.1, middle + 0.1])
    assert taken_for_real(loss, scores).tolist() == [False, True]
    # There both halves of the discriminator's loss weigh the same.
    at = torch.tensor([middle])
    if loss != "wasserstein":
        torch.testing.assert_close(real_losses(loss, at), fake_losses(loss, at))
