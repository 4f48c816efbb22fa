"""Metrics of feature sets against closed forms, reference implementations and sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from fedsynth.metrics.density_coverage import density_coverage
from fedsynth.metrics.domain_extractor import DomainExtractor, extract, train_extractor
from fedsynth.metrics.frechet import frechet_distance
from fedsynth.metrics.kernel_distance import kernel_distance
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.phantoms import phantom_slices
from fedsynth.metrics.precision_recall import precision_recall
from fedsynth.metrics.ssim_diversity import mean_pairwise_ssim


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_frechet_distance_is_the_closed_form_of_the_sample_gaussians(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(150, 5)) + 3
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussians_with_known_moments(rng: np.random.Generator) -> None:
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2 = 2 * 9 + 2 * 1."""
    a, b = rng.normal(size=(200_000, 2)), 3 + 2 * rng.normal(size=(200_000, 2))
    assert frechet_distance(a, b) == pytest.approx(20, rel=0.02)


def test_frechet_distance_keeps_its_digits_far_from_the_origin(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 1
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_identical_sets(rng: np.random.Generator) -> None:
    a = rng.normal(size=(120, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert precision_recall(a, a) == (1.0, 1.0)
    density, coverage = density_coverage(a, a)
    assert coverage == 1.0 and density >= 1


def test_disjoint_sets(rng: np.random.Generator) -> None:
    a = rng.normal(size=(120, 8))
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    assert density_coverage(a, a + 100) == (0.0, 0.0)
    assert kernel_distance(a, a + 100) > 1000


def test_equal_laws_have_density_one_and_no_kernel_distance(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(800, 6)), rng.normal(size=(800, 6))
    density, coverage = density_coverage(a, b)
    assert density == pytest.approx(1, abs=0.1)
    # Naeem et al., appendix: coverage expects 1 - prod (M - i) / (M + N - i) of k, here about 1 - 2^-5.
    assert coverage == pytest.approx(1 - 2**-5, abs=0.03)
    assert kernel_distance(a, b) == pytest.approx(0, abs=0.02)


def test_kernel_distance_is_the_unbiased_mmd(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 0.5
    aa, bb, ab = (polynomial_kernel(x, y, degree=3, gamma=1 / 4, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    n = 60
    expected = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (n * (n - 1)) - 2 * ab.mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_of_many_slices_of_few_patients_is_not_moved_by_their_likeness(
    rng: np.random.Generator,
) -> None:
    """Equal laws of patients, 40 slices of each nearly the same: with pairs within a patient it would be far above 0."""
    values, naive = [], []
    for _ in range(30):
        a, b = (np.repeat(rng.normal(size=(12, 4)), 40, axis=0) for _ in range(2))
        patients = np.repeat(np.arange(12), 40)
        values.append(kernel_distance(a, b, patients, patients))
        naive.append(kernel_distance(a, b))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error and np.mean(naive) > 5 * error


def test_a_collapsed_generator_has_no_recall_even_if_its_one_sample_is_good(rng: np.random.Generator) -> None:
    real = rng.normal(size=(200, 8))
    collapsed = np.repeat(real.mean(axis=0)[None], 200, axis=0)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0 and recall == 0.0
    assert density_coverage(real, collapsed)[1] < 0.7


def test_an_outlier_inflates_precision_but_not_density(rng: np.random.Generator) -> None:
    """The case Naeem et al. open with: one far real sample whose ball swallows bad fakes."""
    real = np.concatenate([rng.normal(size=(199, 4)), np.full((1, 4), 20.0)])
    fake = 12 + rng.normal(size=(200, 4))
    assert precision_recall(real, fake)[0] == 1.0
    assert density_coverage(real, fake)[0] < 0.3


def test_ssim_is_one_for_copies_and_less_for_different_patients(rng: np.random.Generator) -> None:
    one = rng.random((1, 2, 3, 32, 32))
    assert mean_pairwise_ssim(np.repeat(one, 5, axis=0), rng, pairs=50) == pytest.approx(1, abs=1e-5)
    assert mean_pairwise_ssim(rng.random((5, 2, 3, 32, 32)), rng, pairs=50) < 0.2


def test_ssim_of_constant_images_is_the_luminance_term(rng: np.random.Generator) -> None:
    images = np.stack([np.full((1, 1, 32, 32), 0.2), np.full((1, 1, 32, 32), 0.6)])
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert mean_pairwise_ssim(images, rng, pairs=90) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("broken", [np.zeros((3, 8)), np.full((50, 8), np.nan)])
def test_too_few_and_not_finite_are_not_measurable(broken: np.ndarray, rng: np.random.Generator) -> None:
    good = rng.normal(size=(50, 8))
    for metric in (frechet_distance, precision_recall, kernel_distance):
        with pytest.raises(NotMeasurable):
            metric(good, broken)
        with pytest.raises(NotMeasurable):
            metric(broken, good)
    with pytest.raises(NotMeasurable, match="at least 2"):
        mean_pairwise_ssim(np.zeros((1, 1, 1, 32, 32)), rng)


def test_the_extractor_learns_is_named_by_its_weights_and_is_reproducible(rng: np.random.Generator) -> None:
    images, targets = phantom_slices(400, 2, 32, rng)
    first, second, third = (
        train_extractor(images, targets, torch.Generator().manual_seed(seed), "phantoms", steps=30)
        for seed in (1, 1, 2)
    )
    assert first.name == second.name != third.name and "phantoms" in first.name
    features = extract(first, images)
    assert features.shape == (400, first.num_features)
    assert np.allclose(features.mean(axis=0), 0, atol=1e-4) and np.allclose(features.std(axis=0), 1, atol=1e-3)
    area = torch.sigmoid(first.logits(torch.from_numpy(images)))[:, 5].numpy()
    assert np.corrcoef(area, targets[:, 5])[0, 1] > 0.5


def test_the_extractor_refuses_what_it_cannot_learn_from(rng: np.random.Generator) -> None:
    images, targets = phantom_slices(4, 1, 32, rng)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        train_extractor(images, targets + 2, generator)
    with pytest.raises(ValueError, match="as many"):
        train_extractor(images, targets[:3], generator)
    with pytest.raises(ValueError, match="channels"):
        extract(DomainExtractor(3, 1, "none"), images)
