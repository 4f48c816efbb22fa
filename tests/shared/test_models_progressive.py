"""Growing generators and discriminators: sizes, fading in without a jump, attention, normalisation, memory."""

from __future__ import annotations

import math
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils import parametrize

from fedsynth.models.condition import TumourMap
from fedsynth.models.dcgan import initialise
from fedsynth.models.growth import Stage, enlarged, last_level
from fedsynth.models.layers import (
    Equalised,
    PixelNorm,
    Scale,
    SelfAttention,
    equalised,
    equalised_linear,
    spectrally_normalised,
)
from fedsynth.models.progressive import ProgressiveDiscriminator, ProgressiveGenerator

LATENT, CONDITION, CHANNELS = 6, 9, 3
Model = TypeVar("Model", bound=nn.Module)


def tumour_map(size: int) -> TumourMap:
    return TumourMap(size, (1, 2, 3), 0, (0.5, 200.0), 96 / size, 100.0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def generator(size: int = 32, width: int = 2, enhanced: bool = True) -> ProgressiveGenerator:
    model = ProgressiveGenerator(
        latent_dim=LATENT,
        condition_dim=CONDITION,
        channels=CHANNELS,
        size=size,
        width=width,
        tumour_map=tumour_map(size),
        attention=enhanced,
    )
    return looking(model)


def discriminator(size: int = 32, width: int = 2, enhanced: bool = True) -> ProgressiveDiscriminator:
    model = ProgressiveDiscriminator(
        condition_dim=CONDITION,
        channels=CHANNELS,
        size=size,
        width=width,
        tumour_map=tumour_map(size),
        attention=enhanced,
        spectral_norm=enhanced,
    )
    return looking(model).eval()  # the power iteration rests


def looking(model: Model) -> Model:
    """Fresh weights, with attention at work."""
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Scale):
                layer.weight.fill_(0.7)
    return model


sizes = pytest.mark.parametrize("size", [32, 64, 128, 256])
kinds = pytest.mark.parametrize("enhanced", [False, True])


@sizes
@kinds
@torch.no_grad()
def test_networks_make_and_judge_images_of_every_size_of_a_plan(size: int, enhanced: bool) -> None:
    makes, judges = generator(size, 1, enhanced), discriminator(size, 1, enhanced)
    z, code = normal(2, LATENT), normal(2, CONDITION)
    for stage in (None, *(Stage(level) for level in range(last_level(size) + 1))):
        images = makes(z, code, stage=stage)
        own = size if stage is None else stage.size
        assert images.shape == (2, CHANNELS, own, own)
        assert float(images.abs().max()) <= 1
        assert float(images.std()) > 0.01
        assert judges(images, code, stage=stage).shape == (2,)
        assert len(judges.features(images, code, stage=stage)) == int(math.log2(own)) - 2
    assert torch.equal(makes(z, code), makes(z, code, stage=Stage(last_level(size))))


@kinds
def test_a_stage_beyond_the_full_size_is_refused(enhanced: bool) -> None:
    with pytest.raises(ValueError, match="levels 0 to 2"):
        generator(enhanced=enhanced)(normal(1, LATENT), normal(1, CONDITION), stage=Stage(3))


@kinds
@pytest.mark.parametrize("level", [1, 2])
@torch.no_grad()
def test_fading_in_leads_from_one_resolution_to_the_next_without_a_jump(level: int, enhanced: bool) -> None:
    makes, judges = generator(enhanced=enhanced), discriminator(enhanced=enhanced)
    z, code = normal(4, LATENT), normal(4, CONDITION)
    before, after = makes(z, code, stage=Stage(level - 1)), makes(z, code, stage=Stage(level))
    blends = [makes(z, code, stage=Stage(level, alpha)) for alpha in (1e-7, 0.5, 1 - 1e-7)]
    before = enlarged(before, after.shape[-1])
    for blend, expected in zip(blends, (before, (before + after) / 2, after), strict=True):
        torch.testing.assert_close(blend, expected, rtol=0, atol=1e-5)
    assert float((after - before).abs().mean()) > 0.01  # there is something to blend
    x = normal(4, CHANNELS, 8 * 2**level, 8 * 2**level).tanh()
    first, last = judges(avg_pool2d(x, 2), code, stage=Stage(level - 1)), judges(x, code, stage=Stage(level))
    torch.testing.assert_close(judges(x, code, stage=Stage(level, 1e-7)), first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judges(x, code, stage=Stage(level, 1 - 1e-7)), last, rtol=1e-4, atol=1e-6)
    assert float((first - last).abs().max()) > 1e-4


@kinds
@torch.no_grad()
def test_images_and_scores_depend_on_every_part_of_the_condition(enhanced: bool) -> None:
    makes, judges = generator(enhanced=enhanced), discriminator(enhanced=enhanced)
    z, code = normal(1, LATENT), normal(1, CONDITION)
    images = makes(z, code)
    for place in range(CONDITION):
        other = code.clone()
        other[0, place] += 1
        assert float((makes(z, other) - images).abs().max()) > 1e-3
        assert float((judges(images, other) - judges(images, code)).abs()) > 1e-7


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    z, code, x = normal(4, LATENT), normal(4, CONDITION), normal(4, CHANNELS, 32, 32)
    for stage in (None, Stage(1, 0.4), Stage(2, 0.4)):
        makes, judges = generator(), discriminator()
        size = 32 if stage is None else stage.size
        for model, first in ((makes, z), (judges, x[:, :, :size, :size])):
            others = torch.tensor([0, 2, 3])
            changed = first.clone(), code.clone()
            for tensor in changed:
                tensor[others] = 3 - 2 * tensor[others]
            before, after = model(first, code, stage=stage), model(*changed, stage=stage)
            assert torch.equal(before[1], after[1])
            assert not torch.equal(before, after)


@torch.no_grad()
def test_attention_is_the_identity_until_gamma_moves_and_then_carries_far() -> None:
    layer = SelfAttention(4, 8, equalised_linear)
    initialise(layer, torch.Generator().manual_seed(0))
    x = normal(2, 4, 8, 8)
    assert torch.equal(layer(x), x)
    layer.gamma.weight.fill_(1.0)
    other = x.clone()
    other[0, :, 0, 0] += 1
    moved = (layer(other) - layer(x)).abs()
    assert float(moved[0, :, 7, 7].max()) > 1e-4  # the far corner sees it
    assert float(moved[1].max()) == 0  # another image does not


@pytest.mark.parametrize("keys", [4, 2])
@torch.no_grad()
def test_attention_is_that_of_its_definition_and_pools_only_keys_and_values(keys: int) -> None:
    layer = SelfAttention(4, 8, equalised_linear, keys=keys)
    initialise(layer, torch.Generator().manual_seed(0))
    layer.gamma.weight.fill_(0.5)
    x = normal(1, 4, 8, 8)
    pooled, values = (
        maps[0].reshape(-1, keys, 8 // keys, keys, 8 // keys).amax((2, 4)).flatten(1)
        for maps in (layer.f(x), layer.h(x))
    )
    for i, j in ((0, 0), (3, 6)):
        weights = torch.softmax(layer.g(x)[0, :, i, j] @ pooled, dim=0)
        torch.testing.assert_close(layer(x)[0, :, i, j], x[0, :, i, j] + 0.5 * values @ weights)


def test_pixel_norm_gives_every_pixel_the_mean_square_one() -> None:
    x = 30 * normal(2, 5, 4, 4)
    torch.testing.assert_close(PixelNorm()(x).square().mean(1), torch.ones(2, 4, 4))
    assert float(PixelNorm()(torch.zeros(1, 5, 1, 1)).abs().max()) == 0


@torch.no_grad()
def test_equalised_layers_keep_the_scale_of_what_passes_through_them() -> None:
    for fan_in in (4, 256):
        layer = equalised(nn.Linear(fan_in, 4000))
        initialise(layer, torch.Generator().manual_seed(0))
        assert isinstance(layer, Equalised)
        assert float(layer.layer.weight.std()) == pytest.approx(1, rel=0.05)  # whatever the fan-in
        out = torch.relu(layer(torch.ones(1, fan_in)))
        assert float(out.square().mean()) == pytest.approx(1, rel=0.1)


def test_every_weight_of_the_enhanced_discriminator_is_normalised_and_none_of_the_others() -> None:
    for model, expected in ((discriminator(), True), (discriminator(enhanced=False), False), (generator(), False)):
        weighted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert len(weighted) > 8
        assert all(parametrize.is_parametrized(layer, "weight") == expected for layer in weighted)


def test_fresh_raw_weights_behind_spectral_norm_come_from_the_given_generator_alone() -> None:
    def fresh(seed: int) -> nn.Module:
        layer = spectrally_normalised(nn.Conv2d(8, 32, 4))
        initialise(layer, torch.Generator().manual_seed(seed))
        return layer

    a, b, c = fresh(1), fresh(1), fresh(2)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
    raw = a.get_parameter("parametrizations.weight.original")
    assert not torch.equal(raw, c.get_parameter("parametrizations.weight.original"))
    assert float(raw.detach().std()) == pytest.approx(0.02, rel=0.1)
    weight = a.eval().weight
    assert isinstance(weight, Tensor)
    assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, rel=0.05)


def kept_for_backward(model: nn.Module, first: Tensor) -> int:
    """Bytes that a forward pass of 2 items keeps for the backward one."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(first, normal(2, CONDITION))
    return sum(storages.values())


def test_attention_at_256_pixels_fits_an_ordinary_machine() -> None:
    """Unpooled, one of the maps alone would take 2 GB."""
    assert kept_for_backward(generator(256, 8), normal(2, LATENT)) < 5e8
    assert kept_for_backward(discriminator(256, 8), normal(2, CHANNELS, 256, 256)) < 5e8
