"""What the audit puts in place of patients and networks: the smallest that leave a module's mechanism as it is.

Sampling, noise, number of steps and clipping norm are the plan's. Networks are narrow, and they start from weights that
make an auditor as strong as can be: a canary's gradient lies in few parameters, apart from that of any other canary. A
guarantee of privacy holds for whatever weights a coordinator sends, so also for these.

Adam divides by the root of a mean square plus 1e-8. Where gradients are far below that, its steps are proportional to
them, and what a step released can be read off the weights. The divisor of a step (the expected batch) is public and
changes no epsilon, so it may be large enough for that.

The GAN of the default options is read off its optimiser's first moments (`_gan`). For all its other options and for the
translation (`_images`) the networks start from generic weights, in the midst of growth where there is any, and step by plain
gradient descent: an optimiser, a schedule and a projection of weights see only what is noised already. What every weight
moved by is then what was released, for the private part and a public one together; the public part is known from a run
without patients and without noise on the same fakes (`heard`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsynth.domains import source_and_target
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.models.dcgan import Discriminator, initialise
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.growth import active_parameters, stage_at
from fedsynth.models.images import make_companion, make_discriminator, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import Activity, GanPlan, LabelPlan, SiteEvaluationPlan, StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth.translation import make_networks
from fedsynth_client.training import adversarial, profiles, statistic, translation
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_client.training.block import BlockResult

ADAM_EPSILON = 1e-8
# Gradients this far below Adam's epsilon make its steps proportional to them to five digits; squares stay in float32.
_SMALL = 1e-5
# By about how much a weight moves in a step: nothing beside `_HUGE`, so a canary's gradient stays what it was at first.
# What is read off starts at 0 and has all its digits however small it is.
_DRIFT = 1e-9
_HUGE = 1e5  # what marks a made-up patient: no gradient of it is below the clip
_SIZE, _SLICES, _WIDTH = 32, 2, 4  # of the stand-in images and of the discriminator
# All but the volume, so that the condition draws no tumour: it would overflow at `_HUGE`.
_FEATURES = [
    "enhancing_fraction",
    "oedema_fraction",
    "sphericity",
    "position_left",
    "position_posterior",
    "position_superior",
    "t1c_ratio",
    "flair_ratio",
]
# The discriminator starts by taking everything for fake, so surely that a fake's gradient, which is added without noise,
# is nothing beside a real one's.
_SURELY_FAKE = -60.0
# Of the stand-ins over images: a clip that nearly every patient's gradient is far above, so that each part of it that a
# fault leaves out of the clip shows; few fakes, whose gradient is beside it; a learning rate of 1, for one step.
_CLIP, _BATCH = 1e-2, 4
_STEPS_A_RESOLUTION = 1000


@dataclass(frozen=True)
class Patients:
    """Made-up patients, in the shape in which the training of a module takes them.

    Attributes:
        rows: (N, ...) of a statistic: rows; of a network over profiles: genes; of the GAN: slices.
        morphology: (N, F), for the GAN and the radiogenomic DNN.
        labels: (N,).
    """

    rows: Tensor
    morphology: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor | slice) -> Patients:
        return Patients(self.rows[keep], self.morphology[keep], self.labels[keep])

    def __add__(self, other: Patients) -> Patients:
        return Patients(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.morphology, other.morphology]),
            torch.cat([self.labels, other.labels]),
        )


@dataclass(frozen=True)
class StandIn:
    """A module of a plan with a small network, and the weights that it starts from.

    Attributes:
        module: which.
        plan: the plan with the stand-in in it; not a plan that could be approved, since nothing is trained with it.
        weights: what the coordinator would send.
        local: what the site would keep (a discriminator).
        unit: by what a change of the weights after one step is multiplied to give the sum that the step released; for
            the GAN of default options, by what the first moment of the discriminator's optimiser is.
        momentum: of gradient descent, which steps of a network over profiles are; None of Adam.
        first_step: number of a block's first step, of which growth depends.
        trained: the parameters that are privately trained, of what is released and, after "model/", of what is kept; None
            of any stand-in but one over images.
    """

    module: Activity
    plan: StudyPlan
    weights: State
    local: State
    unit: float
    momentum: float | None = None
    first_step: int = 0
    trained: frozenset[str] | None = None

    def block(
        self, patients: Patients, mechanism: Mechanism, randomness: Randomness, local: State | None = None
    ) -> BlockResult:
        """One block of the client's own training of the module."""
        kept = self.local if local is None else local
        return run_block(self.plan, self.module, self.weights, kept, patients, mechanism, randomness, self.first_step)


def run_block(
    plan: StudyPlan,
    module: Activity,
    weights: State,
    local: State,
    patients: Patients,
    mechanism: Mechanism,
    randomness: Randomness,
    first_step: int = 0,
) -> BlockResult:
    """The client's training of `module`, as `fedsynth_client.rounds` calls it.

    The functions are looked up in their modules at each call, so that what is audited is what a site would run.
    """
    match module:
        case "moments" | "embedding" | "evaluation":
            return statistic.release_statistic(patients.rows, mechanism, max_norm(plan, module), randomness)
        case "autoencoder":
            return profiles.train_autoencoder(plan, weights, patients.rows, mechanism, randomness)
        case "radiogenomics":
            return profiles.train_radiogenomics(
                plan, weights, patients.rows, patients.morphology, patients.labels, mechanism, randomness
            )
        case "gan":
            images = ImagePatients(patients.rows, patients.morphology, patients.labels)
            pool = SyntheticProfiles(torch.zeros(1, 2), torch.full((1, len(_FEATURES)), 0.5), torch.zeros(1).long())
            return adversarial.train_gan(plan, weights, local, pool, images, mechanism, randomness, first_step)
        case "translation":
            domains = source_and_target(plan, patients.rows)
            return translation.train_translation(plan, weights, local, domains, mechanism, randomness, first_step)


def max_norm(plan: StudyPlan, module: Activity) -> float:
    """The clipping norm of a patient's contribution."""
    return SiteEvaluationPlan.max_grad_norm if module == "evaluation" else plan.training(module).max_grad_norm


def stand_in(plan: StudyPlan, module: Activity, genes: int, noise: float) -> StandIn:
    """The stand-in of `module`.

    Args:
        plan: the plan that is audited.
        module: one of its modules.
        genes: length of a profile, or of a statistic's row.
        noise: about how large, in clipping norms, an entry of what a step releases is: it sets the scale on which Adam
            is proportional.
    """
    if module == "autoencoder":
        return _autoencoder(plan, genes, noise)
    if module == "radiogenomics":
        return _radiogenomics(plan, genes, noise)
    if module == "gan" and has_default_options(plan.gan):
        return _gan(plan, plan.gan.max_grad_norm)
    if module in IMAGES:
        return images(plan, module)
    return StandIn(module, plan, {}, {}, 1.0)


# The modules whose patients are slices.
IMAGES: tuple[Activity, ...] = ("gan", "translation")


def has_default_options(gan: GanPlan) -> bool:
    """Whether the GAN can be read off the first moments of its discriminator's optimiser, all else being nothing."""
    adversarial_only = not gan.generator_is_private and gan.lipschitz == "none"
    plain = gan.architecture == "dcgan" and not gan.spectral_norm and gan.optimizer == "adam"
    return plain and adversarial_only and gan.loss == "bce" and gan.schedule == "constant"


def images(plan: StudyPlan, module: Activity, rate: float = 1.0, clip: float = _CLIP) -> StandIn:
    """The stand-in of a module over images that steps by gradient descent, see the module's docstring.

    Args:
        plan: the plan that is audited.
        module: ``"gan"`` or ``"translation"``.
        rate: the learning rate. 1 leaves the most digits after one step; more steps need a small one, since the public
            part depends on the weights.
        clip: the clipping norm.
    """
    return _translation(plan, rate, clip) if module == "translation" else _general_gan(plan, rate, clip)


def for_many_steps(stand: StandIn) -> StandIn:
    """The stand-in for a block of several steps.

    Over images its public part, which depends on the weights, must not move with the noise: the learning rate is small, and
    the clipping norm large, so that the weights still move by many of their last digits. A patient's gradient is below it.
    """
    return stand if stand.trained is None else images(stand.plan, stand.module, 2.0**-20, 100.0)


def proportional_gan(plan: StudyPlan, noise: float) -> StandIn:
    """The stand-in of the GAN with another clipping norm, so small that Adam is proportional; `noise` as in `stand_in`.

    The number of fakes is that of the expected batch, which can therefore not be made large instead. A clipping norm is
    only the unit of the noise. The unit of this stand-in is that of the discriminator's weights, not of its moments.
    """
    clip = _SMALL * ADAM_EPSILON * plan.gan.expected_batch / noise
    found = _gan(plan, clip)
    return replace(found, unit=ADAM_EPSILON * plan.gan.expected_batch / found.plan.gan.learning_rate)


def canary_patients(module: Activity, plan: StudyPlan, count: int) -> Patients:
    """`count` made-up patients whose clipped contributions are as far apart as the stand-in allows.

    Statistics: each has a coordinate of its own. Networks over profiles: each expresses one gene, and that far beyond any
    real patient. GAN: each has one bright patch, in its own place and channel and of its own pattern, and one extreme
    feature of morphology. Other options of the GAN and the translation: each is a pattern of its own all over, with no
    tumour on the first slice.
    """
    labels = torch.zeros(count, dtype=torch.int64)
    if module == "gan" and has_default_options(plan.gan):
        return _image_canaries(count, labels)
    if module in IMAGES:
        return _patterned(count, labels)
    scale = 10 * max_norm(plan, module) * (count if module == "autoencoder" else _HUGE)
    return Patients(torch.eye(count) * scale, torch.zeros(count, 1), labels)


def alike(module: Activity, plan: StudyPlan, genes: int, count: int) -> Patients:
    """`count` patients who are all the first canary: an un-noised sum is their number times its clipped contribution."""
    return canary_patients(module, plan, genes)[torch.zeros(count, dtype=torch.int64)]


def released(stand: StandIn, result: BlockResult) -> State:
    """What the last step of a block released, read off its result: by parameter, in clipping norms.

    Exact, up to rounding, for blocks of one step. For longer blocks it is the sum over steps s of a weight times what
    step s released, see `step_weights`.
    """
    norm = max_norm(stand.plan, stand.module)
    if stand.trained is not None:
        return {name: change * stand.unit / norm for name, change in _changes(stand, result).items()}
    if stand.module == "gan":
        moments = {name: t for name, t in result.local.items() if name.startswith("exp_avg/")}
        return {name.removeprefix("exp_avg/"): t.double() * stand.unit / norm for name, t in moments.items()}
    if not stand.weights:
        return {name: tensor.double() / norm for name, tensor in result.weights.items()}
    return {
        # What starts at 0 is known to all its digits; a small change of a larger number is not.
        name: -tensor.double() * stand.unit / norm
        for name, tensor in result.weights.items()
        if not bool(stand.weights[name].any())
    }


def _changes(stand: StandIn, result: BlockResult) -> State:
    """Weights before minus after, of what was sent and of what is kept: of all that trains, and whatever else moved."""
    assert stand.trained is not None
    before = {**stand.weights, **stand.local}
    after = {**result.weights, **{name: t for name, t in result.local.items() if name.startswith("model/")}}
    changes = {name: start.double() - after[name].double() for name, start in before.items()}
    # Buffers follow the weights: the vectors of a spectral norm are no parameters.
    return {
        name: change
        for name, change in changes.items()
        if name in stand.trained or (bool(change.any()) and not name.endswith(("._u", "._v")))
    }


class SameFakes:
    """Randomness with known seeds of public streams, so that two runs see the same fakes; else that of `source`.

    A block draws a seed as a single value; no stand-in has a single patient to draw at a rate below 1.
    """

    def __init__(self, source: Randomness, seed: float = 0.0) -> None:
        self._source, self._seed = source, seed
        self.private, self.description = source.private, source.description

    def uniform(self, count: int) -> Tensor:
        """The seed, or what the source gives."""
        return torch.full((1,), self._seed, dtype=torch.float64) if count == 1 else self._source.uniform(count)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        """What the source gives."""
        return self._source.normal(shape, std)


class Noiseless:
    """Adds nothing, so that what is released is the sum itself; who is drawn is left to `draws`, or everybody is."""

    private = False
    description = "no noise"

    def __init__(self, draws: Randomness | None = None) -> None:
        self._draws = draws

    def uniform(self, count: int) -> Tensor:
        """Zeros, with which everybody is drawn; or what `draws` gives."""
        return torch.zeros(count, dtype=torch.float64) if self._draws is None else self._draws.uniform(count)

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        """Zeros."""
        return torch.zeros(tuple(shape))


def heard(stand: StandIn, patients: Patients, mechanism: Mechanism, randomness: Randomness) -> State:
    """What a block released of patients and noise, by parameter, in clipping norms; see `released`."""
    if stand.trained is None:
        return released(stand, stand.block(patients, mechanism, randomness))
    nobody = patients[torch.zeros(0, dtype=torch.int64)]
    whole, public = (
        released(stand, stand.block(whose, mechanism, SameFakes(source)))
        for whose, source in ((patients, randomness), (nobody, Noiseless()))
    )
    zero = torch.zeros((), dtype=torch.float64)
    return {name: whole.get(name, zero) - public.get(name, zero) for name in {**whole, **public}}


def flat(state: State) -> Tensor:
    """All values of a state dict in a row, in the order of names."""
    return torch.cat([state[name].flatten() for name in sorted(state)])


def step_weights(stand: StandIn, steps: int) -> Tensor:
    """(steps,) by what the noise of each step of a block is weighed in what `released` reads off."""
    if stand.trained is not None:
        return torch.ones(steps, dtype=torch.float64)
    if stand.module == "gan":  # the first moment itself, whose memory is 0.5
        return 0.5 ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    if not stand.weights:
        return torch.ones(steps, dtype=torch.float64)
    if stand.momentum is not None:
        return _sums_of_powers(stand.momentum, steps)
    # Adam's corrected first moments, memory 0.9, summed over the steps.
    memory, times = 0.9, torch.arange(1, steps + 1, dtype=torch.float64)
    moved = (1 - memory) * memory ** (times[None, :] - times[:, None]) / (1 - memory ** times[None, :])
    return torch.where(times[None, :] >= times[:, None], moved, 0.0).sum(1)


def _sums_of_powers(momentum: float, steps: int) -> Tensor:
    """(steps,) how often a step's gradient is in the sum of the velocities up to the last: 1 + m + m^2 + ..."""
    powers = momentum ** torch.arange(steps, dtype=torch.float64)
    return powers.cumsum(0).flip(0)


def _over_profiles(plan: StudyPlan, genes: int) -> StudyPlan:
    panel = plan.genes.model_copy(
        update={"panel": [f"G{i}" for i in range(genes)], "center": [0.0] * genes, "scale": [1.0] * genes}
    )
    morphology = plan.morphology.model_copy(update={"features": ["sphericity"], "reference_sd": []})
    return plan.model_copy(update={"genes": panel, "morphology": morphology})


def _scaled(section: TrainingPlan, noise: float) -> tuple[dict[str, float | str], float]:
    """Expected batch and learning rate with which steps are proportional to gradients, and the unit of `StandIn`.

    Gradient descent is so at any scale; Adam far below its epsilon. A schedule only weighs what is noised already.
    """
    clip, constant = section.max_grad_norm, {"schedule": "constant"}
    if section.optimizer == "sgd":
        batch = section.expected_batch
        rate = _DRIFT * batch / (noise * clip)
        return {**constant, "learning_rate": rate}, batch / rate
    batch = math.ceil(noise * clip / (_SMALL * ADAM_EPSILON))
    rate = _DRIFT / _SMALL
    return {**constant, "expected_batch": batch, "learning_rate": rate}, ADAM_EPSILON * batch / rate


def _momentum(section: TrainingPlan) -> float | None:
    return section.momentum if section.optimizer == "sgd" else None


def _autoencoder(plan: StudyPlan, genes: int, noise: float) -> StandIn:
    scaled, unit = _scaled(plan.autoencoder, noise)
    section = plan.autoencoder.model_copy(
        update={**scaled, "hidden": [4], "latent_dim": 1, "activation": "tanh", "variational": True}
    )
    small = _over_profiles(plan, genes).model_copy(update={"autoencoder": section})
    weights = {name: torch.zeros_like(tensor) for name, tensor in make_autoencoder(small).state_dict().items()}
    # The last layer is 0, so nothing is learned before it, and what is learned in it is a row for each gene.
    weights["decoder.0.bias"].fill_(2.0)
    return StandIn("autoencoder", small, weights, {}, unit, _momentum(section))


def _radiogenomics(plan: StudyPlan, genes: int, noise: float) -> StandIn:
    scaled, unit = _scaled(plan.radiogenomics, noise)
    section = plan.radiogenomics.model_copy(
        update={
            **scaled,
            "hidden": [4],
            "dropout": 0.0,
            # A projection of what is noised already; it would hide half of the noise.
            "nonnegative_output": False,
            "nonnegative_weights": False,
        }
    )
    autoencoder = plan.autoencoder.model_copy(update={"activation": "tanh"})
    small = _over_profiles(plan, genes).model_copy(update={"radiogenomics": section, "autoencoder": autoencoder})
    weights = {name: torch.zeros_like(tensor) for name, tensor in make_radiogenomic_dnn(small).state_dict().items()}
    # The first layer is 0, so a gene of `_HUGE` does not saturate it, and its column is nearly the whole gradient.
    weights["hidden.0.bias"].fill_(0.5)
    weights["morphology.weight"].fill_(1.0)
    return StandIn("radiogenomics", small, weights, {}, unit, _momentum(section))


def _gan(plan: StudyPlan, clip: float) -> StandIn:
    section = plan.gan.model_copy(
        update={
            "latent_dim": 2,
            "generator_width": 2,
            "discriminator_width": _WIDTH,
            "generator_batch": 1,
            "discriminator_trains": "all",
            "generator_trains": "all",
            "augmentation": [],
            "max_grad_norm": clip,
            "learning_rate": _DRIFT / _SMALL,
        }
    )
    small = plan.model_copy(
        update={
            "gan": section,
            "image": plan.image.model_copy(
                update={"sequences": ["T1", "T1c", "FLAIR"], "size": _SIZE, "slices": _SLICES}
            ),
            "morphology": plan.morphology.model_copy(update={"features": _FEATURES, "reference_sd": []}),
            "label": LabelPlan(),
        }
    )
    generator = torch.Generator().manual_seed(0)
    shared, discriminator = make_generator(small), make_discriminator(small)
    if not isinstance(discriminator, Discriminator) or section.spectral_norm:
        raise ValueError("the stand-in of the gan knows a plain discriminator of the architecture 'dcgan' alone")
    initialise(shared, generator)
    initialise(discriminator, generator)
    with torch.no_grad():
        # With both last layers 0 nothing is learned before them, and what is learned in them is a patient's features.
        discriminator.score.weight.zero_()
        discriminator.projection.weight.zero_()
        discriminator.score.bias.fill_(_SURELY_FAKE)
    local = {f"model/{name}": tensor.clone() for name, tensor in discriminator.state_dict().items()}
    # The first moment after a step is half of the gradient, which is the released sum over the expected batch.
    return StandIn("gan", small, shared.state_dict(), local, 2.0 * section.expected_batch)


_OPTIMISER = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant"}
_OTHER_OPTIONS = {
    "latent_dim": 2,
    "generator_width": 2,
    "discriminator_width": _WIDTH,
    "generator_batch": 2,
    "discriminator_steps": 1,
    "discriminator_trains": "all",
    "generator_trains": "all",
    "augmentation": [],
    "weight_clip": 1e6,  # a projection of what is noised already
}
# Of a penalty at fakes, which is public: with generic weights and a weight of 10 it would be longer than 1e8 clipping norms,
# and in float32 nothing could be read off beside it. So weighed, one that a fault took of patients would still show.
_PUBLIC_PENALTY = 1e-4


def _general_gan(plan: StudyPlan, rate: float, clip: float) -> StandIn:
    growth = {
        "growth": [1] * 3,  # 8, 16 and 32 pixels
        "rounds": 3,
        "steps_per_round": _STEPS_A_RESOLUTION,
    }
    section = plan.gan.model_copy(
        update={
            **_OTHER_OPTIONS,
            **_OPTIMISER,
            **(growth if plan.gan.growth else {}),
            **({"penalty_weight": _PUBLIC_PENALTY} if plan.gan.penalty_at == "fakes" else {}),
            "max_grad_norm": clip,
            "expected_batch": _BATCH,
            "learning_rate": rate,
            # A generator that sees no patient is to stand still, so that the fakes are the same in two runs.
            "generator_learning_rate": rate if plan.gan.generator_is_private else 0.0,
        }
    )
    small = _over_images(plan, ["T1", "T1c", "FLAIR"]).model_copy(update={"gan": section})
    # In the midst of the last fade-in, where a step uses more parameters than anywhere else.
    first_step = round((2 + section.fade_in / 2) * _STEPS_A_RESOLUTION) if section.growth else 0
    stage = stage_at(small, first_step)
    generator = torch.Generator().manual_seed(0)
    shared, kept = make_generator(small), make_companion(small)
    _generic(shared, generator)
    _generic(kept, generator)
    trained = [f"model/{name}" for name in active_parameters(kept, stage)]
    if section.generator_is_private:
        trained += active_parameters(shared, stage)
    return StandIn(
        "gan",
        small,
        {name: tensor.clone() for name, tensor in shared.state_dict().items()},
        {f"model/{name}": tensor.clone() for name, tensor in kept.state_dict().items()},
        _BATCH / rate,
        first_step=first_step,
        trained=frozenset(trained),
    )


def _translation(plan: StudyPlan, rate: float, clip: float) -> StandIn:
    assert plan.translation is not None
    section = plan.translation.model_copy(
        update={**_OPTIMISER, "width": 2, "max_grad_norm": clip, "expected_batch": _BATCH, "learning_rate": rate}
    )
    ends = [section.source, section.target] if section.domains == "sequences" else ["T1", "T1c"]
    small = _over_images(plan, [*ends, "third"]).model_copy(update={"translation": section})
    networks = make_networks(small)
    _generic(networks, torch.Generator().manual_seed(0))
    shared, kept = networks["translators"], networks["discriminators"]
    return StandIn(
        "translation",
        small,
        {name: tensor.clone() for name, tensor in shared.state_dict().items()},
        {f"model/{name}": tensor.clone() for name, tensor in kept.state_dict().items()},
        _BATCH / rate,
        trained=frozenset(
            [*dict(shared.named_parameters()), *(f"model/{name}" for name in dict(kept.named_parameters()))]
        ),
    )


def _over_images(plan: StudyPlan, sequences: list[str]) -> StudyPlan:
    return plan.model_copy(
        update={
            "image": plan.image.model_copy(update={"sequences": sequences, "size": _SIZE, "slices": _SLICES}),
            "morphology": plan.morphology.model_copy(update={"features": _FEATURES, "reference_sd": []}),
            "label": LabelPlan(),
        }
    )


def _generic(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of which none is 0 and no two are alike, so that every part of a gradient is there."""
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _patterned(count: int, labels: Tensor) -> Patients:
    channels = 4
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randint(0, 2, (count, channels, 1, _SIZE, _SIZE), generator=generator) * 2.0 - 1).to(torch.float16)
    rows = rows.repeat(1, 1, _SLICES, 1, 1)
    rows[:, -1, 0] = -1.0
    return Patients(rows, torch.rand(count, len(_FEATURES), generator=generator), labels)


def _image_canaries(count: int, labels: Tensor) -> Patients:
    channels, side = 4, 4
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(0, 2, (count, side, side), generator=generator) * 2.0 - 1
    places = _SIZE // side
    images = torch.zeros(count, channels, _SIZE, _SIZE)
    for i in range(count):
        channel, place = i % channels, (i // channels) % places**2
        row, column = side * (place // places), side * (place % places)
        images[i, channel, row : row + side, column : column + side] = patterns[i]
    morphology = torch.full((count, len(_FEATURES)), 0.5)
    morphology[torch.arange(count), torch.arange(count) % len(_FEATURES)] = _HUGE
    slices = images[:, :, None].expand(-1, -1, _SLICES, -1, -1).to(torch.float16)
    return Patients(slices, morphology, labels)
