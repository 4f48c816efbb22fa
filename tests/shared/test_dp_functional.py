"""The functional backend gives what autograd gives one patient at a time, clips one joint vector and keeps to the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fedsynth.dp.bookkeeping import UnsupportedLayerError
from fedsynth.dp.functional import (
    PatientLosses,
    clipped_sums_of,
    default_chunk,
    fixed_parametrisations,
    gradient_penalties,
    held,
)
from fedsynth.dp.randomness import Randomness, SeededRandomness
from fedsynth.dp.step import (
    Backend,
    PrivateModel,
    PublicLoss,
    PublicParts,
    clamp_weights,
    make_private,
    private_step,
    private_step_of,
)
from fedsynth.models.condition import condition_dim
from fedsynth.models.growth import Stage, active_parameters
from fedsynth.models.images import make_discriminator
from fedsynth.plan import StudyPlan

SIZE, CHANNELS, LATENT = 8, 2, 3


class Quiet:
    """Randomness without noise."""

    private = False
    description = "no noise"

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


class Critic(nn.Module):
    """Convolutions, group norm and a linear score; the middle layer may be spectrally normalised."""

    def __init__(self, spectral: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, 4, 4, 2, 1)
        middle = nn.Conv2d(4, 6, 3, 1, 1, bias=False)
        self.middle = spectral_norm(middle) if spectral else middle
        self.norm = nn.GroupNorm(2, 6)
        self.score = nn.Linear(6 * (SIZE // 2) ** 2, 1)

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.middle(torch.tanh(self.first(x)))), 0.2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.features(x).flatten(1))[:, 0]
        return scores


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LATENT, 4 * (SIZE // 2) ** 2)
        self.last = nn.ConvTranspose2d(4, CHANNELS, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = torch.tanh(self.last(torch.tanh(self.first(z)).reshape(-1, 4, SIZE // 2, SIZE // 2)))
        return image


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # norms start at 1 and 0, where some mistakes do not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def pair() -> nn.Module:
    return nn.ModuleDict({"generator": Generator(), "discriminator": Critic()})


def plain_losses(model: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> Tensor:
    return nn.functional.softplus(-model(real))


def penalised_losses(model: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> Tensor:
    """WGAN-GP's real part, with the penalty at interpolates of a real and a fake image."""
    return -model(real) + 10 * gradient_penalties(model, 0.3 * real + 0.7 * fake)


def joint_losses(model: nn.ModuleDict, real: Tensor, fake: Tensor, z: Tensor) -> Tensor:
    """The discriminator's real loss, and L1 and feature matching that must move the generator alone."""
    discriminator, made = model["discriminator"], model["generator"](z)
    features = held(discriminator, lambda critic: critic.features(made))
    matching = (features - discriminator.features(real).detach()).square().mean((1, 2, 3))
    return nn.functional.softplus(-discriminator(real)) + 2 * (made - real).abs().mean((1, 2, 3)) + matching


def joint_losses_by_hand(model: nn.ModuleDict, real: Tensor, fake: Tensor, z: Tensor) -> Tensor:
    """The same, with the discriminator's weights detached one by one."""
    critic, made = model["discriminator"], model["generator"](z)
    x = torch.tanh(nn.functional.conv2d(made, critic.first.weight.detach(), critic.first.bias.detach(), 2, 1))
    x = nn.functional.conv2d(x, critic.middle.weight.detach(), None, 1, 1)
    x = nn.functional.group_norm(x, 2, critic.norm.weight.detach(), critic.norm.bias.detach())
    features = nn.functional.leaky_relu(x, 0.2)
    matching = (features - critic.features(real).detach()).square().mean((1, 2, 3))
    return nn.functional.softplus(-critic(real)) + 2 * (made - real).abs().mean((1, 2, 3)) + matching


def one_at_a_time_penalised(model: nn.Module, real: Tensor, fake: Tensor, z: Tensor) -> Tensor:
    """`penalised_losses` by autograd's own double backward."""
    at = (0.3 * real + 0.7 * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
    return -model(real) + 10 * (slope.flatten(1).norm(dim=1) - 1).square()


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    losses: PatientLosses
    by_autograd: PatientLosses


CASES = {
    "plain": Case(Critic, plain_losses, plain_losses),
    "penalty": Case(Critic, penalised_losses, one_at_a_time_penalised),
    "spectral": Case(lambda: Critic(spectral=True), plain_losses, plain_losses),
    "spectral and penalty": Case(lambda: Critic(spectral=True), penalised_losses, one_at_a_time_penalised),
    "pair": Case(pair, joint_losses, joint_losses_by_hand),
}


def draw(patients: int, items: int, seed: int = 1) -> tuple[Tensor, ...]:
    """Real and fake images and latent vectors (P, k, ...); some patients are far brighter than others."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = (torch.randn(patients, items, CHANNELS, SIZE, SIZE, generator=generator) for _ in range(2))
    scale = torch.logspace(-1, 1, max(patients, 1))[:patients, None, None, None, None]
    return real * scale, fake, torch.randn(patients, items, LATENT, generator=generator)


def private(
    model: nn.Module,
    clip: float = 0.5,
    noise: float = 1.0,
    randomness: Randomness | None = None,
    backend: Backend = "functional",
    optimizer: torch.optim.Optimizer | None = None,
) -> PrivateModel:
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0) if optimizer is None else optimizer,
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch=8,
        randomness=Quiet() if randomness is None else randomness,
        backend=backend,
    )


def flat(tensors: object) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])  # type: ignore[attr-defined]


def step(
    stepped: PrivateModel,
    batch: Sequence[Tensor],
    losses: PatientLosses,
    public: PublicLoss | PublicParts | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The step's update times the expected batch: weights before minus weights after."""
    before = flat(stepped.model.parameters())
    private_step_of(stepped, len(batch[0]), lambda rows: [part[rows] for part in batch], losses, public, chunk=chunk)
    return (before - flat(stepped.model.parameters())) * 8


def gradient_of_patient(model: nn.Module, losses: PatientLosses, patient: Sequence[Tensor]) -> Tensor:
    parameters = list(model.parameters())
    value = losses(model, *patient).mean()
    return flat(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def after_one_use(model: nn.Module) -> nn.Module:
    """A copy whose spectral norms are where a step puts them, and stay there."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            module()
            module.eval()
    return moved


def clipped(gradient: Tensor, clip: float) -> Tensor:
    return gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))


@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_are_those_of_autograd_one_patient_at_a_time(name: str, items: int) -> None:
    case, batch = CASES[name], draw(5, items)
    model = seeded(case.make)
    alone = after_one_use(model)
    gradients = [gradient_of_patient(alone, case.by_autograd, [part[i] for part in batch]) for i in range(5)]
    norms = sorted(float(g.norm()) for g in gradients)
    clip = norms[2] * 1.01  # some are shortened and some are not
    torch.testing.assert_close(
        step(private(model, clip), batch, case.losses), sum(clipped(g, clip) for g in gradients), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_a_patient_s_own_gradient_is_that_of_autograd(name: str) -> None:
    case = CASES[name]
    model = seeded(case.make)
    alone = after_one_use(model)
    for i, chunk in ((0, 1), (3, 1)):
        patient = [part[i : i + 1] for part in draw(4, 3)]
        expected = gradient_of_patient(alone, case.by_autograd, [part[0] for part in patient])
        for repeated in (1, 2):  # one patient by plain autograd inside, two by vmap
            twice = [part.repeat(repeated, *(1 for _ in part.shape[1:])) for part in patient]
            found = step(private(copy.deepcopy(model), clip=1e6), twice, case.losses, chunk=chunk * repeated)
            error = float((found / repeated - expected).norm() / expected.norm())
            assert error < 1e-5, f"patient {i} times {repeated}"


@pytest.mark.parametrize("spectral", [False, True])
def test_it_is_book_keeping_on_a_loss_that_both_can_do(spectral: bool) -> None:
    found = [
        step(private(seeded(lambda: Critic(spectral)), backend=backend), draw(6, 2), plain_losses)
        for backend in ("functional", "bookkeeping")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_step_of_tensors_is_the_same_with_the_hooks() -> None:
    found = [
        step(private(seeded(Critic), backend=backend), draw(6, 2), plain_losses) for backend in ("functional", "hooks")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    scale=st.floats(1e-3, 1e4),
    clip=st.floats(1e-3, 10),
    seed=st.integers(0, 99),
    items=st.integers(1, 3),
)
def test_no_patient_moves_the_joint_vector_of_two_networks_by_more_than_the_clip(
    scale: float, clip: float, seed: int, items: int
) -> None:
    batch = draw(1, items, seed)
    patient = [batch[0] * scale, *batch[1:]]
    model = seeded(pair)
    own = float(gradient_of_patient(model, joint_losses_by_hand, [part[0] for part in patient]).norm())
    moved = float(step(private(model, clip), patient, joint_losses).norm())
    # Read off weights in float32, of which there are hundreds: their rounding is in the tolerance.
    rounding = 8 * 1e-6
    assert moved <= clip * (1 + 1e-4) + rounding
    assert moved == pytest.approx(min(own, clip), rel=2e-3, abs=rounding)


def test_the_parts_of_a_joint_loss_move_the_networks_that_they_are_for() -> None:
    """The auxiliary part does not move the discriminator, and the discriminator's part not the generator."""
    batch = draw(4, 1)
    together = step(private(seeded(pair), clip=1e6), batch, joint_losses)
    real_part = step(
        private(seeded(pair), clip=1e6), batch, lambda m, real, _, __: nn.functional.softplus(-m["discriminator"](real))
    )
    of_generator = sum(parameter.numel() for parameter in Generator().parameters())
    assert not bool(real_part[:of_generator].any()) and float(together[:of_generator].norm()) > 0.1
    torch.testing.assert_close(together[of_generator:], real_part[of_generator:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", [math.inf, math.nan])
@pytest.mark.parametrize("chunk", [1, 16])
def test_a_patient_whose_gradient_is_not_finite_counts_as_0(fault: float, chunk: int) -> None:
    batch = draw(4, 2)
    strange = [part.clone() for part in batch]
    strange[0][2, 0] = fault
    without = [part[[0, 1, 3]] for part in batch]
    found = step(private(seeded(Critic)), strange, penalised_losses, chunk=chunk)
    expected = step(private(seeded(Critic)), without, penalised_losses, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 16])
def test_a_patient_whose_gradient_overflows_moves_nothing(chunk: int) -> None:
    batch = [torch.tensor([[[1.0, 2.0]], [[3e38, 3e38]], [[2.0, 1.0]]])]
    found = step(private(nn.Linear(2, 1, bias=False)), batch, lambda m, x: 2 * m(x)[:, 0], chunk=chunk)
    expected = sum(clipped(2 * batch[0][i, 0], 0.5) for i in (0, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["spectral and penalty", "pair"])
def test_the_result_does_not_depend_on_the_chunk(name: str) -> None:
    case, batch = CASES[name], draw(7, 2)
    whole, *others = (step(private(seeded(case.make)), batch, case.losses, chunk=chunk) for chunk in (7, 1, 3, None))
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)


def test_the_vectors_of_spectral_normalisation_advance_once_a_step_whatever_is_drawn() -> None:
    vectors = []
    for patients, chunk in ((0, 1), (5, 1), (5, 5)):
        model = seeded(lambda: Critic(spectral=True))
        step(private(model), draw(patients, 1), penalised_losses, chunk=chunk)
        vectors.append(model.middle.parametrizations.weight[0]._u.clone())
        assert all(module.training for module in model.modules())
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])
    assert not torch.equal(vectors[0], seeded(lambda: Critic(spectral=True)).middle.parametrizations.weight[0]._u)


def test_noise_has_its_scale_in_every_network_and_is_all_that_an_empty_draw_gives() -> None:
    sigma, clip = 3.0, 0.5
    model = nn.ModuleDict({"generator": nn.Linear(60, 60), "discriminator": nn.Linear(60, 60)})
    noisy = private(model, clip, sigma, SeededRandomness(5))
    noise = step(noisy, [torch.zeros(0, 1, 60)], lambda m, x: m["discriminator"](m["generator"](x)).sum(1))
    for part in noise.split(len(noise) // 2):
        assert float(part.std()) == pytest.approx(sigma * clip, rel=0.05)

    quiet, loud = (
        step(
            private(copy.deepcopy(model), clip, sigma, source),
            [torch.ones(3, 2, 60)],
            lambda m, x: m["generator"](x).sum(1),
        )
        for source in (Quiet(), SeededRandomness(6))
    )
    for part in (loud - quiet).split(len(noise) // 2):
        assert float(part.std()) == pytest.approx(sigma * clip, rel=0.05)


def fake_part(model: nn.ModuleDict) -> Tensor:
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(3))
    return 50 * nn.functional.softplus(model["discriminator"](model["generator"](z).detach())).mean()


def adversarial_part(model: nn.ModuleDict) -> Tensor:
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(4))
    return 50 * nn.functional.softplus(-model["discriminator"](model["generator"](z))).mean()


def test_public_gradients_of_two_networks_arrive_whole_and_without_noise() -> None:
    batch, model = draw(3, 1), seeded(pair)
    generator, discriminator = (list(model[name].parameters()) for name in ("generator", "discriminator"))
    expected = torch.cat(
        [
            flat(torch.autograd.grad(adversarial_part(model), generator)),
            flat(torch.autograd.grad(fake_part(model), discriminator)),
        ]
    )
    alone = step(private(copy.deepcopy(model), randomness=SeededRandomness(1)), batch, joint_losses)
    stepped = private(copy.deepcopy(model), randomness=SeededRandomness(1))
    parts: PublicParts = [
        (fake_part, list(stepped.model["discriminator"].parameters())),
        (adversarial_part, list(stepped.model["generator"].parameters())),
    ]
    both = step(stepped, batch, joint_losses, parts)
    torch.testing.assert_close((both - alone) / 8, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.norm()) > 2  # several clipping norms


def test_a_public_loss_may_leave_parameters_alone_but_not_move_others() -> None:
    model = seeded(pair)
    found = step(private(model), draw(0, 1), joint_losses, fake_part)
    of_generator = sum(parameter.numel() for parameter in model["generator"].parameters())
    assert not bool(found[:of_generator].any()) and bool(found[of_generator:].any())
    only = private(model, optimizer=torch.optim.SGD(model["discriminator"].parameters(), lr=1.0))
    with pytest.raises(ValueError, match="has not"):
        step(only, draw(0, 1), joint_losses, [(adversarial_part, list(model["generator"].parameters()))])


def test_what_the_optimiser_has_not_is_neither_clipped_nor_noised_nor_moved() -> None:
    model, batch = seeded(pair), draw(4, 1)
    trained = list(model["discriminator"].parameters())
    before = flat(model["generator"].parameters())
    only = private(model, clip=0.2, optimizer=torch.optim.SGD(trained, lr=1.0))
    alone = copy.deepcopy(model)
    expected = torch.zeros(sum(p.numel() for p in trained))
    for i in range(4):
        value = joint_losses_by_hand(alone, *(part[i] for part in batch)).mean()
        expected += clipped(flat(torch.autograd.grad(value, list(alone["discriminator"].parameters()))), 0.2)
    found = step(only, batch, joint_losses)
    assert torch.equal(flat(model["generator"].parameters()), before)
    torch.testing.assert_close(found[-len(expected) :], expected, rtol=1e-4, atol=1e-5)


def test_networks_keep_learning_rates_of_their_own() -> None:
    batch, updates = draw(4, 1), []
    for rates in ((1.0, 1.0), (0.25, 2.0)):
        model = seeded(pair)
        groups = [
            {"params": list(model[name].parameters()), "lr": rate}
            for name, rate in zip(("generator", "discriminator"), rates, strict=True)
        ]
        stepped = private(model, optimizer=torch.optim.SGD(groups, lr=9.0), randomness=SeededRandomness(2))
        updates.append(step(stepped, batch, joint_losses).split([len(flat(group["params"])) for group in groups]))
    for same, other, factor in zip(*updates, (0.25, 2.0), strict=True):
        torch.testing.assert_close(other, factor * same, rtol=1e-3, atol=1e-5)


class Counting(nn.Module):
    """Adds up what it sees, as running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1.0
        return self.linear(x)[:, 0] + self.seen


@pytest.mark.parametrize("patients", [1, 3])
def test_a_buffer_that_would_carry_patients_on_is_refused(patients: int) -> None:
    model = Counting()
    with pytest.raises((UnsupportedLayerError, RuntimeError)):
        step(private(model), [torch.ones(patients, 2, 3)], lambda m, x: m(x))
    assert float(model.seen) == 0.0


def test_a_layer_that_mixes_samples_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError):
        private(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))


def test_dropout_draws_for_each_patient() -> None:
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Dropout(0.5))
    masks: list[Tensor] = []
    for repeats in (1, 2):
        torch.manual_seed(0)
        masks.append(
            step(private(copy.deepcopy(model), clip=1e9), [torch.ones(repeats, 1, 40)], lambda m, x: m(x).sum(1))
        )
    assert not torch.allclose(masks[1], 2 * masks[0]), "the same mask twice"


def test_wrong_uses_are_refused() -> None:
    stepped, batch = private(seeded(Critic)), draw(3, 2)
    with pytest.raises(ValueError, match="private_step_of"):
        private_step(stepped, 3, lambda m, rows: m(batch[0][rows, 0]))
    with pytest.raises(ValueError, match="shape"):
        step(stepped, batch, lambda m, real, fake, z: m(real)[:1])
    with pytest.raises(ValueError, match="patients"):
        private_step_of(stepped, 3, lambda rows: [batch[0][:2]], plain_losses)
    with pytest.raises(ValueError, match="patients"):
        private_step_of(stepped, 3, lambda rows: [batch[0][rows], batch[1][rows, :1]], plain_losses)
    with pytest.raises(ValueError, match="chunk"):
        step(stepped, batch, plain_losses, chunk=0)
    with pytest.raises(UnsupportedLayerError, match="has not"):
        other = private(seeded(Critic), optimizer=torch.optim.SGD(seeded(Critic).parameters(), lr=1.0))
        step(other, batch, plain_losses)
    with pytest.raises(ValueError, match="autocast"):
        make_private(
            seeded(Critic),
            torch.optim.SGD(seeded(Critic).parameters(), lr=1.0),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch=1,
            randomness=Quiet(),
            backend="functional",
            autocast=torch.bfloat16,
        )


def test_fewer_patients_are_held_at_once_the_larger_the_model() -> None:
    small, large = (default_chunk([torch.empty(size, device="meta")]) for size in (1000, 100_000_000))
    assert small > large == 1


def test_clamping_limits_every_weight_and_leaves_small_ones_alone() -> None:
    model = nn.Linear(30, 30)
    before = flat(model.parameters())
    clamp_weights(model.parameters(), 0.05)
    torch.testing.assert_close(flat(model.parameters()), before.clamp(-0.05, 0.05))
    assert bool((before.abs() > 0.05).any()) and bool((before.abs() < 0.05).any())


def test_a_penalty_of_a_flat_critic_has_a_finite_gradient() -> None:
    critic = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(critic.weight)
    penalty = gradient_penalties(lambda x: critic(x)[:, 0], torch.randn(3, 4))
    torch.testing.assert_close(penalty, torch.ones(3), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(penalty.sum(), critic.weight)
    assert bool(gradient.isfinite().all())


def study(architecture: str) -> StudyPlan:
    training = {"rounds": 1, "steps_per_round": 1, "expected_batch": 1, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    section = {**training, "budget_share": 0.3}
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of the private step",
            "image": {"sequences": ["T1c"], "size": 32, "slices": 2},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": ["volume", "position_left", "position_posterior", "position_superior"]},
            "privacy": {"epsilon": 1.0},
            "autoencoder": section,
            "radiogenomics": section,
            "gan": {**section, "architecture": architecture, "spectral_norm": True, "discriminator_width": 4},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


@pytest.mark.parametrize(
    ("architecture", "alpha"),
    [("dcgan", None), ("progressive", None), ("progressive", 0.4), ("enhanced", None), ("enhanced", 0.4)],
)
def test_a_penalty_inside_the_clip_is_exact_for_every_architecture(architecture: str, alpha: float | None) -> None:
    """Also while a resolution fades in: only what the stage uses trains."""
    stage = None if alpha is None else Stage(1, alpha)
    model = seeded(lambda: make_discriminator(study(architecture)))
    names = list(dict(model.named_parameters())) if stage is None else active_parameters(model, stage)
    trained = [parameter for name, parameter in model.named_parameters() if name in set(names)]
    generator = torch.Generator().manual_seed(2)
    size = 32 if stage is None else 16
    images = torch.randn(3, 2, 2, size, size, generator=generator)
    codes = torch.rand(3, 2, condition_dim(len(study(architecture).label.classes), 4), generator=generator)

    def ours(m: nn.Module, x: Tensor, code: Tensor) -> Tensor:
        return -m(x, code, stage) + 10 * gradient_penalties(lambda at: m(at, code, stage), 0.5 * x)

    def by_autograd(m: nn.Module, x: Tensor, code: Tensor) -> Tensor:
        at = (0.5 * x).requires_grad_()
        (slope,) = torch.autograd.grad(m(at, code, stage).sum(), at, create_graph=True)
        return -m(x, code, stage) + 10 * (slope.flatten(1).norm(dim=1) - 1).square()

    alone = after_one_use(model)
    parameters = [dict(alone.named_parameters())[name] for name, p in model.named_parameters() if name in set(names)]
    expected = sum(
        flat(torch.autograd.grad(by_autograd(alone, images[i], codes[i]).mean(), parameters, materialize_grads=True))
        for i in range(3)
    )
    with fixed_parametrisations(model):
        found = flat(clipped_sums_of(model, trained, (images, codes), ours, 1e9))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
