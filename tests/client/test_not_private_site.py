"""A study without privacy at a site: refused by default, said in plain words, and never forgotten once it was allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from typer.testing import CliRunner

from fedsynth.countersignature import Statement, sign
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import SystemRandomness
from fedsynth.errors import Refused
from fedsynth.plan import Module, StudyPlan, save_plan
from fedsynth.records import check_reply
from fedsynth.statement import PrivacyStatement, SiteStatement
from fedsynth_client.account import account, current_split, render
from fedsynth_client.audit import audit
from fedsynth_client.cli import app
from fedsynth_client.countersign import _ledger_agrees
from fedsynth_client.dry_run import dry_run
from fedsynth_client.dry_run import render as render_dry_run
from fedsynth_client.ledger import Ledger, Limit, Task
from fedsynth_client.policy import SitePolicy, check_plan, load_policy, save_policy
from fedsynth_client.preflight import approved_lines, preflight
from fedsynth_client.sent import render as render_sent
from fedsynth_client.sent import sent
from fedsynth_client.setup import init_site, plan_summary
from fedsynth_client.site import Site
from fedsynth_client.training.statistic import TOTAL, release_statistic

Ask = Callable[[Site, Module, RecordDict], RecordDict]
Content = Callable[..., RecordDict]

BARE = Mechanism(1.0, 0.0, 1)
ENDLESS, AMPLE = Limit(math.inf, 1e-5), Limit(1e3, 1e-5)


def with_privacy(plan: StudyPlan, **privacy: object) -> StudyPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=privacy)})


def allow(site: Site, **changes: object) -> None:
    save_policy(site.policy().model_copy(update=changes), site.policy_path)


def code_of(reply: RecordDict) -> object:
    return reply.config_records["refusal"]["code"] if "refusal" in reply else None


@pytest.fixture(scope="module")
def bare(tiny_plan: StudyPlan) -> StudyPlan:
    return with_privacy(tiny_plan, epsilon=math.inf)


@pytest.fixture
def site(tiny_site: Site, bare: StudyPlan) -> Site:
    """A site whose staff approved the plan, under a policy that says nothing of studies without privacy."""
    tiny_site.approve(bare)
    return tiny_site


@pytest.fixture
def exposed(site: Site, bare: StudyPlan, ask: Ask, task_content: Content) -> Site:
    """The site after one round without privacy."""
    allow(site, allow_not_private=True)
    assert code_of(ask(site, "autoencoder", task_content(bare, "autoencoder"))) is None
    return site


def test_silence_refuses_and_nothing_is_spent(site: Site, bare: StudyPlan, ask: Ask, task_content: Content) -> None:
    for changes in ({}, {"max_epsilon": 1e9}, {"allow_reproducible_noise": True}):
        allow(site, **changes)
        assert code_of(ask(site, "autoencoder", task_content(bare, "autoencoder"))) == "not_private_not_allowed"
    assert site.ledger().entries() == []
    assert account(site).epsilon == 0.0
    assert "not_private_not_allowed" in {line.code for line in preflight(site, bare) if not line.ok}


def test_a_new_sites_policy_refuses_and_says_what_it_would_mean(tmp_path: Path, bare: StudyPlan) -> None:
    path = init_site(tmp_path / "site", "a", 40)
    assert "allow_not_private = false" in path.read_text()
    assert "no private study any more" in path.read_text().replace("\n# ", " ")
    policy = load_policy(path).model_copy(update={"approved_plans": [bare.digest]})
    with pytest.raises(Refused, match="unprotected") as refused:
        check_plan(policy, bare)
    assert refused.value.code == "not_private_not_allowed"


def test_a_seeded_study_without_privacy_needs_both_permissions(bare: StudyPlan) -> None:
    both = with_privacy(bare, reproducible_seed=3)
    policy = SitePolicy(site="a", approved_plans=[both.digest], max_delta=1e-5)
    allowed = {"allow_not_private": True, "allow_reproducible_noise": True}
    for key, code in (
        ("allow_not_private", "not_private_not_allowed"),
        ("allow_reproducible_noise", "reproducible_noise_not_allowed"),
    ):
        with pytest.raises(Refused) as refused:
            check_plan(policy.model_copy(update={**allowed, key: False}), both)
        assert refused.value.code == code
    check_plan(policy.model_copy(update=allowed), both)
    assert plan_summary(both, "a").count("NOT PRIVATE") == 2


def test_a_receipt_says_infinite_and_not_private(site: Site, bare: StudyPlan, ask: Ask, task_content: Content) -> None:
    allow(site, allow_not_private=True)
    reply = ask(site, "autoencoder", task_content(bare, "autoencoder"))
    check_reply(reply, "autoencoder")
    receipt = reply.config_records["receipt"]
    assert receipt["private"] is False
    assert receipt["epsilon"] == receipt["epsilon_lifetime"] == math.inf
    (answer,) = sent(site)
    assert not answer.private
    assert "NOT PRIVATE" in render_sent([answer])
    assert "NOT PRIVATE" in (site.folder / "site.log").read_text()


def test_afterwards_no_private_study_can_use_these_patients(
    exposed: Site, tiny_plan: StudyPlan, bare: StudyPlan, ask: Ask, task_content: Content
) -> None:
    before = len(exposed.ledger().entries())
    allow(exposed, max_epsilon=1e9)
    assert code_of(ask(exposed, "autoencoder", task_content(tiny_plan, "autoencoder"))) == "budget_exceeded"
    assert len(exposed.ledger().entries()) == before
    assert "This cohort took part in a study without privacy" in (exposed.folder / "site.log").read_text()
    (line,) = [line for line in preflight(exposed, tiny_plan) if line.code == "budget_exceeded"]
    assert "took part in a study without privacy" in line.what
    # Another study without privacy adds nothing to what is infinite, as long as the policy allows it.
    another = bare.model_copy(update={"name": "another"})
    exposed.approve(another)
    assert code_of(ask(exposed, "autoencoder", task_content(another, "autoencoder"))) is None
    allow(exposed, allow_not_private=False)
    assert code_of(ask(exposed, "radiogenomics", task_content(another, "radiogenomics"))) == "not_private_not_allowed"


def test_the_account_says_infinity_and_can_be_exported(
    exposed: Site, tiny_plan: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    found = account(exposed)
    assert (found.epsilon, found.left, found.holdout_epsilon) == (math.inf, 0.0, 0.0)
    assert [spending.private for spending in found.spendings] == [False]
    written = json.loads(json.dumps(found.model_dump(mode="json"), allow_nan=False))
    assert written["epsilon"] is None and written["spendings"][0]["epsilon_alone"] is None
    assert type(found).model_validate(written) == found
    render(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT PRIVATE: this cohort took part in a study without privacy" in printed
    assert "epsilon infinite of 10; left 0.0000" in printed
    exported = CliRunner().invoke(app, ["ledger", str(exposed.folder), "--json"])
    assert json.loads(exported.stdout)["data"]["epsilon"] is None
    assert not exposed.ledger().is_private()
    # A private study that was charged before would stay private: each study is judged by its own charges.
    assert exposed.ledger().is_private(tiny_plan.digest)


def test_the_audit_of_a_ledger_names_it(exposed: Site) -> None:
    (line,) = [line for line in audit(exposed) if line.code == "not_private"]
    assert line.state == "warn" and "study without privacy" in line.what
    assert all(line.ok for line in audit(exposed))
    allow(exposed, allow_not_private=False)
    (line,) = [line for line in audit(exposed) if not line.ok]
    assert line.code == "not_private_not_allowed"
    assert "NOT PRIVATE" in " ".join(line.what for line in approved_lines(exposed))


def test_what_held_out_patients_spent_is_judged_beside_it(exposed: Site) -> None:
    ample = Limit(10.0, 1e-5)
    exposed.ledger().charge(
        Task("8" * 64, "evaluation", 1),
        Mechanism(1.0, 5.0, 1),
        max_grad_norm=1.0,
        private=True,
        study_limit=ample,
        lifetime_limit=ample,
        population="holdout",
        split=current_split(exposed) or "",
    )
    allow(exposed, max_holdout_epsilon=2.0)
    assert all(line.ok for line in audit(exposed))
    allow(exposed, max_holdout_epsilon=0.1)
    assert [line.code for line in audit(exposed) if not line.ok] == ["holdout_budget_exceeded"]


def test_approving_says_in_plain_words_what_it_means(tiny_site: Site, bare: StudyPlan, tmp_path: Path) -> None:
    save_plan(bare, tmp_path / "plan.toml")
    asked = CliRunner().invoke(app, ["approve", str(tiny_site.folder), str(tmp_path / "plan.toml")], input="n\n")
    assert asked.exit_code != 0
    assert bare.digest not in tiny_site.policy().approved_plans
    for words in ("NOT PRIVATE", "leaves as it is", "cannot be taken back", "WITHOUT PRIVACY", "no noise"):
        assert words in asked.output
    agreed = CliRunner().invoke(app, ["approve", str(tiny_site.folder), str(tmp_path / "plan.toml"), "--yes"])
    assert "allow_not_private is false" in agreed.output
    planned = dry_run(bare, "a")
    assert "NOT PRIVATE" in planned.marks[0]
    assert "NOT PRIVATE" in render_dry_run(planned, bare.name)


def test_held_out_patients_are_other_people_until_the_cohort_is_prepared_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    more = {"max_grad_norm": 1.0, "private": True}
    ledger.charge(Task("5" * 64, "moments", 1), BARE, study_limit=ENDLESS, lifetime_limit=ENDLESS, split="one", **more)
    evaluation = Mechanism(1.0, 5.0, 1)

    def evaluate(study: str, split: str) -> None:
        ledger.charge(
            Task(study * 64, "evaluation", 1),
            evaluation,
            study_limit=AMPLE,
            lifetime_limit=AMPLE,
            population="holdout",
            split=split,
            **more,
        )

    evaluate("6", "one")
    assert ledger.epsilon(1e-5, population="holdout") < 1.5
    assert ledger.epsilon(1e-5) == math.inf
    with pytest.raises(Refused, match="study without privacy"):
        evaluate("7", "two")  # whoever is held out now may have been a training patient then


def test_a_charge_without_noise_is_never_private_and_never_within_a_finite_budget(tmp_path: Path) -> None:
    ledger, task = Ledger(tmp_path / "ledger.sqlite"), Task("5" * 64, "moments", 1)
    for limits in ((AMPLE, ENDLESS), (ENDLESS, AMPLE)):
        with pytest.raises(Refused) as refused:
            ledger.charge(task, BARE, max_grad_norm=1.0, private=True, study_limit=limits[0], lifetime_limit=limits[1])
        assert refused.value.code == "budget_exceeded"
    assert ledger.entries() == []
    ledger.charge(task, BARE, max_grad_norm=1.0, private=True, study_limit=ENDLESS, lifetime_limit=ENDLESS)
    assert ledger.entries()[0].body["private"] is False
    assert ledger.history() == [BARE]
    for accountant in ("rdp", "prv"):
        assert ledger.epsilon(1e-5, accountant) == math.inf  # type: ignore[arg-type]


def test_a_statistic_without_noise_is_the_sum_itself() -> None:
    rows = torch.randn(30, 7, generator=torch.Generator().manual_seed(1)) / 10
    released = release_statistic(rows, BARE, 1.0, SystemRandomness()).weights[TOTAL]
    torch.testing.assert_close(released, rows.double().sum(0).float())
    empty = release_statistic(rows[:0], BARE, 1.0, SystemRandomness()).weights[TOTAL]
    assert torch.equal(empty, torch.zeros(7))


def test_a_countersignature_states_infinity_and_agrees_with_the_ledger(exposed: Site, bare: StudyPlan) -> None:
    ledger = exposed.ledger()
    stated = SiteStatement(
        name="a",
        nominal_patients=40,
        epsilon=math.inf,
        epsilon_lifetime=math.inf,
        ledger_head=ledger.head,
        mechanisms=[],
    )
    statement = PrivacyStatement(
        study=bare.name,
        plan_digest=bare.digest,
        private=False,
        epsilon_budget=math.inf,
        delta=1e-5,
        accountant="rdp",
        accountant_version="fedsynth",
        noise_source="none",
        sites=[stated],
        trust_model="",
        composition="",
        not_covered=[],
        intended_use="",
        forbidden_use="",
    )
    assert "spent epsilon infinite" in _ledger_agrees(exposed, bare, statement, stated)
    with pytest.raises(Refused, match="its ledger says infinite"):
        _ledger_agrees(exposed, bare, statement, stated.model_copy(update={"epsilon": 3.0}))
    with pytest.raises(Refused, match="no noise"):
        _ledger_agrees(exposed, bare, statement.model_copy(update={"private": True}), stated)
    signed = sign(
        Statement(
            site="a",
            plan_digest=bare.digest,
            content="0" * 64,
            evidence={},
            ledger_head=ledger.head,
            epsilon=math.inf,
            attacks=None,
        ),
        Ed25519PrivateKey.generate(),
    )
    assert json.loads(signed.statement, parse_constant=pytest.fail)["epsilon"] is None
    assert signed.stated.epsilon == math.inf
