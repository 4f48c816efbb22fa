"""No layer of a privately trained network mixes samples, and per-sample gradients, by whichever backend, are autograd's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.bookkeeping import Bookkeeper, weights_of_one_step
from fedsynth.dp.functional import clipped_sums_of, fixed_parametrisations, gradient_penalties
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.dp.step import make_private, private_step
from fedsynth.models.condition import condition_dim
from fedsynth.models.dcgan import Discriminator, initialise
from fedsynth.models.gene_autoencoder import GeneAutoencoder, autoencoder_losses
from fedsynth.models.growth import Stage, active_parameters
from fedsynth.models.images import make_discriminator, make_encoder, make_generator
from fedsynth.models.layers import PixelNorm, Scale, SelfAttention, equalised, spectrally_normalised
from fedsynth.models.radiogenomic_dnn import RadiogenomicDNN, radiogenomic_losses
from fedsynth.models.translator import make_domain_discriminators, make_translators
from fedsynth.models.vae import ImageVAE, vae_losses
from fedsynth.plan import AutoencoderPlan, StudyPlan

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

PATIENTS, GENES, FEATURES, CLASSES = 4, 12, 3, 2
IMAGE_FEATURES = ["volume", "sphericity", "position_left", "position_posterior", "position_superior"]
CONDITION = condition_dim(CLASSES, len(IMAGE_FEATURES))
LATENT = 6
TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "budget_share": 0.3,
}


def study(size: int, **gan: object) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of the networks",
            "image": {"sequences": ["T1c", "FLAIR"], "size": size, "slices": 4},
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "morphology": {"features": IMAGE_FEATURES},
            "privacy": {"epsilon": 1.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": {**TRAINING, "latent_dim": LATENT, "generator_width": 4, "discriminator_width": 8, **gan},
            "translation": {**TRAINING, "budget_share": 0.1, "source": "T1c", "target": "FLAIR", "width": 4},
            "sites": [{"name": "north", "nominal_patients": 40}],
        }
    )


Losses = Callable[[nn.Module, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its inputs (one row a patient in each tensor) and its loss for each patient."""

    model: nn.Module
    rows: list[Tensor]
    losses: Losses


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def discriminator(size: int) -> Case:
    model = make_discriminator(study(size))
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():  # away from the start, where some gradients vanish
        for parameter in model.parameters():
            parameter.add_(0.1 * normal(*parameter.shape))
    rows = [normal(PATIENTS, 3, size, size).tanh(), normal(PATIENTS, CONDITION)]
    return Case(model, rows, lambda module, r: softplus(-module(r[0], r[1])))


def autoencoder(variational: bool, activation: str) -> Case:
    plan = AutoencoderPlan.model_validate(
        {
            **TRAINING,
            "variational": variational,
            "hidden": [9, 7],
            "latent_dim": 4,
            "activation": activation,
        }
    )
    torch.manual_seed(1)
    rows = [normal(PATIENTS, GENES), normal(PATIENTS, plan.latent_dim)]
    return Case(GeneAutoencoder(GENES, plan), rows, lambda module, r: autoencoder_losses(module, r[0], r[1], 0.05))


def radiogenomic_dnn() -> Case:
    torch.manual_seed(2)
    model = RadiogenomicDNN(GENES, FEATURES, CLASSES, hidden=[9, 7, 5], dropout=0.0, activation="tanh")
    morphology = normal(PATIENTS, FEATURES).sigmoid()
    morphology[1, 0] = torch.nan
    morphology[2] = torch.nan
    rows = [normal(PATIENTS, GENES), morphology, torch.tensor([0, 1, 1, -1])]
    return Case(model, rows, lambda module, r: radiogenomic_losses(module, r[0], r[1], r[2]))


CASES: dict[str, Callable[[], Case]] = {
    "discriminator 32": lambda: discriminator(32),
    "discriminator 64": lambda: discriminator(64),
    "autoencoder": lambda: autoencoder(variational=False, activation="relu"),
    "variational autoencoder": lambda: autoencoder(variational=True, activation="tanh"),
    "radiogenomic DNN": radiogenomic_dnn,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def per_sample_gradients(case: Case, rows: list[Tensor]) -> list[Tensor]:
    module = GradSampleModule(case.model, loss_reduction="mean", strict=True)
    try:
        case.losses(module, rows).mean().backward()
        return [parameter.grad_sample.detach().clone() for parameter in case.model.parameters()]
    finally:
        module.to_standard_module().zero_grad()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7


def changed_in_first_patient(rows: list[Tensor]) -> list[Tensor]:
    changed = [row.clone() for row in rows]
    for row in changed:
        if row.is_floating_point():
            row[0] = torch.where(row[0].isnan(), row[0], 3.0 - 2.0 * row[0])
        else:
            row[0] = 1 - row[0]
    return changed


def test_per_sample_gradients_are_those_of_one_patient_at_a_time(case: Case) -> None:
    together = per_sample_gradients(case, case.rows)
    for patient in range(PATIENTS):
        loss = case.losses(case.model, [row[patient : patient + 1] for row in case.rows])
        assert loss.shape == (1,)
        alone = torch.autograd.grad(loss.sum(), list(case.model.parameters()))
        for of_batch, of_patient in zip(together, alone, strict=True):
            assert_same(of_batch[patient], of_patient)


def test_one_patient_changes_neither_the_loss_nor_the_gradient_of_another(case: Case) -> None:
    changed = changed_in_first_patient(case.rows)
    before, after = case.losses(case.model, case.rows).detach(), case.losses(case.model, changed).detach()
    assert float((before[0] - after[0]).abs()) > 1e-3
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-5, atol=1e-6)
    pairs = list(zip(per_sample_gradients(case, case.rows), per_sample_gradients(case, changed), strict=True))
    for a, b in pairs:
        assert_same(a[1:], b[1:])
    assert max(float((a[0] - b[0]).norm()) for a, b in pairs) > 1e-3


def test_every_network_is_accepted_for_private_training(case: Case) -> None:
    make_private(
        case.model,
        torch.optim.SGD(case.model.parameters(), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch=1,
        randomness=SystemRandomness(),
    )


def with_batch_norm() -> Case:
    case = discriminator(32)
    assert isinstance(case.model, Discriminator)
    trunk = case.model.trunk
    for place, layer in enumerate(trunk):
        if isinstance(layer, nn.GroupNorm):
            trunk[place] = nn.BatchNorm2d(layer.num_channels)
    return case


def test_a_discriminator_with_batch_normalisation_is_refused_and_would_fail_the_checks() -> None:
    case = with_batch_norm()
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        test_every_network_is_accepted_for_private_training(case)
    changed = changed_in_first_patient(case.rows)
    before, after = case.losses(case.model, case.rows).detach(), case.losses(case.model, changed).detach()
    assert float((before[1:] - after[1:]).abs().max()) > 1e-3


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_generator_makes_images_of_the_plans_size_one_sample_at_a_time(size: int) -> None:
    model = make_generator(study(size))
    z, code = normal(PATIENTS, LATENT), normal(PATIENTS, CONDITION)
    images = model(z, code).detach()
    assert images.shape == (PATIENTS, 3, size, size)
    assert float(images.abs().max()) <= 1
    torch.testing.assert_close(model(z[1:2], code[1:2]).detach(), images[1:2], rtol=1e-4, atol=1e-5)


# ---- networks of images: by book-keeping and by torch.func ------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A network, rows of its inputs, its loss for each patient, and the stage at which it stands."""

    model: nn.Module
    rows: list[Tensor]
    losses: Losses
    stage: Stage | None = None

    @property
    def active(self) -> list[nn.Parameter]:
        names = set(active_parameters(self.model, self.stage))
        return [parameter for name, parameter in self.model.named_parameters() if name in names]


def away_from_the_start(model: nn.Module) -> nn.Module:
    """Fresh weights, moved: norms start at 1 and 0 and attention's gamma at 0, where mistakes do not show."""
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * normal(*parameter.shape))
        for layer in model.modules():
            if isinstance(layer, Scale):
                layer.weight.fill_(0.7)
    return model


def judging(stage: Stage | None = None, **gan: object) -> Image:
    """A discriminator on images of its stage."""
    size = 32 if stage is None else stage.size
    rows = [normal(PATIENTS, 3, size, size).tanh(), normal(PATIENTS, CONDITION)]
    model = away_from_the_start(make_discriminator(study(32, **gan)))
    return Image(model, rows, lambda m, r: softplus(-m(r[0], r[1], stage=stage)), stage)


def drawing(stage: Stage | None = None, **gan: object) -> Image:
    """A generator held against patients' own images, as with an L1 loss."""
    size = 32 if stage is None else stage.size
    rows = [normal(PATIENTS, LATENT), normal(PATIENTS, CONDITION), normal(PATIENTS, 3, size, size).tanh()]
    model = away_from_the_start(make_generator(study(32, **gan)))
    return Image(model, rows, lambda m, r: (m(r[0], r[1], stage=stage) - r[2]).abs().flatten(1).mean(1), stage)


def coding() -> Image:
    plan = study(32, architecture="vae")
    model = away_from_the_start(ImageVAE(make_encoder(plan), make_generator(plan)))
    rows = [normal(PATIENTS, 3, 32, 32).tanh(), normal(PATIENTS, CONDITION), normal(PATIENTS, LATENT)]
    return Image(model, rows, lambda m, r: vae_losses(m, r[0], r[1], r[2], 0.3))


def translating() -> Image:
    model = away_from_the_start(make_translators(study(32))["to_target"])
    rows = [normal(PATIENTS, 1, 32, 32).tanh(), normal(PATIENTS, 1, 32, 32, 1)[..., 0].tanh()]
    return Image(model, rows, lambda m, r: (m(r[0]) - r[1]).abs().flatten(1).mean(1))


def judging_a_domain() -> Image:
    model = away_from_the_start(make_domain_discriminators(study(32))["source"])
    return Image(model, [normal(PATIENTS, 1, 32, 32).tanh()], lambda m, r: (m(r[0]) - 1) ** 2)


def layers(*made: nn.Module, size: int = 6) -> Image:
    torch.manual_seed(3)
    model = away_from_the_start(nn.Sequential(*made))
    return Image(model, [normal(PATIENTS, 8, size, size)], lambda m, r: torch.tanh(m(r[0])).square().flatten(1).mean(1))


IMAGES: dict[str, Callable[[], Image]] = {
    "scale": lambda: layers(nn.Conv2d(8, 3, 3), Scale(0.3)),
    "pixel norm": lambda: layers(nn.Conv2d(8, 5, 3), PixelNorm(), nn.Conv2d(5, 2, 1)),
    "equalised": lambda: layers(equalised(nn.Conv2d(8, 5, 3)), nn.Flatten(), equalised(nn.Linear(80, 4))),
    "attention": lambda: layers(SelfAttention(8, 6, equalised)),
    "attention, spectral norm": lambda: layers(SelfAttention(8, 6, spectrally_normalised)),
    "attention, few keys": lambda: layers(SelfAttention(8, 8, equalised, keys=2), size=8),
    "dcgan": judging,
    "dcgan, spectral norm": lambda: judging(spectral_norm=True),
    "progressive, 8 pixels": lambda: judging(Stage(0), architecture="progressive"),
    "progressive, 16 pixels fading in": lambda: judging(Stage(1, 0.3), architecture="progressive"),
    "progressive, 16 pixels": lambda: judging(Stage(1), architecture="progressive"),
    "progressive, 32 pixels fading in": lambda: judging(Stage(2, 0.6), architecture="progressive"),
    "progressive": lambda: judging(architecture="progressive"),
    "progressive, spectral norm": lambda: judging(Stage(1, 0.3), architecture="progressive", spectral_norm=True),
    "enhanced, 8 pixels": lambda: judging(Stage(0), architecture="enhanced"),
    "enhanced, 16 pixels fading in": lambda: judging(Stage(1, 0.3), architecture="enhanced"),
    "enhanced, 16 pixels": lambda: judging(Stage(1), architecture="enhanced"),
    "enhanced, 32 pixels fading in": lambda: judging(Stage(2, 0.6), architecture="enhanced"),
    "enhanced": lambda: judging(architecture="enhanced"),
    "dcgan generator": drawing,
    "progressive generator, 8 pixels": lambda: drawing(Stage(0), architecture="progressive"),
    "progressive generator fading in": lambda: drawing(Stage(1, 0.3), architecture="progressive"),
    "enhanced generator fading in": lambda: drawing(Stage(2, 0.6), architecture="enhanced"),
    "enhanced generator": lambda: drawing(architecture="enhanced"),
    "image VAE": coding,
    "translator": translating,
    "domain discriminator": judging_a_domain,
}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> Image:
    return IMAGES[request.param]()


def length(gradients: list[Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def alone(image: Image, patient: int) -> list[Tensor]:
    loss = image.losses(image.model, [row[patient : patient + 1] for row in image.rows])
    # Weights behind spectral normalisation are made once for all patients, with one graph.
    return list(torch.autograd.grad(loss.sum(), image.active, retain_graph=True))


def clipped_by_hand(gradients: list[list[Tensor]], clip: float) -> list[Tensor]:
    factors = [min(1.0, clip / (length(own) + 1e-6)) for own in gradients]
    return [sum(f * g for f, g in zip(factors, of_all, strict=True)) for of_all in zip(*gradients, strict=True)]  # type: ignore[misc]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).abs().max()) <= 1e-5 * largest


def test_clipped_sums_of_images_are_those_of_one_patient_at_a_time(image: Image) -> None:
    keeper = Bookkeeper(image.model, image.active)
    with weights_of_one_step(image.model):
        gradients = [alone(image, patient) for patient in range(PATIENTS)]
        norms = sorted(length(own) for own in gradients)
        assert norms[0] > 0
        for clip in (norms[PATIENTS // 2], 1e-3 * norms[0], 1e6):  # some, all, none are clipped
            found, _ = keeper.clipped_sums(
                lambda: image.losses(image.model, image.rows), PATIENTS, clip, check_mixing=True
            )
            assert_near(found, clipped_by_hand(gradients, clip))


def test_the_networks_of_images_have_gradients_under_vmap_as_well(image: Image) -> None:
    with fixed_parametrisations(image.model):
        gradients = [alone(image, patient) for patient in range(PATIENTS)]
        clip = sorted(length(own) for own in gradients)[PATIENTS // 2]
        found = clipped_sums_of(
            image.model,
            image.active,
            [row[:, None] for row in image.rows],
            lambda m, *rows: image.losses(m, list(rows)),
            clip,
        )
    assert_near(found, clipped_by_hand(gradients, clip))


def test_a_private_step_moves_what_the_stage_uses_and_nothing_else(image: Image) -> None:
    before = {name: parameter.detach().clone() for name, parameter in image.model.named_parameters()}
    private = make_private(
        image.model,
        torch.optim.Adam(image.active, lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.1,
        expected_batch=PATIENTS,
        randomness=SeededRandomness(1),
    )
    assert private.backend == "bookkeeping"
    private_step(private, PATIENTS, lambda m, p: image.losses(m, [row[p] for row in image.rows]))
    active = set(active_parameters(image.model, image.stage))
    for name, parameter in image.model.named_parameters():
        assert bool((parameter != before[name]).all()) == (name in active)


def test_what_a_stage_is_said_to_use_is_what_it_uses(image: Image) -> None:
    loss = image.losses(image.model, image.rows).sum()
    names = [name for name, _ in image.model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(image.model.parameters()), allow_unused=True)
    used = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]
    assert used == active_parameters(image.model, image.stage)


@pytest.mark.parametrize(
    ("architecture", "stage"), [("dcgan", None), ("progressive", Stage(1, 0.3)), ("enhanced", Stage(2, 0.6))]
)
def test_discriminators_can_be_differentiated_twice_by_patient(architecture: str, stage: Stage | None) -> None:
    image = judging(stage, architecture=architecture)

    def penalty(x: Tensor, code: Tensor) -> Tensor:
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(image.model(points, code, stage=stage).sum(), points, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1) ** 2

    def gradient(patient: int) -> list[Tensor]:
        one = slice(patient, patient + 1)
        found = torch.autograd.grad(
            penalty(image.rows[0][one], image.rows[1][one]).sum(), image.active, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, image.active, strict=True)]

    with fixed_parametrisations(image.model):
        gradients = [gradient(patient) for patient in range(PATIENTS)]
        clip = sorted(length(own) for own in gradients)[PATIENTS // 2]
        found = clipped_sums_of(
            image.model,
            image.active,
            [row[:, None] for row in image.rows],
            lambda m, x, code: gradient_penalties(lambda points: m(points, code, stage=stage), x),
            clip,
        )
    assert_near(found, clipped_by_hand(gradients, clip))
