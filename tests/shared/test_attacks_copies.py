"""Copy detection: planted copies are found however they were disguised, and people who resemble each other are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fedsynth.attacks.copies import Volume, copy_threshold, gene_copies, image_copies, stack
from fedsynth.metrics.measurable import NotMeasurable

TRAIN, HELD_OUT, MADE = 60, 40, 30
NAMES = [f"SYN{i:04d}" for i in range(MADE)]


def people(n: int, seed: int, size: int = 32) -> list[Volume]:
    """Heads that are alike in what all share, and each of their own in folds, brightness and tumour."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(-1, 1, size),) * 2, indexing="ij")
    found: list[Volume] = []
    for _ in range(n):
        head = (np.square(y / rng.uniform(0.8, 0.9)) + np.square(x / rng.uniform(0.7, 0.8)) < 1).astype(float)
        folds = gaussian_filter(rng.normal(size=(3, 4, size, size)), (0, 0.5, 1.5, 1.5))
        centre, radius = rng.uniform(-0.4, 0.4, size=2), rng.uniform(0.15, 0.35)
        tumour = (np.square(y - centre[0]) + np.square(x - centre[1]) < radius**2) & (head > 0)
        images = np.clip(head * (0.5 + 0.3 * folds) + 0.2 * tumour, 0, 1).astype(np.float32)
        found.append((images, np.broadcast_to(tumour, (4, size, size)).astype(np.uint8)))
    return found


@pytest.fixture(scope="module")
def training() -> list[Volume]:
    return people(TRAIN, 1)


@pytest.fixture(scope="module")
def held_out() -> list[Volume]:
    return people(HELD_OUT, 2)


def noisy(volume: Volume) -> Volume:
    noise = np.random.default_rng(9).normal(size=volume[0].shape)
    return np.clip(volume[0] + 0.03 * noise, 0, 1).astype(np.float32), volume[1]


def moved(volume: Volume, down: int, across: int) -> Volume:
    return np.roll(volume[0], (down, across), axis=(-2, -1)), np.roll(volume[1], (down, across), axis=(-2, -1))


DISGUISES: dict[str, Callable[[Volume], Volume]] = {
    "exact": lambda volume: volume,
    "with noise": noisy,
    "mirrored": lambda volume: (volume[0][..., ::-1], volume[1][..., ::-1]),
    "shifted": lambda volume: moved(volume, 1, -1),
    "mirrored and shifted": lambda volume: moved((volume[0][..., ::-1], volume[1][..., ::-1]), -1, 0),
    "slightly blurred": lambda volume: (gaussian_filter(volume[0], (0, 0, 0.4, 0.4)), volume[1]),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_planted_copy_of_a_training_patient_is_found(
    training: list[Volume], held_out: list[Volume], disguise: str
) -> None:
    made = people(MADE, 3)
    made[7] = DISGUISES[disguise](training[20])
    found = image_copies(stack(training), stack(held_out), held_out, made, NAMES)
    assert found.participants == ["SYN0007"]
    assert (found.found, found.found_holdout, found.compared) == (1, 0, MADE)
    assert found.most_similar[0] >= found.threshold > found.most_similar[1]


def test_nobody_is_a_copy_of_somebody_who_only_resembles(training: list[Volume], held_out: list[Volume]) -> None:
    found = image_copies(stack(training), stack(held_out), held_out, people(MADE, 4), NAMES)
    assert (found.found, found.found_holdout, found.participants) == (0, 0, [])


def test_a_copy_of_a_held_out_patient_is_counted_as_chance(training: list[Volume], held_out: list[Volume]) -> None:
    made = [*people(MADE - 1, 5), held_out[3]]
    found = image_copies(stack(training), stack(held_out), held_out, made, NAMES)
    assert (found.found, found.found_holdout) == (0, 1)


@pytest.mark.parametrize("size", [64, 128])
def test_larger_images_are_compared_after_the_shift(size: int) -> None:
    training, held_out, made = people(20, 6, size), people(12, 7, size), people(11, 8, size)
    made[0] = moved(training[5], size // 64, 0)
    found = image_copies(stack(training), stack(held_out), held_out, made, NAMES[:11])
    assert found.participants == ["SYN0000"]


def profiles(n: int, seed: int) -> NDArray[np.float32]:
    """Expression of people who share pathways."""
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).normal(size=(5, 200))
    return (rng.normal(size=(n, 5)) @ loadings * 0.5 + rng.normal(size=(n, 200))).astype(np.float32)


def test_planted_copies_of_profiles_are_found() -> None:
    training, held_out, made = profiles(120, 1), profiles(60, 2), profiles(MADE, 3)
    made[4], made[11] = training[30], training[31] + 0.2 * profiles(1, 4)[0]
    found = gene_copies(training, held_out, made, NAMES)
    assert found.participants == ["SYN0004", "SYN0011"]
    assert found.found_holdout == 0
    assert gene_copies(training, held_out, profiles(MADE, 5), NAMES).found == 0


def test_releases_without_copies_rarely_raise_an_alarm() -> None:
    alarms = 0
    for seed in range(40):
        training, held_out, made = (profiles(n, 10 * seed + part) for part, n in enumerate((80, 60, MADE)))
        alarms += gene_copies(training, held_out, made, NAMES).found > 0
    assert alarms <= 3


def test_the_threshold_is_above_all_pairs_of_different_people() -> None:
    different = np.random.default_rng(0).uniform(0.3, 0.6, size=100)
    assert different.max() < copy_threshold(different, 150) < 1
    assert copy_threshold(different, 10_000) > copy_threshold(different, 100)


def test_too_few_patients_are_no_result() -> None:
    with pytest.raises(NotMeasurable):
        gene_copies(profiles(5, 1), profiles(60, 2), profiles(10, 3), NAMES)


def test_a_person_on_both_sides_of_the_split_does_not_hide_copies() -> None:
    """With that person's similarity to itself among those of different people nothing would be similar enough."""
    rng = np.random.default_rng(11)
    factors = rng.normal(size=(10, 200))

    def profiles(n: int) -> NDArray[np.float32]:
        return (rng.normal(size=(n, 10)) @ factors + 1.5 * rng.normal(size=(n, 200))).astype(np.float32)

    training, held_out, made = profiles(300), profiles(80), profiles(100)
    held_out[:3] = training[:3]
    made[:5] = training[10:15] + 0.2 * rng.normal(size=(5, 200)).astype(np.float32)
    names = [f"SYN{i:04d}" for i in range(100)]
    found = gene_copies(training, held_out, made, names)
    assert found.participants == names[:5]
    assert "Left out: 3 held-out patients" in found.how
    # Nor does a copy of that person pass for chance, being as like a held-out patient.
    made[5] = held_out[0]
    both = gene_copies(training, held_out, made, names)
    assert (both.found, both.found_holdout) == (6, 0)
    assert "Left out" not in gene_copies(training, held_out[3:], made, names).how


def test_an_exact_copy_is_one_even_where_everybody_is_on_both_sides() -> None:
    rng = np.random.default_rng(12)
    training = rng.normal(size=(40, 50)).astype(np.float32)
    assert gene_copies(training, training.copy(), training[:20], NAMES[:20]).found == 20


def test_images_of_a_person_on_both_sides_are_copies_and_no_chance(
    training: list[Volume], held_out: list[Volume]
) -> None:
    broken = [training[0], *held_out[1:]]
    check = image_copies(stack(training), stack(broken), broken, [training[0], training[1]], NAMES[:2])
    assert (check.found, check.found_holdout) == (2, 0)
    assert "Left out: 1 held-out patients" in check.how
