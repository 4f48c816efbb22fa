"""The networks of a translation: what goes in and out of them, how deep they are, and that slices pass alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedsynth.models.translator import make_domain_discriminators, make_translators
from fedsynth.plan import StudyPlan

TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.2,
}
SEQUENCES = {"source": "T1", "target": "T1c"}
TUMOUR = {"domains": "tumour"}


def study(translation: dict[str, object] | None) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "translating",
            "purpose": "tests of translating networks",
            "image": {"sequences": ["T1", "T1c", "FLAIR"], "size": 32, "slices": 4},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "privacy": {"epsilon": 1.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": TRAINING,
            "translation": None if translation is None else {**TRAINING, "width": 4, **translation},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def networks(plan: StudyPlan) -> list[nn.Module]:
    torch.manual_seed(0)
    return [*make_translators(plan).values(), *make_domain_discriminators(plan).values()]


@pytest.mark.parametrize(("translation", "channels"), [(SEQUENCES, 1), (TUMOUR, 3)])
@pytest.mark.parametrize("size", [32, 64, 256])
@torch.no_grad()
def test_slices_keep_their_shape_and_get_one_score(translation: dict[str, object], channels: int, size: int) -> None:
    plan = study(translation)
    x = normal(2, channels, size, size)
    translators, discriminators = make_translators(plan), make_domain_discriminators(plan)
    assert set(translators) == {"to_target", "to_source"}
    assert set(discriminators) == {"source", "target"}
    for model in translators.values():
        assert model(x).shape == x.shape
        assert float(model(100 * x).abs().max()) <= 1
    for model in discriminators.values():
        assert model(x).shape == (2,)


def test_each_network_has_eight_layers_and_no_parameter_outside_them() -> None:
    for model in networks(study(SEQUENCES)):
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        assert len(layers) == 8
        assert sum(1 for _ in model.parameters()) == 2 * 8
        assert not list(model.buffers())


@torch.no_grad()
def test_a_slice_does_not_see_the_others() -> None:
    x = normal(3, 1, 32, 32)
    for model in networks(study(SEQUENCES)):
        torch.testing.assert_close(model(x[1:2]), model(x)[1:2], rtol=1e-4, atol=1e-5)


def test_a_plan_without_translation_has_no_such_networks() -> None:
    for make in (make_translators, make_domain_discriminators):
        with pytest.raises(ValueError, match="no section translation"):
            make(study(None))
