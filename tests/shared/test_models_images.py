"""Which networks a plan's architecture names, and what plans are refused because two choices undo each other."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsynth.models.adapters import adapt
from fedsynth.models.condition import condition_dim
from fedsynth.models.dcgan import Discriminator, Generator, initialise
from fedsynth.models.images import make_companion, make_discriminator, make_encoder, make_generator
from fedsynth.models.progressive import ProgressiveDiscriminator, ProgressiveGenerator
from fedsynth.models.trainable import make_trainable, trainable_parameters
from fedsynth.models.vae import Encoder
from fedsynth.plan import StudyPlan

TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.3,
}
FEATURES = ["volume", "position_left", "position_posterior", "position_superior"]
CONDITION, LATENT = condition_dim(2, len(FEATURES)), 5


def study(epsilon: float = 1.0, **gan: object) -> StudyPlan:
    sizes = {"latent_dim": LATENT, "generator_width": 4, "discriminator_width": 8}
    return StudyPlan.model_validate(
        {
            "name": "images",
            "purpose": "tests of the factory of networks",
            "image": {"sequences": ["T1", "FLAIR"], "size": 32, "slices": 4},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": epsilon},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": {**TRAINING, **sizes, **gan},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("architecture", "generator", "companion"),
    [
        ("dcgan", Generator, Discriminator),
        ("progressive", ProgressiveGenerator, ProgressiveDiscriminator),
        ("enhanced", ProgressiveGenerator, ProgressiveDiscriminator),
        ("vae", Generator, Encoder),
    ],
)
@torch.no_grad()
def test_each_architecture_has_a_generator_and_something_that_stays_at_the_site(
    architecture: str, generator: type[nn.Module], companion: type[nn.Module]
) -> None:
    plan = study(architecture=architecture)
    makes, stays = make_generator(plan), make_companion(plan)
    assert type(makes) is generator
    assert type(stays) is companion
    assert makes.latent_dim == LATENT
    images = makes(normal(2, LATENT), normal(2, CONDITION))
    assert images.shape == (2, 3, 32, 32)  # all sequences of a patient and the mask are one image
    found = stays(images, normal(2, CONDITION))
    assert found.shape == (2,) if architecture != "vae" else [t.shape for t in found] == [(2, LATENT)] * 2
    assert not list(makes.buffers())  # nothing but weights is averaged over sites


def test_a_variational_autoencoder_has_no_discriminator() -> None:
    with pytest.raises(ValueError, match="no discriminator"):
        make_discriminator(study(architecture="vae"))


def test_the_names_of_the_default_discriminators_weights_stay_those_that_packaged_weights_have() -> None:
    names = set(make_discriminator(study()).state_dict())
    of_trunk = {f"trunk.{place}.{kind}" for place in (0, 2, 3, 5, 6) for kind in ("weight", "bias")}
    assert names == of_trunk | {"score.weight", "score.bias", "projection.weight"}


@torch.no_grad()
def test_features_lead_to_the_score() -> None:
    model, x, code = make_discriminator(study()), normal(2, 3, 32, 32), normal(2, CONDITION)
    maps = model.features(x, code)
    assert [m.shape[1:] for m in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert isinstance(model, Discriminator)
    last = maps[-1].flatten(1)
    expected = model.score(last)[:, 0] + (model.projection(code) * last).mean(1)
    assert torch.equal(model(x, code), expected)


def test_spectral_norm_stands_in_place_of_group_norm_and_bounds_every_weight() -> None:
    for architecture in ("dcgan", "progressive", "enhanced"):
        model = make_discriminator(study(architecture=architecture, spectral_norm=True))
        initialise(model, torch.Generator().manual_seed(0))
        weighted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert len(weighted) >= 5
        assert all(parametrize.is_parametrized(layer, "weight") for layer in weighted)
        assert not any(isinstance(m, nn.GroupNorm) for m in model.modules())
        for layer in weighted:
            norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert float(norm) == pytest.approx(1, rel=0.05)


def test_batch_normalisation_is_there_where_the_plan_has_no_privacy() -> None:
    model = make_discriminator(study(float("inf"), discriminator_norm="batch"))
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.BatchNorm2d) == 2
    assert nn.GroupNorm not in kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator_norm": "batch", "spectral_norm": True, "epsilon": float("inf")}, "would undo"),
        ({"architecture": "vae", "spectral_norm": True}, "no discriminator"),
        ({"spectral_norm": True, "discriminator_trains": "adapters"}, "adapters"),
        ({"architecture": "enhanced", "discriminator_trains": "adapters"}, "adapters"),
        ({"architecture": "enhanced", "loss": "wasserstein", "lipschitz": "weight_clip"}, "weight_clip"),
    ],
)
def test_choices_that_undo_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        study(**options)  # type: ignore[arg-type]


def test_an_adapter_beside_a_spectrally_normalised_weight_is_refused() -> None:
    model = make_discriminator(study(spectral_norm=True))
    with pytest.raises(ValueError, match="parametrised"):
        adapt(model, 1, torch.Generator())


@pytest.mark.parametrize("architecture", ["progressive", "enhanced"])
def test_heads_of_growing_networks_are_their_last_layers(architecture: str) -> None:
    plan = study(architecture=architecture)

    def parts(model: nn.Module) -> set[str]:
        return {name.split(".")[0] for name in make_trainable(model, "head", 1, torch.Generator())}

    assert parts(make_discriminator(plan)) == {"score", "projection"}
    assert parts(make_generator(plan)) == {"to_images"}


def test_what_is_noised_is_what_a_private_step_moves() -> None:
    def size(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    plan = study()
    assert trainable_parameters(plan, "gan") == size(make_discriminator(plan))
    both = size(make_discriminator(plan)) + size(make_generator(plan))
    assert trainable_parameters(study(l1_weight=1.0), "gan") == both
    vae = study(architecture="vae")
    assert trainable_parameters(vae, "gan") == size(make_encoder(vae)) + size(make_generator(vae))
    growing = make_discriminator(study(architecture="enhanced"))
    unused = size(growing.get_submodule("from_images.0")) + size(growing.get_submodule("from_images.1"))
    assert trainable_parameters(study(architecture="enhanced"), "gan") == size(growing) - unused
