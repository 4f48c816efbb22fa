"""From a plan to mechanisms: forecast and charge are one function, and the whole keeps to the plan's epsilon."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsynth import budget
from fedsynth.budget import mechanism, noise_multipliers, planned_epsilon
from fedsynth.dp.accounting import epsilon
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
