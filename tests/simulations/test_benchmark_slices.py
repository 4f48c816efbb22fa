"""The benchmark on real slices, on drawn ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fedsynth_simulations.benchmarking import slices as task_module
from fedsynth_simulations.benchmarking.cohorts import Patients, save_patients
from fedsynth_simulations.benchmarking.slice_methods import METHODS, public_embedding
from fedsynth_simulations.benchmarking.slices import CLASSES, Slices, Task, classify, load_task


def drawn(n: int, seed: int) -> Slices:
    """A bright square on dark ground, at another height in each class (training mirrors left to right)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    images = rng.random((n, 32, 32)) * 0.2
    for image, label in zip(images, labels, strict=True):
        image[2 + 10 * label : 10 + 10 * label, 8:24] += 0.7
    return Slices(images.astype(np.float32), labels)


@pytest.fixture(scope="module")
def task() -> Task:
    public = drawn(60, 9)
    targets = np.full((60, 6), 0.5, dtype=np.float32)
    return Task({name: drawn(90, i) for i, name in enumerate("abc")}, drawn(60, 7), public.images, targets)


def test_sites_and_test_set_are_contiguous_and_disjoint(tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "_PUBLIC_PATIENTS", 2)
    monkeypatch.setattr(task_module, "scaled", lambda planes: np.asarray(planes, dtype=np.float32))
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):  # written out of order: the number decides, not the name
            grey = np.full((128, 128), 10 * number, dtype=np.uint8)
            Image.fromarray(grey).save(tmp_path / "data" / name / f"{number}.png")
    rng = np.random.default_rng(0)
    public = Patients(
        rng.random((2, 3, 16, 64, 64)).astype(np.float16),
        np.zeros((2, 16, 64, 64), dtype=np.uint8),
        np.zeros((2, 0), dtype=np.float32),
        np.full((2, 9), 0.5, dtype=np.float32),
        np.zeros(2, dtype=np.int64),
    )
    save_patients(tmp_path / "public-000.npz", public)
    loaded = load_task(tmp_path / "data", tmp_path)
    numbers = {}
    for name, part in (*loaded.sites.items(), ("test", loaded.test)):
        assert sorted(np.unique(part.labels)) == [0, 1, 2]
        numbers[name] = sorted({round(float(image.mean()) / 10) for image in part.images})
        assert numbers[name] == list(range(numbers[name][0], numbers[name][-1] + 1))
    assert sorted(n for some in numbers.values() for n in some) == list(range(20))
    assert loaded.public.shape == (32, 32, 32)


@pytest.mark.slow
def test_gaussian_without_noise_has_the_class_means_and_is_learnt_from(task):
    made = METHODS["gaussian"](task, math.inf, 1)
    for code in range(len(CLASSES)):
        real = task.train.images[task.train.labels == code].mean(axis=0)
        assert np.abs(made.images[made.labels == code].mean(axis=0) - real).mean() < 0.05
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    result = classify(made, task.test, 1)
    assert result["accuracy"] > 0.95
    assert result["auc"] > 0.95


def test_noise_at_a_small_epsilon_drowns_three_hundred_slices(task):
    exact, noisy = (METHODS["gaussian"](task, epsilon, 1) for epsilon in (math.inf, 0.01))
    real = task.train.images[task.train.labels == 0].mean(axis=0)

    def away(made: Slices) -> float:
        return float(np.abs(made.images[made.labels == 0].mean(axis=0) - real).mean())

    assert away(noisy) > 3 * away(exact)


def test_embedded_slices_have_norm_one_at_most(task):
    embed = public_embedding(task, trained=False, seed=1)
    coordinates = embed(torch.from_numpy(drawn(6, 3).images) * 2 - 1)
    wild = embed(torch.randn(6, 32, 32, generator=torch.Generator().manual_seed(0)) * 100)
    for rows in (coordinates, wild):
        assert float(rows.norm(dim=1).max()) <= 1 + 1e-6
    assert float(coordinates.norm(dim=1).min()) > 0.1
