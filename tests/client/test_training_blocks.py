"""A block of private steps: what it returns, what it depends on, and what it does with patients of whom little is known."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.models.condition import condition
from fedsynth.models.dcgan import initialise
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Module, StudyPlan
from fedsynth.records import PROGRESS, State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import ImagePatients, train_gan
from fedsynth_client.training.block import BlockResult, update_norm
from fedsynth_client.training.profiles import train_autoencoder, train_radiogenomics

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

GENES, FEATURES, SLICES = 6, 2, 3
TRAINING = {"rounds": 1, "steps_per_round": 2, "expected_batch": 4, "max_grad_norm": 0.5, "learning_rate": 1e-2}
SIGMA = 0.8
MECHANISM = Mechanism(0.5, SIGMA, 2)


def plan(**changes: dict[str, object]) -> StudyPlan:
    sections: dict[str, dict[str, object]] = {
        "autoencoder": {**TRAINING, "budget_share": 0.3, "hidden": [5], "latent_dim": 2},
        "radiogenomics": {**TRAINING, "budget_share": 0.3, "hidden": [5], "dropout": 0.3},
        "gan": {
            **TRAINING,
            "budget_share": 0.4,
            "latent_dim": 3,
            "generator_width": 4,
            "discriminator_width": 4,
            "generator_batch": 4,
            "slices_per_patient": 2,
        },
    }
    study = StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of training",
            "image": {"sequences": ["T1c"], "size": 32, "slices": SLICES},
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [0, 1],
                "center": [0] * GENES,
                "scale": [1] * GENES,
            },
            "morphology": {"features": ["volume", "sphericity"]},
            "privacy": {"epsilon": 1.0},
            **{name: {**values, **changes.get(name, {})} for name, values in sections.items()},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )
    return study


def discriminator_frozen() -> StudyPlan:
    """A plan whose discriminator learns nothing; no such plan is valid, so it is made behind validation."""
    study = plan()
    return study.model_copy(update={"gan": study.gan.model_copy(update={"learning_rate": 0.0})})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 2


def image_patients(count: int = 8, seed: int = 1) -> ImagePatients:
    slices = normal(count, 2, SLICES, 32, 32, seed=seed).tanh().to(torch.float16)
    return ImagePatients(slices, normal(count, FEATURES, seed=seed).sigmoid(), labels(count))


def start(module: Module, study: StudyPlan) -> State:
    make = {"autoencoder": make_autoencoder, "radiogenomics": make_radiogenomic_dnn, "gan": make_generator}[module]
    model = make(study)
    initialise(model, torch.Generator().manual_seed(3))
    return model.state_dict()


def discriminator(study: StudyPlan) -> State:
    model = make_discriminator(study)
    initialise(model, torch.Generator().manual_seed(4))
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


PROFILES = SyntheticProfiles(normal(16, GENES), normal(16, FEATURES).sigmoid(), labels(16))


def gan(
    study: StudyPlan,
    patients: ImagePatients,
    local: State | None = None,
    seed: int = 7,
    mechanism: Mechanism = MECHANISM,
    randomness: SeededRandomness | SystemRandomness | None = None,
) -> BlockResult:
    given = discriminator(study) if local is None else local
    source = SeededRandomness(seed) if randomness is None else randomness
    return train_gan(study, start("gan", study), given, PROFILES, patients, mechanism, source)


def block(
    module: Module,
    study: StudyPlan,
    patients: int = 8,
    randomness: SeededRandomness | SystemRandomness | None = None,
    unknown: slice | None = None,
) -> BlockResult:
    source = SeededRandomness(7) if randomness is None else randomness
    genes, morphology, classes = normal(patients, GENES), normal(patients, FEATURES).sigmoid(), labels(patients)
    images = image_patients(patients)
    if unknown is not None:
        for values in (morphology, images.morphology):
            values[unknown] = torch.nan
        for codes in (classes, images.labels):
            codes[unknown] = -1
    if module == "autoencoder":
        return train_autoencoder(study, start(module, study), genes, MECHANISM, source)
    if module == "radiogenomics":
        return train_radiogenomics(study, start(module, study), genes, morphology, classes, MECHANISM, source)
    return gan(study, images, randomness=source)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finite(state: State) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("module", TRAINED)
def test_a_block_returns_new_weights_and_the_closed_list_of_progress(module: Module) -> None:
    study = plan()
    before, result = start(module, study), block(module, study, randomness=SystemRandomness())
    assert {name: (t.shape, t.dtype) for name, t in result.weights.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert finite(result.weights)
    assert not same(result.weights, before)
    assert set(result.progress) == PROGRESS[module]
    assert result.progress["update_norm"] == pytest.approx(update_norm(before, result.weights), rel=1e-6)
    assert (result.local == {}) == (module != "gan")
    # What is returned shares no memory with what was given.
    assert same(start(module, study), before)


@pytest.mark.parametrize("module", TRAINED)
def test_a_seeded_block_repeats_itself_whatever_the_global_stream_says(module: Module) -> None:
    torch.manual_seed(1)
    first = block(module, plan())
    torch.manual_seed(2)
    again = block(module, plan())
    assert same(first.weights, again.weights)
    assert first.progress == again.progress
    other = block(module, plan(), randomness=SeededRandomness(8))
    assert not same(first.weights, other.weights)


@pytest.mark.parametrize("module", TRAINED)
def test_patients_of_whom_little_is_known_leave_everything_finite(module: Module) -> None:
    for unknown in (slice(0, 3), slice(0, 8)):
        result = block(module, plan(), unknown=unknown)
        assert finite(result.weights)
        assert finite(result.local)
        assert all(abs(value) < float("inf") for value in result.progress.values())


@pytest.mark.parametrize("module", TRAINED)
def test_a_block_that_draws_nobody_still_takes_noisy_steps(module: Module) -> None:
    rare = Mechanism(1e-9, SIGMA, 2)
    study = plan()
    if module == "gan":
        result = gan(study, image_patients(), mechanism=rare)
        before = discriminator(study)
        after = {name: tensor for name, tensor in result.local.items() if name.startswith("model/")}
    else:
        before = start(module, study)
        genes = normal(8, GENES)
        randomness = SeededRandomness(7)
        if module == "autoencoder":
            after = train_autoencoder(study, before, genes, rare, randomness).weights
        else:
            scores = normal(8, FEATURES).sigmoid()
            after = train_radiogenomics(study, before, genes, scores, labels(8), rare, randomness).weights
    assert all(not torch.equal(before[name], after[name]) for name in before)


class Recording(SeededRandomness):
    """A seeded source that notes what noise was asked of it."""

    def __init__(self) -> None:
        super().__init__(7)
        self.asked: Counter[tuple[tuple[int, ...], float]] = Counter()

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        self.asked[tuple(shape), std] += 1
        return super().normal(shape, std)


@pytest.mark.parametrize("module", TRAINED)
def test_every_step_adds_the_charged_noise_to_every_private_parameter(module: Module) -> None:
    study, randomness = plan(), Recording()
    block(module, study, randomness=randomness)
    model = {
        "autoencoder": make_autoencoder,
        "radiogenomics": make_radiogenomic_dnn,
        "gan": make_discriminator,
    }[module](study)
    std = SIGMA * study.training(module).max_grad_norm
    shapes = Counter(tuple(parameter.shape) for parameter in model.parameters())
    assert randomness.asked == {(shape, std): MECHANISM.steps * count for shape, count in shapes.items()}


# ---- the generator sees private data only through the discriminator ---------------------------------------------------


def test_with_a_frozen_discriminator_the_generator_depends_on_no_patient() -> None:
    study = discriminator_frozen()
    reference = gan(study, image_patients(8, seed=1))
    for patients in (image_patients(8, seed=2), image_patients(30, seed=3), image_patients(1, seed=4)):
        other = gan(study, patients)
        assert same(other.weights, reference.weights)
        assert other.progress == reference.progress


def test_with_a_learning_discriminator_the_generator_depends_on_the_patients() -> None:
    a, b = gan(plan(), image_patients(8, seed=1)), gan(plan(), image_patients(8, seed=2))
    assert not same(a.weights, b.weights)


def test_the_generator_steps_once_every_so_many_discriminator_steps() -> None:
    study = plan(gan={"discriminator_steps": 3})
    assert same(gan(study, image_patients()).weights, start("gan", study))
    assert gan(study, image_patients()).progress["update_norm"] == 0
    longer = gan(study, image_patients(), mechanism=Mechanism(0.5, SIGMA, 3))
    assert not same(longer.weights, start("gan", study))


class Silent(SeededRandomness):
    """A seeded source without noise, so that what a step learns shows."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


def scores(study: StudyPlan, local: State, images: Tensor, rows: int = 8) -> float:
    """Mean logit of the discriminator of `local` on images (rows, channels, H, W)."""
    model = make_discriminator(study)
    model.load_state_dict({name.removeprefix("model/"): t for name, t in local.items() if name.startswith("model/")})
    code = condition(labels(rows), normal(rows, FEATURES).sigmoid(), torch.zeros(rows), 2)
    return float(model(images, code).mean().detach())


def fakes(study: StudyPlan, rows: int = 8) -> Tensor:
    model = make_generator(study)
    model.load_state_dict(start("gan", study))
    code = condition(labels(rows), normal(rows, FEATURES).sigmoid(), torch.zeros(rows), 2)
    return model(normal(rows, study.gan.latent_dim), code).detach()


def test_the_discriminator_learns_from_fakes_when_nobody_is_drawn_and_from_patients_when_they_are() -> None:
    study = plan(gan={"generator_learning_rate": 1e-9})  # a generator that stands still
    patients, fake = image_patients(), fakes(study)
    real = patients.slices[:, :, 0].float()
    before = discriminator(study)
    nobody = gan(study, patients, mechanism=Mechanism(1e-9, SIGMA, 10), randomness=Silent(1)).local
    assert scores(study, nobody, fake) < scores(study, before, fake) - 0.1
    everybody = gan(study, patients, mechanism=Mechanism(1.0, SIGMA, 10), randomness=Silent(1)).local
    assert scores(study, everybody, real) > scores(study, nobody, real) + 0.1
    assert scores(study, everybody, real) > scores(study, everybody, fake) + 0.1


# ---- local state -----------------------------------------------------------------------------------------------------


def test_discriminator_and_moments_survive_the_file_and_go_on() -> None:
    study = plan()
    first = gan(study, image_patients())
    names = {name.removeprefix("model/") for name in discriminator(study)}
    assert set(first.local) == {
        f"{kind}/{name}" for kind in ("model", "exp_avg", "exp_avg_sq", "step") for name in names
    }
    stored = load(save(first.local))
    assert same(stored, first.local)
    second, again = gan(study, image_patients(), first.local, seed=9), gan(study, image_patients(), stored, seed=9)
    assert same(second.weights, again.weights)
    assert same(second.local, again.local)
    assert {float(t) for name, t in second.local.items() if name.startswith("step/")} == {4.0}
    assert same(stored, first.local)  # the given state is not changed


def test_the_moments_count() -> None:
    study = plan()
    first = gan(study, image_patients())
    weights_only = {name: tensor for name, tensor in first.local.items() if name.startswith("model/")}
    kept, forgotten = gan(study, image_patients(), first.local, 9), gan(study, image_patients(), weights_only, 9)
    assert not same(kept.local, forgotten.local)
    assert {float(t) for name, t in forgotten.local.items() if name.startswith("step/")} == {2.0}


def test_the_discriminator_does_not_leave() -> None:
    result = gan(plan(), image_patients())
    assert set(result.weights) == set(start("gan", plan()))
    assert not set(result.weights) & set(result.local)


# ---- the radiogenomic DNN --------------------------------------------------------------------------------------------


def test_the_output_layer_is_kept_non_negative_where_the_plan_says_so() -> None:
    free, kept = (
        block("radiogenomics", plan()),
        block("radiogenomics", plan(radiogenomics={"nonnegative_output": True})),
    )
    assert float(free.weights["morphology.weight"].min()) < 0
    assert float(kept.weights["morphology.weight"].min()) >= 0
