"""Options of the adversarial block change what trains, what is shown and when, never what is charged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedsynth.dp import step as dp_step
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.trainable import make_trainable, trainable_parameters
from fedsynth.plan import StudyPlan, Trains
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adaptive_steps import (
    LADDER,
    Pace,
    Rung,
    after_discriminator_step,
    after_generator_step,
    rung_from,
)
from fedsynth_client.training.adversarial import ImagePatients, train_gan
from fedsynth_client.training.block import BlockResult

FEATURES = ["volume", "position_left", "position_posterior", "position_superior"]
SLICES, SIGMA, CLIP = 3, 0.8, 0.5
TRAINING = {"rounds": 2, "steps_per_round": 3, "expected_batch": 4, "max_grad_norm": CLIP, "learning_rate": 1e-2}
GAN = {
    "latent_dim": 3,
    "generator_width": 8,
    "discriminator_width": 8,
    "generator_batch": 4,
    "slices_per_patient": 2,
    "adapter_rank": 1,
}
MECHANISM = Mechanism(0.5, SIGMA, 3)
AUGMENTED = {"augmentation": ["translation", "intensity"]}
OPTIONS: dict[str, Mapping[str, object]] = {
    "norms": {"discriminator_trains": "norms", "generator_trains": "norms"},
    "head": {"discriminator_trains": "head", "generator_trains": "head"},
    "adapters": {"discriminator_trains": "adapters", "generator_trains": "adapters"},
    "adaptive": {"discriminator_steps": "adaptive"},
    "augmented": AUGMENTED,
    "all of them": {"discriminator_trains": "adapters", "discriminator_steps": "adaptive", **AUGMENTED},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
PARTS = pytest.mark.parametrize("trains", ["norms", "head", "adapters"])


def plan(**gan: object) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of options",
            "image": {"sequences": ["T1c"], "size": 32, "slices": SLICES},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": 1.0},
            "autoencoder": {**TRAINING, "budget_share": 0.3},
            "radiogenomics": {**TRAINING, "budget_share": 0.3},
            "gan": {**TRAINING, "budget_share": 0.4, **GAN, **gan},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def blind(study: StudyPlan) -> StudyPlan:
    """A plan whose discriminator learns nothing; no such plan is valid, so it is made behind validation."""
    return study.model_copy(update={"gan": study.gan.model_copy(update={"learning_rate": 0.0})})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 2


def patients(count: int = 8, seed: int = 1) -> ImagePatients:
    slices = normal(count, 2, SLICES, 32, 32, seed=seed).tanh().to(torch.float16)
    return ImagePatients(slices, normal(count, len(FEATURES), seed=seed).sigmoid(), labels(count))


PROFILES = SyntheticProfiles(normal(16, 2), normal(16, len(FEATURES)).sigmoid(), labels(16))


def generator(study: StudyPlan) -> State:
    model = make_generator(study)
    initialise(model, torch.Generator().manual_seed(3))
    return model.state_dict()


def discriminator(study: StudyPlan) -> State:
    model = make_discriminator(study)
    initialise(model, torch.Generator().manual_seed(4))
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


def block(
    study: StudyPlan,
    cohort: ImagePatients | None = None,
    local: State | None = None,
    randomness: SeededRandomness | None = None,
    mechanism: Mechanism = MECHANISM,
) -> BlockResult:
    return train_gan(
        study,
        generator(study),
        discriminator(study) if local is None else local,
        PROFILES,
        patients() if cohort is None else cohort,
        mechanism,
        SeededRandomness(7) if randomness is None else randomness,
    )


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class Recording(SeededRandomness):
    """A seeded source that notes what noise was asked of it."""

    def __init__(self) -> None:
        super().__init__(7)
        self.asked: Counter[tuple[tuple[int, ...], float]] = Counter()

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        self.asked[tuple(shape), std] += 1
        return super().normal(shape, std)


# ---- for every option ------------------------------------------------------------------------------------------------


@EACH_OPTION
def test_the_generator_depends_on_patients_only_through_a_learning_discriminator(options: Mapping[str, object]) -> None:
    study = plan(**options)
    reference = block(blind(study))
    for cohort in (patients(8, seed=2), patients(30, seed=3), patients(1, seed=4)):
        other = block(blind(study), cohort)
        assert same(other.weights, reference.weights)
        assert other.progress == reference.progress
    assert not same(block(study).weights, block(study, patients(8, seed=2)).weights)


@EACH_OPTION
def test_each_private_step_is_noised_as_charged_whatever_the_option(options: Mapping[str, object]) -> None:
    study, randomness = plan(**options), Recording()
    block(study, randomness=randomness)
    model = make_discriminator(study)
    trained = make_trainable(model, study.gan.discriminator_trains, 1, torch.Generator())
    shapes = Counter(tuple(parameter.shape) for parameter in trained.values())
    assert randomness.asked == {(shape, SIGMA * CLIP): MECHANISM.steps * count for shape, count in shapes.items()}
    assert trainable_parameters(study, "gan") == sum(parameter.numel() for parameter in trained.values())


class Silent(SeededRandomness):
    """A seeded source without noise."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


def gradient(study: StudyPlan, cohort: ImagePatients, rate: float) -> Tensor:
    """The gradient of a block's first step, without noise, from the first moment of its optimiser."""
    local = block(study, cohort, mechanism=Mechanism(rate, SIGMA, 1), randomness=Silent(5)).local
    return torch.cat([tensor.flatten() for tensor in part(local, "exp_avg/").values()]) / 0.5


@EACH_OPTION
def test_a_patient_of_many_slices_changes_a_step_by_at_most_the_clip(options: Mapping[str, object]) -> None:
    for clip in (1e-2, 1e3):
        study = plan(**options, max_grad_norm=clip, slices_per_patient=8)
        nobody = gradient(study, patients(), 1e-9)
        changed = [gradient(study, patients(1, seed=seed), 1.0) - nobody for seed in (1, 2)]
        norms = [float(each.norm()) * study.gan.expected_batch for each in changed]
        # The difference of two gradients in float32, of which the fakes' part is much the larger.
        assert all(0 < norm <= clip * 1.002 for norm in norms)
        assert (clip == 1e-2) == all(norm > clip * 0.998 for norm in norms)
        assert not torch.equal(changed[0], changed[1])


@EACH_OPTION
def test_what_is_sent_looks_as_the_plan_says_and_local_state_survives_the_file(options: Mapping[str, object]) -> None:
    study = plan(**options)
    first = block(study)
    assert {name: (t.shape, t.dtype) for name, t in first.weights.items()} == {
        name: (t.shape, t.dtype) for name, t in generator(study).items()
    }
    assert not same(first.weights, generator(study))
    stored = load(save(first.local))
    assert same(stored, first.local)
    second, again = (block(study, local=state, randomness=SeededRandomness(9)) for state in (first.local, stored))
    assert same(second.weights, again.weights)
    assert same(second.local, again.local)
    assert {float(t) for name, t in second.local.items() if name.startswith("step/")} == {6.0}


@EACH_OPTION
def test_chunks_of_a_draw_change_nothing(options: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    study, whole = plan(**options), Mechanism(1.0, SIGMA, 1)
    at_once = block(study, mechanism=whole).local
    monkeypatch.setattr(dp_step, "CHUNK", 4)  # two patients with two slices each
    in_chunks = block(study, mechanism=whole).local
    for name in at_once:
        if name.startswith("exp_avg/"):
            assert float((at_once[name] - in_chunks[name]).norm()) <= 1e-5 * float(at_once[name].norm()) + 1e-8


# ---- parts that train ------------------------------------------------------------------------------------------------


@PARTS
def test_frozen_parameters_of_the_discriminator_do_not_change(trains: Trains) -> None:
    study = plan(discriminator_trains=trains)
    before, after = part(discriminator(study), "model/"), block(study).local
    trained = set(make_trainable(make_discriminator(study), trains, 1, torch.Generator()))
    for name, tensor in part(after, "model/").items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    assert set(part(after, "exp_avg/")) == trained
    adapters = part(after, "adapter/")
    assert set(adapters) == {name for name in trained if name.endswith(("down.weight", "up.weight"))}
    assert bool(adapters) == (trains == "adapters")
    assert all(bool(tensor.any()) for tensor in adapters.values())


@PARTS
def test_only_the_named_part_of_the_generator_moves(trains: Trains) -> None:
    study = plan(generator_trains=trains)
    before, after = generator(study), block(study).weights
    trained = set(make_trainable(make_generator(study), trains, 1, torch.Generator()))
    moving = {
        name.replace(".down.", ".").replace(".up.", ".") for name in trained
    }  # an adapter moves its layer's weight
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in moving), name


# ---- steps that adapt ------------------------------------------------------------------------------------------------

PACE = Pace(threshold=0.6, memory=0.5, largest=1000)


def climb(rung: Rung, accuracies: list[float], pace: Pace = PACE) -> Rung:
    for accuracy in accuracies:
        rung = after_generator_step(rung, accuracy, pace)
    return rung


def test_the_ladder_is_climbed_when_the_discriminator_falls_behind_and_not_before_its_time() -> None:
    assert PACE.patience == 4
    assert Pace(0.6, 0.99, 1).patience == pytest.approx(200)
    waiting = climb(Rung(), [0.0] * 3)
    assert waiting.discriminator_steps == 1
    assert climb(waiting, [0.0]).discriminator_steps == 2
    assert climb(waiting, [0.0]).steps == 0
    assert climb(Rung(), [0.9] * 50).discriminator_steps == 1
    # The average decides, not the last accuracy.
    assert climb(Rung(), [0.9] * 50 + [0.5]).discriminator_steps == 1
    assert climb(Rung(), [0.9] * 50 + [0.5] * 3).discriminator_steps == 2


def test_the_ladder_is_the_published_one_and_ends() -> None:
    seen, rung = [], Rung()
    for _ in range(4 * len(LADDER) + 8):
        rung = after_generator_step(rung, 0.0, PACE)
        seen.append(rung.discriminator_steps)
    assert list(dict.fromkeys(seen)) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert climb(Rung(), [0.0] * 100, Pace(0.6, 0.5, 7)).discriminator_steps == 5


def test_a_generator_step_is_due_after_so_many_discriminator_steps() -> None:
    rung, due = Rung(discriminator_steps=3), []
    for _ in range(7):
        rung, now = after_discriminator_step(rung)
        due.append(now)
    assert due == [False, False, True, False, False, True, False]
    assert rung.waited == 1


def test_the_rung_survives_as_tensors() -> None:
    rung = Rung(20, 0.123456789, 7, 13)
    assert rung_from(load(save(rung.to_state()))) == rung
    assert rung_from({}) == Rung()


def test_the_ladder_looks_at_no_real_image() -> None:
    study = blind(plan(discriminator_steps="adaptive"))
    reference = part(block(study).local, "ladder/")
    assert 0 < float(reference["accuracy"]) < 1
    garbage = patients(30, seed=5)
    garbage.slices.fill_(1.0)
    garbage.morphology.fill_(torch.nan)
    assert same(part(block(study, garbage).local, "ladder/"), reference)
    nobody = block(study, mechanism=Mechanism(1e-9, SIGMA, 3))
    assert same(part(nobody.local, "ladder/"), reference)


def test_the_ladder_goes_on_over_rounds() -> None:
    study = plan(discriminator_steps="adaptive", adaptive_memory=0.0, adaptive_accuracy=0.99)
    high = {f"ladder/{name}": t for name, t in Rung(5, 1.0, 0, 0).to_state().items()}
    first = block(study, local={**discriminator(study), **high})
    assert same(first.weights, generator(study))  # three of five steps
    assert first.progress["update_norm"] == 0
    assert rung_from(part(first.local, "ladder/")).waited == 3
    second = block(study, local=first.local)
    assert not same(second.weights, generator(study))
    assert rung_from(part(second.local, "ladder/")).waited == 1


def test_a_block_climbs_by_its_plan() -> None:
    # A discriminator that learns nothing and calls everything real.
    study = blind(plan(discriminator_steps="adaptive", adaptive_memory=0.0, steps_per_round=5))
    fooled = discriminator(study)
    fooled["model/score.bias"] = torch.tensor([100.0])
    after = rung_from(part(block(study, local=fooled, mechanism=Mechanism(0.5, SIGMA, 4)).local, "ladder/"))
    # Two steps on the first rung are its least stay; the third step starts the second one.
    assert (after.discriminator_steps, after.accuracy, after.steps) == (2, 0.0, 1)
    assert "ladder/accuracy" not in block(plan()).local
