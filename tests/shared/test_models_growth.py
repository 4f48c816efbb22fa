"""When each resolution trains, what real images look like then, and that what travels never changes shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsynth.models.growth import Stage, active_parameters, at_stage, blended, enlarged, last_level, stage_at
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.plan import StudyPlan

TRAINING = {
    "rounds": 6,
    "steps_per_round": 4,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.3,
}


def study(**gan: object) -> StudyPlan:
    options = {"architecture": "enhanced", "growth": [1, 2, 3], "latent_dim": 5, "generator_width": 2}
    return StudyPlan.model_validate(
        {
            "name": "growing",
            "purpose": "tests of growing networks",
            "image": {"sequences": ["T1"], "size": 32, "slices": 4},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "privacy": {"epsilon": 1.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": {**TRAINING, "discriminator_width": 2, **options, **gan},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def test_each_resolution_trains_for_its_rounds_and_fades_in_first() -> None:
    plan = study()
    stages = [stage_at(plan, step) for step in range(24)]
    assert [stage.level for stage in stages if stage] == [0] * 4 + [1] * 8 + [2] * 12
    assert [stage.alpha for stage in stages if stage] == pytest.approx(
        [1.0] * 4 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 4 + [i / 6 for i in range(1, 7)] + [1.0] * 6
    )
    assert stage_at(plan, 10_000) == Stage(2, 1.0)


def test_the_growth_of_a_plan_ends_at_the_size_of_its_images() -> None:
    end = stage_at(study(), 24)
    assert end is not None
    assert end.size == 32
    assert [last_level(size) for size in (32, 64, 128, 256)] == [2, 3, 4, 5]


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_any_share_of_fading_leaves_alpha_above_zero_and_at_one_in_the_end(share: float) -> None:
    plan = study(fade_in=share)
    found = [stage_at(plan, step) for step in range(24)]
    assert all(stage is not None and 0 < stage.alpha <= 1 for stage in found)
    last_of_level = {stage.level: stage.alpha for stage in found if stage}
    assert last_of_level == {0: 1.0, 1: 1.0, 2: 1.0}
    assert (share > 0.1) == any(stage is not None and stage.alpha < 1 for stage in found)


def test_a_plan_without_growth_has_no_stages() -> None:
    assert stage_at(study(growth=[]), 7) is None
    assert stage_at(study(architecture="dcgan", growth=[]), 7) is None
    with pytest.raises(ValueError, match="no step -1"):
        stage_at(study(), -1)


@pytest.mark.parametrize(("level", "alpha"), [(-1, 1.0), (1, 0.0), (1, 1.1), (0, 0.5), (1, float("nan"))])
def test_stages_that_do_not_exist_are_refused(level: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="no stage"):
        Stage(level, alpha)


def test_real_images_are_averaged_down_and_blended_while_a_resolution_fades_in() -> None:
    images = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert at_stage(images, None, 32) is images
    assert torch.equal(at_stage(images, Stage(2), 32), images)
    halves = images.reshape(3, 2, 16, 2, 16, 2).mean((3, 5))
    quarters = images.reshape(3, 2, 8, 4, 8, 4).mean((3, 5))
    torch.testing.assert_close(at_stage(images, Stage(1), 32), halves)
    torch.testing.assert_close(at_stage(images, Stage(0), 32), quarters)
    expected = 0.25 * halves + 0.75 * quarters.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(at_stage(images, Stage(1, 0.25), 32), expected)
    torch.testing.assert_close(at_stage(images[1:2], Stage(1, 0.25), 32), expected[1:2])  # each by itself


def test_enlarging_keeps_every_pixel() -> None:
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(enlarged(images, 32)[:, :, ::4, ::4], images)
    assert torch.equal(enlarged(images, 32)[:, :, 3::4, 3::4], images)
    assert enlarged(images, 8) is images
    assert torch.equal(blended(images, 2 * images, 1.0), 2 * images)


@pytest.mark.parametrize("make", [make_generator, make_discriminator])
@pytest.mark.parametrize("architecture", ["progressive", "enhanced"])
def test_what_travels_has_the_same_names_and_shapes_at_all_stages(make, architecture: str) -> None:  # type: ignore[no-untyped-def]
    plan = study(architecture=architecture)
    model = make(plan)
    template = {name: tensor.shape for name, tensor in model.state_dict().items()}
    used: set[str] = set()
    for stage in (Stage(0), Stage(1, 0.5), Stage(1), Stage(2, 0.5), Stage(2)):
        code = torch.zeros(2, (model.start.layer.in_features - 5) if make is make_generator else _condition(model))
        x = torch.zeros(2, 5) if make is make_generator else torch.zeros(2, 2, stage.size, stage.size)
        model(x, code, stage=stage).sum().backward()
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == template
        used |= set(active_parameters(model, stage))
    assert used == {name for name, _ in model.named_parameters()}  # nothing is there that never trains


def _condition(model: nn.Module) -> int:
    projection = model.get_submodule("projection")
    return (projection if isinstance(projection, nn.Linear) else projection.get_submodule("layer")).in_features  # type: ignore[return-value]


def test_a_stage_uses_the_levels_up_to_its_own_and_the_ends_that_it_blends() -> None:
    model = make_generator(study())
    names = [name for name, _ in model.named_parameters()]

    def parts(stage: Stage | None) -> set[str]:
        active = active_parameters(model, stage)
        assert active == [name for name in names if name in set(active)]  # in the model's order
        return {".".join(name.split(".")[:2]) if name[0] in "bt" else name.split(".")[0] for name in active}

    assert parts(Stage(0)) == {"start", "blocks.0", "to_images.0"}
    assert parts(Stage(1, 0.5)) == {"start", "blocks.0", "blocks.1", "to_images.0", "to_images.1"}
    assert parts(Stage(1)) == {"start", "blocks.0", "blocks.1", "to_images.1"}
    whole = {"start", "blocks.0", "blocks.1", "blocks.2", "attention", "to_images.2"}
    assert parts(Stage(2, 0.5)) == whole | {"to_images.1"}
    assert parts(Stage(2)) == parts(None) == whole


def test_networks_that_do_not_grow_use_all_they_have() -> None:
    model = make_generator(study(architecture="dcgan", growth=[]))
    assert active_parameters(model, None) == [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="does not grow"):
        model(torch.zeros(2, 5), torch.zeros(2, 12), stage=Stage(1))
