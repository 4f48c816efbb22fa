"""Adversarial losses of scores, one loss an item.

A discriminator's loss is a sum of a part over real and a part over fake items, so the real part can be clipped and noised
by patient while the fake part, which touches no patient, is added untouched.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus

from fedsynth.plan import AdversarialLoss


def real_losses(loss: AdversarialLoss, scores: Tensor) -> Tensor:
    """The discriminator's losses (B,) on real items of `scores` (B,).

    Args:
        loss: ``"bce"`` (Goodfellow et al. 2014), ``"wasserstein"`` (Arjovsky et al. 2017), ``"least_squares"`` (Mao et al.
            2017, real 1 and fake 0) or ``"hinge"`` (Lim and Ye 2017).
        scores: the discriminator's output, without a sigmoid.
    """
    if loss == "wasserstein":
        return -scores
    if loss == "least_squares":
        return (scores - 1) ** 2 / 2
    if loss == "hinge":
        return relu(1 - scores)
    return softplus(-scores)


def fake_losses(loss: AdversarialLoss, scores: Tensor) -> Tensor:
    """The discriminator's losses (B,) on fakes of `scores` (B,)."""
    if loss == "wasserstein":
        return scores
    if loss == "least_squares":
        return scores**2 / 2
    if loss == "hinge":
        return relu(1 + scores)
    return softplus(scores)


def generator_losses(loss: AdversarialLoss, scores: Tensor) -> Tensor:
    """The generator's losses (B,) on its fakes of `scores` (B,); of ``"bce"`` the non-saturating one."""
    if loss == "wasserstein" or loss == "hinge":
        return -scores
    if loss == "least_squares":
        return (scores - 1) ** 2 / 2
    return softplus(-scores)


def taken_for_real(loss: AdversarialLoss, scores: Tensor) -> Tensor:
    """Whether (B,) the discriminator takes items for real: scores above the middle between its two targets."""
    return scores > (0.5 if loss == "least_squares" else 0.0)
