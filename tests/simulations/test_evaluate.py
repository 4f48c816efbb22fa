"""The evaluation of a release: honest columns, honest gaps, broken generators exposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.evaluation import fidelity_pixels, networks, radiogenomics, utility
from fedsynth.evaluation.evaluate import evaluate
from fedsynth.evaluation.patients import Patients
from fedsynth.evaluation.values import Evaluation, Figure
from fedsynth.metrics import domain_extractor
from fedsynth.metrics.domain_extractor import DomainExtractor, train_extractor
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.phantoms import phantom_slices
from fedsynth.morphology import FEATURES, denormalise, normalise
from fedsynth.morphometry import measure
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient
from fedsynth_client.cohort import Cohort, PatientEntry
from fedsynth_client.evaluation.patients import patients_of

NAMES = [feature.name for feature in FEATURES]
GENES = 40


def make_plan(size: int = 32, slices: int = 8) -> StudyPlan:
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
            "image": {"size": size, "slices": slices, "pixel_spacing_mm": 192 / size, "slice_spacing_mm": 112 / slices},
            "genes": {
                "panel": [f"G{i}" for i in range(GENES)],
                "reference_quantiles": [0.0, 1.0],
                "center": [0.0] * GENES,
                "scale": [1.0] * GENES,
            },
            "privacy": {"epsilon": 1.0},
            "autoencoder": training,
            "radiogenomics": training,
            "gan": training,
            "sites": [{"name": "a", "nominal_patients": 10}],
        }
    )


def make_cohort(n: int, plan: StudyPlan, seed: int) -> Patients:
    """Elliptic heads with a ball-shaped tumour; two latent factors drive genes, size and brightness of the tumour."""
    rng = np.random.default_rng(seed)
    depth, size = plan.image.slices, plan.image.size
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, m) for m in (depth, size, size)), indexing="ij")
    factors = rng.normal(size=(n, 2))
    loadings = np.random.default_rng(99).normal(size=(2, GENES))
    genes = np.clip(0.6 * factors @ loadings + 0.5 * rng.normal(size=(n, GENES)), -4, 4).astype(np.float32)
    images = np.zeros((n, 3, depth, size, size), dtype=np.float16)
    masks = np.zeros((n, depth, size, size), dtype=np.uint8)
    morphology = np.zeros((n, len(NAMES)))
    spacing = (plan.image.slice_spacing_mm, plan.image.pixel_spacing_mm, plan.image.pixel_spacing_mm)
    for i in range(n):
        half = rng.uniform(0.7, 0.9, size=3)
        head = np.square(z / half[0]) + np.square(y / half[1]) + np.square(x / half[2]) < 1
        centre = rng.uniform(-0.35, 0.35, size=3)
        radius = 0.33 * np.exp(0.25 * np.clip(factors[i, 0], -2, 2))
        tumour = head & (sum(np.square(a - c) for a, c in zip((z, y, x), centre, strict=True)) < radius**2)
        bright = 0.2 + 0.08 * np.clip(factors[i, 1], -2, 2)
        for channel, gain in enumerate((-0.5, 1.0, 1.5)):
            picture = head * rng.uniform(0.35, 0.5) + gain * bright * tumour + 0.03 * head * rng.normal(size=head.shape)
            images[i, channel] = np.clip(picture, 0, 1)
        masks[i] = tumour * 4
        morphology[i] = measure(images[i], masks[i], plan.image.sequences, spacing)
    return Patients(
        images,
        masks,
        genes,
        normalise(morphology, NAMES),
        (factors[:, 1] > 0).astype(np.int64),
        has_images=np.ones(n, dtype=bool),
        has_genes=np.ones(n, dtype=bool),
        sites=np.zeros(n, dtype=np.int64),
        site_names=("a",),
    )


def as_synthetic(cohort: Patients, plan: StudyPlan) -> list[SyntheticPatient]:
    """A perfect generator: the patients of another draw of the same cohort."""
    return [
        SyntheticPatient(
            f"SYN{i:04d}",
            plan.label.classes[cohort.labels[i]],
            cohort.genes[i],
            denormalise(cohort.morphology[i], NAMES),
            cohort.images[i].astype(np.float32),
            (cohort.masks[i] > 0).astype(np.uint8),
        )
        for i in range(len(cohort))
    ]


def least_squares(train: Patients) -> Callable[[NDArray[np.float32]], NDArray[np.floating]]:
    middle = train.morphology.mean(axis=0)
    weights, *_ = np.linalg.lstsq(train.genes, train.morphology - middle, rcond=None)
    return lambda genes: genes @ weights + middle


def flat(evaluation: Evaluation) -> dict[str, Figure]:
    return {figure.metric: figure for section in evaluation.sections for figure in section.figures}


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return make_plan()


@pytest.fixture(scope="module")
def train(plan: StudyPlan) -> Patients:
    return make_cohort(60, plan, seed=1)


@pytest.fixture(scope="module")
def holdout(plan: StudyPlan) -> Patients:
    return make_cohort(24, plan, seed=2)


@pytest.fixture(scope="module")
def extractor() -> DomainExtractor:
    images, targets = phantom_slices(300, 3, 32, np.random.default_rng(0))
    return train_extractor(images, targets, domain_extractor.torch.Generator().manual_seed(0), "phantoms", steps=40)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "CLASSIFIER_STEPS", 60)
    monkeypatch.setattr(utility, "UNET_STEPS", 60)
    monkeypatch.setattr(fidelity_pixels, "PAIRS", 60)
    monkeypatch.setattr(fidelity_pixels, "PAIRS_IN_CLASS", 10)
    monkeypatch.setattr(networks, "track", lambda items, description, total: items)


def test_a_perfect_generator_reaches_the_ceiling_and_beats_every_floor(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor
) -> None:
    synthetic = as_synthetic(make_cohort(60, plan, seed=3), plan)
    evaluation = evaluate(
        plan, train, holdout, synthetic, synthetic[:30], extractor, least_squares(train), "phantoms", 5
    )
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    assert [section.id for section in evaluation.sections] == [
        "fidelity",
        "detection",
        "utility",
        "radiogenomics",
        "genes",
    ]
    assert (evaluation.n_train, evaluation.n_holdout, evaluation.n_synthetic) == (60, 24, 60)

    figures = flat(evaluation)
    assert all(f.synthetic is not None and f.real is not None for f in figures.values())
    for name in (
        "FID in domain features",
        "Recall",
        "Coverage",
        "AUC, tumour-bearing slice",
        "Dice, tumour",
        "MAE of morphology, trained on the pairs (share of the public range)",
        "R² of morphology, trained on the pairs",
        "Agreement of the gene-by-feature association maps",
        "Image follows morphology: volume",
        "Agreement of co-expression (correlation)",
        "AUC, grade from genes",
    ):
        figure = figures[name]
        assert figure.synthetic is not None and figure.floor is not None, name
        gain = figure.synthetic - figure.floor
        assert (gain if figure.better == "higher" else -gain) > 0.02, (name, figure)
    assert figures["Recall"].floor == pytest.approx(0, abs=0.02)
    assert figures["SSIM between patients"].floor == pytest.approx(1, abs=1e-5)
    dice = figures["Dice, tumour"]
    assert dice.interval is not None and dice.synthetic is not None
    assert dice.interval[0] <= dice.synthetic <= dice.interval[1]
    assert dice.public_only is not None
    assert "Not comparable with published FID" in figures["FID in domain features"].note
    assert figures["FID in domain features"].extractor == extractor.name


def test_the_same_seed_gives_the_same_numbers(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility, "CLASSIFIER_STEPS", 8)
    monkeypatch.setattr(utility, "UNET_STEPS", 8)
    synthetic = as_synthetic(make_cohort(12, plan, seed=3), plan)
    first, second = (
        evaluate(plan, train, holdout, synthetic, None, extractor, least_squares(train), "phantoms", 5)
        for _ in range(2)
    )
    assert first == second
    assert all(figure.public_only is None for figure in flat(first).values())


def test_a_generator_of_one_picture_is_exposed(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor
) -> None:
    one = as_synthetic(make_cohort(1, plan, seed=3), plan)[0]
    synthetic = [
        replace(patient, images=one.images, mask=np.zeros_like(one.mask), genes=one.genes)
        for patient in as_synthetic(make_cohort(40, plan, seed=4), plan)
    ]
    figures = flat(evaluate(plan, train, holdout, synthetic, None, extractor, least_squares(train), "phantoms", 5))
    assert figures["Recall"].synthetic == pytest.approx(0, abs=0.02)
    assert figures["SSIM between patients"].synthetic == pytest.approx(1, abs=1e-5)
    assert figures["Share of patients whose mask shows a tumour"].synthetic == 0
    assert figures["AUC, tumour-bearing slice"].synthetic is None
    assert "all of one class" in figures["AUC, tumour-bearing slice"].note
    assert figures["AUC, tumour-bearing slice"].real is not None
    dice = figures["Dice, tumour"].synthetic
    assert dice is not None and dice < 0.1
    assert figures["Agreement of co-expression (correlation)"].synthetic is None
    assert figures["Agreement of the gene-by-feature association maps"].synthetic is None


def test_too_few_patients_and_missing_parts_give_gaps_with_reasons_not_numbers(
    plan: StudyPlan, train: Patients, extractor: DomainExtractor
) -> None:
    few = make_cohort(4, plan, seed=2)
    few = replace(few, labels=np.full(4, -1), morphology=np.full_like(few.morphology, np.nan))
    figures = flat(
        evaluate(
            plan,
            train,
            few,
            as_synthetic(make_cohort(10, plan, 3), plan),
            None,
            extractor,
            least_squares(train),
            "x",
            5,
        )
    )
    for name in (
        "Dice, tumour",
        "AUC, grade from genes",
        "MAPE of morphology, released DNN (%)",
        "FID in domain features",
    ):
        figure = figures[name]
        assert (figure.synthetic, figure.real, figure.interval) == (None, None, None), name
        assert "at least" in figure.note, name


def test_no_images_no_genes_and_no_synthetic_patients_are_gaps_too(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor
) -> None:
    nobody = np.zeros(len(holdout), dtype=bool)
    bare = replace(holdout, has_images=nobody, has_genes=nobody, genes=np.full_like(holdout.genes, np.nan))
    evaluation = evaluate(plan, train, bare, [], [], extractor, least_squares(train), "x", 5)
    for section in evaluation.sections:
        for figure in section.figures:
            assert figure.synthetic is None, figure
            assert "Not measured" in figure.note, figure


def test_broken_numbers_in_a_release_are_named_not_averaged(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor
) -> None:
    synthetic = [
        replace(p, images=np.full_like(p.images, np.nan), genes=np.full_like(p.genes, np.nan))
        for p in as_synthetic(make_cohort(20, plan, 3), plan)
    ]
    figures = flat(evaluate(plan, train, holdout, synthetic, None, extractor, least_squares(train), "x", 5))
    for name in ("FID in domain features", "Dice, tumour", "SSIM between patients", "AUC, grade from genes"):
        assert figures[name].synthetic is None and "not finite" in figures[name].note, name


def test_large_planes_are_averaged_down(train: Patients) -> None:
    from fedsynth.evaluation.samples import real_volumes, shrink

    checks = np.indices((128, 128)).sum(axis=0) % 2
    assert np.array_equal(shrink(checks[None].astype(bool)), np.full((1, 64, 64), 0.5))
    assert real_volumes(train).images.base is train.images or real_volumes(train).images is train.images


def test_an_extractor_of_other_channels_and_unknown_labels_are_refused(
    plan: StudyPlan, train: Patients, holdout: Patients, extractor: DomainExtractor
) -> None:
    synthetic = as_synthetic(make_cohort(9, plan, 3), plan)
    with pytest.raises(UsageError, match="extractor_channels"):
        evaluate(plan, train, holdout, synthetic, None, DomainExtractor(1, 1, "none"), least_squares(train), "x", 5)
    with pytest.raises(UsageError, match="synthetic_label_unknown"):
        evaluate(
            plan, train, holdout, [replace(synthetic[0], label="odd")], None, extractor, least_squares(train), "x", 5
        )


def test_patients_of_several_sites_keep_their_rows_and_sites_but_no_key() -> None:
    def cohort(n: int) -> Cohort:
        entries = tuple(PatientEntry(f"p{i:012x}", "train", True, i > 0) for i in range(n))
        images, masks = np.full((n, 1, 2, 4, 4), n / 10, dtype=np.float16), np.zeros((n, 2, 4, 4), dtype=np.uint8)
        genes, morphology = np.full((n, 3), n, dtype=np.float32), np.zeros((n, 2), dtype=np.float32)
        return Cohort(entries, images, masks, genes, morphology, np.arange(n))

    both = patients_of({"a": cohort(2), "b": cohort(3)})
    assert both.sites.tolist() == [0, 0, 1, 1, 1] and both.site_names == ("a", "b")
    assert both.genes[:, 0].tolist() == [2, 2, 3, 3, 3] and both.labels.tolist() == [0, 1, 0, 1, 2]
    assert both.has_images.all() and both.has_genes.tolist() == [False, True, False, True, True]
    assert both.rows(both.sites == 1).images.max() == np.float16(0.3)
    with pytest.raises(ValueError):
        patients_of({})


def test_of_many_held_out_patients_those_measured_again_are_of_all_sites(
    plan: StudyPlan, holdout: Patients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patients come site by site: the first so many would be of one."""
    monkeypatch.setattr(radiogenomics, "MAX_MEASURED", 6)
    measured = radiogenomics.remeasured(plan, [], holdout, None).real
    assert not isinstance(measured, NotMeasurable)
    rows = [int(np.flatnonzero((holdout.morphology == asked).all(axis=1))[0]) for asked in measured[0]]
    assert len(set(rows)) == 6
    assert sum(row < len(holdout) // 2 for row in rows) == 3
