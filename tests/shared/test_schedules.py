"""Learning rates fall from their whole to a share of it, over all of a module's steps, and depend on nothing else."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsynth.plan import Schedule, TrainingPlan
from fedsynth.schedules import rate_factor, set_learning_rate

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
FALLING = [schedule for schedule in SCHEDULES if schedule != "constant"]

schedules = st.sampled_from(SCHEDULES)
shares = st.floats(0.0, 1.0)
finals = st.floats(1e-4, 1.0)


def training(schedule: Schedule, rounds: int = 3, steps: int = 10) -> TrainingPlan:
    return TrainingPlan(
        rounds=rounds,
        steps_per_round=steps,
        expected_batch=4,
        max_grad_norm=1.0,
        learning_rate=0.5,
        budget_share=0.5,
        schedule=schedule,
        final_learning_rate=0.04,
    )


def rates(schedule: Schedule) -> list[float]:
    """The rates that an optimiser has at each step of three rounds of ten."""
    plan = training(schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    found = []
    for step in range(plan.steps):
        set_learning_rate(optimizer, plan.learning_rate, plan, step)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


@given(schedules, shares, finals)
def test_a_factor_lies_between_its_end_and_one(schedule: Schedule, progress: float, final: float) -> None:
    assert final * (1 - 1e-9) <= rate_factor(schedule, progress, final) <= 1 + 1e-9


@given(schedules, shares, shares, finals)
def test_a_rate_never_rises(schedule: Schedule, a: float, b: float, final: float) -> None:
    early, late = sorted((a, b))
    assert rate_factor(schedule, early, final) >= rate_factor(schedule, late, final) * (1 - 1e-9)


@pytest.mark.parametrize("schedule", FALLING)
def test_a_schedule_begins_with_the_whole_rate_and_ends_with_its_share(schedule: Schedule) -> None:
    assert rate_factor(schedule, 0.0, 0.1) == 1.0
    assert rate_factor(schedule, 1.0, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("constant", 1.0), ("linear", 0.52), ("cosine", 0.52), ("exponential", 0.2), ("step", 0.2)],
)
def test_half_way(schedule: Schedule, middle: float) -> None:
    assert rate_factor(schedule, 0.5, 0.04) == pytest.approx(middle)


def test_a_quarter_of_the_way_by_cosine() -> None:
    assert rate_factor("cosine", 0.25, 0.04) == pytest.approx(0.04 + 0.96 * (1 + math.sqrt(0.5)) / 2)


def test_three_steps_of_equal_length() -> None:
    found = rates("step")
    assert found == pytest.approx([0.5] * 10 + [0.1] * 10 + [0.02] * 10)


def test_a_constant_rate_is_the_very_number_of_the_plan() -> None:
    assert rates("constant") == [0.5] * 30


@pytest.mark.parametrize("schedule", FALLING)
def test_rounds_continue_one_schedule(schedule: Schedule) -> None:
    found = rates(schedule)
    assert found[0] == 0.5
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 * found[0]
    assert found[10] == pytest.approx(0.5 * rate_factor(schedule, 1 / 3, 0.04))


def test_all_groups_of_an_optimizer_are_set() -> None:
    plan = training("linear")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    set_learning_rate(optimizer, 0.5, plan, 15)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.26, 0.26])
