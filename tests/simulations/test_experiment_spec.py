"""Specifications of experiments: what is shipped can be read, what is misspelt is refused, what is wrong is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedsynth.errors import UsageError
from fedsynth_simulations.experiments import run as run_module
from fedsynth_simulations.experiments import spec as spec_module
from fedsynth_simulations.experiments.cli import app
from fedsynth_simulations.experiments.rendering import table_text
from fedsynth_simulations.experiments.run import Experiment, Kept, run_experiment
from fedsynth_simulations.experiments.spec import find, load_spec, names
from fedsynth_simulations.experiments.values import Cell, Result, Row, Table

MINIMAL = """
title = "Title"
system = "System"
paper = "Paper"
runner = "images"
data = "simulated"
seed = 1
[[columns]]
name = "one"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "made.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", names())
def test_every_shipped_specification_is_valid_names_its_runner_and_has_a_private_column(name):
    spec = load_spec(find(name))
    assert callable(spec_module.runner_module(spec.runner).run)
    assert any(column.private for column in spec.columns)
    assert spec.title and spec.paper
    quick = spec.quickened()
    assert quick.data in ("simulated", "expression")
    assert [column.name for column in quick.columns] == [column.name for column in spec.columns]


def test_the_systems_of_the_issue_are_all_there():
    systems = {"dcgan", "auxiliary", "enhanced", "enhanced-masks", "losses", "vae", "multi-sequence", "conditional"}
    assert systems | {"detection", "training-options"} <= set(names())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("colour = 1", "colour"),
        ("epsilonn = 10.0", "epsilonn"),
        ("plan.gan.lerning_rate = 1.0", "lerning_rate"),
        ("plan.gann.loss = 'bce'", "gann"),
        ("[options]\nmeasure = ['ssim']", "measure"),
        ("[options]\nmeasures = ['beauty']", "measures"),
        ("[quick.plan.gan]\nround = 1", "round"),
        ("[published.fid]\nvalue = '1'", "why"),
    ],
)
def test_what_is_misspelt_is_refused_by_name(tmp_path, more, named):
    with pytest.raises(UsageError) as caught:
        load_spec(written(tmp_path, MINIMAL + more))
    assert caught.value.code == "experiment_invalid"
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("plan.translation.width = 4", "does not look at translation"),
        ("plan.image.size = 64", "all columns share the data"),
        ("epsilon = 10.0\nplan.privacy.epsilon = inf", "by which it is marked"),
        ("[plan.privacy]\nepsilon = 10.0", "by which it is marked"),
    ],
)
def test_what_would_be_printed_as_a_setting_and_not_be_one_is_refused(tmp_path, more, named):
    with pytest.raises(UsageError, match=named):
        load_spec(written(tmp_path, MINIMAL + more))


def test_columns_that_share_a_folder_are_refused(tmp_path):
    with pytest.raises(UsageError, match="columns"):
        load_spec(written(tmp_path, MINIMAL + '[[columns]]\nname = "One!"\n'))


def test_a_column_is_without_privacy_exactly_where_its_epsilon_is_infinite(tmp_path):
    text = MINIMAL + '[[columns]]\nname = "two"\nepsilon = 10.0\n[[columns]]\nname = "three"\nepsilon = inf\n'
    columns = load_spec(written(tmp_path, text)).columns
    assert [column.private for column in columns] == [False, True, False]
    assert [column.epsilon for column in columns] == [math.inf, 10.0, math.inf]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="dcgan"):
        find("nothing-of-the-kind")


def test_without_its_data_an_experiment_says_how_the_folder_must_look(tmp_path):
    for folder in (None, tmp_path / "absent"):
        with pytest.raises(UsageError) as caught:
            run_experiment(find("dcgan"), folder, tmp_path / "out", quick=False)
        assert caught.value.code == "data_missing"
        assert "--data" in caught.value.hint
        assert "glioma" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        run_experiment(find("dcgan"), tmp_path / "empty", tmp_path / "out", quick=False)
    assert caught.value.code == "data_wrong"
    with pytest.raises(UsageError) as caught:
        run_experiment(find("multi-sequence"), None, tmp_path / "out", quick=False)
    assert "FLAIR" in caught.value.hint


def test_work_that_was_interrupted_while_it_was_kept_is_not_taken_for_earlier_work(tmp_path, monkeypatch):
    experiment = Experiment(load_spec(written(tmp_path, MINIMAL)), None, tmp_path, False)

    def kept(value: float) -> float:
        made = experiment.kept("part", {"value": value}, lambda: Kept({"x": torch.tensor([value])}))
        return float(made.arrays["x"])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert kept(1.0) == 1.0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "write_json", interrupted)
        kept(2.0)
    assert kept(1.0) == 1.0


def test_the_command_lists_what_is_shipped():
    answer = CliRunner().invoke(app, ["list"])
    assert answer.exit_code == 0
    assert all(name in answer.output for name in names())


def test_the_table_has_the_papers_column_beside_ours_and_marks_what_was_not_private():
    result = Result(
        name="n",
        title="T",
        system="S",
        paper="P",
        data="D",
        not_private=["open"],
        settings={},
        seed=1,
        machine="m",
        date="2026-01-01",
        seconds=1.0,
        tables=[
            Table(
                title="Result",
                columns=["open", "closed"],
                rows=[
                    Row(
                        what="AM score",
                        cells={
                            "open": Cell(value=0.5, interval=(0.4, 0.6)),
                            "closed": Cell(value=None, note="too few"),
                        },
                        paper="3.0250",
                        note="other data",
                    )
                ],
            )
        ],
    )
    text = table_text(result)
    assert "| | open (not private) | closed | paper | comparable |" in text
    assert "| AM score [1] | 0.500 (0.400 to 0.600) | - | 3.0250 | no |" in text
    assert "1. other data. closed: too few." in text
