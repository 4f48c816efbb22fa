"""The coordinator's round of evaluation: after everything else, without holding anything up, and read as what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from safetensors.numpy import load_file, save_file

from fedsynth.budget import evaluation_mechanism, planned_epsilon
from fedsynth.errors import Refused
from fedsynth.evaluation.site_scores import ROW_SIZE, evaluators_template
from fedsynth.evaluation.site_values import FILE, SiteEvaluation
from fedsynth.plan import MODULES, SiteEvaluationPlan, StudyPlan
from fedsynth.records import EVALUATORS, refusal, state_digest
from fedsynth.statement import PrivacyStatement
from fedsynth_client.app import app as client_app
from fedsynth_client.countersign import _held_out_agree, _ledger_agrees
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site
from fedsynth_server import rounds, site_evaluation
from fedsynth_server.checkpoint import Receipt, StudyState, load_state
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.forecast import forecast
from fedsynth_server.forecast_command import show_forecast
from fedsynth_server.rounds import run_study
from fedsynth_server.statement import check_holdout_receipt, privacy_statement
from fedsynth_server.status import read_status
from fedsynth_simulations.grid import InProcessGrid

NODES = {10: "a", 11: "b"}
Edit = Callable[[RecordDict], RecordDict]


def as_it_is(content: RecordDict) -> RecordDict:
    return content


class Spoiling(InProcessGrid):
    """Changes what site b answers to an evaluation; remembers what was asked."""

    def __init__(self, folder: Path, edit: Edit = as_it_is, nodes: dict[int, str] | None = None) -> None:
        super().__init__(client_app, {node: folder / name for node, name in (nodes or NODES).items()})
        self.edit, self.asked = edit, list[tuple[int, str]]()

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        self.asked += [(m.metadata.dst_node_id, m.metadata.message_type) for m in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return [
            make_message(reply.metadata, self.edit(reply.content))
            if reply.metadata.message_type == "evaluate.holdout" and reply.metadata.src_node_id == 11
            else reply
            for reply in super().pull_messages(message_ids)
        ]

    @property
    def evaluations(self) -> list[int]:
        return [node for node, kind in self.asked if kind == "evaluate.holdout"]


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    """One short module and an evaluation."""
    short = {
        name: tiny_plan.training(name).model_copy(update={"rounds": 1, "steps_per_round": 1})  # type: ignore[arg-type]
        for name in ("autoencoder", "radiogenomics", "gan")
    }
    return tiny_plan.model_copy(update={**short, "site_evaluation": SiteEvaluationPlan(epsilon=8.0)})


@pytest.fixture(scope="module")
def _trained(plan: StudyPlan, _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites with held-out patients that allow the evaluation, and a study that has run up to it."""
    root = tmp_path_factory.mktemp("trained") / "tiny"
    shutil.copytree(_tiny_template, root)
    for name in NODES.values():
        site = Site(root / name)
        manifest = json.loads((site.cohort_path / "manifest.json").read_text())
        for row in manifest["patients"][:15]:
            row["split"] = "holdout"
        (site.cohort_path / "manifest.json").write_text(json.dumps(manifest))
        for path in (site.cohort_path / "patients").iterdir():
            held = load_file(path)
            held["mask"][:2] = 0
            save_file(held, path)
        changes: dict[str, Any] = {"modules": [*MODULES, "evaluation"], "max_holdout_epsilon": 8.0}
        save_policy(site.policy().model_copy(update=changes), site.policy_path)
        site.approve(plan)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds, "_POLL_SECONDS", 0.01)

        def stops(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(rounds, "_evaluate", stops)
        with pytest.raises(KeyboardInterrupt):
            run_study(Spoiling(root), plan, root / "study")
    return root


@pytest.fixture
def folder(_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rounds, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(rounds, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(rounds, "_HELLO_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(site_evaluation, "STEPS", 3)
    monkeypatch.setattr(site_evaluation, "PATIENTS", 10)
    shutil.copytree(_trained, tmp_path / "tiny")
    return tmp_path / "tiny"


def evaluated(folder: Path) -> SiteEvaluation:
    return SiteEvaluation.model_validate_json((folder / "study" / FILE).read_text())


def charges(folder: Path, site: str) -> list[str]:
    return [e.body["module"] for e in Site(folder / site).ledger().entries() if e.kind == "charge"]


def test_all_sites_evaluate_once_and_the_file_says_what_they_found(folder: Path, plan: StudyPlan) -> None:
    before = load_state(folder / "study", plan)
    assert before is not None and not before.missing_rounds(plan) and not before.finished(plan)
    grid = Spoiling(folder)
    state = run_study(grid, plan, folder / "study")
    assert grid.evaluations == [10, 11] and state.finished(plan)
    found = evaluated(folder)
    assert [site.site for site in found.sites] == ["a", "b"] and found.missing == {} and found.private
    assert found.plan_digest == plan.digest and found.evaluators == state_digest(state.weights[EVALUATORS])
    assert found.sites[0].noise_multiplier == evaluation_mechanism(plan).noise_multiplier
    assert [score.name for score in found.pooled] == ["dice", "slices", "morphology", "label"]
    for site in found.sites:
        assert site.epsilon == Site(folder / site.site).ledger().epsilon(plan.privacy.delta, population="holdout")
        assert sum(score.patients for score in site.scores) / 4 == pytest.approx(15, abs=8)
    one = [site.scores[3].patients for site in found.sites]
    assert found.pooled[3].patients == pytest.approx(sum(one), abs=1e-4)
    # A study that is done asks nobody again, and puts the file back where it is missing.
    (folder / "study" / FILE).unlink()
    grid = Spoiling(folder)
    run_study(grid, plan, folder / "study")
    assert grid.asked == [] and evaluated(folder) == found


def test_training_patients_pay_nothing_and_the_statement_says_who_paid(folder: Path, plan: StudyPlan) -> None:
    state = run_study(Spoiling(folder), plan, folder / "study")
    stated = privacy_statement(plan, state)
    assert stated.holdout_epsilon_budget == 8.0 and "Held-out patients are other people" in stated.composition
    for site in stated.sites:
        assert site.epsilon == pytest.approx(planned_epsilon(plan, site.name), abs=1e-9)
        assert {m.module for m in site.mechanisms} == set(plan.modules)
        assert site.holdout is not None and 7.9 < site.holdout.epsilon <= 8.0
        assert site.holdout.noise_multiplier == evaluation_mechanism(plan).noise_multiplier
        # The head covers the charge of the evaluation too.
        assert site.ledger_head == Site(folder / site.name).ledger().head
    assert PrivacyStatement.model_validate_json(stated.model_dump_json()) == stated


def test_a_statement_of_a_plan_without_evaluation_is_as_it_was(folder: Path, plan: StudyPlan) -> None:
    state = load_state(folder / "study", plan)
    assert state is not None
    stated = privacy_statement(plan, state)  # not evaluated yet: released all the same
    assert all(site.holdout is None for site in stated.sites)
    older = json.loads(stated.model_dump_json())
    del older["holdout_epsilon_budget"]
    for site in older["sites"]:
        del site["holdout"]
    assert PrivacyStatement.model_validate(older).sites == stated.sites


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_holdout_epsilon": 0.0}, "holdout_epsilon_above_policy"),
        ({"modules": list(MODULES)}, "module_not_allowed"),
    ],
)
def test_a_site_that_does_not_allow_it_costs_the_study_its_scores_and_nothing_else(
    folder: Path, plan: StudyPlan, changes: dict[str, Any], code: str
) -> None:
    site = Site(folder / "b")
    save_policy(site.policy().model_copy(update=changes), site.policy_path)
    state = run_study(Spoiling(folder), plan, folder / "study")
    found = evaluated(folder)
    assert state.finished(plan) and found.missing == {"b": code}
    assert [each.site for each in found.sites] == ["a"]
    assert [(s.value, s.patients) for s in found.pooled] == [(s.value, s.patients) for s in found.sites[0].scores]
    assert "evaluation" not in charges(folder, "b")
    stated = privacy_statement(plan, state)
    assert {each.name: each.holdout is None for each in stated.sites} == {"a": False, "b": True}
    # The coordinator cannot know whether one of whom nothing is stated was charged.
    assert "lost on the way cost them at most the budget" in stated.composition


def test_a_study_of_which_no_site_evaluates_ends_all_the_same(folder: Path, plan: StudyPlan) -> None:
    nobody = Spoiling(folder, nodes={12: "b"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds._Sites, "connected", lambda *_, **__: {})
        state = run_study(nobody, plan, folder / "study")
    found = evaluated(folder)
    assert state.finished(plan) and found.sites == [] and found.pooled == []
    assert found.missing == {"a": "not_connected", "b": "not_connected"}
    status = read_status(folder / "study")
    assert status is not None and status.phase == "finished"
    again = load_state(folder / "study", plan)
    assert again is not None and again.evaluated == state.evaluated


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(content: RecordDict) -> RecordDict:
        total = change(content.array_records["evaluation"]["total"].numpy())
        return RecordDict({**dict(content.items()), "evaluation": ArrayRecord({"total": Array(total)})})

    return edit


def receipt(**values: Any) -> Edit:
    return lambda content: RecordDict(
        {**dict(content.items()), "receipt": ConfigRecord({**dict(content.config_records["receipt"]), **values})}
    )


BROKEN: dict[str, Edit] = {
    "arrays_not_finite": weights(lambda x: x * np.float32("nan")),
    "arrays_too_large": weights(lambda x: x * 0 + np.float32(1e6)),
    "arrays_differ": weights(lambda x: x[:3]),
    "epsilon_above_plan": receipt(epsilon=8.1),
    "epsilon_below_charges": receipt(epsilon=1.0),
    "steps_above_plan": receipt(steps=2),
    "receipt_not_private": receipt(private=False),
    "reply_not_in_closed_list": lambda content: RecordDict(
        {**dict(content.items()), "scores": ArrayRecord({"dice": Array(np.zeros(15, np.float32))})}
    ),
    "budget_exceeded": lambda _: refusal("budget_exceeded"),
}


@pytest.mark.parametrize(("code", "edit"), BROKEN.items(), ids=BROKEN.keys())
def test_a_broken_answer_leaves_its_site_out(folder: Path, plan: StudyPlan, code: str, edit: Edit) -> None:
    state = run_study(Spoiling(folder, edit), plan, folder / "study")
    assert state.finished(plan) and evaluated(folder).missing == {"b": code}
    assert privacy_statement(plan, state).private


def test_a_site_whose_answer_was_lost_reads_what_it_spent_before_it_signs(folder: Path, plan: StudyPlan) -> None:
    """It was charged and the coordinator never asks again: the site could not sign any release of the study otherwise."""
    state = run_study(Spoiling(folder, BROKEN["budget_exceeded"]), plan, folder / "study")
    stated = privacy_statement(plan, state)
    site, of_b = Site(folder / "b"), next(each for each in stated.sites if each.name == "b")
    spent = site.ledger().epsilon(plan.privacy.delta, "rdp", plan.digest, population="holdout")
    assert "evaluation" in charges(folder, "b") and of_b.holdout is None and spent > 0
    assert f"held-out patients spent {spent:.4f} of" in _ledger_agrees(site, plan, stated, of_b)
    smaller = plan.model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=spent / 2)})
    with pytest.raises(Refused, match="held-out patients in this study"):  # more than silence may stand for
        _held_out_agree(smaller, of_b, spent)
    with pytest.raises(Refused, match="held-out patients in this study"):
        _held_out_agree(plan, next(each for each in stated.sites if each.name == "a"), spent / 2)


def test_a_coordinator_killed_before_the_answers_asks_again_with_the_same_evaluators(
    folder: Path, plan: StudyPlan
) -> None:
    """Sites have answered, the checkpoint does not know: their stored answers come again, and nobody pays twice."""
    with pytest.MonkeyPatch.context() as patched:
        attempt = rounds._attempt

        def killed(*arguments: Any) -> None:
            attempt(*arguments)
            raise KeyboardInterrupt

        patched.setattr(rounds, "_attempt", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study(Spoiling(folder), plan, folder / "study")
    stopped = load_state(folder / "study", plan)
    assert stopped is not None and stopped.evaluated is None and not (folder / "study" / FILE).exists()
    progress = progress_of(folder / "study", plan)
    assert progress is not None and not progress.finished(plan) and "evaluation 0/1" in progress.summary(plan)

    state = run_study(Spoiling(folder), plan, folder / "study")
    assert state_digest(state.weights[EVALUATORS]) == state_digest(stopped.weights[EVALUATORS])
    for name in NODES.values():
        assert charges(folder, name).count("evaluation") == 1
        stored = next((folder / name / "outbox").glob("*/evaluation-0001.safetensors"))
        assert np.array_equal(load_file(stored)["total"], state.weights["evaluation"][name].numpy())
    progress = progress_of(folder / "study", plan)
    assert progress is not None and progress.finished(plan) and "evaluation 1/1" in progress.summary(plan)
    assert progress.heads == {name: Site(folder / name).ledger().head for name in NODES.values()}


def test_evaluators_are_those_of_the_plan_and_come_out_the_same_again(folder: Path, plan: StudyPlan) -> None:
    state = load_state(folder / "study", plan)
    assert state is not None
    first, second = (site_evaluation.make_evaluators(plan, state) for _ in range(2))
    template = evaluators_template(plan)
    assert {name: tuple(v.shape) for name, v in first.items()} == {n: tuple(v.shape) for n, v in template.items()}
    assert all(first[name].dtype == template[name].dtype for name in template)
    assert state_digest(first) == state_digest(second)
    assert float(first["label_floor"].sum()) == pytest.approx(1.0)
    assert site_evaluation.evaluation_template()["total"].shape == (ROW_SIZE,)


def test_a_receipt_of_held_out_patients_is_checked_on_its_own(plan: StudyPlan) -> None:
    good = Receipt(head="0" * 64, epsilon=7.999, epsilon_lifetime=20.0, steps=1, private=True, order=1)
    check_holdout_receipt(plan, "a", good)
    without = plan.model_copy(update={"site_evaluation": None})
    with pytest.raises(Refused) as refused:
        check_holdout_receipt(without, "a", good)
    assert refused.value.code == "epsilon_above_plan"


def test_a_checkpoint_of_an_older_version_is_read(folder: Path, tiny_plan: StudyPlan) -> None:
    """Without an evaluation in the plan nothing of it is in the state."""
    state = StudyState(tiny_plan.digest, {})
    assert state.evaluated is None and state.newest_receipt("a") is None
    assert tiny_plan.activities == tiny_plan.modules
    with pytest.raises(ValueError, match="not evaluated"):
        site_evaluation.site_evaluation(tiny_plan, state)


def test_the_forecast_says_what_the_noise_will_leave(
    plan: StudyPlan, tiny_plan: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forecast(tiny_plan).site_evaluation is None
    foretold = forecast(plan).site_evaluation
    assert foretold is not None and foretold.epsilon == 8.0
    assert foretold.pooled_width < foretold.width["a"] == foretold.width["b"] < 1
    drowned = plan.model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=0.1)})
    poor = forecast(drowned).site_evaluation
    assert poor is not None and poor.pooled_width == 1.0 and "next to nothing" in poor.sentence
    # What training patients will have spent does not know of it.
    assert forecast(plan).epsilon == forecast(plan.model_copy(update={"site_evaluation": None})).epsilon
    show_forecast(plan, as_json=True)
    assert json.loads(capsys.readouterr().out)["data"]["site_evaluation"]["epsilon"] == 8.0
    show_forecast(plan, as_json=False)
    assert "site evaluation: epsilon 8 of held-out patients" in " ".join(capsys.readouterr().out.split())


def test_noise_of_sites_adds_up_in_the_pooled_scores(folder: Path, plan: StudyPlan) -> None:
    state = run_study(Spoiling(folder), plan, folder / "study")
    sums = state.weights["evaluation"]
    doubled = state.with_weights(evaluation=dict.fromkeys(sums, 2 * sums["a"]))
    found = site_evaluation.site_evaluation(plan, doubled)
    alone, pooled = found.sites[0].scores[0], found.pooled[0]
    assert pooled.patients == pytest.approx(2 * alone.patients)
    # As many patients again and independent noise: the error shrinks by the square root of two.
    assert alone.standard_error is not None and pooled.standard_error is not None
    assert pooled.standard_error == pytest.approx(alone.standard_error / 2**0.5)
