"""What a hospital sets up, checks and reads: silence refuses, checks spend nothing, the account adds up."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.deployment.checks import Line
from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.plan import Module, StudyPlan
from fedsynth_client.account import account, render
from fedsynth_client.ledger import Limit, Task
from fedsynth_client.outbox import Outbox
from fedsynth_client.policy import SitePolicy, check_module, check_patients, check_plan, load_policy, save_policy
from fedsynth_client.preflight import preflight
from fedsynth_client.setup import init_site, plan_summary
from fedsynth_client.site import Site

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")


def spend(site: Site, plan: StudyPlan, module: str = "autoencoder", rounds: int = 1) -> None:
    ample = Limit(1e6, 1e-5)
    for number in range(1, rounds + 1):
        site.ledger().charge(
            Task(plan.digest, module, number),  # type: ignore[arg-type]
            mechanism(plan, "a", module),  # type: ignore[arg-type]
            max_grad_norm=1.0,
            private=True,
            study_limit=ample,
            lifetime_limit=ample,
        )


def failed(lines: list[Line]) -> dict[str, str]:
    """code -> text of the checks that did not pass."""
    return {line.code: line.what for line in lines if not line.ok}


def test_a_policy_that_only_names_the_site_allows_nothing(tiny_plan: StudyPlan) -> None:
    silent = SitePolicy(site="a")
    with pytest.raises(Refused) as refused:
        check_plan(silent, tiny_plan)
    assert refused.value.code == "plan_not_approved"
    approved = silent.model_copy(update={"approved_plans": [tiny_plan.digest]})
    with pytest.raises(Refused) as refused:
        check_plan(approved, tiny_plan)
    assert refused.value.code == "epsilon_above_policy"
    for module in TRAINED:
        with pytest.raises(Refused) as refused:
            check_module(silent, module)
        assert refused.value.code == "module_not_allowed"
        with pytest.raises(Refused) as refused:
            check_patients(silent, module, 99)
        assert refused.value.code == "cohort_too_small"
        check_patients(silent, module, 100)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('site = "a"\nmax_epsilonn = 3.0\n', "policy_invalid"),
        ('site = "a"\nmax_epsilon = "3"\nmodules = ["everything"]\n', "policy_invalid"),
        ('site = "a"\nmax_epsilon = inf\n', "policy_invalid"),
        ('site = "a"\napproved_plans = ["*"]\n', "policy_invalid"),
        ("site = a\n", "policy_not_toml"),
        ("", "policy_invalid"),
    ],
)
def test_a_policy_with_a_slip_allows_nothing(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_policy(path)
    assert refused.value.code == code


def test_a_policy_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    policy = SitePolicy(site="a", max_epsilon=3.0, max_delta=1e-5, modules=["gan"], approved_plans=["0" * 64])
    save_policy(policy, tmp_path / "policy.toml")
    assert load_policy(tmp_path / "policy.toml") == policy


def test_a_new_site_allows_nothing_and_is_never_overwritten(tmp_path: Path) -> None:
    path = init_site(tmp_path / "site", "north", 250)
    policy = load_policy(path)
    assert policy == SitePolicy(site="north", declared_patients=250)
    with pytest.raises(UsageError) as refused:
        init_site(tmp_path / "site", "north", 250)
    assert refused.value.code == "policy_exists"


@pytest.mark.parametrize(("name", "declared"), [("North Hospital", 250), ("north", 0), ('n"\nmax_epsilon = 9', 250)])
def test_a_name_or_size_that_no_plan_could_hold_writes_nothing(tmp_path: Path, name: str, declared: int) -> None:
    with pytest.raises((ValueError, FedsynthError)):
        init_site(tmp_path / "site", name, declared)
    assert not (tmp_path / "site" / "policy.toml").exists()


def test_a_person_reads_what_a_plan_asks_before_approving(tiny_plan: StudyPlan) -> None:
    text = plan_summary(tiny_plan, "a")
    assert tiny_plan.digest in text
    assert f"{planned_epsilon(tiny_plan, 'a'):.3f} of 10 per patient" in text
    for module in TRAINED:
        assert f"noise multiplier {mechanism(tiny_plan, 'a', module).noise_multiplier:g}" in text
    seeded = tiny_plan.model_copy(update={"privacy": tiny_plan.privacy.model_copy(update={"reproducible_seed": 1})})
    assert "NOT PRIVATE" in plan_summary(seeded, "a") and "NOT PRIVATE" not in text


def test_checks_of_a_good_site_pass_and_spend_nothing(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    lines = [line for line in preflight(tiny_site, tiny_plan) if not line.what.startswith(("disk", "Only"))]
    assert all(line.ok for line in lines), lines
    assert tiny_site.ledger().entries() == []
    (budget,) = [line.what for line in lines if line.what.startswith("budget")]
    assert f"{planned_epsilon(tiny_plan, 'a'):.3f} after the study" in budget


def test_what_was_charged_before_is_not_counted_twice(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    spend(tiny_site, tiny_plan, "gan", 2)
    (budget,) = [line.what for line in preflight(tiny_site, tiny_plan) if line.what.startswith("budget")]
    assert f"{planned_epsilon(tiny_plan, 'a'):.3f} after the study" in budget
    assert f"{tiny_site.ledger().epsilon(1e-5):.3f} now" in budget


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"approved_plans": []}, "plan_not_approved"),
        ({"modules": ["gan"]}, "module_not_allowed"),
        ({"min_patients": 41}, "cohort_too_small"),
        ({"max_epsilon": 9.0}, "budget_exceeded"),
        ({"max_delta": 0.0}, "delta_above_policy"),
        ({"site": "c"}, "site_not_in_plan"),
    ],
)
def test_each_check_names_its_cause(tiny_site: Site, tiny_plan: StudyPlan, changes: dict[str, Any], code: str) -> None:
    spend(tiny_site, tiny_plan)
    save_policy(tiny_site.policy().model_copy(update=changes), tiny_site.policy_path)
    assert code in failed(preflight(tiny_site, tiny_plan))


def test_an_earlier_study_counts_against_the_next(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    spend(tiny_site, tiny_plan.model_copy(update={"name": "earlier"}), "gan", 2)
    assert "budget_exceeded" in failed(preflight(tiny_site, tiny_plan))


def test_a_cohort_of_another_plan_is_seen(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    manifest = tiny_site.cohort_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"classes": ["low", "high"]', '"classes": ["high", "low"]'))
    assert "cohort_of_other_settings" in failed(preflight(tiny_site, tiny_plan))


def test_a_full_outbox_without_its_ledger_is_seen(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    folder = tiny_site.folder / "outbox" / tiny_plan.digest
    folder.mkdir(parents=True)
    (folder / "gan-0001.safetensors").write_bytes(b"")
    assert Outbox(tiny_site.folder).stored() == {f"{tiny_plan.digest}/gan-0001"}
    assert "ledger_incomplete" in failed(preflight(tiny_site, None))
    spend(tiny_site, tiny_plan, "gan")
    assert "ledger_incomplete" not in failed(preflight(tiny_site, None))


def test_the_account_adds_up(tiny_site: Site, tiny_plan: StudyPlan, capsys: pytest.CaptureFixture[str]) -> None:
    empty = account(tiny_site)
    assert (empty.epsilon, empty.left, empty.spendings) == (0.0, 10.0, [])
    for module in TRAINED:
        spend(tiny_site, tiny_plan, module, 2)
    full = account(tiny_site)
    assert full.epsilon == pytest.approx(planned_epsilon(tiny_plan, "a"))
    assert full.left == pytest.approx(10.0 - full.epsilon)
    assert full.head == tiny_site.ledger().head
    assert [(s.module, s.rounds, s.steps) for s in full.spendings] == [(m, 2, 6) for m in TRAINED]
    assert max(s.epsilon_alone for s in full.spendings) < full.epsilon < sum(s.epsilon_alone for s in full.spendings)
    render(full)
    printed = capsys.readouterr().out
    assert f"epsilon {full.epsilon:.4f} of 10" in printed
    assert "chain" in printed and full.head[:16] in printed


def test_an_account_of_a_tampered_ledger_is_refused(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    import sqlite3

    spend(tiny_site, tiny_plan, "gan", 2)
    with sqlite3.connect(tiny_site.ledger_path) as connection:
        connection.execute("DROP TRIGGER entry_is_never_deleted")
        connection.execute("DELETE FROM entry WHERE sequence = 1")
    connection.close()
    with pytest.raises(Refused) as refused:
        account(tiny_site)
    assert refused.value.code == "ledger_tampered"
    assert "ledger_tampered" in failed(preflight(tiny_site, None))


def test_a_policy_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.toml"
    save_policy(SitePolicy(site="a", declared_patients=100), path)
    path.chmod(0o640)
    save_policy(SitePolicy(site="a", declared_patients=200), path)
    assert path.stat().st_mode & 0o777 == 0o640
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_policy(SitePolicy(site="a", declared_patients=300), path)
    assert path.read_bytes() == before
