"""Metrics against other implementations on shared inputs: torchmetrics, prdc, scikit-image, scipy. Tolerances are stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from fedsynth.metrics.class_scores import am_score, divergence, entropy, inception_score, mode_score
from fedsynth.metrics.density_coverage import density_coverage, neighbourhood_members
from fedsynth.metrics.frechet import frechet_distance, frechet_folds
from fedsynth.metrics.jackknife import deal, jackknife_interval, standard_error
from fedsynth.metrics.kernel_distance import kernel_distance, kernel_folds
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.nearest_image import nearest_slices, psnr
from fedsynth.metrics.patient_pairs import draw_pairs, resampled_mean
from fedsynth.metrics.precision_recall import manifold_members, precision_recall
from fedsynth.metrics.ssim_diversity import multiscale_similarity, similarity


class Given(torch.nn.Module):
    """Stands in for the network of a torchmetrics metric: its input already is the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def sets(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mix = rng.normal(size=(12, 12))
    return rng.normal(size=(160, 12)) @ mix, 0.8 * rng.normal(size=(140, 12)) @ mix + 0.4


Sets = tuple[NDArray[np.float64], NDArray[np.float64]]


def test_frechet_distance_agrees_with_torchmetrics_to_a_millionth(sets: Sets) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(feature=Given(12)).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(sets[0]), real=True)
    theirs.update(torch.from_numpy(sets[1]), real=False)
    assert frechet_distance(*sets) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_distance_of_more_features_than_samples_is_that_of_the_products_singular_values(
    rng: np.random.Generator,
) -> None:
    """Without full rank tr (S1 S2)^(1/2) is the sum of the singular values of the product of the centred data."""
    a, b = rng.normal(size=(20, 50)), rng.normal(size=(25, 50)) + 0.1
    with pytest.raises(NotMeasurable, match="at least 51"):
        frechet_distance(a, b)
    x, y = (a - a.mean(0)) / np.sqrt(19), (b - b.mean(0)) / np.sqrt(24)
    between = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * between
    assert frechet_distance(a, b, any_rank=True) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_agrees_with_torchmetrics_to_a_millionth(sets: Sets) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    theirs = KernelInceptionDistance(feature=Given(12), subsets=1, subset_size=140)
    theirs.update(torch.from_numpy(sets[0][:140]), real=True)
    theirs.update(torch.from_numpy(sets[1]), real=False)
    assert kernel_distance(sets[0][:140], sets[1]) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_kernel_distance_in_blocks_is_that_of_one_block(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernel_folds(*sets)
    monkeypatch.setattr("fedsynth.metrics.kernel_distance.CHUNK", 33)
    for one, other in zip(whole, kernel_folds(*sets), strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_precision_recall_density_and_coverage_agree_with_prdc_to_rounding(sets: Sets) -> None:
    prdc = pytest.importorskip("prdc")
    theirs = prdc.compute_prdc(real_features=sets[0], fake_features=sets[1], nearest_k=5)
    assert precision_recall(*sets, neighbours=5) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert density_coverage(*sets, neighbours=5) == pytest.approx((theirs["density"], theirs["coverage"]))


def test_precision_recall_density_and_coverage_agree_with_their_definitions_in_chunks(
    sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force, one ball at a time, while ours works in chunks of 7."""
    real, fake = sets[0][:60], sets[1][:50]

    def radius(of: NDArray[np.float64], i: int, k: int) -> float:
        return float(np.sort([np.linalg.norm(of[i] - other) for j, other in enumerate(of) if j != i])[k - 1])

    balls = [radius(real, i, 3) for i in range(len(real))]
    fakes = [radius(fake, i, 3) for i in range(len(fake))]
    inside = np.array([[np.linalg.norm(r - f) <= ball for f in fake] for r, ball in zip(real, balls, strict=True)])
    monkeypatch.setattr("fedsynth.metrics.neighbours.CHUNK", 7)
    precise, recalled = manifold_members(real, fake, 3)
    assert precise.tolist() == inside.any(axis=0).tolist()
    expected = [any(np.linalg.norm(r - f) <= ball for f, ball in zip(fake, fakes, strict=True)) for r in real]
    assert recalled.tolist() == expected
    dense, covered = neighbourhood_members(real, fake, 3)
    assert dense == pytest.approx(inside.sum(axis=0) / 3)
    assert covered.tolist() == inside.any(axis=1).tolist()


def test_inception_score_agrees_with_torchmetrics_to_1e_5(rng: np.random.Generator) -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = rng.normal(size=(200, 4)) * 2
    theirs = InceptionScore(feature=Given(4), splits=1)
    theirs.update(torch.from_numpy(logits))
    posteriors = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    assert inception_score(posteriors) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_scores_of_a_perfect_a_blurred_and_a_collapsed_generator() -> None:
    """Four classes by hand: all clear and even gives 4; no clear class gives 1; one class only gives 1."""
    perfect, blurred, collapsed = np.eye(4)[np.arange(40) % 4], np.full((40, 4), 0.25), np.eye(4)[np.zeros(40, int)]
    even = np.full(4, 0.25)
    assert inception_score(perfect) == pytest.approx(4) and mode_score(perfect, even) == pytest.approx(4)
    assert inception_score(blurred) == inception_score(collapsed) == pytest.approx(1)
    assert mode_score(collapsed, even) == pytest.approx(1 / 4)
    assert am_score(perfect, even) == pytest.approx(0, abs=1e-9)
    assert am_score(blurred, even) == pytest.approx(np.log(4))
    assert am_score(collapsed, even) > 10


def test_the_mode_score_sees_wrong_frequencies_where_the_inception_score_does_not(rng: np.random.Generator) -> None:
    posteriors = np.eye(3)[rng.choice(3, size=300, p=[0.7, 0.2, 0.1])]
    mine = posteriors.mean(axis=0)
    swapped = mine[[2, 1, 0]]
    assert mode_score(posteriors, mine) == pytest.approx(inception_score(posteriors))
    assert mode_score(posteriors, swapped) < 0.5 * inception_score(posteriors)


def test_the_first_papers_mode_score_read_literally_is_the_inception_score(rng: np.random.Generator) -> None:
    """The remark of Zhou et al. (2018) for which we use the form of Xu et al. (2018)."""
    posteriors, reference = rng.dirichlet(np.ones(5), size=100), rng.dirichlet(np.ones(5))
    literal = np.mean([divergence(p, reference) for p in posteriors]) - divergence(posteriors.mean(axis=0), reference)
    assert np.exp(literal) == pytest.approx(inception_score(posteriors))


def test_rows_that_are_no_probabilities_are_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(np.full((4, 3), 0.5))
    with pytest.raises(NotMeasurable, match="single class"):
        inception_score(np.ones((4, 1)))
    assert entropy(np.array([0.5, 0.5])) == pytest.approx(np.log(2))


def test_ssim_agrees_with_scikit_image_to_1e_5_but_for_the_margin(rng: np.random.Generator) -> None:
    """scikit-image leaves out a margin of half a window; here both images are black there, where similarity is 1."""
    a, b = np.zeros((2, 2, 3, 48, 40), dtype=np.float32)
    a[..., 11:-11, 11:-11] = rng.random((2, 3, 26, 18))
    b[..., 11:-11, 11:-11] = np.clip(a[..., 11:-11, 11:-11] + 0.2 * rng.normal(size=(2, 3, 26, 18)), 0, 1)
    ours = similarity(a, b)
    inner = 38 * 30 / (48 * 40)
    for i in range(2):
        for c in range(3):
            theirs = structural_similarity(
                a[i, c], b[i, c], data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert ours[i, c] == pytest.approx(inner * theirs + 1 - inner, abs=1e-5)


def test_ms_ssim_agrees_with_torchmetrics_where_all_five_scales_fit_and_with_a_pyramid_where_not(
    rng: np.random.Generator,
) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs

    large = rng.random((1, 1, 192, 192)).astype(np.float32)
    other = np.clip(large + 0.1 * rng.normal(size=large.shape), 0, 1).astype(np.float32)
    expected = theirs(torch.from_numpy(large), torch.from_numpy(other), data_range=1.0)
    assert multiscale_similarity(large, other)[0, 0] == pytest.approx(float(expected), abs=1e-5)

    # 32 pixels have two scales: contrast-structure of the first, SSIM of the second, weighted 0.0448 : 0.2856.
    small, near = large[..., :32, :32], other[..., :32, :32]
    first, second = ((x[0, 0], x[0, 0].reshape(16, 2, 16, 2).mean(axis=(1, 3))) for x in (small, near))
    coarse = similarity(first[1][None, None].astype(np.float32), second[1][None, None].astype(np.float32))[0, 0]
    contrast = contrast_structure(first[0], second[0])
    weights = np.array([0.0448, 0.2856]) / 0.3304
    assert multiscale_similarity(small, near)[0, 0] == pytest.approx(
        contrast ** weights[0] * coarse ** weights[1], abs=2e-3
    )


def contrast_structure(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """(2 cov + c2) / (var + var + c2) with an 11-pixel Gaussian window, mean over the plane without its margin."""
    from scipy.ndimage import gaussian_filter

    def smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(x, 1.5, radius=5, mode="mirror"))

    x, y = a.astype(np.float64), b.astype(np.float64)
    covariance = smooth(x * y) - smooth(x) * smooth(y)
    variances = smooth(x * x) - smooth(x) ** 2 + smooth(y * y) - smooth(y) ** 2
    return float(((2 * covariance + 0.03**2) / (variances + 0.03**2))[5:-5, 5:-5].mean())


def test_psnr_agrees_with_torchmetrics_and_the_nearest_slice_is_found(rng: np.random.Generator) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    among = rng.random((300, 2, 16, 16)).astype(np.float32)
    slices = np.clip(among[[299, 7]] + 0.05 * rng.normal(size=(2, 2, 16, 16)), 0, 1).astype(np.float32)
    found = nearest_slices(slices, among)
    assert found.row.tolist() == [299, 7]
    for i, row in enumerate(found.row):
        expected = peak_signal_noise_ratio(torch.from_numpy(slices[i]), torch.from_numpy(among[row]), data_range=1.0)
        assert found.psnr[i] == pytest.approx(float(expected), abs=1e-3)
    assert float(psnr(np.array(0.0))) == 100


def test_the_jackknife_tells_the_spread_over_patients_that_a_bootstrap_overstates(rng: np.random.Generator) -> None:
    """FID of 60 patients of 6 slices: standard error within a third of the true one; the bootstrap's mean is off by more."""

    def patients(n: int) -> NDArray[np.float64]:
        return np.repeat(rng.normal(size=(n, 6)), 6, axis=0) + 0.4 * rng.normal(size=(6 * n, 6))

    real = patients(60) + 0.5
    number = np.repeat(np.arange(60), 6)
    drawn = [patients(60) for _ in range(80)]
    truth = np.array([frechet_distance(real, fake) for fake in drawn])
    errors = [standard_error(frechet_folds(real, fake, number, number)[1]) for fake in drawn[:15]]
    assert np.mean(errors) == pytest.approx(truth.std(), rel=0.33)
    rows = [rng.integers(60, size=60) for _ in range(60)]
    again = [frechet_distance(real, drawn[0].reshape(60, 6, 6)[r].reshape(360, 6)) for r in rows]
    assert np.mean(again) > truth[0] + 0.5 * truth.std()


def test_jackknife_of_a_mean_is_its_standard_error(rng: np.random.Generator) -> None:
    x = rng.normal(size=40)
    folds = deal(np.arange(40), 40)
    without = np.array([x[folds != fold].mean() for fold in range(40)])
    assert standard_error(without) == pytest.approx(x.std(ddof=1) / np.sqrt(40))
    ends = jackknife_interval(float(x.mean()), without)
    assert ends is not None and ends[1] - x.mean() == pytest.approx(2.0227 * x.std(ddof=1) / np.sqrt(40), rel=1e-3)
    assert jackknife_interval(0.1, np.array([0.1, 5.0, 9.0]), least=0.0) is not None
    assert jackknife_interval(0.1, np.array([0.1, 5.0])) is None


def test_pairs_are_of_different_patients_of_one_label_and_count_as_often_as_both_were_drawn(
    rng: np.random.Generator,
) -> None:
    labels = np.array([0, 0, 0, 1, 1, -1])
    pairs = draw_pairs(6, np.arange(4), 200, rng, labels)
    assert (pairs.first != pairs.second).all() and (labels[pairs.first] == labels[pairs.second]).all()
    assert labels[pairs.first].min() == 0
    values = np.where(labels[pairs.first] == 0, 1.0, 3.0)
    assert resampled_mean(values, pairs, np.array([0, 0, 1, 2])) == 1
    assert resampled_mean(values, pairs, np.array([3, 4, 4])) == 3
    with pytest.raises(NotMeasurable, match="at least 2"):
        draw_pairs(3, np.arange(2), 5, rng, np.array([0, 1, -1]))
