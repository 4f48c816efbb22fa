"""Attribute inference: what holds in the population is no leak, what holds of training patients alone is one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsynth.attacks.attributes import genes_from_images, label_from_genes, morphology_from_genes
from fedsynth.attacks.descriptions import Described
from fedsynth.attacks.values import AttributeAttack
from fedsynth.metrics.measurable import NotMeasurable

GENES, FEATURES = 60, 3


def people(n: int, seed: int, linked: bool = True) -> Described:
    """People whose genes, images, morphology and label hang together through one factor, or not at all."""
    rng = np.random.default_rng(seed)
    loads = np.random.default_rng(99).normal(size=(3, GENES))
    factor = rng.normal(size=(n, 1))

    def driven(width: int, weights: NDArray[np.floating], noise: float) -> NDArray[np.float32]:
        own = factor if linked else rng.normal(size=(n, 1))
        return (own @ weights[None, :width] + noise * rng.normal(size=(n, width))).astype(np.float32)

    return Described(
        slices=driven(20, loads[0], 0.5),
        mask=np.abs(driven(8, loads[1], 0.5)),
        morphology=np.clip(0.5 + 0.15 * driven(FEATURES, np.ones(FEATURES), 0.3), 0, 1),
        genes=driven(GENES, loads[2], 0.7),
        labels=(driven(1, np.ones(1), 0.1)[:, 0] > 0).astype(np.int64),
        sites=np.zeros(n, dtype=np.int64),
    )


def attacks(members: Described, others: Described, synthetic: Described, reference: Described) -> list[AttributeAttack]:
    rng = np.random.default_rng(0)
    return [
        genes_from_images(members, others, synthetic, reference, rng),
        morphology_from_genes(members, others, synthetic, reference, rng),
        label_from_genes(members, others, synthetic, reference, 2, rng),
    ]


def test_a_link_in_the_population_is_guessed_of_everybody_alike() -> None:
    for found in attacks(people(150, 1), people(100, 2), people(200, 3), people(60, 4)):
        assert found.members > 0.3
        assert found.non_members > 0.3
        assert found.gap.low < 0 < found.gap.high
        assert found.baseline is not None
        assert found.members > found.baseline + 0.2


def test_a_release_that_repeats_training_patients_is_better_at_guessing_them() -> None:
    members = people(30, 5)
    for attack in attacks(members, people(200, 6), members, people(60, 7)):
        assert attack.gap.low > 0
        assert attack.gap.value == pytest.approx(attack.members - attack.non_members)


def test_a_release_without_any_link_guesses_no_better_than_blindly() -> None:
    for found in attacks(people(150, 1), people(100, 2), people(200, 8, linked=False), people(60, 4)):
        assert found.baseline is not None
        assert found.members < found.baseline + 0.15


def test_the_baseline_is_that_of_the_mean() -> None:
    members, others = people(150, 1), people(100, 2)
    found = morphology_from_genes(members, others, people(200, 3), people(60, 4), np.random.default_rng(0))
    assert found.baseline == pytest.approx(0.0, abs=0.1)
    assert "mean of reference patients" in found.note


def test_without_reference_patients_the_baseline_is_a_public_constant() -> None:
    nobody = people(60, 4).take(np.zeros(0, dtype=np.int64))
    for found in attacks(people(150, 1), people(100, 2), people(200, 3), nobody):
        assert found.baseline is not None
        assert "reference" not in found.note


def test_morphology_that_was_not_measured_is_left_out() -> None:
    members, others, made, usual = people(150, 1), people(100, 2), people(200, 3), people(60, 4)
    holes = members.morphology.copy()
    holes[:100, 0], holes[3] = np.nan, np.nan
    some = Described(members.slices, members.mask, holes, members.genes, members.labels, members.sites)
    found = morphology_from_genes(some, others, made, usual, np.random.default_rng(0))
    assert np.isfinite([found.members, found.gap.low, found.gap.high]).all()
    assert found.members == pytest.approx(found.non_members, abs=0.15)


def test_too_few_patients_are_no_result() -> None:
    few = people(5, 1)
    with pytest.raises(NotMeasurable):
        morphology_from_genes(few, people(100, 2), people(100, 3), people(60, 4), np.random.default_rng(0))
