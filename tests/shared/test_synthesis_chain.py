"""The chain genes -> morphology and label -> image and mask of one synthetic patient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsynth.models.dcgan import Generator
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.morphology import features
from fedsynth.plan import StudyPlan
from fedsynth.synthesis import SyntheticProfiles, draw_patients, draw_profiles
from fedsynth.synthetic import SyntheticPatient

TRAINING = {"rounds": 1, "steps_per_round": 1, "expected_batch": 4, "max_grad_norm": 1.0, "learning_rate": 1e-3}
GENES, SLICES = 6, 3

PLAN = StudyPlan.model_validate(
    {
        "name": "small",
        "purpose": "tests of synthesis",
        "image": {"sequences": ["T1", "FLAIR"], "size": 32, "slices": SLICES},
        "genes": {
            "panel": [f"G{i}" for i in range(GENES)],
            "reference_quantiles": [0, 1],
            "center": [0] * GENES,
            "scale": [1] * GENES,
            "clip": 1.5,
        },
        "label": {"classes": ["low", "middle", "high"]},
        "morphology": {"features": ["volume", "sphericity"]},
        "privacy": {"epsilon": 1.0},
        "autoencoder": {**TRAINING, "budget_share": 0.3, "hidden": [5], "latent_dim": 2},
        "radiogenomics": {**TRAINING, "budget_share": 0.3, "hidden": [5], "dropout": 0.5},
        "gan": {**TRAINING, "budget_share": 0.4, "latent_dim": 4, "generator_width": 4},
        "sites": [{"name": "north", "nominal_patients": 40}],
    }
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def profiles(count: int, seed: int = 0) -> SyntheticProfiles:
    torch.manual_seed(0)
    return draw_profiles(make_autoencoder(PLAN), make_radiogenomic_dnn(PLAN), count, seeded(seed), PLAN.genes.clip)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(1)
    return make_generator(PLAN)


def rows(of: SyntheticProfiles, order: list[int]) -> SyntheticProfiles:
    return SyntheticProfiles(of.genes[order], of.morphology[order], of.labels[order])


def without_input(model: Generator, columns: slice) -> None:
    """Make the images independent of these columns of (z, condition)."""
    with torch.no_grad():
        for layer in (model.start, *model.modulations):
            layer.weight[:, columns] = 0  # type: ignore[index, operator]


def test_profiles_have_the_shapes_and_ranges_of_the_plan() -> None:
    drawn = profiles(300)
    assert drawn.genes.shape == (300, GENES)
    assert drawn.morphology.shape == (300, 2)
    assert drawn.labels.shape == (300,)
    assert set(drawn.labels.tolist()) == {0, 1, 2}
    assert 0 <= float(drawn.morphology.min()) <= float(drawn.morphology.max()) <= 1
    assert float(drawn.genes.abs().max()) == PLAN.genes.clip


def test_morphology_follows_from_genes_without_dropout() -> None:
    torch.manual_seed(0)
    make_autoencoder(PLAN)
    dnn = make_radiogenomic_dnn(PLAN)
    drawn = profiles(20)
    torch.testing.assert_close(dnn.eval()(drawn.genes)[0].detach(), drawn.morphology)


def test_labels_are_drawn_with_the_predicted_probabilities() -> None:
    torch.manual_seed(0)
    autoencoder, dnn = make_autoencoder(PLAN), make_radiogenomic_dnn(PLAN)
    with torch.no_grad():
        dnn.label.weight.zero_()
        dnn.label.bias.copy_(torch.log(torch.tensor([0.1, 0.3, 0.6])))
    labels = draw_profiles(autoencoder, dnn, 5000, seeded(2), 4.0).labels
    torch.testing.assert_close(
        torch.bincount(labels) / 5000, torch.tensor([0.1, 0.3, 0.6]), rtol=0, atol=6 * 0.5 / 5000**0.5
    )


def test_patients_have_the_shapes_and_ranges_of_a_release(generator: Generator) -> None:
    drawn = profiles(4)
    patients = draw_patients(PLAN, generator, drawn, seeded(5))
    low = np.array([f.low for f in features(PLAN.morphology.features)])
    high = np.array([f.high for f in features(PLAN.morphology.features)])
    assert [p.participant_id for p in patients] == ["SYN0001", "SYN0002", "SYN0003", "SYN0004"]
    for i, patient in enumerate(patients):
        assert patient.images.shape == (2, SLICES, 32, 32)
        assert patient.images.dtype == np.float32
        assert 0 <= patient.images.min() < patient.images.max() <= 1
        assert patient.mask.shape == (SLICES, 32, 32)
        assert patient.mask.dtype == np.uint8
        assert set(np.unique(patient.mask)) <= {0, 1}
        assert patient.label == PLAN.label.classes[int(drawn.labels[i])]
        np.testing.assert_array_equal(patient.genes, drawn.genes[i].numpy())
        assert (low <= patient.morphology).all()
        assert (patient.morphology <= high).all()


def same_images(a: SyntheticPatient, b: SyntheticPatient) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.mask, b.mask)


def test_a_generator_state_gives_the_same_patients_again(generator: Generator) -> None:
    drawn = profiles(3)
    first, again = draw_patients(PLAN, generator, drawn, seeded(5)), draw_patients(PLAN, generator, drawn, seeded(5))
    other = draw_patients(PLAN, generator, drawn, seeded(6))
    assert all(same_images(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same_images(a, b) for a, b in zip(first, other, strict=True))


def test_a_patients_volume_does_not_depend_on_who_else_is_drawn(generator: Generator) -> None:
    drawn = profiles(3)
    whole = draw_patients(PLAN, generator, drawn, seeded(5))
    alone = draw_patients(PLAN, generator, rows(drawn, [0]), seeded(5))
    turned = draw_patients(PLAN, generator, rows(drawn, [0, 2, 1]), seeded(5))
    assert same_images(whole[0], alone[0])
    assert same_images(whole[0], turned[0])


def test_all_slices_of_a_patient_share_one_z(generator: Generator) -> None:
    z = PLAN.gan.latent_dim
    without_input(generator, slice(z, None))  # images are functions of z alone now
    first, second = draw_patients(PLAN, generator, rows(profiles(1), [0, 0]), seeded(5))
    for plane in range(1, SLICES):
        np.testing.assert_allclose(first.images[:, plane], first.images[:, 0], atol=1e-6)
    assert not np.allclose(first.images, second.images, atol=1e-3)


def test_slices_differ_by_their_position_and_patients_by_their_profile(generator: Generator) -> None:
    without_input(generator, slice(0, PLAN.gan.latent_dim))  # images are functions of the condition alone now
    drawn = profiles(2)
    same = draw_patients(PLAN, generator, rows(drawn, [0, 0]), seeded(5))
    np.testing.assert_allclose(same[0].images, same[1].images, atol=1e-6)
    assert not np.allclose(same[0].images[:, 0], same[0].images[:, 1], atol=1e-3)
    differing = draw_patients(PLAN, generator, drawn, seeded(5))
    assert not np.allclose(differing[0].images, differing[1].images, atol=1e-3)


def test_morphology_spreads_as_the_public_reference_says_and_keeps_its_mean() -> None:
    autoencoder, dnn = make_autoencoder(PLAN), make_radiogenomic_dnn(PLAN)
    features = len(PLAN.morphology.features)
    narrow = draw_profiles(autoencoder, dnn, 4000, seeded(3), 4.0).morphology
    wide = draw_profiles(autoencoder, dnn, 4000, seeded(3), 4.0, [0.15] * features).morphology
    assert narrow.std(0).max() < 0.1
    assert torch.allclose(wide.std(0), torch.full((features,), 0.15), atol=0.01)
    assert torch.allclose(wide.mean(0), narrow.mean(0), atol=0.02)
    assert wide.min() >= 0 and wide.max() <= 1
