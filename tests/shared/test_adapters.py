"""Adapters start as the public model, merge into plain weights, and have exact gradients by patient; parts train alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.randomness import SeededRandomness
from fedsynth.dp.step import make_private, private_step
from fedsynth.models.adapters import (
    Adapted,
    adapt,
    adapter_size,
    adapter_state,
    load_adapters,
    merged_state,
    plain_state,
)
from fedsynth.models.condition import condition_dim
from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.trainable import make_trainable, trainable_parameters
from fedsynth.plan import StudyPlan, Trains

FEATURES = ["volume", "position_left", "position_posterior", "position_superior"]
CONDITION, ROWS = condition_dim(2, len(FEATURES)), 5
TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.3,
}


def study(**gan: object) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of adapters",
            "image": {"sequences": ["T1c", "FLAIR"], "size": 32, "slices": 4},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": 1.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": {**TRAINING, "latent_dim": 6, "generator_width": 8, "discriminator_width": 8, **gan},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=draws(sum(shape)))


def public(make: Callable[[StudyPlan], nn.Module]) -> nn.Module:
    model = make(study())
    initialise(model, draws())
    with torch.no_grad():  # away from the start, where biases and some gradients vanish
        for parameter in model.parameters():
            parameter.add_(0.05 * normal(*parameter.shape))
    return model


def inputs(make: Callable[[StudyPlan], nn.Module]) -> tuple[Tensor, Tensor]:
    first = normal(ROWS, 6) if make is make_generator else normal(ROWS, 3, 32, 32).tanh()
    return first, normal(ROWS, CONDITION)


NETWORKS = pytest.mark.parametrize("make", [make_generator, make_discriminator])
RANKS = pytest.mark.parametrize("rank", [1, 3])
PARTS = pytest.mark.parametrize("trains", ["norms", "head", "adapters"])


def grown(model: nn.Module, rank: int) -> nn.Module:
    """`model` with adapters that do something."""
    adapt(model, rank, draws(1))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Adapted):
                layer.up.weight.normal_(0.0, 0.3, generator=draws(2))
    return model


@NETWORKS
@RANKS
def test_an_adapted_model_starts_as_exactly_the_public_one(make: Callable[[StudyPlan], nn.Module], rank: int) -> None:
    model, given = public(make), inputs(make)
    before, state = model(*given), {name: t.clone() for name, t in model.state_dict().items()}
    adapt(model, rank, draws())
    assert torch.equal(model(*given), before)
    for found in (plain_state(model), merged_state(model)):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    assert adapter_state(model)


@NETWORKS
@RANKS
def test_merged_weights_compute_what_the_adapted_model_does(make: Callable[[StudyPlan], nn.Module], rank: int) -> None:
    plain, given = public(make), inputs(make)
    adapted = grown(public(make), rank)
    expected = adapted(*given).detach()
    assert float((plain(*given) - expected).abs().max().detach()) > 1e-2
    plain.load_state_dict(merged_state(adapted))
    assert float((plain(*given) - expected).abs().max().detach()) <= 1e-5 * max(float(expected.abs().max()), 1.0)


def test_merged_convolutions_keep_stride_padding_and_bias() -> None:
    for layer in (
        nn.Conv2d(3, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.ConvTranspose2d(3, 12, 3, stride=2, padding=1, output_padding=1),
    ):
        model = nn.Sequential(layer)
        x = normal(2, 3, 9, 11)
        expected = grown(model, 1)(x).detach()
        assert isinstance(model[0], Adapted)
        plain = nn.Sequential(model[0].base)
        plain.load_state_dict(merged_state(model))
        torch.testing.assert_close(plain(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_copies_share_no_memory_with_the_model() -> None:
    model = grown(public(make_discriminator), 2)
    before = merged_state(model)
    for state in (merged_state(model), plain_state(model), adapter_state(model)):
        for tensor in state.values():
            tensor.zero_()
    again = merged_state(model)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_adapters_are_stored_and_set_again_or_refused() -> None:
    model, other = grown(public(make_discriminator), 2), public(make_discriminator)
    adapt(other, 2, draws(9))
    load_adapters(other, adapter_state(model))
    given = inputs(make_discriminator)
    assert torch.equal(other(*given), model(*given))
    narrow = public(make_discriminator)
    adapt(narrow, 1, draws())
    with pytest.raises(ValueError, match="not those of the model"):
        load_adapters(narrow, adapter_state(model))


def test_a_layer_no_larger_than_its_adapter_trains_itself() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 1))
    assert adapter_size(model[0], 2) == 2 * (30 + 20)  # type: ignore[arg-type]
    trained = make_trainable(model, "adapters", 2, draws())
    assert set(trained) == {"0.down.weight", "0.up.weight", "1.weight", "1.bias"}
    with pytest.raises(ValueError, match="groups"):
        adapt(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), 1, draws())


# ---- parts of a network ----------------------------------------------------------------------------------------------


def names(make: Callable[[StudyPlan], nn.Module], trains: Trains) -> set[str]:
    return set(make_trainable(make(study()), trains, 2, draws()))


def test_parts_are_what_their_names_say() -> None:
    everything = {name for name, _ in make_discriminator(study()).named_parameters()}
    assert names(make_discriminator, "all") == everything
    assert names(make_discriminator, "head") == {"score.weight", "score.bias", "projection.weight"}
    norms = names(make_discriminator, "norms")
    assert norms == {name for name in everything if name.endswith("bias")} | {"trunk.3.weight", "trunk.6.weight"}
    assert names(make_generator, "head") == {"last.weight", "last.bias"}
    assert {f"modulations.{i}.bias" for i in range(3)} < names(make_generator, "norms")
    with pytest.raises(ValueError, match="no head"):
        make_trainable(nn.Linear(2, 2), "head", 1, draws())


@NETWORKS
@PARTS
def test_what_is_frozen_asks_for_no_gradient(make: Callable[[StudyPlan], nn.Module], trains: Trains) -> None:
    model = make(study())
    trained = {id(parameter) for parameter in make_trainable(model, trains, 2, draws()).values()}
    assert trained
    assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in model.parameters())
    assert len(trained) < len(list(model.parameters()))


@PARTS
def test_fewer_parameters_receive_noise(trains: Trains) -> None:
    part = trainable_parameters(study(discriminator_trains=trains, adapter_rank=1), "gan")
    whole = sum(parameter.numel() for parameter in make_discriminator(study()).parameters())
    assert 0 < part < whole / 2
    assert trainable_parameters(study(), "gan") == whole
    # What trains of the generator is post-processing: it gets no noise.
    assert trainable_parameters(study(generator_trains=trains), "gan") == whole


def test_a_statistic_trains_nothing() -> None:
    assert trainable_parameters(study(), "autoencoder") > 0
    assert trainable_parameters(study(), "radiogenomics") > 0
    for module in ("moments", "embedding"):
        with pytest.raises(ValueError, match="statistic"):
            trainable_parameters(study(), module)  # type: ignore[arg-type]


class Silent(SeededRandomness):
    """A seeded source without noise."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


@PARTS
def test_the_step_clips_exactly_what_trains(trains: Trains) -> None:
    model = public(make_discriminator)
    trained = make_trainable(model, trains, 2, draws(1))
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("up.weight"):
                parameter.normal_(0.0, 0.2, generator=draws(2))
    parameters = list(trained.values())
    x, code = inputs(make_discriminator)
    alone = [
        torch.autograd.grad(softplus(-model(x[i : i + 1], code[i : i + 1])).sum(), parameters) for i in range(ROWS)
    ]
    norms = torch.stack([torch.cat([g.flatten() for g in gradients]).norm() for gradients in alone])
    clip = float(norms.median())
    expected = [
        sum(float(min(clip / (norm + 1e-6), 1.0)) * gradients[i] for norm, gradients in zip(norms, alone, strict=True))
        for i in range(len(parameters))
    ]
    before = [parameter.detach().clone() for parameter in parameters]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    private = make_private(
        model,
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch=1,
        randomness=Silent(1),
        backend="bookkeeping",
    )
    private_step(private, ROWS, lambda module, rows: softplus(-module(x[rows], code[rows])), chunk=2)
    for start, parameter, step in zip(before, parameters, expected, strict=True):
        assert isinstance(step, Tensor)
        moved = start - parameter.detach()
        assert float((moved - step).norm()) <= 1e-5 * float(step.norm()) + 2e-7 * float(start.norm())
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
