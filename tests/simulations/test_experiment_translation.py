"""Experiments of translation: what they are held against, what they may show, and who is in whose domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fedsynth.errors import UsageError
from fedsynth.plan import ImagePlan, LabelPlan
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.experiments import translating, translation
from fedsynth_simulations.experiments.data import ImageData
from fedsynth_simulations.experiments.run import Experiment, run_experiment
from fedsynth_simulations.experiments.spec import load_spec
from fedsynth_simulations.experiments.values import Result, Table

SPEC = """
title = "Translation"
system = "CycleGAN"
paper = "Zhu et al. 2017"
runner = "translation"
data = "DATA"
seed = 3
sites = 1
[plan.image]
size = 32
[plan.translation]
rounds = 2
steps_per_round = 2
width = 2
source = "T1"
target = "T1c"
[[columns]]
name = "pairs, not private"
[[columns]]
name = "pairs, epsilon 10"
epsilon = 10.0
sites = 3
[[columns]]
name = "tumour, not private"
plan.translation.domains = "tumour"
plan.translation.source = ""
plan.translation.target = ""
options.translate = "tumour"
[[columns]]
name = "sites, not private"
options.translate = "sites"
options.sequence = "T1c"
options.target_site = 2
[options]
shown = 4
classifier_steps = 3
"""


def people(count: int, seed: int) -> Patients:
    """Textured slices, whose T1c is a function of their T1 alone; every other slice has a tumour."""
    rng = np.random.default_rng(seed)
    t1 = np.clip(0.5 + 2 * gaussian_filter(rng.normal(size=(count, 4, 32, 32)), (0, 0, 2, 2)), 0.2, 0.9)
    masks = np.zeros((count, 4, 32, 32), dtype=np.uint8)
    masks[:, ::2, 8:16, 8:16] = 1
    nothing = np.zeros((count, 0), dtype=np.float32)
    return Patients(
        np.stack([t1, t1**2], axis=1).astype(np.float16), masks, nothing, nothing, np.zeros(count, dtype=np.int64)
    )


DATA = ImageData(
    {f"site-{i}": people(8, i) for i in range(3)},
    people(6, 9),
    ImagePlan(sequences=["T1", "T1c"], size=32, slices=4),
    LabelPlan(),
    "patient",
    "Textures.",
)


def run(folder: Path, kind: str) -> Result:
    spec = folder / f"{kind}.toml"
    spec.write_text(SPEC.replace("DATA", kind), encoding="utf-8")
    return run_experiment(spec, folder, folder / kind, quick=False)


@pytest.fixture(scope="module", autouse=True)
def textures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "load_images", lambda experiment, image: DATA)
        patch.setattr(translation, "simulated_images", lambda image, seed, scale: DATA)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("translation")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return run(folder, "simulated")


def values(table: Table, start: str) -> dict[str, float | None]:
    (row,) = [row for row in table.rows if row.what.startswith(start)]
    return {name: cell.value for name, cell in row.cells.items()}


def test_each_pair_of_domains_has_a_table_with_what_needs_no_network(result: Result) -> None:
    pairs, tumour, sites = result.tables
    assert pairs.columns == ["pairs, not private", "pairs, epsilon 10", translation.COPY, translation.MATCHED]
    assert tumour.columns == ["tumour, not private", translation.UNTOUCHED]
    assert sites.title == "site site-0 to site site-2"
    assert result.not_private == ["pairs, not private", "tumour, not private", "sites, not private"]
    # T1c is a function of T1 here, so to match histograms is to be right.
    error = values(pairs, "Mean absolute error (lower")
    expected = np.abs(DATA.test.images[:, 0].astype(float) - DATA.test.images[:, 1].astype(float)).mean()
    assert error[translation.COPY] == pytest.approx(expected, rel=0.02)
    assert error[translation.MATCHED] is not None and error[translation.MATCHED] < 0.02
    assert (values(pairs, "SSIM")[translation.MATCHED] or 0) > 0.95


def test_what_is_private_says_what_it_spent_and_what_the_noise_leaves(result: Result) -> None:
    pairs, tumour, _ = result.tables
    spent = values(pairs, "Epsilon")
    assert spent["pairs, not private"] is None
    assert 9 < (spent["pairs, epsilon 10"] or 0) <= 10
    assert set(values(pairs, "Noise")) == {"pairs, epsilon 10"}
    assert not [row for row in tumour.rows if row.what.startswith("Noise")]


def test_pictures_of_simulated_patients_are_shown_and_those_of_real_ones_kept_apart(
    result: Result, folder: Path
) -> None:
    shown = {picture.file for picture in result.pictures if picture.file.startswith("translated-")}
    assert len(shown) == 4 and all((folder / "simulated" / file).is_file() for file in shown)
    of_patients = run(folder, "tcga-lgg")
    assert not [picture for picture in of_patients.pictures if picture.file.startswith("translated-")]
    assert not list((folder / "tcga-lgg").glob("translated-*.png"))
    assert len(list((folder / "tcga-lgg" / "of-real-patients").glob("translated-*.png"))) == 4
    assert any("no part of the result" in note for note in of_patients.notes)


def test_a_finished_run_trains_nothing_again(result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(translating, "train_translation", trained)
    assert run(folder, "simulated").tables == result.tables


def test_nobody_who_is_held_out_of_translated_sites_trains(folder: Path, result: Result) -> None:
    spec = load_spec(folder / "simulated.toml")
    task = translating.make_task(Experiment(spec, None, folder, False), spec.columns[3], DATA)
    ((source, target),) = task.sites.values()
    assert source.member.any(dim=1).sum() == 6 and target.member.any(dim=1).sum() == 6
    assert not (source.member & target.member).any()
    train = {each.numpy().tobytes() for each in source.slices}
    held = {each.numpy().tobytes() for each in task.test[0].slices}
    assert len(train) == 12 and len(held) == 4 and not train & held


def test_sites_are_not_translated_under_a_budget(folder: Path) -> None:
    path = folder / "private-sites.toml"
    text = SPEC.replace("DATA", "simulated").replace('"sites, not private"', '"sites"\nepsilon = 5.0')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="without privacy"):
        run_experiment(path, None, folder / "refused", quick=False)
