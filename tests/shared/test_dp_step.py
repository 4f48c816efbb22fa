"""The private step does what its derivation says, and the checks used here notice when it does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn

from fedsynth.dp.randomness import Randomness, SeededRandomness
from fedsynth.dp.step import Backend, PrivateModel, make_private, private_step

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

FEATURES = 5
BACKEND: list[Backend] = ["bookkeeping"]


class NoNoise:
    """Randomness whose Gaussian values are all 0, so that what is left of a step is its clipped sum."""

    private = False
    description = "no noise"

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


@dataclass(frozen=True)
class Setting:
    noise_multiplier: float = 1.0
    clip: float = 0.5
    expected_batch: int = 8
    randomness: Randomness = field(default_factory=NoNoise)
    backend: Backend = field(default_factory=lambda: BACKEND[-1])


@pytest.fixture(params=["bookkeeping", "hooks"], autouse=True)
def _each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file runs with both ways to clip."""
    BACKEND.append(request.param)
    yield
    BACKEND.pop()


PublicLoss = Callable[[nn.Module], Tensor]
# Model, setting, patients (n, k, FEATURES + 1) and public loss; changes the model by one step of learning rate 1.
Step = Callable[[nn.Module, Setting, Tensor, PublicLoss | None], None]


def network(seed: int = 0, width: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 1))


def losses(model: nn.Module, items: Tensor) -> Tensor:
    """One loss an item; the last column scales its gradient."""
    return items[:, -1] * model(items[:, :-1])[:, 0]


def patients(count: int, items: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, items, FEATURES + 1, generator=generator)
    # Some patients far above the clipping norm, some far below.
    drawn[..., -1] *= torch.logspace(-3, 3, max(count, 1))[:count, None]
    return drawn


def large_public_loss(model: nn.Module) -> Tensor:
    points = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(9))
    return 1000.0 * model(points).mean()


def flat(tensors: object) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])  # type: ignore[attr-defined]


def update(step: Step, setting: Setting, batch: Tensor, public: PublicLoss | None = None, seed: int = 0) -> Tensor:
    """The step's update: weights before minus weights after."""
    model = network(seed)
    before = flat(model.parameters())
    step(model, setting, batch, public)
    return before - flat(model.parameters())


def gradient_of_patient(model: nn.Module, items: Tensor) -> Tensor:
    return flat(torch.autograd.grad(losses(model, items).mean(), list(model.parameters())))


def derived_update(setting: Setting, batch: Tensor, public: PublicLoss | None) -> Tensor:
    """The formula, one patient at a time with plain autograd."""
    model = network()
    total = torch.zeros_like(flat(model.parameters()))
    for items in batch:
        gradient = gradient_of_patient(model, items)
        total += gradient * min(1.0, setting.clip / float(gradient.norm()))
    result = total / setting.expected_batch
    if public is not None:
        result = result + flat(torch.autograd.grad(public(model), list(model.parameters())))
    return result


def of(batch: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """The losses of `batch` (n, k, FEATURES + 1) by positions in it."""
    return lambda module, positions: losses(module, batch[positions].flatten(0, 1))


def ours(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    private_step(_private(model, setting), len(batch), of(batch), public, items_per_patient=batch.shape[1])


def _private(model: nn.Module, setting: Setting) -> PrivateModel:
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=setting.noise_multiplier,
        max_grad_norm=setting.clip,
        expected_batch=setting.expected_batch,
        randomness=setting.randomness,
        backend=setting.backend,
    )


# ---- the checks -----------------------------------------------------------------------------------------------------


def check_formula(step: Step) -> None:
    for count, items, public in ((3, 1, None), (11, 1, large_public_loss), (3, 4, large_public_loss), (0, 1, None)):
        setting, batch = Setting(), patients(count, items)
        torch.testing.assert_close(
            update(step, setting, batch, public), derived_update(setting, batch, public), rtol=1e-4, atol=1e-6
        )


def check_sensitivity(step: Step) -> None:
    setting, cohort = Setting(), patients(5, 4)
    model = network()
    for weight in (1e-3, 1.0, 1e6):
        newcomer = patients(1, 4, seed=3)
        newcomer[..., -1] = weight
        neighbour = torch.cat([cohort, newcomer])
        change = (update(step, setting, neighbour) - update(step, setting, cohort)) * setting.expected_batch
        own = float(gradient_of_patient(model, newcomer[0]).norm())
        assert float(change.norm()) <= setting.clip * (1 + 1e-4)
        assert float(change.norm()) == pytest.approx(min(own, setting.clip), rel=2e-3)


def check_noise(step: Step) -> None:
    sigma, clip, batch = 3.0, 0.5, 8
    setting = Setting(sigma, clip, batch, SeededRandomness(5))
    # A wide network: many values of noise in one step.
    model = network(width=3000)
    before = flat(model.parameters())
    step(model, setting, patients(0, 1), None)
    noise = flat(model.parameters()) - before
    assert float(noise.std()) == pytest.approx(sigma * clip / batch, rel=0.03)
    assert abs(float(noise.mean())) < 6 * sigma * clip / batch / math.sqrt(len(noise))


CHECKS = {"formula": check_formula, "sensitivity": check_sensitivity, "noise": check_noise}


# ---- steps with a planted fault --------------------------------------------------------------------------------------


def without_noise(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    ours(model, replace(setting, noise_multiplier=0.0), batch, public)


def noise_for_the_mean(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    ours(model, replace(setting, noise_multiplier=setting.noise_multiplier / setting.expected_batch), batch, public)


def divided_by_the_drawn(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    ours(model, replace(setting, expected_batch=max(len(batch), 1)), batch, public)


def slices_clipped_singly(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    ours(model, setting, batch.flatten(0, 1)[:, None], public)


def not_clipped(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    wide = replace(setting, clip=1e9, noise_multiplier=setting.noise_multiplier * setting.clip / 1e9)
    ours(model, wide, batch, public)


def public_gradient_before_pre_step(
    model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None
) -> None:
    private = _private(model, setting)
    add_noise = private.optimizer.add_noise

    def add_noise_to_what_was_there() -> None:
        if public is not None:
            with private.public() as inner:
                public(inner).backward()
        add_noise()

    private.optimizer.add_noise = add_noise_to_what_was_there  # type: ignore[method-assign]
    private_step(private, len(batch), of(batch), None, items_per_patient=batch.shape[1])


def public_gradient_clipped(model: nn.Module, setting: Setting, batch: Tensor, public: PublicLoss | None) -> None:
    def clipped(inner: nn.Module) -> Tensor:
        assert public is not None
        loss = public(inner)
        norm = flat(torch.autograd.grad(loss, list(inner.parameters()), retain_graph=True)).norm()
        return loss * (setting.clip / norm).clamp(max=1.0)

    ours(model, setting, batch, None if public is None else clipped)


@pytest.mark.parametrize("check", CHECKS)
def test_the_private_step_keeps_to_its_derivation(check: str) -> None:
    CHECKS[check](ours)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (without_noise, "noise"),
        (noise_for_the_mean, "noise"),
        (divided_by_the_drawn, "formula"),
        (slices_clipped_singly, "formula"),
        (slices_clipped_singly, "sensitivity"),
        (not_clipped, "formula"),
        (not_clipped, "sensitivity"),
        (public_gradient_before_pre_step, "formula"),
        (public_gradient_clipped, "formula"),
    ],
)
def test_the_checks_notice_a_planted_fault(fault: Step, check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](fault)


# ---- single facts ----------------------------------------------------------------------------------------------------


def test_the_public_gradient_is_added_whole_and_without_noise() -> None:
    setting, batch = Setting(randomness=SeededRandomness(1)), patients(3, 1)
    alone = update(ours, setting, batch)
    again = Setting(randomness=SeededRandomness(1))
    both = update(ours, again, batch, large_public_loss)
    model = network()
    public = flat(torch.autograd.grad(large_public_loss(model), list(model.parameters())))
    assert float(public.norm()) > 100 * setting.clip
    torch.testing.assert_close(both - alone, public, rtol=1e-4, atol=1e-3)


def test_an_empty_draw_steps_with_noise_and_public_gradient() -> None:
    setting = Setting(randomness=SeededRandomness(2))
    assert float(update(ours, setting, patients(0, 1)).abs().min()) > 0
    quiet = update(ours, Setting(), patients(0, 4), large_public_loss)
    torch.testing.assert_close(quiet, derived_update(Setting(), patients(0, 4), large_public_loss))


def test_the_noise_does_not_depend_on_the_weights_nor_on_the_patients() -> None:
    def noise(batch: Tensor, seed: int) -> Tensor:
        noisy = Setting(randomness=SeededRandomness(4))
        return update(ours, noisy, batch, seed=seed) - update(ours, Setting(), batch, seed=seed)

    reference = noise(patients(0, 1), seed=0)
    torch.testing.assert_close(noise(patients(0, 1), seed=1), reference)
    torch.testing.assert_close(noise(patients(6, 1), seed=0), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("items", [1, 4])
@pytest.mark.parametrize("fault", [math.inf, -math.inf, math.nan, 3e38])
def test_a_patient_whose_gradient_is_not_finite_changes_the_sum_by_at_most_the_clip(fault: float, items: int) -> None:
    setting, cohort = Setting(), patients(5, items)
    strange = patients(1, items, seed=3)
    strange[0, 0, -1] = fault
    change = update(ours, setting, torch.cat([cohort, strange])) - update(ours, setting, cohort)
    assert bool(change.isfinite().all())
    assert float(change.norm()) * setting.expected_batch <= setting.clip * (1 + 1e-4)


def test_steps_do_not_remember_the_gradients_of_earlier_steps() -> None:
    setting, first, second = Setting(), patients(4, 2), patients(3, 2, seed=8)
    model = network()
    private = _private(model, setting)
    for batch in (first, second, patients(0, 2)):
        private_step(private, len(batch), of(batch), large_public_loss, items_per_patient=2)
    fresh = network()
    for batch in (first, second, patients(0, 2)):
        wrapped = copy.deepcopy(fresh)
        ours(wrapped, setting, batch, large_public_loss)
        fresh.load_state_dict(wrapped.state_dict())
    torch.testing.assert_close(flat(model.parameters()), flat(fresh.parameters()))


def test_losses_that_cannot_be_split_over_the_patients_are_refused() -> None:
    private = _private(network(), Setting())
    with pytest.raises(ValueError, match="split evenly"):
        private_step(private, 2, lambda module, _: losses(module, patients(3, 1).flatten(0, 1)))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(7), nn.SyncBatchNorm(7)])
def test_a_layer_that_mixes_samples_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 7), layer, nn.Linear(7, 1))
    with pytest.raises(UnsupportedModuleError):
        _private(model, Setting())


def test_losses_of_other_patients_than_those_asked_for_are_refused() -> None:
    private, batch = _private(network(), Setting()), patients(4, 1).flatten(0, 1)
    with pytest.raises(ValueError, match="split evenly"):
        private_step(private, 4, lambda module, _: losses(module, batch), chunk=2)
