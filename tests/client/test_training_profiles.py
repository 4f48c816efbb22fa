"""Optimiser, schedule, projections and privacy of the networks over profiles: what a plan's keys do to the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness, poisson_draw
from fedsynth.dp.step import Backend, make_private, private_step
from fedsynth.models.gene_autoencoder import autoencoder_losses, make_autoencoder
from fedsynth.models.radiogenomic_dnn import RadiogenomicDNN, make_radiogenomic_dnn, radiogenomic_losses
from fedsynth.plan import Schedule, StudyPlan
from fedsynth.records import State
from fedsynth.schedules import rate_factor
from fedsynth_client import rounds
from fedsynth_client.site import Site
from fedsynth_client.training.block import BlockResult, public_generator
from fedsynth_client.training.profiles import train_autoencoder, train_radiogenomics

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

GENES, PATIENTS, FEATURES = 12, 6, 2
RATE, CLIP, STEPS = 0.1, 0.01, 4
ALL = Mechanism(1.0, 1e-12, STEPS)  # every patient in each step, and noise that is far below any rounding
NO_NOISE = Mechanism(1.0, 0.0, STEPS)
BIG = 1e6  # a clipping norm that clips nothing


def plan(epsilon: float = 1.0, autoencoder: dict[str, Any] | None = None, **changes: Any) -> StudyPlan:
    """A study of two rounds; `changes` are keys of both networks' sections."""
    training = {
        "rounds": 2,
        "steps_per_round": STEPS,
        "expected_batch": PATIENTS,
        "max_grad_norm": CLIP,
        "learning_rate": RATE,
    }
    networks = {"hidden": [9, 7, 5], "dropout": 0.0, "start_from_encoder": False}
    own = {
        key: value for key, value in changes.items() if key in (*networks, "nonnegative_weights", "nonnegative_output")
    }
    shared = {key: value for key, value in changes.items() if key not in own}
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of training",
            "image": {"sequences": ["T1c"], "size": 32, "slices": 2},
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [0, 1],
                "center": [0] * GENES,
                "scale": [1] * GENES,
            },
            "morphology": {"features": ["volume", "sphericity"]},
            "privacy": {"epsilon": epsilon},
            "autoencoder": {
                **training,
                "budget_share": 0.3,
                "hidden": [9, 7],
                "latent_dim": 3,
                **shared,
                **(autoencoder or {}),
            },
            "radiogenomics": {**training, "budget_share": 0.3, **networks, **shared, **own},
            "gan": {**training, "budget_share": 0.4},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROFILES, MORPHOLOGY, LABELS = (
    normal(PATIENTS, GENES),
    normal(PATIENTS, FEATURES, seed=1).sigmoid(),
    torch.arange(6) % 2,
)


def start(study: StudyPlan) -> State:
    torch.manual_seed(3)
    return {name: tensor.clone() for name, tensor in make_radiogenomic_dnn(study).state_dict().items()}


def dnn(study: StudyPlan, mechanism: Mechanism = ALL, state: State | None = None, first_step: int = 0) -> BlockResult:
    before = start(study) if state is None else state
    source = SeededRandomness(7)
    return train_radiogenomics(study, before, PROFILES, MORPHOLOGY, LABELS, mechanism, source, first_step=first_step)


def gradients(study: StudyPlan, state: State) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradient of the mean loss, and the norm of each patient's own gradient, by plain autograd."""
    model = make_radiogenomic_dnn(study)
    model.load_state_dict(state)
    losses = radiogenomic_losses(model, PROFILES, MORPHOLOGY, LABELS)
    names, parameters = zip(*model.named_parameters(), strict=True)
    each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    norms = [torch.sqrt(sum((g**2).sum() for g in own)) for own in each]  # type: ignore[arg-type]
    mean = {name: torch.stack([own[i] for own in each]).mean(0) for i, name in enumerate(names)}
    return mean, norms


def clipped_mean(study: StudyPlan, state: State, norm: float) -> dict[str, Tensor]:
    model = make_radiogenomic_dnn(study)
    model.load_state_dict(state)
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for loss in radiogenomic_losses(model, PROFILES, MORPHOLOGY, LABELS):
        own = torch.autograd.grad(loss, parameters, retain_graph=True)
        length = math.sqrt(sum(float((g**2).sum()) for g in own))
        for name, g in zip(names, own, strict=True):
            total[name] += g * min(1.0, norm / length)
    return {name: value / PATIENTS for name, value in total.items()}


def same(a: State, b: State, tolerance: float = 2e-6) -> bool:
    return all(float((a[name] - b[name]).abs().max()) <= tolerance for name in a)


# --- the plan's defaults ---------------------------------------------------------------------------------------------


def test_the_defaults_are_adam_at_a_constant_rate_bit_for_bit() -> None:
    study, mechanism = plan(), Mechanism(0.5, 0.8, STEPS)
    torch.manual_seed(1)
    state = {name: tensor.clone() for name, tensor in make_autoencoder(study).state_dict().items()}
    found = train_autoencoder(study, state, PROFILES, mechanism, SeededRandomness(5))

    randomness, model = SeededRandomness(5), make_autoencoder(study)
    generator = public_generator(randomness)
    model.load_state_dict(state)
    private = make_private(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        noise_multiplier=0.8,
        max_grad_norm=CLIP,
        expected_batch=PATIENTS,
        randomness=randomness,
    )
    for _ in range(STEPS):
        drawn = poisson_draw(PATIENTS, 0.5, randomness)

        def losses(module: nn.Module, positions: Tensor, drawn: Tensor = drawn) -> Tensor:
            noise = torch.randn(len(positions), 3, generator=generator)
            return autoencoder_losses(module, PROFILES[drawn[positions]], noise, study.autoencoder.kl_weight)

        private_step(private, len(drawn), losses)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_later_first_step_changes_nothing_without_a_schedule() -> None:
    study, mechanism = plan(), Mechanism(0.5, 0.8, STEPS)
    first, later = dnn(study, mechanism), dnn(study, mechanism, first_step=STEPS)
    assert all(torch.equal(first.weights[name], later.weights[name]) for name in first.weights)


# --- optimiser and schedule ------------------------------------------------------------------------------------------


def test_a_step_of_sgd_is_the_rate_times_the_clipped_mean() -> None:
    study = plan(optimizer="sgd")
    before = start(study)
    after = dnn(study, Mechanism(1.0, 1e-12, 1)).weights
    moved = clipped_mean(study, before, CLIP)
    assert same(after, {name: before[name] - RATE * moved[name] for name in before}, tolerance=1e-7)
    assert any(float(norm) > CLIP for norm in gradients(study, before)[1])


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
def test_momentum_adds_to_the_next_step_what_is_left_of_those_before(epsilon: float) -> None:
    mechanism = Mechanism(1.0, 1e-12 if math.isfinite(epsilon) else 0.0, 2)
    study = plan(epsilon, optimizer="sgd", momentum=0.5, max_grad_norm=BIG)
    before = start(study)
    first = gradients(study, before)[0]
    middle = {name: before[name] - RATE * first[name] for name in before}
    second = gradients(study, middle)[0]
    expected = {name: middle[name] - RATE * (second[name] + 0.5 * first[name]) for name in before}
    assert same(dnn(study, mechanism).weights, expected)


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "step"])
def test_a_schedule_runs_over_all_rounds(schedule: Schedule, epsilon: float) -> None:
    study = plan(epsilon, optimizer="sgd", schedule=schedule, final_learning_rate=0.01, max_grad_norm=BIG)
    mechanism = ALL if math.isfinite(epsilon) else NO_NOISE
    expected = start(study)
    for step in range(2 * STEPS):
        rate = RATE * rate_factor(schedule, step / (2 * STEPS), 0.01)
        gradient = gradients(study, expected)[0]
        expected = {name: expected[name] - rate * gradient[name] for name in expected}
    first = dnn(study, mechanism)
    second = dnn(study, mechanism, first.weights, first_step=STEPS)
    assert same(second.weights, expected)
    assert not same(dnn(study, mechanism, first.weights).weights, expected, tolerance=1e-4)


def test_the_autoencoder_has_the_same_options() -> None:
    torch.manual_seed(1)
    study = plan(optimizer="sgd", schedule="linear", autoencoder={"variational": False, "max_grad_norm": BIG})
    state = {name: tensor.clone() for name, tensor in make_autoencoder(study).state_dict().items()}
    model = make_autoencoder(study)
    model.load_state_dict(state)
    for step in range(STEPS, 2 * STEPS):
        loss = autoencoder_losses(model, PROFILES, torch.zeros(PATIENTS, 3), 0.0).mean()
        parameters = list(model.parameters())
        rate = RATE * rate_factor("linear", step / (2 * STEPS), study.autoencoder.final_learning_rate)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= rate * gradient
    found = train_autoencoder(study, state, PROFILES, ALL, SeededRandomness(1), first_step=STEPS)
    assert same(found.weights, dict(model.state_dict()))


@pytest.mark.parametrize("module", ["autoencoder", "radiogenomics"])
def test_a_site_counts_the_steps_of_earlier_rounds(
    module: Any, tiny_site: Site, tiny_plan: StudyPlan, ask: Any, task_content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    name = "train_autoencoder" if module == "autoencoder" else "train_radiogenomics"
    train = getattr(rounds, name)

    def watched(*given: Any, first_step: int) -> BlockResult:
        seen.append(first_step)
        return train(*given, first_step=first_step)

    monkeypatch.setattr(rounds, name, watched)
    for number in (1, 2):
        reply: RecordDict = ask(tiny_site, module, task_content(tiny_plan, module, number))
        assert module in reply
    assert seen == [0, tiny_plan.training(module).steps_per_round]


# --- without privacy -------------------------------------------------------------------------------------------------


def test_without_privacy_nothing_is_clipped_and_nothing_noised() -> None:
    study = plan(math.inf, optimizer="sgd")
    before = start(study)
    gradient, norms = gradients(study, before)
    assert all(float(norm) > CLIP for norm in norms)
    after = dnn(study, Mechanism(1.0, 0.0, 1)).weights
    assert same(after, {name: before[name] - RATE * gradient[name] for name in before}, tolerance=1e-7)
    private = dnn(plan(optimizer="sgd"), Mechanism(1.0, 1e-12, 1)).weights
    assert not same(private, after, tolerance=1e-4)


def test_noise_that_would_not_be_added_is_refused() -> None:
    with pytest.raises(ValueError, match="none may be charged"):
        dnn(plan(math.inf), Mechanism(1.0, 0.5, 1))


def test_a_private_plan_is_noised_whatever_the_optimiser() -> None:
    for optimizer in ("adam", "sgd"):
        study = plan(optimizer=optimizer, max_grad_norm=1.0)
        quiet, loud = dnn(study, Mechanism(1.0, 1e-12, 1)).weights, dnn(study, Mechanism(1.0, 3.0, 1)).weights
        assert not same(quiet, loud, tolerance=1e-2)


# --- non-negative weights --------------------------------------------------------------------------------------------


def signs(state: State) -> dict[str, bool]:
    """Whether each layer's weights have any below 0."""
    return {name: bool((tensor < 0).any()) for name, tensor in state.items() if name.endswith(".weight")}


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
def test_weights_of_every_layer_end_non_negative_and_biases_are_free(epsilon: float) -> None:
    mechanism = Mechanism(1.0, 3.0 if math.isfinite(epsilon) else 0.0, STEPS)
    study = plan(epsilon, nonnegative_weights=True)
    assert all(signs(start(study)).values())
    after = dnn(study, mechanism).weights
    assert not any(signs(after).values())
    assert any(bool((tensor < 0).any()) for name, tensor in after.items() if name.endswith(".bias"))


def test_only_the_output_is_held_where_only_that_is_asked_for() -> None:
    found = signs(dnn(plan(nonnegative_output=True), Mechanism(1.0, 3.0, STEPS)).weights)
    assert found.pop("morphology.weight") is False
    assert all(found.values())


def test_a_projection_sees_the_noisy_weights_alone() -> None:
    """Post-processing: the projected step is the projection of the step without one."""
    mechanism = Mechanism(1.0, 2.0, 1)
    free, held = dnn(plan(), mechanism).weights, dnn(plan(nonnegative_weights=True), mechanism).weights
    for name, tensor in free.items():
        assert torch.equal(held[name], tensor.clamp(min=0) if name.endswith(".weight") else tensor)


# --- per-patient gradients -------------------------------------------------------------------------------------------


def one_at_a_time(model: nn.Module, losses: list[Tensor], norm: float) -> list[Tensor]:
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    clipped = set()
    for loss in losses:
        own = torch.autograd.grad(loss, parameters)
        length = math.sqrt(sum(float((g.double() ** 2).sum()) for g in own))
        clipped.add(length > norm)
        for value, g in zip(total, own, strict=True):
            value += g * min(1.0, norm / length)
    assert clipped == {True, False}, "the norm is to lie among those of the patients"
    return total


def private_gradient(model: nn.Module, losses: Any, norm: float, backend: Backend) -> list[Tensor]:
    """The clipped sum of one private step, read from a step of SGD at rate 1 with a divisor of 1 and hardly any noise."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=1e-12,
        max_grad_norm=norm,
        expected_batch=1,
        randomness=SeededRandomness(0),
        backend=backend,
    )
    private.tested_for_mixing = True  # whose extra passes would draw further masks of dropout
    private_step(private, PATIENTS, losses)
    return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


def assert_equal_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    length = math.sqrt(sum(float((e**2).sum()) for e in expected))
    difference = math.sqrt(sum(float(((f - e) ** 2).sum()) for f, e in zip(found, expected, strict=True)))
    assert difference <= 1e-5 * length


BACKENDS: tuple[Backend, ...] = ("bookkeeping", "hooks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("variational", [False, True])
def test_an_autoencoders_patients_are_clipped_each_by_its_own_gradient(
    variational: bool, activation: str, backend: Backend
) -> None:
    torch.manual_seed(2)
    model = make_autoencoder(plan(autoencoder={"variational": variational, "activation": activation}))
    assert sum(isinstance(layer, nn.Linear) for layer in model.modules()) == 6  # five hidden layers between 12 and 12
    noise = normal(PATIENTS, 3, seed=4)
    rows = PROFILES * torch.linspace(0.2, 4.0, PATIENTS)[:, None]  # some are clipped, some are not
    alone = [autoencoder_losses(model, rows[i : i + 1], noise[i : i + 1], 0.5)[0] for i in range(PATIENTS)]
    expected = one_at_a_time(model, alone, 0.6)

    def losses(module: nn.Module, positions: Tensor) -> Tensor:
        return autoencoder_losses(module, rows[positions], noise[positions], 0.5)

    assert_equal_gradients(private_gradient(model, losses, 0.6, backend), expected)


class Replayed(nn.Module):
    """Dropout by masks that were recorded, those of one patient."""

    def __init__(self, masks: list[Tensor], patient: int) -> None:
        super().__init__()
        self.masks, self.patient, self.place = masks, patient, 0

    def forward(self, x: Tensor) -> Tensor:
        self.place += 1
        return x * self.masks[self.place - 1][self.patient]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_dropout_leaves_each_patient_its_own_gradient(activation: str, backend: Backend) -> None:
    torch.manual_seed(2)
    model = make_radiogenomic_dnn(plan(dropout=0.4, autoencoder={"activation": activation}))
    model.train()
    masks: list[Tensor] = []

    def record(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        masks.append(torch.where(out != 0, 1 / 0.6, 0.0))

    handle = model.dropout.register_forward_hook(record)
    reference = make_radiogenomic_dnn(plan(dropout=0.4, autoencoder={"activation": activation}))
    reference.load_state_dict(model.state_dict())

    def losses(module: nn.Module, positions: Tensor) -> Tensor:
        return radiogenomic_losses(module, PROFILES[positions], MORPHOLOGY[positions], LABELS[positions])

    found = private_gradient(model, losses, 2.0, backend)
    handle.remove()
    assert len(masks) == 3
    assert all(0 < float((mask > 0).float().mean()) < 1 for mask in masks)
    expected = one_at_a_time(reference, [_replayed(reference, masks, i) for i in range(PATIENTS)], 2.0)
    assert_equal_gradients(found, expected)


def _replayed(model: RadiogenomicDNN, masks: list[Tensor], patient: int) -> Tensor:
    dropout = model.dropout
    model.dropout = Replayed(masks, patient)  # type: ignore[assignment]
    row = slice(patient, patient + 1)
    loss = radiogenomic_losses(model, PROFILES[row], MORPHOLOGY[row], LABELS[row])[0]
    model.dropout = dropout
    return loss
