"""The fidelity section: faults planted in synthetic patients show, in the figure and in the group they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsynth.evaluation import fidelity_pixels
from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.fidelity import fidelity
from fedsynth.evaluation.fidelity_distances import GroupNames
from fedsynth.evaluation.samples import Volumes
from fedsynth.evaluation.values import Figure, Group
from fedsynth.metrics.domain_extractor import train_extractor
from fedsynth.metrics.feature_network import Ensemble, domain_ensemble
from fedsynth.metrics.phantoms import phantom_slices

NAMES = GroupNames(("low", "high"), ("T1", "T1c"), ("north", "south"))
SPACING = (3.0, 2.0, 2.0)
SIZE, DEPTH = 32, 6
NEAREST = "PSNR to the nearest training slice (dB)"
RADIOMICS = "Fréchet distance of radiomics features"


def cohort(n: int, seed: int, broken_site: bool = False) -> Volumes:
    """Elliptic heads of two sequences with a ball-shaped tumour, large and bright on T1c in class 1; two sites in turn."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, m) for m in (DEPTH, SIZE, SIZE)), indexing="ij")
    images, masks = np.zeros((n, 2, DEPTH, SIZE, SIZE), dtype=np.float16), np.zeros((n, DEPTH, SIZE, SIZE), dtype=bool)
    labels, sites = rng.integers(2, size=n), np.arange(n) % 2
    for i in range(n):
        half = rng.uniform(0.65, 0.95, size=2)
        head = np.square(y / half[0]) + np.square(x / half[1]) < 1
        place = rng.uniform(-0.35, 0.35, size=3)
        radius = rng.uniform(0.2, 0.3) + 0.25 * labels[i]
        ball = sum(np.square(a - c) for a, c in zip((z, y, x), place, strict=True)) < radius**2
        masks[i] = head & ball
        for channel, gain in enumerate((-0.15, 0.2 + 0.2 * labels[i])):
            picture = head * rng.uniform(0.35, 0.5) + gain * masks[i] + 0.03 * head * rng.normal(size=head.shape)
            images[i, channel] = np.clip(picture, 0, 1)
        if broken_site and sites[i] == 1:
            images[i] = images[i, :, :, ::-1] ** 0.3
    return Volumes(images, masks, labels, sites)


def synthetic(volumes: Volumes) -> Volumes:
    return replace(volumes, sites=np.full(len(volumes), -1))


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    images, targets = phantom_slices(400, 2, SIZE, np.random.default_rng(0))
    seeds = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    return domain_ensemble(tuple(train_extractor(images, targets, seed, "phantoms", steps=60) for seed in seeds))


@pytest.fixture(scope="module")
def train() -> Volumes:
    return cohort(120, seed=1)


@pytest.fixture(scope="module")
def holdout() -> Volumes:
    return cohort(60, seed=2)


Measure = Callable[[Volumes], dict[str, Figure]]


@pytest.fixture(scope="module")
def measure(ensemble: Ensemble, train: Volumes, holdout: Volumes) -> Measure:
    def measured(of: Volumes, train: Volumes = train, holdout: Volumes = holdout) -> dict[str, Figure]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fidelity_pixels, "PAIRS", 60)
            patch.setattr(fidelity_pixels, "PAIRS_IN_CLASS", 20)
            patch.setattr(fidelity_pixels, "MOST_NEAREST", 30)
            rng = np.random.default_rng(5)
            section = fidelity(Columns(of, train), holdout, [ensemble], NAMES, SPACING, rng, max_slices=240)
        return {figure.metric: figure for figure in section.figures}

    return measured


@pytest.fixture(scope="module")
def good(measure: Measure) -> dict[str, Figure]:
    return measure(synthetic(cohort(60, seed=3)))


def value(number: float | None) -> float:
    assert number is not None
    return number


def group(figure: Figure, by: str, name: str) -> Group:
    return next(each for each in figure.groups if each.by == by and each.name == name)


def excess(each: Group) -> float:
    """How many times the ceiling of its own group a group's distance is."""
    return value(each.synthetic) / value(each.real)


def test_good_patients_are_as_near_as_real_ones_in_every_figure_and_group(
    good: dict[str, Figure], ensemble: Ensemble
) -> None:
    fid = good["FID in domain features"]
    assert value(fid.synthetic) < 3 * value(fid.real) < value(fid.floor)
    for name, figure in good.items():
        assert figure.synthetic is not None and figure.real is not None and figure.floor is not None, name
        assert figure.interval is not None, name
        assert figure.interval[0] <= figure.synthetic <= figure.interval[1], (name, figure)
    for name in ("FID in domain features", "KID in domain features", "Precision", "Coverage", RADIOMICS):
        assert [(g.by, g.name) for g in good[name].groups] == [
            *(("class", each) for each in NAMES.classes),
            *(("sequence", each) for each in NAMES.sequences),
            *(("site", each) for each in NAMES.sites),
        ], name
        assert all(g.synthetic is not None and g.real is not None for g in good[name].groups), name
    assert good[NEAREST].better == "none" and abs(value(good[NEAREST].synthetic) - value(good[NEAREST].real)) < 2


def test_every_figure_that_uses_a_network_names_it_with_its_weights(
    good: dict[str, Figure], ensemble: Ensemble
) -> None:
    needs_none = {RADIOMICS, "SSIM between patients", "MS-SSIM between patients", NEAREST}
    for name, figure in good.items():
        if name in needs_none or name.startswith("SSIM to"):
            assert figure.extractor == "", name
        else:
            assert figure.extractor.startswith("mean over 2 networks: "), name
            assert all(network.name in figure.extractor for network in ensemble.networks), name
    assert "Not comparable with published FID" in good["FID in domain features"].note


def test_the_distance_of_an_ensemble_is_the_mean_of_its_networks(
    ensemble: Ensemble, train: Volumes, holdout: Volumes, good: dict[str, Figure]
) -> None:
    from fedsynth.evaluation.fidelity_distances import compare
    from fedsynth.evaluation.fidelity_slices import draw_slices, features_of

    rng = np.random.default_rng(0)
    real, fake = (draw_slices(each, 30, np.arange(1, 5), 4, rng) for each in (holdout, train))
    sets = [[features_of(each, network) for network in ensemble.networks] for each in (real, fake)]
    together = compare(sets[0], sets[1], rng)
    singly = [compare([a], [b], rng) for a, b in zip(*sets, strict=True)]
    for name, measured in together.items():
        parts = [each[name] for each in singly]
        assert measured.value == pytest.approx(np.mean([part.value for part in parts])), name  # type: ignore[union-attr]


def test_one_picture_again_and_again_has_no_recall_and_no_variety(measure: Measure, good: dict[str, Figure]) -> None:
    one = synthetic(cohort(60, seed=3)).take(np.zeros(60, dtype=np.int64))
    bad = measure(one)
    assert value(bad["Recall"].synthetic) < 0.2 < value(good["Recall"].synthetic)
    assert value(bad["Coverage"].synthetic) < 0.5 * value(good["Coverage"].synthetic)
    assert value(bad["SSIM between patients"].synthetic) == pytest.approx(1, abs=1e-4)
    assert value(bad["MS-SSIM between patients"].synthetic) == pytest.approx(1, abs=1e-4)
    assert value(bad["Inception-style score"].synthetic) < value(good["Inception-style score"].synthetic)
    fid = bad["FID in domain features"]
    assert fid.interval is not None and fid.interval[0] > 2 * value(fid.real)


def test_noise_is_varied_but_looks_like_nothing(measure: Measure, good: dict[str, Figure]) -> None:
    noise = synthetic(cohort(60, seed=3))
    noise = replace(noise, images=np.random.default_rng(0).random(noise.images.shape).astype(np.float16))
    bad = measure(noise)
    assert value(bad["Precision"].synthetic) < 0.1 and value(bad["Density"].synthetic) < 0.1
    assert value(bad["SSIM between patients"].synthetic) < 0.1
    for name in ("FID in domain features", "KID in domain features", RADIOMICS):
        assert value(bad[name].synthetic) > 10 * abs(value(good[name].synthetic)), name
        ends = bad[name].interval
        assert ends is not None and ends[0] > value(bad[name].real), name


def test_a_missing_class_lowers_the_mode_score_and_is_named(measure: Measure, good: dict[str, Figure]) -> None:
    drawn = cohort(140, seed=3)
    bad = measure(synthetic(drawn.take(np.flatnonzero(drawn.labels == 0)[:60])))
    assert value(bad["Mode score"].synthetic) < 0.95 * value(good["Mode score"].synthetic)
    lacking = group(bad["FID in domain features"], "class", "high")
    assert lacking.synthetic is None and "at least" in lacking.note and lacking.n == 0
    assert group(bad["FID in domain features"], "class", "low").synthetic is not None


def test_one_broken_sequence_shows_in_its_own_group(measure: Measure) -> None:
    broken = synthetic(cohort(60, seed=3))
    images = broken.images.copy()
    images[:, 1] = images[:, 1, :, ::-1, ::-1][:, ::-1] ** 0.4
    bad = measure(replace(broken, images=images))
    for name in ("FID in domain features", RADIOMICS):
        whole, fault = group(bad[name], "sequence", "T1"), group(bad[name], "sequence", "T1c")
        assert excess(fault) > 5 and excess(fault) > 3 * excess(whole), (name, whole, fault)


def test_a_site_that_the_generator_does_not_reach_shows_in_its_own_group(measure: Measure) -> None:
    """The scanner of one site differs, in training as in held-out patients; the synthetic patients know only the other."""
    bad = measure(
        synthetic(cohort(60, seed=3)),
        train=cohort(120, seed=1, broken_site=True),  # type: ignore[call-arg]
        holdout=cohort(60, seed=2, broken_site=True),
    )
    for name in ("FID in domain features", RADIOMICS):
        assert excess(group(bad[name], "site", "south")) > 3, name
    reached, missed = (group(bad["FID in domain features"], "site", name) for name in NAMES.sites)
    assert missed.interval is not None and missed.interval[0] > 2 * value(missed.real)
    assert reached.interval is not None and reached.interval[0] < value(reached.real)
    reached, missed = (group(bad["Coverage"], "site", name) for name in NAMES.sites)
    assert value(missed.synthetic) < 0.5 * value(missed.real) and value(reached.synthetic) > 0.7 * value(reached.real)


def test_copies_of_training_patients_lie_nearer_than_unseen_patients(measure: Measure, train: Volumes) -> None:
    bad = measure(synthetic(train.take(np.arange(60))))
    assert bad[NEAREST].synthetic == pytest.approx(100) and value(bad[NEAREST].real) < 40
    assert bad["SSIM to the nearest training slice"].synthetic == pytest.approx(1, abs=1e-4)


def test_masks_without_a_tumour_show_in_the_radiomics_distance(measure: Measure, good: dict[str, Figure]) -> None:
    drawn = synthetic(cohort(60, seed=3))
    bad = measure(replace(drawn, masks=np.zeros_like(drawn.masks)))
    assert value(bad[RADIOMICS].synthetic) > 5 * value(good[RADIOMICS].synthetic)


def test_patients_who_taught_the_classifier_are_in_no_column(
    ensemble: Ensemble, train: Volumes, holdout: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsynth.evaluation import fidelity as module

    taken: list[NDArray[np.int64]] = []
    take = Volumes.take

    def noted(self: Volumes, rows: NDArray[np.integer]) -> Volumes:
        if self is train:
            taken.append(np.asarray(rows))
        return take(self, rows)

    monkeypatch.setattr(Volumes, "take", noted)
    ceiling, learning = module._halves(train, np.random.default_rng(0))
    assert len(ceiling) + len(learning) == len(train)
    assert not set(taken[0].tolist()) & set(taken[1].tolist())
