"""The privacy statement says what the ledgers say, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsynth.budget import planned_epsilon
from fedsynth.errors import Refused
from fedsynth.plan import Module, StudyPlan
from fedsynth_client.app import app as client_app
from fedsynth_client.policy import save_policy
from fedsynth_client.setup import plan_summary
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import Receipt, StudyState, first_state
from fedsynth_server.rounds import run_study
from fedsynth_server.statement import privacy_statement
from fedsynth_simulations.grid import InProcessGrid

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

Study = Callable[..., StudyState]


@pytest.fixture
def state(tiny_plan: StudyPlan) -> StudyState:
    """What a coordinator holds after a whole study, made by hand."""
    spent = planned_epsilon(tiny_plan, "a")
    receipts = {
        site.name: {
            module: Receipt("ab" * 32, spent, spent, tiny_plan.training(module).steps, True, order)
            for order, module in enumerate(TRAINED, start=1)
        }
        for site in tiny_plan.sites
    }
    return replace(first_state(tiny_plan, None), receipts=receipts)


def with_receipt(state: StudyState, **changes: Any) -> StudyState:
    receipts = {**state.receipts, "b": {**state.receipts["b"], "gan": replace(state.receipts["b"]["gan"], **changes)}}
    return replace(state, receipts=receipts)


def run(folder: Path, plan: StudyPlan) -> StudyState:
    return run_study(InProcessGrid(client_app, {1: folder / "a", 2: folder / "b"}), plan, folder / "of-this-test")


def test_a_statement_states_the_ledgers(tiny_folder: Path, tiny_plan: StudyPlan) -> None:
    statement = privacy_statement(tiny_plan, run(tiny_folder, tiny_plan))
    assert statement.private
    assert (statement.unit, statement.plan_digest) == ("patient", tiny_plan.digest)
    assert (statement.epsilon_budget, statement.delta) == (tiny_plan.privacy.epsilon, tiny_plan.privacy.delta)
    for stated in statement.sites:
        ledger = Site(tiny_folder / stated.name).ledger()
        assert stated.epsilon == pytest.approx(ledger.epsilon(tiny_plan.privacy.delta))
        assert stated.ledger_head == ledger.head
        for mechanism in stated.mechanisms:
            (charged,) = ledger.history(tiny_plan.digest, mechanism.module)
            assert (mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps) == (
                charged.sample_rate,
                charged.noise_multiplier,
                charged.steps,
            )
            assert mechanism.epsilon_alone < stated.epsilon
        assert stated.epsilon < sum(mechanism.epsilon_alone for mechanism in stated.mechanisms)


def test_a_statement_names_the_formulas_that_composed_it_and_what_they_leave_unproven(
    tiny_plan: StudyPlan, state: StudyState
) -> None:
    by_rdp = privacy_statement(tiny_plan, state)
    assert by_rdp.accountant_version.startswith("fedsynth ")
    assert not any("PRV" in item for item in by_rdp.not_covered)
    plan = tiny_plan.model_copy(update={"privacy": tiny_plan.privacy.model_copy(update={"accountant": "prv"})})
    spent = planned_epsilon(plan, "a")
    receipts = {
        site: {module: replace(receipt, epsilon=spent) for module, receipt in by_module.items()}
        for site, by_module in state.receipts.items()
    }
    by_prv = privacy_statement(plan, replace(state, receipts=receipts))
    assert by_prv.accountant_version.startswith("opacus ")
    assert any("direction of removal" in item for item in by_prv.not_covered)
    assert "checked numerically" in plan_summary(plan, "a")


def test_a_seeded_run_is_stated_as_not_private(tiny_folder: Path, tiny_plan: StudyPlan) -> None:
    seeded = tiny_plan.model_copy(update={"privacy": tiny_plan.privacy.model_copy(update={"reproducible_seed": 3})})
    for name in ("a", "b"):
        site = Site(tiny_folder / name)
        save_policy(site.policy().model_copy(update={"allow_reproducible_noise": True}), site.policy_path)
        site.approve(seeded)
    statement = privacy_statement(seeded, run(tiny_folder, seeded))
    assert statement.private is False
    assert "NOT PRIVATE" in statement.noise_source


def test_one_site_without_private_noise_marks_the_whole_release(tiny_plan: StudyPlan, state: StudyState) -> None:
    assert privacy_statement(tiny_plan, state).private
    assert not privacy_statement(tiny_plan, with_receipt(state, private=False)).private


@pytest.mark.parametrize(
    ("changes", "code"), [({"epsilon": 10.01}, "epsilon_above_plan"), ({"epsilon": 1.0}, "epsilon_below_charges")]
)
def test_a_receipt_that_cannot_be_true_is_refused(
    tiny_plan: StudyPlan, state: StudyState, changes: dict[str, float], code: str
) -> None:
    with pytest.raises(Refused, match="Site b states") as refused:
        privacy_statement(tiny_plan, with_receipt(state, **changes))
    assert refused.value.code == code


def test_nothing_is_stated_before_anybody_took_part(tiny_plan: StudyPlan) -> None:
    with pytest.raises(Refused) as refused:
        privacy_statement(tiny_plan, first_state(tiny_plan, None))
    assert refused.value.code == "receipts_missing"
