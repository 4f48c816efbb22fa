"""Usefulness, radiogenomics and genes: what each figure must expose, with the fault planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit

from fedsynth.dp.randomness import SeededRandomness
from fedsynth.evaluation import networks, utility
from fedsynth.evaluation.calibration import calibration_figures
from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.gene_baselines import BINS, draw_marginals, draw_normal, measure_marginals
from fedsynth.evaluation.genes import genes
from fedsynth.evaluation.radiogenomics import radiogenomics
from fedsynth.evaluation.recovery import recover
from fedsynth.evaluation.samples import Profiles, Volumes
from fedsynth.evaluation.values import Figure, Group, Section
from fedsynth.metrics.domain_extractor import DomainExtractor, train_extractor
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.phantoms import phantom_slices
from fedsynth.plan import StudyPlan

GENES = 40
SITES = ("east", "west")
FEATURES = ["volume", "sphericity", "t1c_ratio"]


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    training = {
        "rounds": 1,
        "steps_per_round": 1,
        "expected_batch": 1,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
        "budget_share": 0.3,
    }
    return StudyPlan.model_validate(
        {
            "name": "phantoms",
            "purpose": "testing the evaluation",
            "image": {"size": 32, "slices": 6, "pixel_spacing_mm": 6.0, "slice_spacing_mm": 18.0},
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [0.0, 1.0],
                "center": [0.0] * GENES,
                "scale": [1.0] * GENES,
            },
            "morphology": {"features": FEATURES},
            "privacy": {"epsilon": 10.0},
            "autoencoder": training,
            "radiogenomics": training,
            "gan": training,
            "sites": [{"name": name, "nominal_patients": 10} for name in SITES],
        }
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def draw_profiles(n: int, seed: int, batch: float = 0.0) -> Profiles:
    """Two factors drive genes and morphology; the first also the label. West has another centre by `batch`."""
    rng = np.random.default_rng(seed)
    factors, sites = rng.normal(size=(n, 2)), np.arange(n) % 2
    loadings = np.random.default_rng(99).normal(size=(2, GENES))
    loadings[:, GENES // 2 :] = 0  # half of the genes have nothing to do with anything
    shift = np.random.default_rng(98).choice([-1.0, 1.0], size=GENES)
    values = 0.7 * factors @ loadings + 0.6 * rng.normal(size=(n, GENES)) + batch * np.outer(sites, shift)
    morphology = 0.5 + 0.12 * factors @ np.array([[1.0, 0.3, -0.6], [0.2, -0.8, 0.5]]) + 0.04 * rng.normal(size=(n, 3))
    return Profiles(
        np.clip(values, -4, 4).astype(np.float32),
        np.clip(morphology, 0, 1).astype(np.float32),
        (factors[:, 0] + 0.3 * rng.normal(size=n) > 0).astype(np.int64),
        sites,
    )


def as_synthetic(profiles: Profiles) -> Profiles:
    return replace(profiles, sites=np.full(len(profiles), -1))


def of_genes(plan: StudyPlan, synthetic: Profiles, batch: float = 0.0, seed: int = 5) -> Section:
    train, holdout = draw_profiles(240, 1, batch), draw_profiles(100, 2, batch)
    return genes(plan, Columns(as_synthetic(synthetic), train), holdout, np.random.default_rng(seed), [*SITES, "north"])


def find(section: Section, start: str) -> Figure:
    found = [figure for figure in section.figures if figure.metric.startswith(start)]
    assert found, (start, [figure.metric for figure in section.figures])
    return found[0]


def group(figure: Figure, name: str) -> Group:
    return next(one for one in figure.groups if one.name.startswith(name))


def value(figure: Figure | Group) -> float:
    assert figure.synthetic is not None, figure
    return figure.synthetic


def real(figure: Figure | Group) -> float:
    assert figure.real is not None, figure
    return figure.real


def test_a_perfect_gene_table_is_at_the_ceiling_by_site_too_with_intervals_that_hold_the_value(plan: StudyPlan) -> None:
    section = of_genes(plan, draw_profiles(120, 3))
    for figure in section.figures:
        assert figure.interval is not None and figure.interval[0] <= value(figure) <= figure.interval[1], figure
        assert abs(value(figure) - real(figure)) < (0.3 if figure.better == "none" else 0.12), figure
        names = [one.name for one in figure.groups if one.by == "baseline"]
        assert len(names) == 2 and "NOT private" in names[0] and "epsilon 10" in names[1]
    assert value(find(section, "True positive")) > 0.6
    assert value(find(section, "False positive")) < 0.3
    assert [one.name for one in find(section, "AUC, grade").groups if one.by == "site"] == list(SITES)
    (curve,) = section.curves
    assert {"synthetic", "real, the other half", "chosen at random"} <= {line.name for line in curve.lines}
    assert all(0 <= share <= 1 for line in curve.lines for _, share in line.points)


def test_the_same_seed_gives_the_same_section(plan: StudyPlan) -> None:
    synthetic = draw_profiles(60, 3)
    assert of_genes(plan, synthetic) == of_genes(plan, synthetic)
    assert of_genes(plan, synthetic) != of_genes(plan, synthetic, seed=6)


def test_shuffled_labels_are_exposed_by_use_and_by_differences_only(plan: StudyPlan) -> None:
    synthetic = draw_profiles(120, 3)
    shuffled = replace(synthetic, labels=np.random.default_rng(0).permutation(synthetic.labels))
    section = of_genes(plan, shuffled)
    assert value(find(section, "AUC, grade")) < 0.7 < 0.85 < real(find(section, "AUC, grade"))
    assert value(find(section, "True positive")) < 0.2 < 0.8 < real(find(section, "True positive"))
    assert abs(value(find(section, "Agreement of the differences"))) < 0.5
    pairs = find(section, "Agreement of co-expression")
    assert value(pairs) == pytest.approx(real(pairs), abs=0.1)  # the genes themselves are fine


def test_independent_genes_with_the_right_marginals_are_exposed_by_pairs_only(plan: StudyPlan) -> None:
    synthetic = draw_profiles(120, 3)
    independent = replace(synthetic, genes=np.random.default_rng(0).permuted(synthetic.genes, axis=0))
    section = of_genes(plan, independent)
    assert abs(value(find(section, "Agreement of co-expression"))) < 0.2 < 0.6 < real(find(section, "Agreement of co"))
    assert value(find(section, "AUC, synthetic told")) > 0.8 > real(find(section, "AUC, synthetic told"))
    distance = find(section, "Distance")
    assert value(distance) == pytest.approx(real(distance), abs=0.05)


def test_a_table_with_one_sites_batch_effect_is_near_that_site_and_far_from_the_other(plan: StudyPlan) -> None:
    everybody = draw_profiles(240, 3, batch=0.8)
    section = of_genes(plan, everybody.take(np.flatnonzero(everybody.sites == 0)), batch=0.8)
    east, west = (group(find(section, "Distance"), name) for name in SITES)
    assert value(east) < real(east) - 0.1
    assert value(west) > real(west) + 0.2


def test_a_lost_class_and_few_patients_are_gaps_with_reasons(plan: StudyPlan) -> None:
    synthetic = draw_profiles(60, 3)
    section = of_genes(plan, replace(synthetic, labels=np.zeros(60, dtype=np.int64)))
    rate = find(section, "True positive")
    assert rate.synthetic is None and "0 patients" in rate.note and rate.real is not None
    assert find(section, "Distance").synthetic is not None
    one_class = replace(draw_profiles(40, 1), labels=np.zeros(40, dtype=np.int64))
    with pytest.raises(NotMeasurable, match="two classes"):
        recover(Columns(synthetic), {}, one_class, np.random.default_rng(0))


# ---- the baselines ---------------------------------------------------------------------------------------------------


class NoNoise:
    """Randomness without noise, to see what is summed."""

    private = False
    description = "none"

    def uniform(self, count: int) -> torch.Tensor:
        raise AssertionError("nothing is sampled")

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        assert std > 0
        return torch.zeros(shape)


def test_a_patient_moves_the_private_sum_by_one_at_most_whatever_the_values(plan: StudyPlan) -> None:
    train = draw_profiles(30, 1)
    train.genes[3] = 1e6
    train.labels[4] = -1
    train.genes[5] = np.nan
    everyone = measure_marginals(plan, train, NoNoise()).counts
    for patient in range(8):
        without = measure_marginals(plan, train.take(np.delete(np.arange(30), patient)), NoNoise()).counts
        moved = np.linalg.norm(everyone - without) / np.sqrt(GENES)  # in the units to which noise is added
        assert moved == pytest.approx(0 if patient in (4, 5) else 1)
    assert everyone.sum() / GENES == pytest.approx(28)


def test_the_private_sum_holds_the_noise_that_its_epsilon_asks_for_from_every_site(plan: StudyPlan) -> None:
    train = draw_profiles(40, 1)
    exact = measure_marginals(plan, train, NoNoise())
    noisy = [measure_marginals(plan, train, SeededRandomness(seed)) for seed in range(40)]
    off = np.stack([one.counts - exact.counts for one in noisy])
    assert off.std() == pytest.approx(exact.noise_sd, rel=0.03)
    assert exact.epsilon <= plan.privacy.epsilon
    alone = measure_marginals(plan, replace(train, sites=np.zeros(40, dtype=np.int64)), NoNoise())
    assert exact.noise_sd == pytest.approx(alone.noise_sd * np.sqrt(2))
    strict = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": 1.0})})
    assert measure_marginals(strict, train, NoNoise()).noise_sd > 4 * exact.noise_sd


def test_private_marginals_keep_each_gene_by_class_and_drown_at_a_small_epsilon(plan: StudyPlan) -> None:
    train = draw_profiles(4000, 1)
    rng = np.random.default_rng(0)
    drawn = draw_marginals(measure_marginals(plan, train, SeededRandomness(0)), 4000, 4.0, train, rng)
    gap = [
        sample.genes[sample.labels == 1].mean(0) - sample.genes[sample.labels == 0].mean(0) for sample in (train, drawn)
    ]
    assert np.corrcoef(*gap)[0, 1] > 0.95
    assert drawn.labels.mean() == pytest.approx(train.labels.mean(), abs=0.05)
    assert np.abs(np.corrcoef(drawn.genes[drawn.labels == 0, :10].T) - np.eye(10)).max() < 0.2
    few = draw_profiles(20, 1)
    strict = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": 0.05})})
    drowned = draw_marginals(measure_marginals(strict, few, SeededRandomness(0)), 4000, 4.0, few, rng)
    # Where noise is all there is, the public distribution is left: a quarter of the patients in each quarter.
    quarters = np.histogram(drowned.genes, [-9, -0.6745, 0, 0.6745, 9])[0] / drowned.genes.size
    assert quarters == pytest.approx(np.full(BINS, 1 / BINS), abs=0.08)


def test_the_normal_baseline_has_the_means_covariance_and_classes_of_the_patients() -> None:
    train = draw_profiles(3000, 1)
    drawn = draw_normal(train, 3000, 4.0, np.random.default_rng(0))
    for code in (0, 1):
        first, second = (sample.genes[sample.labels == code] for sample in (train, drawn))
        assert np.abs(first.mean(0) - second.mean(0)).max() < 0.15
        assert np.corrcoef(np.corrcoef(first.T).ravel(), np.corrcoef(second.T).ravel())[0, 1] > 0.95
    assert np.abs(drawn.genes).max() <= 4
    with pytest.raises(NotMeasurable, match="labelled"):
        draw_normal(replace(train, labels=np.full(3000, -1)), 10, 4.0, np.random.default_rng(0))


# ---- radiogenomics ---------------------------------------------------------------------------------------------------


def of_pairs(
    plan: StudyPlan, synthetic: Profiles, predict: Callable[[NDArray[np.float32]], NDArray[np.floating]]
) -> Section:
    nothing = NotMeasurable("no images here")
    return radiogenomics(
        plan,
        Columns(as_synthetic(synthetic), draw_profiles(240, 1)),
        draw_profiles(100, 2),
        predict,
        Columns(nothing, nothing),
        np.random.default_rng(5),
        SITES,
    )


def middle(genes: NDArray[np.float32]) -> NDArray[np.floating]:
    return np.full((len(genes), len(FEATURES)), 0.5)


def test_true_pairs_carry_the_link_by_feature_and_site_and_shuffled_pairs_do_not(plan: StudyPlan) -> None:
    synthetic = draw_profiles(120, 3)
    section = of_pairs(plan, synthetic, middle)
    error, maps = find(section, "MAE of morphology, trained"), find(section, "Agreement of the gene")
    assert value(error) == pytest.approx(real(error), abs=0.01)
    assert value(maps) > 0.9
    for figure in (error, maps):
        assert figure.interval is not None and figure.interval[0] <= value(figure) <= figure.interval[1]
        assert [one.name for one in figure.groups if one.by == "feature"] == FEATURES
        assert [(one.name, one.n) for one in figure.groups if one.by == "site"] == [("east", 50), ("west", 50)]
    by_feature = [value(one) for one in error.groups if one.by == "feature"]
    assert value(error) == pytest.approx(np.mean(by_feature))

    rng = np.random.default_rng(0)
    broken = of_pairs(plan, replace(synthetic, morphology=rng.permutation(synthetic.morphology)), middle)
    assert abs(value(find(broken, "Agreement of the gene"))) < 0.6
    assert (
        value(find(broken, "R² of morphology, trained")) < 0.1 < 0.7 < real(find(broken, "R² of morphology, trained"))
    )
    worse = find(broken, "MAE of morphology, trained")
    assert worse.interval is not None and worse.interval[0] > real(worse)
    assert "differs from linear regression on the real pairs by +0.0" in worse.note


def test_a_network_that_answers_with_the_middle_is_at_the_floor_and_none_at_all_is_a_gap(plan: StudyPlan) -> None:
    lazy = find(of_pairs(plan, draw_profiles(60, 3), middle), "MAE of morphology, released DNN")
    assert lazy.synthetic == pytest.approx(lazy.floor)

    def none(genes: NDArray[np.float32]) -> NDArray[np.floating]:
        raise NotMeasurable("no weights")

    gap = find(of_pairs(plan, draw_profiles(60, 3), none), "MAE of morphology, released DNN")
    assert gap.synthetic is None and "no weights" in gap.note and gap.real is not None


# ---- images ----------------------------------------------------------------------------------------------------------


def draw_volumes(n: int, seed: int, two_scanners: bool = False) -> Volumes:
    """Heads with a ball-shaped tumour, brighter in class 1; with two scanners, that of `west` shows it in the first
    sequence, where that of `east` shows it in the last."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, m) for m in (6, 32, 32)), indexing="ij")
    labels, sites = rng.integers(2, size=n), np.arange(n) % 2
    images, masks = np.zeros((n, 3, 6, 32, 32), dtype=np.float16), np.zeros((n, 6, 32, 32), dtype=bool)
    for i in range(n):
        head = np.square(z / 1.1) + np.square(y / 0.85) + np.square(x / 0.8) < 1
        centre = rng.uniform(-0.35, 0.35, size=3)
        ball = sum(np.square(a - c) for a, c in zip((z, y, x), centre, strict=True))
        masks[i] = head & (ball < rng.uniform(0.3, 0.45) ** 2)
        gains = ((0.0, 0.0, 1.5), (1.5, 0.0, 0.0))[sites[i]] if two_scanners else (-0.5, 1.0, 1.2)
        for channel, gain in enumerate(gains):
            tumour = gain * (0.15 + 0.12 * labels[i]) * masks[i]
            images[i, channel] = np.clip(head * 0.45 + tumour + 0.03 * head * rng.normal(size=head.shape), 0, 1)
    return Volumes(images, masks, labels, sites)


@pytest.fixture(scope="module")
def extractor() -> DomainExtractor:
    images, targets = phantom_slices(300, 3, 32, np.random.default_rng(0))
    return train_extractor(images, targets, torch.Generator().manual_seed(0), "phantoms", steps=40)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "CLASSIFIER_STEPS", 50)
    monkeypatch.setattr(utility, "UNET_STEPS", 50)
    monkeypatch.setattr(networks, "track", lambda items, description, total: items)


def of_images(plan: StudyPlan, synthetic: Volumes, extractor: DomainExtractor, two_scanners: bool = False) -> Section:
    columns = Columns(
        replace(synthetic, sites=np.full(len(synthetic), -1)), draw_volumes(40, 1, two_scanners=two_scanners)
    )
    holdout = draw_volumes(32, 2, two_scanners=two_scanners)
    return utility.utility(plan, columns, holdout, extractor, np.random.default_rng(5), SITES)


def test_a_perfect_generator_serves_all_three_ways_and_every_figure_has_its_ceiling_and_interval(
    plan: StudyPlan, extractor: DomainExtractor
) -> None:
    section = of_images(plan, draw_volumes(40, 3), extractor)
    for task in ("AUC, tumour-bearing slice", "Dice, tumour", "AUC, grade from images"):
        for way in ("", ", trained on real and synthetic together", ", trained on real and tested on synthetic"):
            figure = next(one for one in section.figures if one.metric == task + way)
            if value(figure) < 1:  # an area of 1 stays 1 whoever is drawn, and claims no certainty
                assert figure.interval is not None and figure.interval[0] <= value(figure) <= figure.interval[1]
            assert value(figure) > real(figure) - 0.15, figure
            assert figure.floor is not None and value(figure) > figure.floor, figure
    assert [(one.by, one.name) for one in find(section, "Dice, tumour").groups] == [
        ("class", "low"),
        ("class", "high"),
        ("site", "east"),
        ("site", "west"),
    ]
    assert sum(one.n for one in find(section, "Dice, tumour").groups if one.by == "site") == 32
    assert value(find(section, "Brier")) < 0.2
    error = find(section, "Calibration error")
    assert error.floor is not None and error.interval is not None and error.interval[0] >= 0
    roc, reliability = section.curves
    names = ["trained on synthetic", "trained on real", "trained on real and synthetic", "position alone"]
    assert [line.name for line in roc.lines] == names
    assert [line.name for line in reliability.lines] == [*names, "calibrated"]


def test_outlines_beside_the_tumour_and_wrong_labels_fail_both_ways(
    plan: StudyPlan, extractor: DomainExtractor
) -> None:
    synthetic = draw_volumes(40, 3)
    broken = replace(synthetic, masks=np.roll(synthetic.masks, 8, axis=3), labels=1 - synthetic.labels)
    section = of_images(plan, broken, extractor)
    for task in ("Dice, tumour", "AUC, grade from images"):
        for way in ("", ", trained on real and tested on synthetic"):
            figure = next(one for one in section.figures if one.metric == task + way)
            assert value(figure) < 0.4 < 0.5 < real(figure), figure
    together = next(
        one for one in section.figures if one.metric.startswith("Dice, tumour, trained on real and synthetic")
    )
    assert value(together) < real(together)


def test_images_of_one_scanner_only_fail_at_the_other_site(plan: StudyPlan, extractor: DomainExtractor) -> None:
    everybody = draw_volumes(80, 3, two_scanners=True)
    section = of_images(plan, everybody.take(np.flatnonzero(everybody.sites == 0)), extractor, two_scanners=True)
    east, west = (group(find(section, "Dice, tumour"), name) for name in SITES)
    assert value(east) > value(west) + 0.25
    assert value(west) < real(west) - 0.2


def test_an_overconfident_classifier_is_exposed_by_its_calibration() -> None:
    rng = np.random.default_rng(0)
    honest = expit(rng.normal(scale=1.5, size=(40, 16)))
    positive = rng.random((40, 16)) < honest
    overconfident = expit(5 * logit(honest))
    columns = Columns(overconfident, honest, np.full((40, 16), positive.mean()))
    error, brier = calibration_figures("slice", columns, positive, rng)
    assert value(error) > real(error) + 0.1 and error.interval is not None and error.interval[0] > real(error)
    assert value(brier) > real(brier)
    assert "Exactly right probabilities would show" in error.note


def test_nobody_to_test_on_is_a_gap_in_every_figure_and_no_curve(plan: StudyPlan, extractor: DomainExtractor) -> None:
    few = draw_volumes(4, 2)
    section = utility.utility(
        plan,
        Columns(draw_volumes(6, 3), draw_volumes(10, 1)),
        replace(few, labels=np.full(4, -1)),
        extractor,
        np.random.default_rng(5),
        SITES,
    )
    for figure in section.figures:
        assert figure.synthetic is None and figure.interval is None and "at least" in figure.note, figure
    assert section.curves == []
