"""Cohorts, recipes and yardstick of the benchmarks, on a handful of patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsynth_simulations.benchmarking.cohorts import (
    Patients,
    at_size,
    concatenate,
    draw_site,
    load_site,
    save_patients,
)
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.hospitals.sites import SITES


def some_patients(n: int, size: int = 8) -> Patients:
    rng = np.random.default_rng(n)
    return Patients(
        rng.random((n, 3, 4, size, size)).astype(np.float16),
        rng.integers(0, 4, (n, 4, size, size)).astype(np.uint8),
        rng.standard_normal((n, 5)).astype(np.float32),
        rng.random((n, 9)).astype(np.float32),
        rng.integers(0, 2, n),
    )


def test_a_patient_does_not_depend_on_who_is_drawn_beside_it():
    pytest.importorskip("nilearn")
    plan, anatomy = benchmark_plan(64, {"any": 100}), Anatomy.load()
    both = draw_site(plan, SITES[1], 7, "train", range(2), anatomy)
    second = draw_site(plan, SITES[1], 7, "train", [1], anatomy)
    other = draw_site(plan, SITES[1], 7, "holdout", [1], anatomy)
    assert np.array_equal(both.images[1], second.images[0])
    assert np.array_equal(both.genes[1], second.genes[0])
    assert not np.array_equal(second.images, other.images)
    assert both.images.shape == (2, 3, 16, 64, 64)
    assert both.masks.any(axis=(1, 2, 3)).all()
    assert both.morphology.min() >= 0
    assert both.morphology.max() <= 1


def test_halving_the_matrix_keeps_means_and_a_majority_of_tumour():
    patients = some_patients(3)
    halved = at_size(patients, 4)
    assert halved.images.shape == (3, 3, 4, 4, 4)
    assert np.allclose(halved.images.mean(), patients.images.astype(np.float32).mean(), atol=2e-3)
    block = patients.masks[0, 0, :2, :2]
    assert (halved.masks[0, 0, 0, 0] > 0) == ((block > 0).sum() >= 2)
    with pytest.raises(ValueError, match="cannot be averaged"):
        at_size(patients, 3)


def test_blocks_are_read_in_order_and_no_more_than_asked(tmp_path):
    whole = some_patients(4)
    parts = [some_patients(2), some_patients(3)]
    for number, part in enumerate(parts):
        save_patients(tmp_path / f"seed7-north-train-{number:03d}.npz", part)
    read = load_site(tmp_path, 7, "north", "train", 4, 8)
    assert np.array_equal(read.genes, concatenate(parts).genes[:4])
    assert len(read) == len(whole)
    with pytest.raises(ValueError, match="holds 5 patients"):
        load_site(tmp_path, 7, "north", "train", 6, 8)


def test_training_takes_images_and_mask_between_minus_one_and_one():
    slices = some_patients(2).slices()
    assert slices.shape == (2, 4, 4, 8, 8)
    assert slices.dtype == torch.float16
    assert set(slices[:, 3].unique().tolist()) == {-1.0, 1.0}
    assert float(slices.min()) >= -1
    assert float(slices.max()) <= 1
