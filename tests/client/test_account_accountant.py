"""The account reads as the charges were judged: by the accountant of the plan that was charged last."""

from __future__ import annotations

from fedsynth.budget import mechanism
from fedsynth.dp.accounting import epsilon
from fedsynth.plan import StudyPlan
from fedsynth_client.account import Account, account
from fedsynth_client.ledger import Limit, Task
from fedsynth_client.policy import save_policy
from fedsynth_client.preflight import preflight
from fedsynth_client.site import Site


def charged(site: Site, plan: StudyPlan) -> Account:
    ample = Limit(1e6, 1e-5)
    site.ledger().charge(
        Task(plan.digest, "gan", 1),
        mechanism(plan, "a", "gan"),
        max_grad_norm=1.0,
        private=True,
        study_limit=ample,
        lifetime_limit=ample,
        accountant=plan.privacy.accountant,
    )
    return account(site)


def by_prv(plan: StudyPlan) -> StudyPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"accountant": "prv"})})


def test_the_account_composes_as_the_last_charged_plan_does(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    tight = by_prv(tiny_plan)
    tiny_site.approve(tight)
    first = charged(tiny_site, tiny_plan)
    assert (first.accountant, first.epsilon) == ("rdp", epsilon(tiny_site.ledger().history(), 1e-5))
    second = charged(tiny_site, tight)
    assert (second.accountant, second.epsilon) == ("prv", epsilon(tiny_site.ledger().history(), 1e-5, "prv"))
    assert second.epsilon < epsilon(tiny_site.ledger().history(), 1e-5)
    assert second.left == second.max_epsilon - second.epsilon


def test_without_the_plan_the_account_stands_by_rdp(tiny_site: Site, tiny_plan: StudyPlan) -> None:
    tight = by_prv(tiny_plan)
    tiny_site.approve(tight)
    charged(tiny_site, tight)
    plan_file = tiny_site.folder / "plans" / f"{tight.digest}.toml"
    plan_file.write_text("not a plan", encoding="utf-8")
    assert account(tiny_site).accountant == "rdp"
    plan_file.unlink()
    gone = account(tiny_site)
    assert (gone.accountant, gone.epsilon) == ("rdp", epsilon(tiny_site.ledger().history(), 1e-5))
    assert len(gone.spendings) == 1


def test_a_policy_with_less_delta_than_prv_can_tell_still_shows_what_was_spent(
    tiny_site: Site, tiny_plan: StudyPlan
) -> None:
    tight = by_prv(tiny_plan)
    tiny_site.approve(tight)
    charged(tiny_site, tight)
    save_policy(tiny_site.policy().model_copy(update={"max_delta": 1e-12}), tiny_site.policy_path)
    now = account(tiny_site)
    assert (now.accountant, now.epsilon) == ("rdp", epsilon(tiny_site.ledger().history(), 1e-12))
    refused = {line.code for line in preflight(tiny_site, tight) if not line.ok}
    assert "delta_above_policy" in refused
