"""Book-keeping gives the clipped sums that autograd gives one patient at a time, and refuses what it cannot cover."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from fedsynth.dp.bookkeeping import Bookkeeper, MixedSamplesError, UnsupportedLayerError, weights_of_one_step
from fedsynth.dp.bookkeeping.gradients import Ghost
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.dp.step import Backend, PrivateModel, make_private, private_step

PATIENTS = 6


class Quiet:
    """Randomness without noise."""

    private = False
    description = "no noise"

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


@dataclass(frozen=True)
class Case:
    """A model and the shape of one item that it takes; whole numbers below `entries` if that is given."""

    make: Callable[[], nn.Module]
    item: tuple[int, ...]
    entries: int | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():  # norms start at 1 and 0, where some mistakes do not show
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        return model

    def items(self, count: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.entries is not None:
            return torch.randint(self.entries, (count, *self.item), generator=generator)
        return torch.randn(count, *self.item, generator=generator)


class Head(nn.Module):
    """Features -> one value an item by fixed weights, with a curved loss so that gradients differ."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return (torch.tanh(x) * torch.linspace(-1, 2, x.shape[1])).sum(1)


class Attention(nn.Module):
    """Self-attention over pixels by 1 x 1 convolutions, as in SAGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        return x + (value @ weights.transpose(1, 2)).reshape(x.shape)


def sequence(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers), Head())


IMAGE = (4, 7, 6)
CASES = {
    "linear": Case(sequence(lambda: nn.Linear(5, 8), nn.Tanh, lambda: nn.Linear(8, 3, bias=False)), (5,)),
    "linear over tokens": Case(sequence(lambda: nn.Linear(5, 8), nn.Tanh, lambda: nn.Linear(8, 3)), (4, 5)),
    "linear over few tokens": Case(sequence(lambda: nn.Linear(20, 30)), (2, 20)),
    "convolution": Case(sequence(lambda: nn.Conv2d(4, 6, 3)), IMAGE),
    "convolution, few pixels": Case(sequence(lambda: nn.Conv2d(4, 32, 4, stride=2, padding=1)), IMAGE),
    "convolution, oblong": Case(sequence(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1))), IMAGE),
    "convolution, dilated": Case(sequence(lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False)), IMAGE),
    "convolution, groups": Case(sequence(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1)), IMAGE),
    "convolution, groups, few pixels": Case(
        sequence(lambda: nn.Conv2d(4, 64, 3, groups=2, stride=3, padding=1)), IMAGE
    ),
    "convolution, one group a channel": Case(sequence(lambda: nn.Conv2d(4, 8, 3, groups=4)), IMAGE),
    "convolution, same padding": Case(sequence(lambda: nn.Conv2d(4, 6, (3, 4), padding="same")), IMAGE),
    "convolution, reflected": Case(sequence(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE),
    "convolution, circular, few pixels": Case(
        sequence(lambda: nn.Conv2d(4, 40, 3, stride=2, padding=1, padding_mode="circular")), IMAGE
    ),
    "convolution, rows left over": Case(sequence(lambda: nn.Conv2d(4, 6, 2, stride=3)), IMAGE),
    "transposed convolution": Case(sequence(lambda: nn.ConvTranspose2d(4, 5, 4, stride=2, padding=1)), (4, 3, 5)),
    "transposed convolution, few pixels": Case(sequence(lambda: nn.ConvTranspose2d(4, 20, 4, stride=2)), (4, 3, 2)),
    "transposed convolution, output padding": Case(
        sequence(lambda: nn.ConvTranspose2d(4, 5, 3, stride=(2, 3), padding=(1, 0), output_padding=(1, 2))), (4, 3, 5)
    ),
    "transposed convolution, output padding over the stride": Case(
        sequence(lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, dilation=4, output_padding=3)), (4, 3, 5)
    ),
    "transposed convolution, groups, dilated": Case(
        sequence(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2, padding=2)), (4, 3, 5)
    ),
    "group norm": Case(sequence(lambda: nn.GroupNorm(2, 4)), IMAGE),
    "group norm of vectors": Case(sequence(lambda: nn.GroupNorm(2, 8)), (8,)),
    "layer norm": Case(sequence(lambda: nn.LayerNorm((7, 6))), IMAGE),
    "layer norm of vectors": Case(sequence(lambda: nn.LayerNorm(8)), (8,)),
    "instance norm": Case(sequence(lambda: nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "instance norm of sequences": Case(sequence(lambda: nn.InstanceNorm1d(3, affine=True)), (3, 9)),
    "embedding": Case(sequence(lambda: nn.Embedding(9, 5), lambda: nn.Linear(5, 2)), (4,), entries=9),
    "embedding with padding": Case(sequence(lambda: nn.Embedding(9, 5, padding_idx=2)), (12,), entries=9),
    "attention": Case(sequence(Attention), IMAGE),
    "spectral norm, linear": Case(sequence(lambda: spectral_norm(nn.Linear(5, 8)), nn.Tanh), (5,)),
    "spectral norm, convolution": Case(sequence(lambda: spectral_norm(nn.Conv2d(4, 6, 3))), IMAGE),
    "spectral norm, convolution, few pixels": Case(
        sequence(lambda: spectral_norm(nn.Conv2d(4, 32, 4, stride=2, groups=2))), IMAGE
    ),
    "spectral norm, transposed convolution": Case(
        sequence(lambda: spectral_norm(nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2))), (4, 3, 5)
    ),
    "discriminator with in-place activations": Case(
        sequence(
            lambda: spectral_norm(nn.Conv2d(4, 8, 3, stride=2, padding=1)),
            lambda: nn.LeakyReLU(0.2, inplace=True),
            lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1),
            lambda: nn.GroupNorm(4, 16),
            nn.SiLU,
            nn.Flatten,
            lambda: nn.Linear(64, 3),
        ),
        IMAGE,
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def losses(model: nn.Module, items: Tensor) -> Tensor:
    return torch.nn.functional.softplus(model(items))


def by_patient(model: nn.Module, items: Tensor, patients: int) -> list[list[Tensor]]:
    """Each patient's gradients by plain autograd on its own items alone."""
    groups = items.reshape(patients, -1, *items.shape[1:])
    parameters = list(model.parameters())
    return [list(torch.autograd.grad(losses(model, own).mean(), parameters, retain_graph=True)) for own in groups]


def norm(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def clipped_one_at_a_time(gradients: list[list[Tensor]], clip: float) -> list[Tensor]:
    factors = [float((clip / (norm(own) + 1e-6)).clamp(max=1.0)) for own in gradients]
    return [sum(f * g for f, g in zip(factors, of_all, strict=True)) for of_all in zip(*gradients, strict=True)]  # type: ignore[misc]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Largest difference over the largest value of all parameters' gradients."""
    largest = max(float(e.abs().max()) for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert float((f - e).abs().max()) <= tolerance * largest


def clipped_sums(model: nn.Module, items: Tensor, patients: int, clip: float) -> list[Tensor]:
    keeper = Bookkeeper(model, list(model.parameters()))
    return keeper.clipped_sums(lambda: losses(model, items), patients, clip, check_mixing=True)[0]


# ---- the sums ---------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("k", [1, 3])
def test_clipped_sums_are_those_of_one_patient_at_a_time(case: Case, k: int) -> None:
    model, items = case.model(), case.items(PATIENTS * k)
    with weights_of_one_step(model):
        alone = by_patient(model, items, PATIENTS)
        norms = sorted(float(norm(own)) for own in alone)
        for clip in (norms[PATIENTS // 2], 1e-3 * norms[0], 1e6):  # some, all, none are clipped
            assert_near(clipped_sums(model, items, PATIENTS, clip), clipped_one_at_a_time(alone, clip))


@each_case
def test_the_norm_is_that_of_a_single_patients_gradient(case: Case) -> None:
    model, clip = case.model(), 1e-3
    for seed in range(3):
        with weights_of_one_step(model):
            found = clipped_sums(model, case.items(2, seed), 1, clip)
            (alone,) = by_patient(model, case.items(2, seed), 1)
        own = float(norm(alone))
        assert float(norm(found)) == pytest.approx(own * min(1.0, clip / (own + 1e-6)), rel=2e-5)


def test_a_ghost_norm_of_terms_that_cancel_is_not_left_to_rounding() -> None:
    """Positions in pairs of opposite sign: the Gram matrices hold large values whose sum is small."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(5, 1, 4, 60, generator=generator), torch.randn(5, 1, 50, 4, generator=generator)
    left[:, :, 2:] = left[:, :, :2]
    right[:, :, :, 2:] = -right[:, :, :, :2] * (1 + 1e-6)
    exact = (right.double() @ left.double()).flatten(1).norm(dim=1)
    factored = Ghost(left, right, torch.Size((50, 60)))
    torch.testing.assert_close(factored.norms().double(), exact, rtol=0.1, atol=0)
    spread = torch.logspace(-30, 18, 5)[:, None, None, None]
    alone = Ghost(left[:, :, :2], right[:, :, :, :2] * spread, torch.Size((50, 60))).norms()
    expected = (right[:, :, :, :2].double() @ left[:, :, :2].double()).flatten(1).norm(
        dim=1
    ) * spread.double().flatten()
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("small", "large"), [(1e-25, 1e22), (3e-23, 1e24), (1e-21, 1e20)])
def test_a_ghost_norm_does_not_vanish_where_squares_of_its_factors_underflow(small: float, large: float) -> None:
    draws = torch.Generator().manual_seed(1)
    left, right = torch.randn(3, 1, 2, 60, generator=draws), torch.randn(3, 1, 50, 2, generator=draws)
    left, right = left * torch.tensor([1.0, 0.0])[:, None], right * torch.tensor([1.0, 0.0])
    # All that there is comes from tiny inputs, or from inputs beside which other positions have huge output gradients.
    left[0] *= small
    right[0] *= large
    right[1] += large * torch.tensor([0.0, 1.0])
    expected = (right.double() @ left.double()).flatten(1).norm(dim=1)
    assert torch.allclose(Ghost(left, right, torch.Size((50, 60))).norms().double(), expected, rtol=1e-4)


def test_parameters_that_are_not_trained_are_left_out_of_the_norm() -> None:
    case = CASES["linear"]
    model, items = case.model(), case.items(PATIENTS)
    chosen = [model[2].weight]  # type: ignore[index]
    alone = [[own[2]] for own in by_patient(model, items, PATIENTS)]
    keeper = Bookkeeper(model, chosen)
    found, _ = keeper.clipped_sums(lambda: losses(model, items), PATIENTS, 0.5)
    assert_near(found, clipped_one_at_a_time(alone, 0.5))


def test_a_layer_that_the_losses_do_not_use_has_no_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    keeper = Bookkeeper(model, list(model.parameters()))
    items = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found, count = keeper.clipped_sums(lambda: model["used"](items).square().sum(1), 4, 1.0)
    assert count == 4
    assert float(found[0].norm()) > 0
    assert not float(found[2].norm()) and not float(found[3].norm())


@pytest.mark.parametrize("fault", [math.inf, math.nan, 3e38])
def test_patients_without_a_finite_gradient_count_as_zero_whole(fault: float) -> None:
    case = CASES["discriminator with in-place activations"]
    model, items = case.model(), case.items(PATIENTS * 2)
    strange = items.clone()
    strange[2] = fault
    with weights_of_one_step(model):
        found = clipped_sums(model, strange, PATIENTS, 0.1)
        rest = torch.cat([items[:2], items[4:]])
        assert_near(found, clipped_one_at_a_time(by_patient(model, rest, PATIENTS - 1), 0.1))
        assert not any(bool(s.any()) for s in clipped_sums(model, torch.full_like(items, fault), PATIENTS, 0.1))


def test_half_precision_passes_are_clipped_exactly() -> None:
    """Norms and sums come from the same float32 values, so that one patient's part is within the clip to rounding."""
    case = CASES["discriminator with in-place activations"]
    model = case.model()
    keeper = Bookkeeper(model, list(model.parameters()))
    for seed in range(5):
        items = case.items(2, seed)

        def halved(items: Tensor = items) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return losses(model, items)

        with weights_of_one_step(model):
            found, _ = keeper.clipped_sums(halved, 1, 1e-2)
            whole = clipped_sums(model, items, 1, 1e-2)
        assert float(norm(found)) == pytest.approx(1e-2, rel=2e-4)
        assert_near(found, whole, tolerance=0.1)
        assert any(bool((a != b).any()) for a, b in zip(found, whole, strict=True))


# ---- the step ---------------------------------------------------------------------------------------------------------


def private(
    model: nn.Module,
    backend: Backend | None = "bookkeeping",
    sigma: float = 1.0,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
) -> PrivateModel:
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=0.3,
        expected_batch=4,
        randomness=Quiet() if seed is None else SeededRandomness(seed),
        backend=backend,
        autocast=autocast,
    )


def update(case: Case, items: Tensor, patients: int, chunk: int = 64, backend: Backend = "bookkeeping") -> list[Tensor]:
    """Weights before minus weights after a step without noise."""
    model = case.model()
    before = [p.detach().clone() for p in model.parameters()]
    groups = items.reshape(patients, -1, *items.shape[1:])
    private_step(
        private(model, backend),
        patients,
        lambda m, rows: losses(m, groups[rows].flatten(0, 1)),
        items_per_patient=groups.shape[1],
        chunk=chunk,
    )
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


WITH_HOOKS = {name: case for name, case in CASES.items() if "spectral" not in name and "in-place" not in name}
# What Opacus' own rules refuse or get wrong is left to autograd above.
for name in (
    "convolution, reflected",
    "convolution, circular, few pixels",
    "transposed convolution, output padding over the stride",
    "transposed convolution, groups, dilated",
    "embedding with padding",
):
    del WITH_HOOKS[name]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("case", WITH_HOOKS.values(), ids=WITH_HOOKS.keys())
@pytest.mark.parametrize("k", [1, 3])
def test_without_noise_the_step_is_that_of_opacus_hooks(case: Case, k: int) -> None:
    items = case.items(PATIENTS * k)
    assert_near(update(case, items, PATIENTS), update(case, items, PATIENTS, backend="hooks"), tolerance=2e-5)


@each_case
def test_the_step_does_not_depend_on_the_chunk(case: Case) -> None:
    items = case.items(PATIENTS * 2)
    whole = update(case, items, PATIENTS)
    for chunk in (1, 4):
        assert_near(update(case, items, PATIENTS, chunk), whole)


def test_hooks_take_chunks_as_well() -> None:
    case = CASES["linear"]
    items = case.items(PATIENTS * 2)
    assert_near(update(case, items, PATIENTS, 4, "hooks"), update(case, items, PATIENTS, 64, "hooks"))


@each_case
def test_a_patient_with_many_slices_changes_the_sum_by_at_most_the_clip(case: Case) -> None:
    items, newcomer = case.items(PATIENTS * 8), 50 * case.items(8, seed=5)
    if case.entries is not None:
        newcomer = case.items(8, seed=5)
    without = update(case, items, PATIENTS, chunk=4)
    changed = update(case, torch.cat([items, newcomer]), PATIENTS + 1, chunk=4)
    difference = norm([a - b for a, b in zip(changed, without, strict=True)])
    assert 0 < float(difference) * 4 <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize("patients", [0, 1, 5])
def test_the_power_iteration_does_not_tell_how_many_patients_were_drawn(patients: int) -> None:
    case = CASES["spectral norm, convolution"]
    states = []
    for count in (0, patients):
        model = case.model()
        items = case.items(max(count, 1))
        private_step(private(model), count, lambda m, rows, items=items: losses(m, items[rows]), chunk=2)  # type: ignore[misc]
        states.append([b.clone() for b in model.buffers()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_draw_is_noised_once_however_many_chunks_it_has() -> None:
    case = Case(sequence(lambda: nn.Linear(400, 50)), (400,))
    spreads = []
    for count, chunk in ((0, 1), (12, 1), (12, 64)):
        noisy, quiet = case.model(), case.model()
        items = case.items(max(count, 1))
        for model, seed in ((noisy, 7), (quiet, None)):
            private_step(
                private(model, sigma=2.0, seed=seed),
                count,
                lambda m, rows, items=items: losses(m, items[rows]),  # type: ignore[misc]
                chunk=chunk,
            )
        noise = [a - b for a, b in zip(noisy.parameters(), quiet.parameters(), strict=True)]
        spreads.append(float(torch.cat([n.detach().flatten() for n in noise]).std()))
    assert spreads == pytest.approx([2.0 * 0.3 / 4] * 3, rel=0.03)


def test_opacus_accountants_count_steps_and_not_chunks() -> None:
    accountant, model, items = RDPAccountant(), CASES["linear"].model(), CASES["linear"].items(6)
    wrapped = private(model, sigma=2.0)
    wrapped.optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    for count in (6, 0, 3):
        private_step(wrapped, count, lambda m, rows: losses(m, items[rows]), chunk=2)
    assert accountant.history == [(2.0, 0.1, 3)]


def test_opacus_own_step_cannot_release_what_was_not_accumulated() -> None:
    model, items = CASES["linear"].model(), CASES["linear"].items(4)
    wrapped = private(model)
    losses(wrapped.module, items).mean().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="Per sample gradient"):
        wrapped.optimizer.step()


def test_a_step_in_half_precision_is_near_the_whole_one() -> None:
    case = CASES["convolution"]
    items, updates = case.items(PATIENTS), []
    for autocast in (None, torch.bfloat16):
        model = case.model()
        before = [p.detach().clone() for p in model.parameters()]
        private_step(private(model, autocast=autocast), PATIENTS, lambda m, rows: losses(m, items[rows]))
        updates.append([b - p.detach() for b, p in zip(before, model.parameters(), strict=True)])
    assert_near(updates[1], updates[0], tolerance=0.05)
    with pytest.raises(ValueError, match="autocast"):
        private(case.model(), "hooks", autocast=torch.bfloat16)


def test_public_passes_run_without_hooks() -> None:
    model = CASES["linear"].model()
    wrapped = private(model)
    items = CASES["linear"].items(4)
    hooks: list[int] = []

    def public(m: nn.Module) -> Tensor:
        hooks.append(sum(len(layer._forward_hooks) for layer in m.modules()))
        return m(items).mean()

    private_step(wrapped, 4, lambda m, rows: losses(m, items[rows]), public)
    assert hooks == [0]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


# ---- what is refused --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).sum(1)


class Functional(nn.Module):
    """Uses its layer's weight once more without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight).sum(1)


class Borrowed(nn.Module):
    """Feeds one layer with what another layer's weight made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x @ self.first.weight).sum(1)


class PositionsFirst(nn.Module):
    """Its layer sees tokens in dimension 0 and items in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.transpose(0, 1))).sum((0, 2))


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.layer(x)
        x.zero_()
        return y.sum(1)


USES = {
    "a layer used twice": (Twice, (5,), "twice"),
    "a weight used without its layer": (Functional, (5,), "outside its own layer"),
    "a weight used before another layer": (Borrowed, (5,), "outside its own layer"),
    "items that are not in dimension 0": (PositionsFirst, (7, 5), "dimension 0"),
    "an input overwritten in place": (Overwritten, (5,), "in place"),
}


@pytest.mark.parametrize(("make", "item", "message"), USES.values(), ids=USES.keys())
def test_uses_without_an_exact_gradient_are_refused(
    make: Callable[[], nn.Module], item: tuple[int, ...], message: str
) -> None:
    items = Case(make, item).items(4)
    with pytest.raises(UnsupportedLayerError, match=message):
        private_step(private(make()), 4, lambda m, rows: m(items[rows]))


def test_as_many_tokens_as_items_in_dimension_0_are_noticed() -> None:
    items = torch.randn(7, 7, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MixedSamplesError):
        private_step(private(PositionsFirst()), 7, lambda m, rows: m(items[rows]))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5))
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    return model


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))


class DoubledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


MODELS = {
    "a weight shared by two layers": tied,
    "a hook that changes an output": hooked,
    "a parameter without a layer": Loose,
    "a layer of the model's own": lambda: nn.Sequential(DoubledLinear(5, 5)),
    "a layer without a rule": lambda: nn.Bilinear(5, 5, 5),
    "another parametrisation": lambda: orthogonal(nn.Linear(5, 5)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Linear(5, 5)),
    "two parametrisations": lambda: spectral_norm(spectral_norm(nn.Linear(5, 5))),
    "an embedding that renormalises": lambda: nn.Embedding(5, 5, max_norm=1.0),
    "an embedding that counts over the batch": lambda: nn.Embedding(5, 5, scale_grad_by_freq=True),
    "running statistics": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models_without_exact_gradients_are_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(UnsupportedLayerError):
        Bookkeeper(model, list(model.parameters()))


def test_the_backend_is_bookkeeping_unless_a_layer_has_no_rule() -> None:
    assert private(nn.Sequential(nn.Linear(5, 5)), None).backend == "bookkeeping"
    assert private(nn.Sequential(nn.Conv1d(5, 5, 3)), None).backend == "hooks"
    with pytest.raises(UnsupportedLayerError):
        private(nn.Sequential(nn.Conv1d(5, 5, 3)))
    with pytest.raises(UnsupportedLayerError, match="parametrised"):
        private(nn.Sequential(spectral_norm(nn.Linear(5, 5))), "hooks")


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class BatchSpread(nn.Module):
    """Minibatch standard deviation as a further feature (Karras et al. 2018): no parameter, and every sample in it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.std(0, correction=0).mean().expand(len(x), 1)], dim=1)


MIXERS = {
    "centred input": lambda: nn.Sequential(Centred(), nn.Linear(5, 6), nn.Linear(6, 1)),
    "spread of features": lambda: nn.Sequential(nn.Linear(5, 6), BatchSpread(), nn.Linear(7, 1)),
    "spread of the output": lambda: nn.Sequential(nn.Linear(5, 6), BatchSpread()),
    "batch normalisation without parameters": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False), nn.Linear(6, 1)
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("backend", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS.keys())
def test_what_mixes_samples_without_parameters_is_caught(make: Callable[[], nn.Module], backend: Backend) -> None:
    model, items = make(), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    wrapped, before = private(model, backend), [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # a second attempt is refused like the first
        with pytest.raises(MixedSamplesError):
            private_step(wrapped, 4, lambda m, rows: m(items[rows]).sum(1))
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mixing_is_looked_for_as_soon_as_there_are_two_items() -> None:
    model, items = MIXERS["spread of features"](), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    wrapped = private(model)
    private_step(wrapped, 0, lambda m, rows: m(items[rows]).sum(1))
    with pytest.raises(MixedSamplesError):
        private_step(wrapped, 4, lambda m, rows: m(items[rows]).sum(1))


def test_losses_that_mix_after_the_model_are_caught() -> None:
    model, items = nn.Linear(5, 1), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def relative(m: nn.Module, rows: Tensor) -> Tensor:
        scores = m(items[rows])[:, 0]
        return scores - scores.square().mean()

    with pytest.raises(MixedSamplesError):
        private_step(private(model), 4, relative)


def test_the_test_for_mixing_leaves_the_model_and_the_random_stream_as_they_were() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(5, 6)), nn.Dropout(0.5), nn.Linear(6, 1))
    items = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    streams, buffers = [], []
    for tested in (False, True):
        torch.manual_seed(3)
        wrapped = private(nn.Sequential(*pairs_of(model)))
        wrapped.tested_for_mixing = tested
        private_step(wrapped, 4, lambda m, rows: m(items[rows])[:, 0])
        streams.append(torch.rand(3))
        buffers.append([b.clone() for b in wrapped.model.buffers()])
    assert torch.equal(*streams)
    for a, b in pairwise(buffers):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pairs_of(model: nn.Module) -> Iterator[nn.Module]:
    """Deep copies of a model's children."""
    return (copy.deepcopy(child) for child in model.children())


def test_a_model_that_the_losses_go_around_is_refused() -> None:
    model, items = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 1)), torch.randn(4, 5)
    with pytest.raises(MixedSamplesError, match="did not call"):
        private_step(private(model), 4, lambda m, rows: m[1](m[0](items[rows]))[:, 0])  # type: ignore[index]


def test_cached_weights_do_not_outlive_a_step() -> None:
    model = CASES["spectral norm, linear"].model()
    items = CASES["spectral norm, linear"].items(3)
    private_step(private(model), 3, lambda m, rows: losses(m, items[rows]))
    assert not parametrize._cache
