"""The step of a study without privacy is plain gradient descent, and no private study can take it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fedsynth.dp.functional import gradient_penalties
from fedsynth.dp.plain import PlainModel, make_plain, plain_step, plain_step_of
from fedsynth.plan import PrivacyPlan

WITHOUT = PrivacyPlan(epsilon=math.inf)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def plain(model: nn.Module) -> PlainModel:
    return make_plain(model, torch.optim.SGD(model.parameters(), lr=1.0), WITHOUT)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def losses(model: nn.Module, items: Tensor) -> Tensor:
    return nn.functional.softplus(-model(items)[:, 0])


def public(model: nn.Module) -> Tensor:
    return 3 * model(torch.linspace(-1, 1, 12).reshape(4, 3)).square().mean()


@pytest.mark.parametrize("with_public", [False, True])
def test_the_step_is_that_of_torch_with_batch_norm_over_the_whole_draw(with_public: bool) -> None:
    items = 100 * torch.randn(5, 2, 3)  # far above any clipping norm
    ours, torchs = network(), network()
    plain_step_of(plain(ours), 5, lambda rows: [items[rows]], losses, public if with_public else None)
    optimizer = torch.optim.SGD(torchs.parameters(), lr=1.0)
    loss = losses(torchs, items.flatten(0, 1)).mean()
    (loss + public(torchs) if with_public else loss).backward()
    optimizer.step()
    torch.testing.assert_close(flat(ours), flat(torchs))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(torchs.named_buffers())[name])
    by_positions = network()
    plain_step(
        plain(by_positions), 5, lambda m, rows: losses(m, items[rows].flatten(0, 1)), public if with_public else None
    )
    torch.testing.assert_close(flat(by_positions), flat(ours))


def test_an_empty_draw_moves_on_the_public_loss_alone() -> None:
    ours, torchs = network(), network()
    plain_step_of(plain(ours), 0, lambda rows: [torch.zeros(0, 1, 3)], losses, public)
    optimizer = torch.optim.SGD(torchs.parameters(), lr=1.0)
    public(torchs).backward()
    optimizer.step()
    torch.testing.assert_close(flat(ours), flat(torchs))
    still = copy.deepcopy(ours)
    plain_step_of(plain(still), 0, lambda rows: [torch.zeros(0, 1, 3)], losses)
    assert torch.equal(flat(still), flat(ours))


def test_public_losses_move_their_own_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    at = torch.ones(2, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepped = plain(model)
    plain_step(
        stepped,
        0,
        lambda m, rows: torch.zeros(0),
        [(lambda m: (m["a"](at) + m["b"](at)).sum(), list(model["b"].parameters()))],
    )
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True]


def test_a_gradient_penalty_trains_without_privacy_too() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    items = torch.randn(6, 1, 3)

    def penalty(m: nn.Module, x: Tensor) -> Tensor:
        return gradient_penalties(lambda v: m(v)[:, 0], x)

    stepped = make_plain(model, torch.optim.SGD(model.parameters(), lr=0.05), WITHOUT)
    before = float(penalty(model, items[:, 0]).mean().detach())
    for _ in range(100):
        plain_step_of(stepped, 6, lambda rows: [items[rows]], penalty)
    assert float(penalty(model, items[:, 0]).mean().detach()) < before / 2


@pytest.mark.parametrize("epsilon", [1.0, 1e6])
def test_a_private_study_cannot_step_without_privacy(epsilon: float) -> None:
    model = network()
    with pytest.raises(ValueError, match="without clipping and noise"):
        make_plain(model, torch.optim.SGD(model.parameters(), lr=1.0), PrivacyPlan(epsilon=epsilon))
