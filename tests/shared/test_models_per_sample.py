"""No layer of a privately trained network mixes samples, and Opacus' per-sample gradients are those of autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsynth.dp.randomness import SystemRandomness
from fedsynth.dp.step import make_private
from fedsynth.models.condition import condition_dim
from fedsynth.models.dcgan import Discriminator, initialise
from fedsynth.models.gene_autoencoder import GeneAutoencoder, autoencoder_losses
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.models.radiogenomic_dnn import RadiogenomicDNN, radiogenomic_losses
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


def study(size: int) -> StudyPlan:
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
            "gan": {**TRAINING, "latent_dim": LATENT, "generator_width": 4, "discriminator_width": 8},
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
