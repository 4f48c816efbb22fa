"""Experiments of images on simulated patients: from a specification to tables and pictures, and on when interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fedsynth.dp.accounting import epsilon
from fedsynth.errors import UsageError
from fedsynth_simulations.cohort.public import PublicCohort, public_cohort
from fedsynth_simulations.experiments import data as data_module
from fedsynth_simulations.experiments import training
from fedsynth_simulations.experiments.bench import with_interval
from fedsynth_simulations.experiments.drawing import draw, draw_from_run, even_labels
from fedsynth_simulations.experiments.images import Minority, with_rare_class
from fedsynth_simulations.experiments.measures.sequences import correlation, edges
from fedsynth_simulations.experiments.run import Experiment, load_result, run_experiment
from fedsynth_simulations.experiments.spec import Column, load_spec
from fedsynth_simulations.experiments.training import column_plan, plan_from, plan_text, trained_in
from fedsynth_simulations.experiments.values import Result

SPEC = """
title = "Two columns"
system = "DCGAN"
paper = "None"
runner = "images"
data = "simulated"
seed = 3
sites = 3
[plan.gan]
rounds = 2
steps_per_round = 2
expected_batch = 3
generator_batch = 4
generator_width = 8
discriminator_width = 4
[[columns]]
name = "open"
[[columns]]
name = "closed"
epsilon = 10.0
[options]
measures = ["discriminator", "frechet", "ssim", "losses", "downstream", "scores", "segmentation"]
drawn = 40
snapshots = 2
classifier_steps = 4
unet_steps = 2
shown = 8
[published.fid]
value = "12.3"
why = "other images"
"""


@pytest.fixture(scope="module", autouse=True)
def few_patients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "_SIMULATED", {"site-a": 5, "site-b": 5, "site-c": 5, "test": 6})
        # The same few patients every time: they take seconds to draw.
        drawn: dict[int, PublicCohort] = {}

        def kept(plan, n, *more):
            if n not in drawn:
                drawn[n] = public_cohort(plan, n, *more)
            return drawn[n]

        patch.setattr(data_module, "public_cohort", kept)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Result, list[float]]:
    """A run that was interrupted in its second column, and the same command again."""
    folder = tmp_path_factory.mktemp("experiment")
    spec, out = folder / "two.toml", folder / "out"
    spec.write_text(SPEC, encoding="utf-8")
    trained: list[float] = []
    real = training.train_rounds

    def interrupted(plan, *arguments, **more):
        if trained:
            raise KeyboardInterrupt
        trained.append(plan.privacy.epsilon)
        return real(plan, *arguments, **more)

    def counted(plan, *arguments, **more):
        trained.append(plan.privacy.epsilon)
        return real(plan, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_rounds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(spec, None, out, quick=False)
        assert not (out / "result.json").exists()
        patch.setattr(training, "train_rounds", counted)
        result = run_experiment(spec, None, out, quick=False)
    return out, result, trained


def test_a_run_goes_on_where_it_was_interrupted(run):
    _, _, trained = run
    assert trained == [math.inf, 10.0]


def test_a_run_ends_in_tables_and_pictures(run):
    out, result, _ = run
    assert load_result(out) == result
    main = result.tables[0]
    assert main.columns == ["open", "closed", "real"]
    fid = next(row for row in main.rows if row.what.startswith("Fréchet"))
    assert fid.paper == "12.3"
    assert not fid.comparable
    assert "other images" in fid.note
    assert set(fid.cells) == {"open", "closed", "real"}
    assert fid.cells["real"].value < fid.cells["closed"].value
    for picture in result.pictures:
        with Image.open(out / picture.file) as image:
            assert image.size[0] > 30
    text = (out / "table.md").read_text(encoding="utf-8")
    assert all(f"({picture.file})" in text for picture in result.pictures)
    json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_columns_of_infinite_epsilon_are_marked_and_those_of_a_finite_one_spend_no_more(run):
    out, result, _ = run
    assert result.not_private == ["open"]
    assert "open (not private)" in (out / "table.md").read_text(encoding="utf-8")
    spent = next(row for row in result.tables[0].rows if row.what.startswith("Epsilon"))
    assert spent.cells["open"].value is None
    assert 9 < spent.cells["closed"].value <= 10


def test_a_private_columns_noise_is_what_the_whole_budget_buys(run):
    out, _, _ = run
    plan = trained_in(out, "closed").plan
    assert plan.modules == ("gan",)
    history = [training.mechanism(plan, name, "gan", steps=plan.gan.steps) for name in ("site-a", "site-b", "site-c")]
    assert all(9.9 < epsilon([mechanism], plan.privacy.delta) <= 10 for mechanism in history)
    assert training.mechanism(trained_in(out, "open").plan, "site-a", "gan").noise_multiplier == 0


def test_a_saved_generator_draws_on_demand(run, tmp_path):
    out, _, _ = run
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    draw_from_run(out, "closed", "", 5, 7, first)
    draw_from_run(out, "closed", "", 5, 7, again)
    draw_from_run(out, "closed", "high", 5, 8, other)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    with pytest.raises(UsageError, match="open"):
        draw_from_run(out, "absent", "", 5, 7, first)
    with pytest.raises(UsageError, match="low"):
        draw_from_run(out, "open", "absent", 5, 7, first)


def test_generators_are_kept_without_pickles(run):
    out, _, _ = run
    files = [path for path in out.glob("parts/*/*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    arrays = load_file(out / "parts" / "closed" / "arrays.safetensors")
    assert {name.split("/")[0] for name in arrays} >= {"generator", "round-1", "round-2", "site-site-a"}


def test_other_settings_are_trained_anew(run, monkeypatch):
    out, _, _ = run
    spec = out.parent / "two.toml"
    calls = []
    real = training.train_rounds
    monkeypatch.setattr(training, "train_rounds", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    changed = out.parent / "changed.toml"
    changed.write_text(SPEC.replace("generator_batch = 4", "generator_batch = 3"), encoding="utf-8")
    experiment = Experiment(load_spec(changed), None, out, False)
    data = data_module.load_images(experiment, {})
    training.train_column(experiment, experiment.spec.columns[1], data, 2)
    assert calls == [1]
    experiment = Experiment(load_spec(spec), None, out, False)
    training.train_column(experiment, experiment.spec.columns[0], data, 2)
    assert calls == [1]


def test_what_a_search_found_is_what_the_settings_say(tmp_path):
    text = SPEC.replace("rounds = 2\n", "rounds = 1\n").split("[[columns]]")
    options = """
[[columns]]
name = "open"
[options]
measures = ["losses"]
drawn = 8
shown = 8
[options.search]
rounds = 1
drawn = 8
scale = 1
grid = { generator_batch = [2] }
"""
    path = tmp_path / "searched.toml"
    path.write_text(text[0] + options, encoding="utf-8")
    result = run_experiment(path, None, tmp_path / "out", quick=False)
    assert trained_in(tmp_path / "out", "open").plan.gan.generator_batch == 2
    assert result.settings["gan.generator_batch"] == "2"


def test_a_plan_comes_back_from_its_text(run):
    out, _, _ = run
    for column in ("open", "closed"):
        plan = trained_in(out, column).plan
        again = plan_from(plan_text(plan))
        assert again.gan == plan.gan
        assert again.privacy == plan.privacy
        assert again.sites == plan.sites


def test_keys_that_do_not_fit_are_named(run):
    out, _, _ = run
    experiment = Experiment(load_spec(out.parent / "two.toml"), None, out, False)
    data = data_module.load_images(experiment, {})
    wrong = Column(name="wrong", epsilon=5.0, plan={"gan": {"discriminator_norm": "batch"}})
    with pytest.raises(UsageError, match=r"'wrong' is no plan.*batch"):
        column_plan(experiment, wrong, data)


def test_a_rare_class_is_rare_at_every_site_and_untouched_in_the_test_set(run):
    out, _, _ = run
    experiment = Experiment(load_spec(out.parent / "two.toml"), None, out, False)
    data = data_module.load_images(experiment, {})
    thinned = with_rare_class(data, Minority(name="low", share=0.25))
    for name, site in data.sites.items():
        low = int((site.labels == 0).sum())
        assert int((thinned.sites[name].labels == 0).sum()) == min(low, max(round(0.25 * low), 1))
        assert int((thinned.sites[name].labels == 1).sum()) == int((site.labels == 1).sum())
    assert len(thinned.test) == len(data.test)
    assert "25%" in thinned.description


def test_slices_of_one_seed_are_equal_and_keep_their_classes(run):
    out, _, _ = run
    trained = trained_in(out, "open")
    labels = even_labels(trained.plan, 6)
    first, again = (draw(trained.plan, trained.generator, labels, 4) for _ in range(2))
    assert np.array_equal(first.channels, again.channels)
    assert first.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert first.images.shape == (6, 1, 32, 32)
    assert first.masks.dtype == bool


def test_edges_of_one_head_correlate_and_those_of_two_do_not():
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(20, 32, 32, generator=generator).numpy()
    inverted = 1 - 0.5 * planes
    assert np.allclose(correlation(edges(planes), edges(inverted)), 1)
    assert np.abs(correlation(edges(planes), edges(np.roll(planes, 1, axis=0)))).mean() < 0.3
    assert np.isnan(correlation(edges(planes), edges(np.ones_like(planes)))).all()


def test_intervals_draw_whole_patients():
    values = np.repeat([0.0, 1.0], 50)
    by_patient = with_interval(lambda rows: float(values[rows].mean()), np.repeat([0, 1], 50), np.random.default_rng(0))
    by_slice = with_interval(lambda rows: float(values[rows].mean()), np.arange(100), np.random.default_rng(0))
    assert by_patient.interval == (0.0, 1.0)
    assert by_slice.interval is not None
    assert 0.3 < by_slice.interval[0] < by_slice.interval[1] < 0.7


DETECTION = """
title = "Detection"
system = "Detectors"
paper = "None"
runner = "detection"
data = "simulated"
seed = 3
[[columns]]
name = "first"
options.run = "out"
options.column = "open"
[[columns]]
name = "second"
epsilon = {epsilon}
options.run = "{run}"
options.column = "closed"
[options]
drawn = 32
"""


def test_detectors_are_asked_about_the_generators_of_another_run(run, monkeypatch):
    out, _, _ = run
    monkeypatch.setattr("fedsynth.evaluation.detection.STEPS", 3)
    spec = out.parent / "detection.toml"
    spec.write_text(DETECTION.format(epsilon=10.0, run="out"), encoding="utf-8")
    result = run_experiment(spec, None, out.parent / "detection", quick=False)
    own, across = result.tables
    assert own.columns == ["first", "second", "real"]
    for row in own.rows:
        assert all(cell.value is None or 0 <= cell.value <= 1 for cell in row.cells.values())
    # Untrained generators draw noise, which the frequencies give away at once.
    assert own.rows[1].cells["second"].value > 0.9
    assert [row.what for row in across.rows] == ["Network trained on: first", "Network trained on: second"]
    assert result.not_private == ["first"]


@pytest.mark.parametrize(("epsilon", "named", "code"), [(5.0, "out", "invalid"), (10.0, "absent", "result_missing")])
def test_a_detection_of_what_is_not_there_or_not_so_private_is_refused(run, epsilon, named, code):
    out, _, _ = run
    spec = out.parent / "wrong.toml"
    spec.write_text(DETECTION.format(epsilon=epsilon, run=named), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        run_experiment(spec, None, out.parent / "wrong", quick=False)
    assert code in caught.value.code
