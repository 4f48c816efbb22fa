"""A study's folder: settings that forbid what they do not know, a layout that overwrites nothing, progress, logs."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from fedsynth.errors import FedsynthError, UsageError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.checkpoint import Receipt, first_state, save_state
from fedsynth_server.coordinator import logs
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.coordinator.settings import FILE, Study
from fedsynth_server.coordinator.setup import init_study


@pytest.fixture
def plan_file(tiny_plan: StudyPlan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    save_plan(tiny_plan, path)
    return path


@pytest.fixture
def study(plan_file: Path, tmp_path: Path) -> Study:
    return init_study(tmp_path / "study", plan_file, "fed.example.org:9443", None)


def test_init_lays_out_a_private_folder_that_loads(study: Study, tiny_plan: StudyPlan) -> None:
    assert study.plan.digest == tiny_plan.digest
    assert study.settings.gateway.address == "fed.example.org:9443"
    assert study.settings.gateway.listen == "0.0.0.0:9443"
    assert study.superlink_address == "127.0.0.1:18000"
    for folder in (study.folder, study.folder / "keys", study.folder / "superlink"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_init_overwrites_nothing(study: Study, plan_file: Path) -> None:
    before = (study.folder / FILE).read_bytes()
    with pytest.raises(UsageError) as caught:
        init_study(study.folder, plan_file, "other.example.org:1", None)
    assert caught.value.code == "study_exists"
    assert (study.folder / FILE).read_bytes() == before


def test_init_refuses_weights_that_the_plan_does_not_name(plan_file: Path, tmp_path: Path) -> None:
    stray = tmp_path / "stray.safetensors"
    stray.write_bytes(b"\0" * 16)
    with pytest.raises(FedsynthError) as caught:
        init_study(tmp_path / "study", plan_file, "fed.example.org:9443", stray)
    assert caught.value.code == "warm_start_unreadable"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("address", ["fed.example.org", "fed.example.org:0", "a;b:1", 'a" b:1', "https://a:1", ":8443"])
def test_init_refuses_what_is_no_address(plan_file: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError) as caught:
        init_study(tmp_path / "study", plan_file, address, None)
    assert caught.value.code == "address_invalid"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("max_request_gib = 1", "max_request_gib"),  # unknown
        ("max_request_mib = 2", "max_request_mib"),  # smaller than a chunk
        ('nginx = "nginx; rm"\ncertificate = "a\\"b"', "certificate"),  # would leave nginx's quotes
        ('listen = "fed.example.org"', "listen"),
    ],
)
def test_settings_name_the_offending_key(study: Study, line: str, named: str) -> None:
    path = study.folder / FILE
    key = line.split(" =")[0]
    kept = [each for each in path.read_text().splitlines() if not each.startswith((f"{key} =", "certificate ="))]
    text = "\n".join(kept).replace("[gateway]", f"[gateway]\n{line}")
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        _ = Study(study.folder).settings
    assert caught.value.code == "settings_invalid"
    assert f"gateway.{named}" in caught.value.message


def test_superlink_listens_on_an_address_not_a_name(study: Study) -> None:
    path = study.folder / FILE
    path.write_text(path.read_text().replace('listen = "127.0.0.1"', 'listen = "superlink"'))
    with pytest.raises(UsageError) as caught:
        _ = Study(study.folder).settings
    assert "superlink.listen" in caught.value.message


def test_who_listens_everywhere_is_called_on_loopback(study: Study) -> None:
    path = study.folder / FILE
    path.write_text(path.read_text().replace('listen = "127.0.0.1"', 'listen = "::"'))
    assert Study(study.folder).superlink_address == "[::1]:18000"
    assert Study(study.folder).gateway_local_address == "127.0.0.1:9443"


def test_progress_is_read_from_the_header_alone(study: Study, tiny_plan: StudyPlan) -> None:
    assert progress_of(study.folder, tiny_plan) is None
    state = first_state(tiny_plan, None)
    save_state(state, study.folder)
    begun = progress_of(study.folder, tiny_plan)
    assert begun is not None and not begun.finished(tiny_plan)
    assert begun.summary(tiny_plan) == "autoencoder 0/2, radiogenomics 0/2, gan 0/2"
    done = {module: tiny_plan.training(module).rounds for module in tiny_plan.modules}
    old, new = (Receipt(digit * 64, 1.0, 1.0, 4, True, order) for digit, order in (("a", 1), ("b", 2)))
    receipts = {"north": {"gan": new, "autoencoder": old}}
    save_state(replace(state, rounds={**state.rounds, **done}, receipts=receipts), study.folder)  # type: ignore[arg-type]
    ended = progress_of(study.folder, tiny_plan)
    assert ended is not None and ended.finished(tiny_plan)
    assert ended.heads == {"north": "b" * 64}


def test_progress_of_another_plan_is_refused(study: Study, tiny_plan: StudyPlan) -> None:
    save_state(first_state(tiny_plan, None), study.folder)
    with pytest.raises(UsageError) as caught:
        progress_of(study.folder, tiny_plan.model_copy(update={"name": "other"}))
    assert caught.value.code == "checkpoint_of_other_study"


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_broken_checkpoint_is_named(study: Study, tiny_plan: StudyPlan, content: bytes) -> None:
    (study.folder / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        progress_of(study.folder, tiny_plan)
    assert caught.value.code == "checkpoint_unreadable"


def test_logs_are_found_by_name(study: Study) -> None:
    with pytest.raises(UsageError) as caught:
        logs.find(study.folder, None)
    assert caught.value.code == "log_missing"
    (study.folder / "logs").mkdir()
    (study.folder / "logs" / "runner.log").write_text("one\ntwo\nthree\n")
    assert [path.name for path in logs.find(study.folder, None)] == ["runner.log"]
    assert logs.last_lines(logs.find(study.folder, "runner")[0], 2) == ["two", "three"]
    with pytest.raises(UsageError) as caught:
        logs.find(study.folder, "../../etc/passwd")
    assert caught.value.code == "log_unknown"


def test_following_gives_whole_lines_and_survives_an_emptied_log(tmp_path: Path) -> None:
    path = tmp_path / "runner.log"
    path.write_text("before\n")
    ticks = count()

    def step() -> bool:
        tick = next(ticks)
        if tick == 1:
            path.write_text(path.read_text() + "half")
        if tick == 2:
            path.write_text(path.read_text() + " a line\nnext\n")
        if tick == 3:
            path.write_text("anew\n")
        return tick == 5

    found = [line for _, line in logs.follow([path], stopped=step, poll_seconds=0.0)]
    assert found == ["half a line", "next", "anew"]
