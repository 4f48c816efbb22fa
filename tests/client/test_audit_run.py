"""The audit of a plan: what it reads off the client's training, whom it audits, and what it writes down."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedsynth.auditing.code import code_digest
from fedsynth.auditing.values import Audit
from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SeededRandomness, SystemRandomness
from fedsynth.errors import UsageError
from fedsynth.plan import Activity, Module, StudyPlan
from fedsynth_client.auditing.checks import Noiseless
from fedsynth_client.auditing.run import audit_module, audit_plan
from fedsynth_client.auditing.standins import alike, canary_patients, flat, released, stand_in, step_weights

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

EVERYBODY = Mechanism(1.0, 2.0, 1)
PUBLIC = {"sha256": "0" * 64, "provenance": "made up here"}


@pytest.fixture
def statistics_plan(tiny_plan: StudyPlan) -> StudyPlan:
    """A plan of the two statistics and an evaluation of held-out patients, of two sites."""
    values = tiny_plan.model_dump(mode="python")
    for module in TRAINED:
        values[module]["rounds"] = 0
    values["moments"] = {"budget_share": 0.5, "public": PUBLIC}
    values["embedding"] = {"budget_share": 0.5, "public": PUBLIC}
    values["privacy"]["epsilon"] = 3.0
    values["site_evaluation"] = {"epsilon": 1.0}
    values["sites"] = [{"name": "large", "nominal_patients": 400}, {"name": "small", "nominal_patients": 50}]
    return StudyPlan.model_validate(values)


@pytest.mark.parametrize("module", ["moments", *TRAINED])
def test_what_a_step_released_is_read_off_its_result(tiny_plan: StudyPlan, module: Module) -> None:
    """Of canaries that have nothing in common, the un-noised sum has the length that Pythagoras gives it."""
    plan = tiny_plan if module in TRAINED else tiny_plan.model_copy(update={"moments": _moments()})
    stand = stand_in(plan, module, 8, noise=10.0)
    for count in (0, 1, 5):
        patients = alike(module, plan, 8, count)
        length = float(flat(released(stand, stand.block(patients, EVERYBODY, Noiseless()))).norm())
        assert length == pytest.approx(count, abs=2e-3)
    if module != "gan":  # whose images overlap
        apart = canary_patients(module, plan, 8)
        length = float(flat(released(stand, stand.block(apart, EVERYBODY, Noiseless()))).norm())
        assert length == pytest.approx(math.sqrt(8), rel=2e-3)


def _moments() -> object:
    from fedsynth.plan import MomentsPlan

    return MomentsPlan.model_validate({"budget_share": 0.5, "public": PUBLIC})


@pytest.mark.parametrize("module", TRAINED)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_noise_of_a_block_is_weighed_as_its_optimiser_weighs_steps(
    tiny_plan: StudyPlan, module: Module, steps: int
) -> None:
    stand = stand_in(tiny_plan, module, 400, noise=2.0)
    nobody = alike(module, stand.plan, 400, 0)
    noise = flat(released(stand, stand.block(nobody, replace(EVERYBODY, steps=steps), SystemRandomness())))
    expected = 2.0 * float(step_weights(stand, steps).square().sum().sqrt())
    assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("module", ["autoencoder", "radiogenomics"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_is_weighed_as_gradient_descent_weighs_steps_whatever_the_schedule_and_the_projection(
    tiny_plan: StudyPlan, module: Module, momentum: float
) -> None:
    values = tiny_plan.model_dump(mode="python")
    values[module] |= {"optimizer": "sgd", "momentum": momentum, "schedule": "cosine"}
    values["radiogenomics"]["nonnegative_weights"] = True
    plan = StudyPlan.model_validate(values)
    stand = stand_in(plan, module, 400, noise=2.0)
    nobody = alike(module, stand.plan, 400, 0)
    noise = flat(released(stand, stand.block(nobody, replace(EVERYBODY, steps=3), SystemRandomness())))
    first = 1 + momentum + momentum**2
    assert step_weights(stand, 3).tolist() == pytest.approx([first, 1 + momentum, 1.0])
    expected = 2.0 * math.sqrt(first**2 + (1 + momentum) ** 2 + 1)
    assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


def test_the_weights_of_steps_are_adam_s() -> None:
    """Two steps of Adam far below its epsilon: the first gradient counts 1 + 0.09 / 0.19, the second 0.1 / 0.19."""
    from fedsynth_client.auditing.standins import StandIn

    weights = {"w": torch.zeros(1)}
    stand = StandIn("autoencoder", None, weights, {}, 1.0)  # type: ignore[arg-type]
    assert step_weights(stand, 2).tolist() == pytest.approx([1 + 0.09 / 0.19, 0.1 / 0.19])


def test_bounds_of_sound_mechanisms_stay_below_the_claim(statistics_plan: StudyPlan) -> None:
    bounds = [
        audit_module(statistics_plan, "small", "moments", 512, SeededRandomness(seed)).epsilon_bound
        for seed in range(15)
    ]
    claimed = planned_epsilon(statistics_plan, "small", "moments")
    assert max(bounds) < claimed
    assert sorted(bounds)[7] > 0.1 * claimed, "the audit sees something of a sound mechanism"


@pytest.mark.parametrize("module", TRAINED)
def test_networks_are_audited_with_the_plan_s_mechanism(tiny_plan: StudyPlan, module: Module) -> None:
    found = audit_module(tiny_plan, "a", module, 64)
    block = mechanism(tiny_plan, "a", module)
    assert (found.sample_rate, found.noise_multiplier) == (block.sample_rate, block.noise_multiplier)
    assert found.steps == tiny_plan.training(module).steps
    assert found.claimed_epsilon == planned_epsilon(tiny_plan, "a", module)
    assert found.ok


@pytest.mark.parametrize("module", TRAINED)
def test_canaries_of_networks_show_when_the_noise_is_slight(tiny_plan: StudyPlan, module: Module) -> None:
    """A plan of a very large epsilon: nearly every membership can be told, or the scores are of no use."""
    values = tiny_plan.model_dump(mode="python")
    values["privacy"]["epsilon"] = 3000.0
    for section in TRAINED:  # steps enough that each canary that is in is drawn
        values[section] |= {"rounds": 4, "steps_per_round": 6, "expected_batch": 20}
    found = audit_module(StudyPlan.model_validate(values), "a", module, 256)
    assert found.epsilon_bound > 0.6 * found.reachable
    assert found.ok


def test_the_site_with_the_fewest_patients_is_audited_unless_another_is_named(statistics_plan: StudyPlan) -> None:
    canaries: dict[Activity, int] = {"moments": 64, "embedding": 64, "evaluation": 64}
    found = audit_plan(statistics_plan, canaries=canaries)
    assert {module.site for module in found.modules} == {"small"}
    other = audit_plan(statistics_plan, site="large", canaries=canaries)
    assert {module.site for module in other.modules} == {"large"}
    with pytest.raises(UsageError, match="does not name"):
        audit_plan(statistics_plan, site="elsewhere", canaries=canaries)


def test_an_audit_says_what_it_is_of_and_survives_its_file(statistics_plan: StudyPlan) -> None:
    found = audit_plan(statistics_plan)
    assert found.ok
    assert found.plan_digest == statistics_plan.digest
    assert found.code == code_digest()
    assert [module.module for module in found.modules] == ["moments", "embedding", "evaluation"]
    assert Audit.model_validate_json(found.model_dump_json()) == found
    for module in found.modules:
        assert module.reachable > module.claimed_epsilon >= module.epsilon_bound
        assert module.looks == 2
    ids = {check.id for check in found.checks}
    assert ids == {
        "noise-scale",
        "noise-beside",
        "noise-fresh",
        "clipping",
        "patient-once",
        "sampling-rate",
        "closed-list",
        "progress",
        "accountant",
        "rounds",
        "answers",
        "preprocessing",
    }
