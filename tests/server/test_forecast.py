"""The forecast: true costs, advice where noise drowns the signal, and levers that were computed."""

from __future__ import annotations

import math
import re

import pytest

from fedsynth.budget import noise_multipliers, planned_epsilon
from fedsynth.plan import TRAINED, StudyPlan
from fedsynth_server.forecast import HARD, Forecast, forecast, parameters


def resized(plan: StudyPlan, patients: int, batch: int) -> StudyPlan:
    sites = [site.model_copy(update={"nominal_patients": patients}) for site in plan.sites]
    trainings = {module: plan.training(module).model_copy(update={"expected_batch": batch}) for module in TRAINED}
    return plan.model_copy(update={"sites": sites, **trainings})


@pytest.fixture(scope="module")
def long_plan(tiny_plan: StudyPlan) -> StudyPlan:
    trainings = {module: tiny_plan.training(module).model_copy(update={"rounds": 20}) for module in TRAINED}
    return tiny_plan.model_copy(update=trainings)


@pytest.fixture(scope="module")
def tiny_forecast(tiny_plan: StudyPlan) -> Forecast:
    return forecast(tiny_plan)


def test_figures_follow_from_the_budget(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    foretold = tiny_forecast
    assert [(row.site, row.module) for row in foretold.modules] == [(s, m) for s in ("a", "b") for m in TRAINED]
    for row in foretold.modules:
        training = tiny_plan.training(row.module)
        sigma = noise_multipliers(tiny_plan, row.site)[row.module]
        assert row.noise_multiplier == sigma
        assert row.noise_to_batch == sigma / training.expected_batch
        together = 1 if row.module == "gan" else 2  # discriminators are not averaged
        size = parameters(tiny_plan, row.module)
        assert row.noise_to_signal == pytest.approx(
            sigma * math.sqrt(size) / training.expected_batch / math.sqrt(training.steps * together)
        )
        assert row.epsilon_alone < foretold.epsilon[row.site] <= tiny_plan.privacy.epsilon
    assert foretold.epsilon == {name: planned_epsilon(tiny_plan, name) for name in ("a", "b")}


def test_a_small_cohort_is_warned_and_a_huge_one_is_not(tiny_forecast: Forecast, long_plan: StudyPlan) -> None:
    small, huge = tiny_forecast.advice, forecast(resized(long_plan, 9_000, 900))
    assert any(line.startswith("gan will") for line in small)
    assert all(row.noise_to_signal < HARD for row in huge.modules)
    assert huge.advice == []


def test_a_delta_near_one_over_the_cohort_is_warned(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    loose = tiny_plan.model_copy(update={"privacy": tiny_plan.privacy.model_copy(update={"delta": 5e-3})})
    assert any("a delta near 1 / n" in line for line in forecast(loose).advice)
    assert not any("a delta near 1 / n" in line for line in tiny_forecast.advice)


def test_each_lever_is_what_its_plan_would_forecast(tiny_plan: StudyPlan, tiny_forecast: Forecast) -> None:
    (line,) = [line for line in tiny_forecast.advice if line.startswith("gan")]
    stated = {name: float(value) for name, value in re.findall(r"(twice [a-z ]+): ([0-9.]+)", line)}
    assert set(stated) == {"twice the epsilon", "twice the patients a site", "twice the steps", "twice the batch"}

    def gan(plan: StudyPlan) -> float:
        size, steps = parameters(plan, "gan"), plan.gan.steps
        return noise_multipliers(plan, "a")["gan"] * math.sqrt(size / steps) / plan.gan.expected_batch

    privacy = tiny_plan.privacy.model_copy(update={"epsilon": 20.0})
    longer = tiny_plan.gan.model_copy(update={"rounds": 4})
    larger = tiny_plan.gan.model_copy(update={"expected_batch": 20})
    sites = [site.model_copy(update={"nominal_patients": 80}) for site in tiny_plan.sites]
    changed = {
        "twice the epsilon": tiny_plan.model_copy(update={"privacy": privacy}),
        "twice the steps": tiny_plan.model_copy(update={"gan": longer}),
        "twice the batch": tiny_plan.model_copy(update={"gan": larger}),
        "twice the patients a site": tiny_plan.model_copy(update={"gan": larger, "sites": sites}),
    }
    for lever, plan in changed.items():
        assert stated[lever] == pytest.approx(gan(plan), abs=0.051)
    assert min(stated, key=lambda name: stated[name]) in line.split("; ")[-1]


def test_more_sites_help_only_what_is_averaged(tiny_forecast: Forecast) -> None:
    advice = {line.split()[0]: line for line in tiny_forecast.advice}
    assert "twice the sites" not in advice["gan"]
    for module in set(advice) & {"autoencoder", "radiogenomics"}:
        assert "twice the sites" in advice[module]
