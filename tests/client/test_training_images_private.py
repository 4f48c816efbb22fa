"""What a patient's gradient holds, and what of the networks is clipped, noised and moved, for every way of making images.

Plain gradient descent at a rate of 1 makes the change of the weights the gradient itself, so what a step did is read off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.functional import fixed_parametrisations
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.models.dcgan import initialise
from fedsynth.models.growth import Stage, active_parameters, stage_at
from fedsynth.models.images import make_companion, make_generator
from fedsynth.plan import StudyPlan
from fedsynth.records import State, progress_of
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_client.training.adversarial import train_gan
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.critic import critic_tensors
from fedsynth_client.training.images import ImagePatients, showing
from fedsynth_client.training.private_generator import joint_tensors

FEATURES = ["volume", "position_left", "position_posterior", "position_superior"]
SLICES, BATCH, SIGMA, STEPS = 3, 4, 0.8, 3
TRAINING = {"rounds": 3, "steps_per_round": STEPS, "expected_batch": BATCH, "max_grad_norm": 0.5, "learning_rate": 1.0}
GAN = {
    "latent_dim": 3,
    "generator_width": 4,
    "generator_learning_rate": 1.0,
    "discriminator_width": 4,
    "generator_batch": 4,
    "slices_per_patient": 2,
    "optimizer": "sgd",
}
PENALTY = {"lipschitz": "gradient_penalty", "penalty_weight": 3.0}
AUXILIARY = {"l1_weight": 2.0, "feature_matching_weight": 5.0}
AUGMENTED = {"augmentation": ["translation", "intensity"]}
GROWN: dict[str, Any] = {"growth": [1, 1, 1], "fade_in": 0.7}

OPTIONS: dict[str, Mapping[str, Any]] = {
    "wasserstein": {"loss": "wasserstein", "lipschitz": "weight_clip", "weight_clip": 0.05},
    "least squares": {"loss": "least_squares"},
    "hinge": {"loss": "hinge", "spectral_norm": True},
    "penalty": {"loss": "wasserstein", **PENALTY},
    "penalty at fakes": {**PENALTY, "penalty_at": "fakes", "spectral_norm": True},
    "auxiliary": AUXILIARY,
    "auxiliary, penalty, augmented": {**AUXILIARY, **PENALTY, **AUGMENTED},
    "progressive": {"architecture": "progressive", **GROWN},
    "progressive at full size": {"architecture": "progressive"},
    "enhanced": {"architecture": "enhanced", "loss": "wasserstein", **GROWN, **AUGMENTED},
    "progressive, auxiliary, penalty": {"architecture": "progressive", **GROWN, **AUXILIARY, **PENALTY},
    "vae": {"architecture": "vae"},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# The first step of the last resolution fades in: both resolutions take part, and all blocks.
FADING = 2 * STEPS


def plan(epsilon: float = 1.0, **gan: Any) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of images",
            "image": {"sequences": ["T1c"], "size": 32, "slices": SLICES},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": epsilon},
            "autoencoder": {**TRAINING, "budget_share": 0.3},
            "radiogenomics": {**TRAINING, "budget_share": 0.3},
            "gan": {**TRAINING, "budget_share": 0.4, **GAN, **gan},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patients(count: int = 6, seed: int = 1) -> ImagePatients:
    slices = normal(count, 2, SLICES, 32, 32, seed=seed).tanh().to(torch.float16)
    return ImagePatients(slices, normal(count, len(FEATURES), seed=seed).sigmoid(), torch.arange(count) % 2)


PROFILES = SyntheticProfiles(normal(16, 2), normal(16, len(FEATURES)).sigmoid(), torch.arange(16) % 2)


def drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """The model with first weights; what starts at 0 is moved away, so that it has a gradient of which to speak."""
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gamma.weight")):
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def shared(study: StudyPlan) -> State:
    return dict(drawn_anew(make_generator(study), 3).state_dict())


def at_site(study: StudyPlan) -> State:
    return {f"model/{name}": tensor for name, tensor in drawn_anew(make_companion(study), 4).state_dict().items()}


class Silent(SeededRandomness):
    """A seeded source without noise."""

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.zeros(tuple(shape))


class Recording(SeededRandomness):
    """A seeded source that notes what noise was asked of it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: Counter[tuple[tuple[int, ...], float]] = Counter()

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        self.asked[tuple(shape), std] += 1
        return super().normal(shape, std)


def block(
    study: StudyPlan,
    cohort: ImagePatients | None = None,
    *,
    steps: int = STEPS,
    rate: float = 0.5,
    randomness: SeededRandomness | None = None,
    first_step: int = 0,
    weights: State | None = None,
    local: State | None = None,
) -> BlockResult:
    return train_gan(
        study,
        shared(study) if weights is None else weights,
        at_site(study) if local is None else local,
        PROFILES,
        patients() if cohort is None else cohort,
        Mechanism(rate, SIGMA if study.privacy.private else 0.0, steps),
        SeededRandomness(7) if randomness is None else randomness,
        first_step,
    )


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def joint(result: BlockResult, study: StudyPlan, stage: Stage | None) -> Tensor:
    """Weights of the site's network, and of the generator where it moves by a private gradient, that a stage uses."""
    site = part(result.local, "model/")
    found = [site[name] for name in active_parameters(make_companion(study), stage)]
    if study.gan.generator_is_private:
        found += [result.weights[name] for name in active_parameters(make_generator(study), stage)]
    return flat(found)


def contribution(study: StudyPlan, cohort: ImagePatients) -> Tensor:
    """What the one patient of `cohort` adds to the sum of a step: what moves with it, less what moves without."""
    # Clamped weights do not show the gradient.
    free = {} if study.gan.lipschitz != "weight_clip" else {"lipschitz": "none"}
    study = study.model_copy(update={"gan": study.gan.model_copy(update=free)})
    alone, nobody = (
        block(study, cohort, steps=1, rate=rate, randomness=Silent(5), first_step=FADING) for rate in (1.0, 1e-9)
    )
    stage = stage_at(study, FADING)
    return (joint(nobody, study, stage) - joint(alone, study, stage)) * BATCH


# ---- what a patient's gradient is ------------------------------------------------------------------------------------

REAL: dict[str, Callable[[Tensor], Tensor]] = {
    "bce": lambda scores: softplus(-scores),
    "wasserstein": lambda scores: -scores,
    "least_squares": lambda scores: 0.5 * (1 - scores) ** 2,
    "hinge": lambda scores: relu(1 - scores),
}


def by_autograd(study: StudyPlan, cohort: ImagePatients) -> Tensor:
    """The gradient of the one patient's loss, from the formulas and plain backward passes."""
    gan, stage, randomness = study.gan, stage_at(study, FADING), SeededRandomness(5)
    companion: Any = drawn_anew(make_companion(study), 4)
    generator: Any = drawn_anew(make_generator(study), 3)
    show = showing(study, PROFILES, cohort, randomness)
    drawn = show.draw(1.0, stage, randomness)
    of_site = [companion.get_parameter(name) for name in active_parameters(companion, stage)]
    of_shared = [generator.get_parameter(name) for name in active_parameters(generator, stage)]
    if gan.architecture == "vae":
        noise = show.noise(drawn, gan.latent_dim)[0]
        real, code = show.slices(drawn, torch.arange(1), None)
        mean, log_variance = companion(real, code)
        made = generator(mean + noise * torch.exp(log_variance / 2), code)
        kl = -0.5 * (1 + log_variance - mean**2 - torch.exp(log_variance)).sum(1)
        loss = torch.stack([(a - b).abs().mean() for a, b in zip(made, real, strict=True)]) + gan.kl_weight * kl / 3
        return flat(torch.autograd.grad(loss.mean(), of_site + of_shared))
    tensors = (joint_tensors if gan.generator_is_private else critic_tensors)(show, drawn, generator, stage)
    items: list[Tensor] = [tensor[0] for tensor in tensors(torch.arange(1))]
    with fixed_parametrisations(companion):
        aux, (shown, shown_code, *points) = (items[:3], items[3:]) if gan.generator_is_private else ([], items)
        loss = REAL[gan.loss](companion(shown, shown_code, stage)).mean()
        for point in points:
            point.requires_grad_()
            (slope,) = torch.autograd.grad(companion(point, shown_code, stage).sum(), point, create_graph=True)
            loss = loss + gan.penalty_weight * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        found = list(torch.autograd.grad(loss, of_site))
        if aux:
            real, code, z = aux
            made = generator(z, code, stage)
            pairs = zip(companion.features(made, code, stage), companion.features(real, code, stage), strict=True)
            matching = torch.stack([(a - b.detach()).abs().mean() for a, b in pairs]).mean()
            loss = gan.l1_weight * (made - real).abs().mean() + gan.feature_matching_weight * matching
            found += torch.autograd.grad(loss, of_shared)
    return flat(found)


@EACH_OPTION
def test_a_patient_s_gradient_is_that_of_the_losses_in_the_plan_and_is_clipped_as_one_vector(
    options: Mapping[str, Any],
) -> None:
    cohort = patients(1)
    expected = by_autograd(plan(**options), cohort)
    length = float(expected.norm())
    assert length > 0.3
    free = contribution(plan(**options, max_grad_norm=10 * length), cohort)
    # Weights are of the order of 1, so their differences are good to seven digits of that.
    assert float((free - expected).norm()) < 1e-5 * length + 3e-5 * BATCH
    clip = 0.5 * length
    clipped = contribution(plan(**options, max_grad_norm=clip), cohort)
    assert float((clipped - 0.5 * expected).norm()) < 1e-5 * length + 3e-5 * BATCH
    assert float(clipped.norm()) <= clip * 1.001


def test_auxiliary_losses_are_a_part_of_the_generator_s_gradient_and_of_no_discriminator_s() -> None:
    cohort = patients(1)
    large: dict[str, Any] = {"max_grad_norm": 1e6}
    alone, both = (contribution(plan(**options, **large), cohort) for options in ({}, AUXILIARY))
    assert torch.allclose(alone, both[: len(alone)], atol=1e-5)
    assert float(both[len(alone) :].norm()) > 0.1


def test_a_penalty_at_fakes_touches_no_patient() -> None:
    cohort = patients(1)
    large: dict[str, Any] = {"max_grad_norm": 1e6}
    at_fakes: dict[str, Any] = {**PENALTY, "penalty_at": "fakes"}
    without, with_it = (contribution(plan(**options, **large), cohort) for options in ({}, at_fakes))
    assert torch.allclose(without, with_it, atol=1e-5)
    moved = [part(block(plan(**options), steps=1, rate=1e-9).local, "model/") for options in ({}, at_fakes)]
    assert not same(moved[0], moved[1])


# ---- noise -----------------------------------------------------------------------------------------------------------


@EACH_OPTION
def test_noise_reaches_every_parameter_that_a_private_gradient_moves_and_no_other(
    options: Mapping[str, Any],
) -> None:
    study, randomness = plan(**options), Recording(7)
    block(study, randomness=randomness, first_step=FADING)
    expected: Counter[tuple[int, ...]] = Counter()
    for step in range(FADING, FADING + STEPS):
        stage = stage_at(study, step)
        for model in [make_companion(study), *([make_generator(study)] if study.gan.generator_is_private else [])]:
            expected.update(tuple(model.get_parameter(name).shape) for name in active_parameters(model, stage))
    assert randomness.asked == {(shape, SIGMA * 0.5): count for shape, count in expected.items()}


@EACH_OPTION
def test_other_patients_change_the_generator_by_their_own_gradient_only_where_the_plan_says_so(
    options: Mapping[str, Any],
) -> None:
    study = plan(**options)
    still = study.model_copy(update={"gan": study.gan.model_copy(update={"learning_rate": 0.0})})
    first, other = (block(still, cohort, first_step=FADING - 1) for cohort in (patients(), patients(30, seed=2)))
    assert same(first.weights, other.weights) is not study.gan.generator_is_private
    assert set(first.progress) == progress_of(study, "gan")
    if not study.gan.generator_is_private:
        assert first.progress == other.progress


@pytest.mark.parametrize("options", [{}, AUXILIARY, {"architecture": "vae"}], ids=["gan", "auxiliary", "vae"])
def test_a_private_plan_never_runs_without_noise_nor_one_without_privacy_with_it(
    options: Mapping[str, Any],
) -> None:
    for epsilon, noise in ((1.0, 0.0), (float("inf"), SIGMA)):
        study = plan(epsilon, **options)
        with pytest.raises(ValueError, match="noise multiplier"):
            train_gan(
                study,
                shared(study),
                at_site(study),
                PROFILES,
                patients(),
                Mechanism(0.5, noise, 1),
                SeededRandomness(1),
            )


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [{}, AUXILIARY], ids=["through the discriminator", "private"])
@pytest.mark.parametrize("step", [0, STEPS, 2 * STEPS - 1, FADING, 3 * STEPS - 1])
def test_what_a_stage_does_not_use_stays_bit_for_bit_as_it_was(step: int, auxiliary: Mapping[str, Any]) -> None:
    study = plan(architecture="enhanced", **GROWN, **auxiliary)
    result = block(study, steps=1, first_step=step)
    for before, after, model in (
        (shared(study), result.weights, make_generator(study)),
        (part(at_site(study), "model/"), part(result.local, "model/"), make_companion(study)),
    ):
        used = active_parameters(model, stage_at(study, step))
        names = dict(model.named_parameters())
        assert 0 < len(used) < len(names)
        for name in names:
            # The softmax of attention forgets a number that is added to all keys: it has no gradient but noise.
            if name != "attention.f.layer.bias":
                assert torch.equal(before[name], after[name]) == (name not in used), (step, name)


def test_a_resolution_that_is_added_starts_without_moments_and_none_are_lost() -> None:
    study = plan(architecture="progressive", optimizer="adam", **GROWN)
    weights, local = shared(study), at_site(study)
    counted: dict[str, int] = {}
    for number in range(3):
        result = block(study, weights=weights, local=local, first_step=number * STEPS)
        weights, local = result.weights, result.local
        model = make_companion(study)
        for step in range(number * STEPS, (number + 1) * STEPS):
            counted.update({name: counted.get(name, 0) + 1 for name in active_parameters(model, stage_at(study, step))})
        assert {name: int(tensor) for name, tensor in part(local, "step/").items()} == counted
    assert counted["from_images.0.layer.weight"] < counted["blocks.2.0.layer.weight"] + 2 * STEPS
    assert counted["blocks.0.0.layer.weight"] == 3 * STEPS
    assert counted["blocks.2.0.layer.weight"] == STEPS


# ---- optimisers, schedules, weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, AUXILIARY, {"architecture": "vae"}], ids=["gan", "auxiliary", "vae"])
def test_both_learning_rates_follow_the_schedule_over_all_rounds(options: Mapping[str, Any]) -> None:
    # A slow discriminator: the generator of a plain GAN looks at one that has moved by its rate.
    rates = {"learning_rate": 1e-5, "generator_learning_rate": 2.0}
    study = plan(schedule="linear", final_learning_rate=0.1, **rates, **options)
    moved = []
    for step in (0, STEPS):
        result = block(study, steps=1, first_step=step)
        moved.append((flat(part(result.local, "model/").values()), flat(result.weights.values())))
    starts = flat(at_site(study).values()), flat(shared(study).values())
    for start, first, later in zip(starts, *moved, strict=True):
        expected = (1 - 0.9 / 3) * (first - start)  # a third of all steps is done
        assert float((later - start - expected).norm()) < 0.03 * float(expected.norm())


@EACH_OPTION
def test_a_block_goes_on_from_its_file_as_if_it_had_never_stopped(options: Mapping[str, Any]) -> None:
    study = plan(**{**options, "optimizer": "sgd", "momentum": 0.5, "learning_rate": 0.01})
    first = block(study, first_step=STEPS)
    stored = load(save(first.local))
    assert same(stored, first.local)
    assert part(stored, "momentum_buffer/")
    second, again = (
        block(study, weights=first.weights, local=local, first_step=2 * STEPS, randomness=SeededRandomness(9))
        for local in (first.local, stored)
    )
    assert same(second.weights, again.weights)
    assert same(second.local, again.local)
    forgetful = {name: tensor for name, tensor in stored.items() if name.startswith("model/")}
    other = block(study, weights=first.weights, local=forgetful, first_step=2 * STEPS, randomness=SeededRandomness(9))
    assert not same(other.local, second.local)
    assert set(second.weights) == set(shared(study))


def test_clipped_weights_stay_within_their_bound_and_the_generator_s_are_free() -> None:
    study = plan(**OPTIONS["wasserstein"])
    result = block(study)
    assert max(float(tensor.abs().max()) for tensor in part(result.local, "model/").values()) == pytest.approx(0.05)
    assert max(float(tensor.abs().max()) for tensor in result.weights.values()) > 0.2


# ---- without privacy -------------------------------------------------------------------------------------------------


@EACH_OPTION
def test_without_privacy_a_step_is_the_mean_gradient(options: Mapping[str, Any]) -> None:
    cohort = patients(1)
    public = plan(float("inf"), **options)
    stage = stage_at(public, FADING)
    free = {} if public.gan.lipschitz != "weight_clip" else {"lipschitz": "none"}
    public = public.model_copy(update={"gan": public.gan.model_copy(update=free)})
    alone, nobody = (
        block(public, cohort, steps=1, rate=rate, randomness=SeededRandomness(5), first_step=FADING)
        for rate in (1.0, 1e-9)
    )
    expected = by_autograd(public, cohort)  # of a draw of one, whose mean it is
    moved = joint(nobody, public, stage) - joint(alone, public, stage)
    if not public.gan.spectral_norm and public.gan.architecture != "enhanced":
        assert float((moved - expected).norm()) < 1e-5 * float(expected.norm()) + 3e-5
    else:  # every pass takes one more step of the power iteration
        assert float((moved - expected).norm()) < 0.2 * float(expected.norm())


def test_batch_normalisation_trains_without_privacy() -> None:
    study = plan(float("inf"), discriminator_norm="batch", optimizer="adam", learning_rate=1e-3)
    result = block(study)
    counts = [tensor for name, tensor in result.local.items() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) > 0 for count in counts)
    again = block(study, weights=result.weights, local=load(save(result.local)), first_step=STEPS)
    assert not same(again.weights, result.weights)


# ---- something is learned --------------------------------------------------------------------------------------------


def grey(level: float, count: int = 8) -> ImagePatients:
    """Patients whose slices are all of one grey."""
    cohort = patients(count)
    return ImagePatients(torch.full_like(cohort.slices, level), cohort.morphology, cohort.labels)


def made(study: StudyPlan, weights: State) -> Tensor:
    """Images by a generator, for conditions of synthetic patients."""
    model = make_generator(study)
    model.load_state_dict(weights)
    show = showing(study, PROFILES, patients(), SeededRandomness(1))
    with torch.no_grad():
        images: Tensor = model(show.latent(16), show.synthetic_condition(16), stage_at(study, study.gan.steps - 1))
    return images


LEARNING = {
    "optimizer": "adam",
    "learning_rate": 1e-2,
    "generator_learning_rate": 1e-2,
    "slices_per_patient": 1,
    "steps_per_round": 8,
}


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "least_squares", "steps_per_round": 16},
        {"loss": "hinge", "spectral_norm": True},
        {"loss": "wasserstein", **PENALTY},
        {"loss": "wasserstein", "lipschitz": "weight_clip", "weight_clip": 0.05, "steps_per_round": 20},
        {"l1_weight": 10.0},
        {"feature_matching_weight": 10.0},
        {"architecture": "vae"},
        {"architecture": "enhanced", **GROWN, "loss": "hinge"},
    ],
    ids=str,
)
def test_images_move_towards_those_of_patients(options: Mapping[str, Any]) -> None:
    study = plan(float("inf"), **{**LEARNING, **options})
    weights, local, cohort = shared(study), at_site(study), grey(0.8, 4)
    before = float((made(study, weights) - 0.8).abs().mean())
    result = block(study, cohort, weights=weights, local=local, rate=1.0, steps=study.gan.steps)
    after = float((made(study, result.weights) - 0.8).abs().mean())
    assert after < 0.8 * before, (before, after)
