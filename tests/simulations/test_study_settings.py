"""A study's folder: the same command goes on, another one is refused, and nothing of a user's is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsynth.errors import UsageError
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_discriminator, make_generator
from fedsynth.records import state_digest
from fedsynth_server.checkpoint import first_state
from fedsynth_server.warm_start import load_warm_start, public_starts
from fedsynth_simulations import study
from fedsynth_simulations.plans import simulated_genes, study_plan
from fedsynth_simulations.study import Settings, run
from fedsynth_simulations.weights import packaged_warm_start

SETTINGS = Settings(patients=20, seed=1, epsilon=10.0, synthetic=2)


class Stop(Exception):
    """Ends a run where the test wants it."""


@pytest.fixture
def stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(study, "_hospitals", stop)


@pytest.mark.usefixtures("stops_at_once")
def test_a_folder_goes_on_only_with_the_settings_it_began_with(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "out", SETTINGS)
    with pytest.raises(Stop):
        run(tmp_path / "out", SETTINGS)
    with pytest.raises(UsageError, match="epsilon") as caught:
        run(tmp_path / "out", Settings(patients=20, seed=1, epsilon=3.0, synthetic=2))
    assert caught.value.code == "run_differs"


@pytest.mark.usefixtures("stops_at_once")
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError) as caught:
        run(tmp_path, SETTINGS)
    assert caught.value.code == "out_not_empty"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_real_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "CS").mkdir(parents=True)
    (tmp_path / "sources.toml").write_text('[clinical]\npath = "c.tsv"\nlabel_column = "g"\nlabel_codes = {}\n')
    folders = tuple(str(tmp_path / parent / "CS") for parent in ("a", "b"))
    settings = Settings(20, 1, 10.0, 2, site_folders=folders, sources=str(tmp_path / "sources.toml"))
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "out", settings)
    assert caught.value.code == "site_folders_alike"


def test_the_packaged_weights_fit_the_plan_and_say_where_they_come_from() -> None:
    weights, start = load_warm_start(packaged_warm_start())
    starts = public_starts(packaged_warm_start(), simulated_genes())
    plan = study_plan("fits", "do the weights fit", {"a": 160}, genes=simulated_genes(), epsilon=10, starts=starts)
    make_generator(plan).load_state_dict(weights["generator"])
    make_discriminator(plan).load_state_dict(weights["discriminator"])
    make_autoencoder(plan).load_state_dict(weights["autoencoder"])
    assert "no private data" in start.provenance
    state = first_state(plan, weights)
    assert state_digest(state.weights["generator"]) == start.generator_sha256
    assert starts.autoencoder is not None and state_digest(weights["autoencoder"]) == starts.autoencoder.sha256
