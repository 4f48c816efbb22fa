"""The experiments on expression profiles: fair splits, linear baselines by hand, errors in physical units."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsynth.budget import planned_epsilon
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.morphology import normalise
from fedsynth.plan import StudyPlan
from fedsynth.records import State
from fedsynth_client.training.block import BlockResult
from fedsynth_simulations.experiments import autoencoder, radiogenomics
from fedsynth_simulations.experiments.profiles import network_plan, read_profiles, run_rounds, zscore_panel
from fedsynth_simulations.experiments.radiogenomic_data import RadiogenomicData
from fedsynth_simulations.experiments.run import Experiment, Kept
from fedsynth_simulations.experiments.spec import find, load_spec
from fedsynth_simulations.experiments.values import Row, Table
from fedsynth_simulations.plans import simulated_genes

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEDSYNTH_REAL_DATA", ROOT.parent / "shared" / "data"))
NAMES = ["volume", "enhancing_fraction", "sphericity"]


def hospitals(rng: np.random.Generator, patients: int = 200) -> NDArray[np.str_]:
    return np.array([f"H{number:02d}" for number in rng.geometric(0.15, size=patients)])


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_held_out_hospitals_and_groups_share_no_hospital(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = hospitals(rng)
    out = autoencoder.held_out_hospitals(codes, 0.2, rng)
    rest = codes[~np.isin(codes, list(out))]
    groups = autoencoder.groups_of_hospitals(rest, 3)
    assert 0.1 < np.isin(codes, list(out)).mean() <= 0.2
    parts = [*groups, out]
    assert set().union(*parts) == set(codes)
    assert sum(map(len, parts)) == len(set(codes))
    sizes = [int(np.isin(rest, list(group)).sum()) for group in groups]
    assert max(sizes) - min(sizes) <= np.unique(rest, return_counts=True)[1].max()


def test_every_patient_is_held_out_once() -> None:
    folds = radiogenomics.fold_of_patients(58, 10, seed=1)
    assert sorted(np.bincount(folds)) == [5] * 2 + [6] * 8
    assert (folds == radiogenomics.fold_of_patients(58, 10, seed=1)).all()
    assert (folds != radiogenomics.fold_of_patients(58, 10, seed=2)).any()


def test_a_panel_is_chosen_by_name_alone() -> None:
    names = [f"G{number:03d}" for number in range(100)]
    panel = zscore_panel(list(reversed(names)), 25)
    assert panel.panel == zscore_panel(names, 25).panel
    assert len(panel.panel) == 25
    assert {panel.panel[0], panel.panel[-1]} == {"G000", "G099"}


# --- plans and rounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [3.0, 10.0])
def test_one_network_spends_the_whole_budget(epsilon: float) -> None:
    genes = zscore_panel(["A", "B", "C"], 3)
    for network in ("autoencoder", "radiogenomics"):
        plan = network_plan(network, {}, {"a": 60, "b": 90}, genes, epsilon)  # type: ignore[arg-type]
        assert plan.modules == (network,)
        for site in ("a", "b"):
            assert planned_epsilon(plan, site) == pytest.approx(epsilon, rel=1e-2)
            assert planned_epsilon(plan, site) <= epsilon * (1 + 1e-6)


def test_rounds_average_by_declared_size_and_count_their_steps() -> None:
    keys = {"autoencoder": {"rounds": 3, "steps_per_round": 7, "expected_batch": 10}}
    plan = network_plan("autoencoder", keys, {"a": 30, "b": 90}, zscore_panel(["A", "B", "C"], 3), 5.0)
    seen: list[tuple[str, int, float]] = []

    def block(state: State, site: str, first: int, mechanism: Mechanism, _: Randomness) -> BlockResult:
        seen.append((site, first, mechanism.sample_rate))
        assert mechanism.steps == 7
        assert mechanism.noise_multiplier > 0
        return BlockResult({"w": state["w"] + (4.0 if site == "a" else 0.0)}, {}, {})

    passed: list[float] = []
    last = run_rounds(
        plan, "autoencoder", {"w": torch.zeros(1)}, block, 1, lambda number, state: passed.append(float(state["w"]))
    )
    assert passed == [1.0, 2.0, 3.0]
    assert float(last["w"]) == 3.0
    assert seen[:3] == [("a", 0, pytest.approx(1 / 3)), ("b", 0, pytest.approx(1 / 9)), ("a", 7, pytest.approx(1 / 3))]


# --- the autoencoder's measures --------------------------------------------------------------------------------------


def test_pca_gives_back_what_lies_in_as_many_directions() -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(2, 9))
    train, test = (rng.normal(size=(n, 2)) @ basis + 3.0 for n in (30, 8))
    np.testing.assert_allclose(autoencoder.pca(train, test, 2), test, atol=1e-8)
    one = autoencoder.pca(train, test, 1)
    assert not np.allclose(one, test, atol=0.1)
    np.testing.assert_allclose(autoencoder.pca(train, one, 1), one, atol=1e-8)


def test_r2_is_zero_of_the_training_mean_and_one_of_the_profiles() -> None:
    rng = np.random.default_rng(0)
    test, mean = rng.normal(size=(20, 5)), np.full(5, 0.3)
    of_mean = autoencoder._errors(np.tile(mean, (20, 1)), test, mean)
    assert of_mean.r2 == pytest.approx(0.0)
    assert of_mean.r2_of_genes() == pytest.approx([0.0] * 5)
    assert autoencoder._errors(test, test, mean).r2 == 1.0
    half = autoencoder._errors((test + mean) / 2, test, mean)
    assert half.r2 == pytest.approx(0.75)
    assert half.mse == pytest.approx(((test - mean) ** 2).mean() / 4)


# --- errors of morphology --------------------------------------------------------------------------------------------


def test_errors_are_in_physical_units_and_values_near_zero_are_left_out_of_mape_alone() -> None:
    true = np.array([[20.0, 0.0, 0.8], [10.0, 0.5, 0.4]])
    said = np.array([[30.0, 0.2, 0.6], [10.0, 0.25, 0.4]])
    unit = normalise(true, NAMES)
    found = radiogenomics.score(normalise(said, NAMES), unit, unit, NAMES, np.array([0, 1]))
    np.testing.assert_allclose(found.absolute, np.abs(true - said), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.relative, [[50.0, np.nan, 25.0], [0.0, 50.0, 0.0]], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.mape_of_folds(), [37.5, 50 / 3], rtol=1e-4)


def test_a_feature_that_was_not_measured_counts_nowhere() -> None:
    unit = normalise(np.array([[20.0, np.nan, 0.8], [10.0, 0.5, np.nan], [15.0, 0.5, 0.6]]), NAMES)
    found = radiogenomics.score(np.full((3, 3), 0.5), np.full((3, 3), 0.4), unit, NAMES, np.array([0, 1, 1]))
    assert (np.isnan(found.absolute) == np.isnan(unit)).all()
    assert (np.isnan(found.relative) == np.isnan(unit)).all()
    assert np.isfinite(found.r2()).all()


def test_no_constant_has_a_lower_mape_than_the_weighted_median() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.uniform(size=31), rng.exponential(size=31)

    def cost(constant: float) -> float:
        return float((weights * np.abs(values - constant)).sum())

    best = radiogenomics.weighted_median(values, weights)
    assert best in values
    assert cost(best) <= min(map(cost, np.linspace(0, 1, 400))) + 1e-12


def test_an_interval_of_paired_differences_is_students() -> None:
    middle, (low, high) = radiogenomics.paired_interval(np.array([3.0, 5.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert middle == pytest.approx(3.0)
    half = 4.302653 / math.sqrt(3)  # t of two degrees of freedom times the standard error
    assert (low, high) == pytest.approx((3.0 - half, 3.0 + half), rel=1e-5)


def linear_data(patients: int = 120) -> RadiogenomicData:
    """Morphology that is a linear function of ten genes, a little noise, and further people of the same kind."""
    rng = np.random.default_rng(5)
    panel = zscore_panel([f"G{number}" for number in range(10)], 10)
    genes = rng.normal(size=(patients, 10)).astype(np.float32)
    link = rng.normal(size=(10, 3)) * 0.03
    morphology = (0.5 + genes @ link + 0.01 * rng.normal(size=(patients, 3))).astype(np.float32)
    others = rng.normal(size=(50, 10)).astype(np.float32)
    labels = np.zeros(patients, dtype=np.int64)
    return RadiogenomicData(panel, tuple(NAMES), genes, morphology, labels, others, "made", "made")


def test_linear_methods_find_a_linear_link_and_predict_nobody_they_were_fitted_to() -> None:
    data = linear_data()
    folds = radiogenomics.fold_of_patients(len(data.genes), 5, 1)
    found = radiogenomics.linear_predictions(data, folds)
    means = found[radiogenomics.MEAN]
    r2 = {
        name: radiogenomics.score(values, means, data.morphology, NAMES, folds).r2().min()
        for name, values in found.items()
    }
    assert r2[radiogenomics.OLS] > 0.9
    assert r2[radiogenomics.RIDGE] > 0.9
    assert r2[radiogenomics.MEAN] == pytest.approx(0.0)
    assert r2[radiogenomics.CONSTANT] < 0.0
    # A patient's own morphology does not move its prediction.
    changed = data.morphology.copy()
    changed[0] = 0.9
    others = radiogenomics.linear_predictions(RadiogenomicData(**{**vars(data), "morphology": changed}), folds)
    for name, values in found.items():
        np.testing.assert_array_equal(others[name][folds == folds[0]], values[folds == folds[0]])


def test_the_network_learns_the_same_link_and_its_curve_falls() -> None:
    data = linear_data()
    keys = {
        "morphology": {"features": NAMES},
        "radiogenomics": {
            "hidden": [16],
            "dropout": 0.0,
            "start_from_encoder": False,
            "rounds": 4,
            "steps_per_round": 40,
            "expected_batch": 30,
            "optimizer": "sgd",
            "momentum": 0.9,
            "schedule": "step",
            "learning_rate": 0.03,
        },
    }
    plan: StudyPlan = network_plan("radiogenomics", keys, {"pooled": 96}, data.panel, math.inf)
    held = np.arange(120) < 24
    state, curve = radiogenomics._fold(plan, data, held, None, 1)
    found = radiogenomics._predict(plan, state, data.genes[held])
    real = data.morphology[held]
    assert 1 - ((found - real) ** 2).sum() / ((real - data.morphology[~held].mean(axis=0)) ** 2).sum() > 0.7
    assert len(curve["train"]) == 5
    assert curve["validation"][-1] < 0.5 * curve["validation"][0]


def test_another_encoder_trains_its_columns_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, trained = linear_data(), []
    data = RadiogenomicData(**{**vars(data), "panel": simulated_genes()})
    folds = radiogenomics.fold_of_patients(len(data.genes), 5, 1)

    def train(*_: object) -> Kept:
        trained.append(1)
        return Kept({"predicted": torch.zeros(1)})

    monkeypatch.setattr(radiogenomics, "_train", train)

    def run(rounds: int, profiles: NDArray[np.float32]) -> int:
        spec = load_spec(find("radiogenomic-dnn-simulated"))
        plan = {**spec.plan, "autoencoder": {**spec.plan["autoencoder"], "rounds": rounds}}
        experiment = Experiment(spec.model_copy(update={"plan": plan}), None, tmp_path, False)
        others = RadiogenomicData(**{**vars(data), "encoder_profiles": profiles})
        column = experiment.spec.columns[1]
        of_column = radiogenomics._plan(experiment, column, others, folds)
        radiogenomics._kept(experiment, column, of_column, others, folds)
        return len(trained)

    assert run(10, data.encoder_profiles) == 1
    assert run(10, data.encoder_profiles) == 1
    assert run(20, data.encoder_profiles) == 2
    assert run(20, data.encoder_profiles + 1) == 3


# --- the shipped specifications --------------------------------------------------------------------------------------


def rows(table: Table) -> dict[str, Row]:
    return {row.what: row for row in table.rows}


def test_a_quick_autoencoder_measures_every_column_beside_pca(tmp_path: Path) -> None:
    spec = load_spec(find("gene-autoencoder")).quickened()
    few = [column for column in spec.columns if column.slug in ("tanh", "tanh-epsilon-10")]
    findings = autoencoder.run(Experiment(spec.model_copy(update={"columns": few}), None, tmp_path, True))
    table = findings.tables[0]
    assert table.columns == ["tanh", "tanh, epsilon 10", "PCA, 16 directions, not private"]
    assert all(
        cell.value is not None and math.isfinite(cell.value) for row in table.rows for cell in row.cells.values()
    )
    assert any("epsilon 10.0" in note and "noise multiplier" in note for note in findings.notes)
    assert {line.name for curves in findings.curves for line in curves.lines} >= {"tanh, train", "tanh, test"}


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason="the research data are not beside the checkout")
def test_profiles_of_real_hospitals_are_on_the_plans_scale() -> None:
    found = read_profiles(DATA / "tcga_glioma_expression", 1300)
    assert found.values.shape == (484, 1300)
    assert len(np.unique(found.hospitals)) == 33
    assert np.abs(found.values).max() <= 3.0
    assert np.abs(found.values.mean(axis=1)).max() < 0.01
