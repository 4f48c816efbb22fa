"""The checkpoint: whole or as it was before, readable by nothing but its own study, without a pickle."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsynth.errors import JobFailed, UsageError
from fedsynth.plan import StudyPlan, WarmStart
from fedsynth.records import state_digest
from fedsynth_server.checkpoint import FILE, Receipt, StudyState, first_state, load_state, save_state


@pytest.fixture
def state(tiny_plan: StudyPlan) -> StudyState:
    receipt = Receipt("ab" * 32, 1.5, 2.5, 3, True, 1)
    return replace(
        first_state(tiny_plan, None),
        rounds={"autoencoder": 1, "radiogenomics": 0, "gan": 0},
        curves={
            "autoencoder": [{"round": 1, "site": "a", "update_norm": 0.1 + 0.2}],
            "radiogenomics": [],
            "gan": [],
        },
        receipts={"a": {"autoencoder": receipt}},
    )


def test_everything_comes_back(tiny_plan: StudyPlan, state: StudyState, tmp_path: Path) -> None:
    save_state(state, tmp_path)
    back = load_state(tmp_path, tiny_plan)
    assert back is not None
    assert (back.study, back.rounds, back.curves, back.receipts) == (
        state.study,
        state.rounds,
        state.curves,
        state.receipts,
    )
    assert {name: state_digest(weights) for name, weights in back.weights.items()} == {
        name: state_digest(weights) for name, weights in state.weights.items()
    }


def test_no_checkpoint_is_none(tiny_plan: StudyPlan, tmp_path: Path) -> None:
    assert load_state(tmp_path, tiny_plan) is None


def test_a_checkpoint_of_another_study_is_refused(tiny_plan: StudyPlan, state: StudyState, tmp_path: Path) -> None:
    save_state(state, tmp_path)
    other = tiny_plan.model_copy(update={"name": "other"})
    with pytest.raises(UsageError) as refused:
        load_state(tmp_path, other)
    assert refused.value.code == "checkpoint_of_other_study"


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_half_a_checkpoint_is_named_and_never_taken_for_a_fresh_start(
    tiny_plan: StudyPlan, state: StudyState, tmp_path: Path, keep: int
) -> None:
    save_state(state, tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError) as refused:
        load_state(tmp_path, tiny_plan)
    assert refused.value.code == "checkpoint_unreadable"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_checkpoint_before_it(
    tiny_plan: StudyPlan, state: StudyState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save_state(state, tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os if step == "fsync" else Path, step, full)
        with pytest.raises(JobFailed, match="disk is full"):
            save_state(replace(state, rounds={**state.rounds, "autoencoder": 2}), tmp_path)
    back = load_state(tmp_path, tiny_plan)
    assert back is not None
    assert back.rounds["autoencoder"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_start_follows_from_the_plan_alone(tiny_plan: StudyPlan) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = first_state(tiny_plan, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = first_state(tiny_plan, None), first_state(tiny_plan.model_copy(update={"name": "other"}), None)
    for name, weights in one.weights.items():
        assert state_digest(weights) == state_digest(again.weights[name])
        assert state_digest(weights) != state_digest(other.weights[name])


def test_a_warm_start_is_bound_by_its_digests(tiny_plan: StudyPlan) -> None:
    start = {name: first_state(tiny_plan, None).weights[name] for name in ("generator", "discriminator")}
    named = WarmStart(
        generator_sha256=state_digest(start["generator"]),
        discriminator_sha256=state_digest(start["discriminator"]),
        provenance="made by this test",
    )
    plan = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": named})})
    taken = first_state(plan, start)
    assert taken.weights["generator"] is taken.weights["generator_ema"] is start["generator"]
    wrong = {**start, "generator": {name: tensor + 1e-3 for name, tensor in start["generator"].items()}}
    for asked, given, code in (
        (plan, None, "warm_start_missing"),
        (plan, wrong, "warm_start_differs"),
        (tiny_plan, start, "warm_start_not_in_plan"),
    ):
        with pytest.raises(UsageError) as refused:
            first_state(asked, given)
        assert refused.value.code == code
