"""From a plan to mechanisms: forecast and charge are one function, and the whole keeps to the plan's epsilon."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedsynth import budget
from fedsynth.budget import charge, mechanism, noise_multipliers, planned_epsilon, private_activities
from fedsynth.dp.accounting import (
    Demand,
    Mechanism,
    allocate,
    allocation_report,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    merged,
    noise_multiplier,
)
from fedsynth.plan import Module, StudyPlan, load_plan, save_plan

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")


def plan(epsilon: float = 3.0, **others: object) -> StudyPlan:
    training = {"max_grad_norm": 1.0, "learning_rate": 1e-3}
    return StudyPlan.model_validate(
        {
            "name": "small",
            "purpose": "tests of the budget",
            "genes": {"panel": ["A", "B"], "reference_quantiles": [0, 1], "center": [0, 0], "scale": [1, 1]},
            "privacy": {"epsilon": epsilon},
            "autoencoder": {**training, "rounds": 3, "steps_per_round": 20, "expected_batch": 8, "budget_share": 0.25},
            "radiogenomics": {
                **training,
                "rounds": 2,
                "steps_per_round": 25,
                "expected_batch": 4,
                "budget_share": 0.25,
            },
            "gan": {**training, "rounds": 5, "steps_per_round": 30, "expected_batch": 2, "budget_share": 0.5},
            "sites": [{"name": "north", "nominal_patients": 200}, {"name": "south", "nominal_patients": 400}],
            **others,
        }
    )


@pytest.mark.parametrize("site", ["north", "south"])
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_all_rounds_of_all_modules_together_cost_the_plans_epsilon_and_not_more(site: str, target: float) -> None:
    study = plan(target)
    charged = [mechanism(study, site, module) for module in TRAINED for _ in range(study.training(module).rounds)]
    spent = epsilon(charged, study.privacy.delta)
    assert 0.98 * target <= spent <= target
    assert planned_epsilon(study, site) == pytest.approx(spent, rel=1e-12)


def test_a_rounds_mechanism_is_what_the_plan_states() -> None:
    study = plan()
    for module in TRAINED:
        one = mechanism(study, "south", module)
        assert one.steps == study.training(module).steps_per_round
        assert one.sample_rate == study.training(module).expected_batch / 400
        assert one.noise_multiplier == noise_multipliers(study, "south")[module]
        assert mechanism(study, "south", module, steps=7).steps == 7


def test_both_sides_compute_the_same_numbers(tmp_path: Path) -> None:
    study = plan()
    at_the_coordinator = {module: mechanism(study, "north", module) for module in TRAINED}
    save_plan(study, tmp_path / "plan.toml")
    budget._allocate.cache_clear()
    at_the_site = load_plan(tmp_path / "plan.toml")
    assert {module: mechanism(at_the_site, "north", module) for module in TRAINED} == at_the_coordinator


def test_a_sites_noise_depends_on_its_own_size_only() -> None:
    alone = plan(sites=[{"name": "north", "nominal_patients": 200}])
    assert noise_multipliers(alone, "north") == noise_multipliers(plan(), "north")
    assert all(
        noise_multipliers(plan(), "south")[module] < noise_multipliers(plan(), "north")[module] for module in TRAINED
    )


def test_a_module_costs_less_than_the_whole() -> None:
    study = plan()
    parts = [planned_epsilon(study, "north", module) for module in TRAINED]
    assert max(parts) < planned_epsilon(study, "north") < sum(parts)


@pytest.mark.slow
def test_the_tighter_accountant_needs_less_noise() -> None:
    tight = plan(privacy={"epsilon": 3.0, "accountant": "prv"})
    loose = noise_multipliers(plan(), "north")
    assert all(sigma < loose[module] for module, sigma in noise_multipliers(tight, "north").items())
    assert 0.98 * 3.0 <= planned_epsilon(tight, "north") <= 3.0


ENDLESS = float("inf")


def test_a_study_without_privacy_runs_without_noise_and_costs_everything() -> None:
    study = plan(ENDLESS)
    assert not study.privacy.private
    assert noise_multipliers(study, "north") == dict.fromkeys(TRAINED, 0.0)
    assert mechanism(study, "north", "gan").noise_multiplier == 0.0
    assert planned_epsilon(study, "north") == planned_epsilon(study, "north", "gan") == ENDLESS
    assert charge(study, "north", "gan").study_epsilon == ENDLESS
    assert private_activities(study) == ()


@pytest.mark.parametrize("target", [0.1, 8.0, 1e3, 1e6])
def test_no_private_plan_ever_gets_away_without_noise(target: float) -> None:
    assert all(sigma > 0 for sigma in noise_multipliers(plan(target), "north").values())
    assert plan(target).privacy.private


def test_a_private_plan_that_would_run_without_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_allocate", lambda demands, *_: tuple((module, 0.0) for module, *_ in demands))
    with pytest.raises(ValueError, match="noise multiplier 0 under a plan of epsilon 3"):
        mechanism(plan(3.0), "north", "gan")
    monkeypatch.setattr(budget, "_allocate", lambda demands, *_: tuple((module, 1.0) for module, *_ in demands))
    with pytest.raises(ValueError, match="noise multiplier 1 under a plan of epsilon inf"):
        mechanism(plan(ENDLESS), "north", "gan")


def test_held_out_patients_stay_protected_in_a_study_without_privacy() -> None:
    study = plan(ENDLESS, site_evaluation={"epsilon": 2.0})
    cost = charge(study, "north", "evaluation")
    assert cost.population == "holdout" and cost.study_epsilon == 2.0
    assert cost.mechanism == charge(plan(site_evaluation={"epsilon": 2.0}), "north", "evaluation").mechanism
    assert private_activities(study) == ("evaluation",)
    with pytest.raises(ValidationError):
        plan(ENDLESS, site_evaluation={"epsilon": ENDLESS})


def test_infinity_survives_a_file_and_makes_another_study(tmp_path: Path) -> None:
    study = plan(ENDLESS)
    save_plan(study, tmp_path / "plan.toml")
    assert "epsilon = inf" in (tmp_path / "plan.toml").read_text()
    assert load_plan(tmp_path / "plan.toml") == study
    assert load_plan(tmp_path / "plan.toml").digest == study.digest != plan().digest
    with pytest.raises(ValidationError):
        plan(float("nan"))


def test_one_mechanism_without_noise_makes_any_history_infinite() -> None:
    noisy, bare = Mechanism(0.1, 2.0, 10), Mechanism(0.01, 0.0, 1)
    for history in ([bare], [noisy, bare], [Mechanism(1.0, 0.0, 1), Mechanism(1.0, 3.0, 1)]):
        for accountant in ("rdp", "prv"):
            assert epsilon(history, 1e-5, accountant) == ENDLESS  # type: ignore[arg-type]
        assert epsilon(merged(history), 1e-5) == ENDLESS
    assert gaussian_epsilon(0.0, 1e-5) == ENDLESS and gaussian_delta(0.0, 5.0) == 1.0
    demands = {"one": Demand(0.1, 10, 0.5), "two": Demand(1.0, 1, 0.5)}
    assert allocate(demands, ENDLESS, 1e-5, "prv") == {"one": 0.0, "two": 0.0}
    report = allocation_report(demands, {"one": 0.0, "two": 0.0}, ENDLESS, 1e-5)
    assert report.epsilon == report.epsilon_summed == ENDLESS
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="noise_multiplier"):
            Mechanism(0.1, wrong, 1)
    with pytest.raises(ValueError, match="target_epsilon"):
        noise_multiplier(0.1, 10, 0.0, 1e-5)
