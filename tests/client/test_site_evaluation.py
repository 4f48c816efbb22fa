"""A site evaluates a generator on its held-out patients: one noisy sum leaves, on an account of their own.

Every question goes through the ClientApp over the in-process grid, as bytes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedsynth.budget import charge, evaluation_mechanism, mechanism, planned_epsilon
from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.dp.randomness import SystemRandomness
from fedsynth.errors import Refused
from fedsynth.evaluation.networks import SliceClassifier, SmallUNet
from fedsynth.evaluation.site_scores import ROW_SIZE, evaluators, evaluators_template, rows
from fedsynth.plan import MODULES, Population, SiteEvaluationPlan, StudyPlan
from fedsynth.records import EVALUATORS, MESSAGE_TYPES, State, check_reply, task_record, to_record
from fedsynth_client import rounds
from fedsynth_client.account import account, render
from fedsynth_client.app import app as client_app
from fedsynth_client.audit import audit
from fedsynth_client.cohort import Cohort, load_cohort
from fedsynth_client.dry_run import dry_run
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.ledger import Entry, Ledger, Limit, Standing, Task, _history
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.preflight import preflight
from fedsynth_client.setup import plan_summary
from fedsynth_client.site import Site
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.evaluation import evaluate_holdout
from fedsynth_server.checkpoint import first_state
from fedsynth_simulations.grid import InProcessGrid

HELD_OUT = 12
AMPLE = Limit(1e6, 1e-5)
Content = Callable[..., RecordDict]
Ask = Callable[[Site, str, RecordDict], RecordDict]


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    """The tiny plan with an evaluation."""
    return tiny_plan.model_copy(update={"site_evaluation": SiteEvaluationPlan(epsilon=2.0)})


def hold_out(site: Site, chosen: Callable[[int], bool]) -> None:
    """Set who is held out, as preparing anew would; patients are numbered as in the manifest."""
    path = site.cohort_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for i, row in enumerate(manifest["patients"]):
        row["split"] = "holdout" if chosen(i) else "train"
    path.write_text(json.dumps(manifest))


def change_policy(site: Site, **changes: Any) -> None:
    save_policy(site.policy().model_copy(update=changes), site.policy_path)


@pytest.fixture
def site(tiny_site: Site, plan: StudyPlan) -> Site:
    """Site ``a`` with 12 held-out patients and a policy that allows the evaluation."""
    hold_out(tiny_site, lambda i: i < HELD_OUT)
    for path in (tiny_site.cohort_path / "patients").iterdir():  # tumour in some slices and none in others
        held = load_file(path)
        held["mask"][:2] = 0
        save_file(held, path)
    change_policy(tiny_site, modules=[*MODULES, "evaluation"], max_holdout_epsilon=2.0)
    tiny_site.approve(plan)
    return tiny_site


def random_evaluators(plan: StudyPlan, factor: float = 1.0) -> State:
    """Evaluators that answer at random, but always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        networks = {
            "unet": SmallUNet(len(plan.image.sequences)),
            "classifier": SliceClassifier(len(plan.image.sequences)),
        }
    state = {f"{name}/{k}": factor * v for name, net in networks.items() for k, v in net.state_dict().items()}
    template = evaluators_template(plan)
    return {
        **state,
        "morphology_floor": torch.full_like(template["morphology_floor"], 0.5),
        "label_floor": torch.tensor([0.3, 0.7]),
    }


def asked(plan: StudyPlan, state: State | None = None, *, head: str = "") -> RecordDict:
    """The task of an evaluation."""
    weights = {**first_state(plan, None).weights, EVALUATORS: state or random_evaluators(plan)}
    task = task_record(plan.digest, "evaluation", 1, "a", head)
    return RecordDict(
        {"task": task, **{name: to_record(weights[name]) for name in (EVALUATORS, "autoencoder", "radiogenomics")}}
    )


def held_out(site: Site, plan: StudyPlan) -> Cohort:
    return load_cohort(site.cohort_path, plan.morphology.features).split("holdout")


def truth(site: Site, plan: StudyPlan, state: State | None = None) -> torch.Tensor:
    """The rows of the site's held-out patients, which nobody outside ever sees."""
    weights = {**first_state(plan, None).weights, EVALUATORS: state or random_evaluators(plan)}
    return rows(evaluators(plan, weights), patients_of({"a": held_out(site, plan)}))


def total_of(reply: RecordDict) -> np.ndarray:
    return np.asarray(reply.array_records["evaluation"]["total"].numpy())


def code_of(reply: RecordDict) -> str:
    assert set(reply) == {"refusal"}, f"not refused: {list(reply)}"
    return str(reply.config_records["refusal"]["code"])


def kinds(site: Site) -> list[str]:
    return [entry.kind for entry in site.ledger().entries()]


def again(plan: StudyPlan, number: int) -> StudyPlan:
    return plan.model_copy(update={"purpose": f"The same once more, number {number}"})


# --- what leaves ---------------------------------------------------------------------------------------------------


def test_one_noisy_sum_leaves_and_held_out_patients_pay_for_it(site: Site, plan: StudyPlan, ask: Ask) -> None:
    reply = ask(site, "evaluation", asked(plan))
    check_reply(reply, "evaluation")
    assert set(reply) == {"evaluation", "progress", "receipt"}
    assert total_of(reply).shape == (ROW_SIZE,) and not reply.metric_records["progress"]
    assert kinds(site) == ["charge", "released", "sent"]
    (body,) = [e.body for e in site.ledger().entries() if e.kind == "charge"]
    assert (body["population"], body["module"], body["steps"], body["sample_rate"]) == ("holdout", "evaluation", 1, 1.0)
    ledger, receipt = site.ledger(), reply.config_records["receipt"]
    spent = ledger.epsilon(plan.privacy.delta, population="holdout")
    assert 1.9 < spent <= 2.0
    assert receipt["epsilon"] == spent and receipt["steps"] == 1 and receipt["head"] == ledger.head
    assert ledger.epsilon(plan.privacy.delta) == 0.0  # training patients paid nothing


def test_training_patients_and_held_out_patients_have_accounts_of_their_own(
    site: Site, plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    alone = float(ask(site, "autoencoder", task_content(plan, "autoencoder")).config_records["receipt"]["epsilon"])
    held = ask(site, "evaluation", asked(plan)).config_records["receipt"]
    later = ask(site, "gan", task_content(plan, "gan")).config_records["receipt"]
    both = [mechanism(plan, "a", "autoencoder"), mechanism(plan, "a", "gan")]
    assert alone == epsilon(both[:1], plan.privacy.delta)
    assert later["epsilon"] == epsilon(both, plan.privacy.delta)
    assert held["epsilon"] == held["epsilon_lifetime"] == epsilon([evaluation_mechanism(plan)], plan.privacy.delta)
    # What the plan foresees for training patients does not know of the evaluation at all.
    without = plan.model_copy(update={"site_evaluation": None})
    assert planned_epsilon(plan, "a") == planned_epsilon(without, "a")


def test_asked_twice_it_sends_the_same_bytes_and_charges_once(site: Site, plan: StudyPlan, ask: Ask) -> None:
    first, second = (
        ask(site, "evaluation", asked(plan)),
        ask(site, "evaluation", asked(plan, random_evaluators(plan, 2))),
    )
    assert total_of(first).tobytes() == total_of(second).tobytes()
    assert kinds(site) == ["charge", "released", "sent", "sent"]


def test_no_score_of_a_patient_and_no_true_sum_is_in_any_byte_that_leaves(site: Site, plan: StudyPlan) -> None:
    leaving: list[bytes] = []

    def tap(direction: str, _node: int, data: bytes) -> None:
        if direction == "to coordinator":
            leaving.append(data)

    grid = InProcessGrid(client_app, {1: site.folder}, wiretap=tap)
    (reply,) = grid.send_and_receive([Message(asked(plan), dst_node_id=1, message_type=MESSAGE_TYPES["evaluation"])])
    real = truth(site, plan)
    sums = real.sum(0)
    numbers = {*real.flatten().tolist(), *sums.tolist(), *(3 * real).flatten().tolist(), *(3 * sums).tolist()}
    forms = [np.array(x, kind).tobytes() for x in numbers if x not in (0.0, 1.0, -1.0) for kind in ("<f4", "<f8")]
    assert len(forms) > 50
    assert leaving and not any(form in data for form in forms for data in leaving)
    # The search finds what leaves: it would have found them.
    assert any(total_of(reply.content).astype("<f4").tobytes()[:4] in data for data in leaving)
    assert np.all(np.abs(total_of(reply.content) - sums.numpy()) > 1e-4)


def test_the_noise_is_that_of_the_charge(site: Site, plan: StudyPlan) -> None:
    """As many sums as a study would never release, beside the true one."""
    cost = charge(plan, "a", "evaluation")
    weights = {**first_state(plan, None).weights, EVALUATORS: random_evaluators(plan)}
    real, patients = truth(site, plan).sum(0), held_out(site, plan)
    one = patients.rows(np.arange(len(patients)) < 1)
    of_one, used = rows(evaluators(plan, weights), patients_of({"a": one})).sum(0), evaluators(plan, weights)
    noise = np.array(
        [
            (evaluate_holdout(used, one, cost.mechanism, 1.0, SystemRandomness()).weights["total"] - of_one).numpy()
            for _ in range(120)
        ]
    )
    expected, count = cost.mechanism.noise_multiplier, noise.size
    assert abs(noise.mean()) < 5 * expected / math.sqrt(count)
    assert noise.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
    assert real.norm() <= HELD_OUT  # rows of norm at most 1
    assert (
        epsilon([Mechanism(1.0, expected, 1)], plan.privacy.delta)
        <= 2.0
        < epsilon([Mechanism(1.0, expected - 0.01, 1)], plan.privacy.delta)
    )


# --- whose data it depends on, and by how much -----------------------------------------------------------------------


def test_a_held_out_patient_more_or_less_changes_the_sum_by_that_patient_s_row_alone(
    site: Site, plan: StudyPlan
) -> None:
    used = evaluators(plan, {**first_state(plan, None).weights, EVALUATORS: random_evaluators(plan)})
    patients = held_out(site, plan)
    whole = rows(used, patients_of({"a": patients}))
    assert whole.norm(dim=1).max() <= 1 + 1e-12 and (whole != 0).any(dim=1).all()
    for left_out in (0, 5, HELD_OUT - 1):
        rest = rows(used, patients_of({"a": patients.rows(np.arange(HELD_OUT) != left_out)}))
        others = [i for i in range(HELD_OUT) if i != left_out]
        assert torch.equal(rest, whole[others])  # to the last bit: no row depends on who else is there
        assert (whole.sum(0) - rest.sum(0)).norm() <= 1 + 1e-9


WILD: list[Callable[[Cohort], Cohort]] = [
    lambda c: replace(c, images=c.images * np.float16("nan")),
    lambda c: replace(c, images=c.images * 0 + np.float16("inf")),
    lambda c: replace(c, masks=c.masks * 0),
    lambda c: replace(c, masks=c.masks * 0 + 1),
    lambda c: replace(c, genes=c.genes * np.float32("nan")),
    lambda c: replace(c, genes=c.genes * 0 + np.float32(1e30)),
    lambda c: replace(c, morphology=c.morphology * np.float32("nan")),
    lambda c: replace(c, morphology=c.morphology * 0 + np.float32(1e9)),
    lambda c: replace(c, labels=c.labels * 0 - 1),
    lambda c: replace(c, labels=c.labels * 0 + 99),
]


@pytest.mark.parametrize("change", WILD)
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_whatever_a_patient_and_the_networks_are_like_a_row_is_at_most_1(
    site: Site, plan: StudyPlan, change: Callable[[Cohort], Cohort], factor: float
) -> None:
    """Networks that were sent to make a row large, patients whose files are odd: no error either, which would tell."""
    used = evaluators(plan, {**first_state(plan, None).weights, EVALUATORS: random_evaluators(plan, factor)})
    patients = held_out(site, plan)
    found = rows(used, patients_of({"a": change(patients.rows(np.arange(HELD_OUT) < 2))}))
    assert torch.isfinite(found).all()
    assert found.norm(dim=1).max() <= 1 + 1e-12


def test_training_patients_have_no_influence_on_the_reply(site: Site, plan: StudyPlan, ask: Ask) -> None:
    """With the noise of a seed, which is the same in both runs, not a bit differs; a held-out patient does make one."""
    change_policy(site, allow_reproducible_noise=True)
    seeded = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"reproducible_seed": 1})})
    site.approve(seeded)
    before = total_of(ask(site, "evaluation", asked(seeded)))
    entries = json.loads((site.cohort_path / "manifest.json").read_text())["patients"]

    def spoil(keys: list[str]) -> np.ndarray:
        for key in keys:
            path = site.cohort_path / "patients" / f"{key}.safetensors"
            held = load_file(path)
            save_file({"images": 1 - held["images"], "mask": np.zeros_like(held["mask"])}, path)
        site.ledger_path.unlink()
        for stored in site.folder.glob("outbox/*/*"):
            stored.unlink()
        return total_of(ask(site, "evaluation", asked(seeded)))

    assert spoil([row["key"] for row in entries if row["split"] == "train"]).tobytes() == before.tobytes()
    assert spoil([next(row["key"] for row in entries if row["split"] == "holdout")]).tobytes() != before.tobytes()


def test_the_images_of_training_patients_are_not_even_opened(site: Site, plan: StudyPlan, ask: Ask) -> None:
    entries = json.loads((site.cohort_path / "manifest.json").read_text())["patients"]
    for key in (row["key"] for row in entries if row["split"] == "train"):
        (site.cohort_path / "patients" / f"{key}.safetensors").unlink()
    assert "evaluation" in ask(site, "evaluation", asked(plan))


def test_a_cohort_that_changes_while_it_is_read_is_refused_before_anything_is_spent(
    site: Site, plan: StudyPlan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes(folder: Path, features: list[str], only: Any = None) -> Cohort:
        found = load_cohort(folder, features, only)
        hold_out(site, lambda i: i >= 40 - HELD_OUT)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "load_cohort", changes)
        assert code_of(ask(site, "evaluation", asked(plan))) == "cohort_changed"
    assert kinds(site) == []
    assert "evaluation" in ask(site, "evaluation", asked(plan))


def test_a_patient_who_was_trained_on_is_never_evaluated_on(site: Site, plan: StudyPlan) -> None:
    used = evaluators(plan, {**first_state(plan, None).weights, EVALUATORS: random_evaluators(plan)})
    everybody = load_cohort(site.cohort_path, plan.morphology.features)
    with pytest.raises(ValueError, match="held-out"):
        evaluate_holdout(used, everybody, evaluation_mechanism(plan), 1.0, SystemRandomness())


def test_a_site_without_held_out_patients_answers_with_noise(site: Site, plan: StudyPlan, ask: Ask) -> None:
    """A refusal would tell their number."""
    hold_out(site, lambda _: False)
    assert np.abs(total_of(ask(site, "evaluation", asked(plan)))).max() > 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_holdout_epsilon": 0.0}, "holdout_epsilon_above_policy"),
        ({"max_holdout_epsilon": 1.9}, "holdout_epsilon_above_policy"),
        ({"modules": list(MODULES)}, "module_not_allowed"),
        ({"approved_plans": []}, "plan_not_approved"),
        ({"max_delta": 1e-7}, "delta_above_policy"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_and_costs_nothing(
    site: Site, plan: StudyPlan, ask: Ask, changes: dict[str, Any], code: str
) -> None:
    change_policy(site, **changes)
    assert code_of(ask(site, "evaluation", asked(plan))) == code
    assert kinds(site) == []


def test_silence_refuses_the_evaluation_and_nothing_else(
    tiny_site: Site, plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    assert SitePolicy(site="a").max_holdout_epsilon == 0.0
    tiny_site.approve(plan)
    assert code_of(ask(tiny_site, "evaluation", asked(plan))) == "module_not_allowed"
    assert "autoencoder" in ask(tiny_site, "autoencoder", task_content(plan, "autoencoder"))


def test_a_plan_without_an_evaluation_has_no_such_round(site: Site, tiny_plan: StudyPlan, ask: Ask) -> None:
    assert code_of(ask(site, "evaluation", asked(tiny_plan))) == "round_not_in_plan"
    assert kinds(site) == []


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.full_like(x, value)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("arrays_not_finite", poisoned(math.nan)),
        ("arrays_not_finite", poisoned(math.inf)),
        ("arrays_too_large", poisoned(1e6)),
        ("arrays_differ", lambda x: x[:1]),
        ("arrays_differ", lambda x: x.astype(np.float64)),
    ],
)
def test_poisoned_evaluators_are_refused_before_anything_is_spent(
    site: Site, plan: StudyPlan, ask: Ask, code: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    content = asked(plan)
    arrays = {key: array.numpy() for key, array in content.array_records[EVALUATORS].items()}
    content[EVALUATORS] = ArrayRecord(
        {key: Array(change(v) if key == "unet/head.weight" else v) for key, v in arrays.items()}
    )
    assert code_of(ask(site, "evaluation", content)) == code
    assert kinds(site) == []


def test_a_record_more_in_the_task_is_refused(site: Site, plan: StudyPlan, ask: Ask) -> None:
    content = asked(plan)
    content["discriminator"] = to_record(first_state(plan, None).weights["discriminator"])
    assert code_of(ask(site, "evaluation", content)) == "task_not_in_closed_list"


# --- the account over studies, splits and versions --------------------------------------------------------------------


def test_held_out_patients_pay_over_all_studies_until_nothing_is_left(site: Site, plan: StudyPlan, ask: Ask) -> None:
    change_policy(site, max_holdout_epsilon=3.0)
    plans = [again(plan, number) for number in range(3)]
    for each in plans:
        site.approve(each)
    first, second = (ask(site, "evaluation", asked(each)).config_records["receipt"] for each in plans[:2])
    block, delta = evaluation_mechanism(plan), plan.privacy.delta
    assert second["epsilon"] == first["epsilon"] == epsilon([block], delta)
    assert second["epsilon_lifetime"] == epsilon([block, block], delta) > first["epsilon_lifetime"]
    before = kinds(site)
    assert code_of(ask(site, "evaluation", asked(plans[2]))) == "budget_exceeded"
    assert kinds(site) == before
    current = account(site)
    assert (current.epsilon, current.holdout_epsilon) == (0.0, pytest.approx(epsilon([block, block], delta)))
    assert current.holdout_left == pytest.approx(3.0 - current.holdout_epsilon)


def test_a_cohort_that_was_split_anew_is_not_evaluated_on_and_charges_count_against_both(
    site: Site, plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    """Who is held out now may have been trained on before the cohort was prepared anew."""
    assert "autoencoder" in ask(site, "autoencoder", task_content(plan, "autoencoder"))
    hold_out(site, lambda i: i >= 40 - HELD_OUT)
    assert code_of(ask(site, "evaluation", asked(plan))) == "split_changed"
    trained = mechanism(plan, "a", "autoencoder")
    other = again(plan, 1)
    site.approve(other)
    refused = code_of(ask(site, "evaluation", asked(other)))
    assert refused == "budget_exceeded"  # 2.0 is not left: their training counts
    assert "prepared anew" in (site.folder / "site.log").read_text()
    change_policy(site, max_holdout_epsilon=10.0)
    receipt = ask(site, "evaluation", asked(other)).config_records["receipt"]
    delta = plan.privacy.delta
    assert receipt["epsilon"] == epsilon([evaluation_mechanism(plan)], delta)  # of this study
    assert receipt["epsilon_lifetime"] == pytest.approx(epsilon([evaluation_mechanism(plan), trained], delta))
    # And the other way round: those who train now may have been held out then.
    hold_out(site, lambda i: i < HELD_OUT)
    assert account(site).epsilon == pytest.approx(epsilon([evaluation_mechanism(plan), trained], delta))


def test_a_task_goes_on_only_with_the_people_that_it_was_charged_for(
    site: Site, plan: StudyPlan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> BlockResult:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(site, "evaluation", asked(plan))
    hold_out(site, lambda i: i >= 40 - HELD_OUT)
    assert code_of(ask(site, "evaluation", asked(plan))) == "charge_differs"
    hold_out(site, lambda i: i < HELD_OUT)
    assert "evaluation" in ask(site, "evaluation", asked(plan))


def charged_by_an_older_version(ledger: Ledger, task: Task, block: Mechanism) -> None:
    """An entry without population and split, as versions wrote it that knew training patients only."""
    body = {"study": task.study, "module": task.module, "round": task.round, "sample_rate": block.sample_rate}
    body |= {"noise_multiplier": block.noise_multiplier, "steps": block.steps, "max_grad_norm": 1.0, "private": True}
    with ledger._connection() as connection:
        connection.execute("BEGIN IMMEDIATE")
        ledger._append(connection, "charge", body)


def test_a_ledger_of_an_older_version_means_training_patients_and_keeps_its_digests(tmp_path: Path) -> None:
    ledger, block, old = Ledger(tmp_path / "ledger.sqlite"), Mechanism(0.25, 2.0, 3), Task("5" * 64, "gan", 1)
    charged_by_an_older_version(ledger, old, block)
    head = ledger.head
    assert ledger.history() == [block]
    terms = {"max_grad_norm": 1.0, "private": True, "study_limit": AMPLE, "lifetime_limit": AMPLE}
    # It goes on under the charge that the older version made.
    assert ledger.charge(old, block, **terms, population="train", split="a" * 64) is Standing.INTERRUPTED  # type: ignore[arg-type]
    assert ledger.entries()[0].digest == head
    # Nobody knows how the cohort was split then, so held-out patients count what was trained.
    spent, statistic = epsilon([block], 1e-5), Mechanism(1.0, 5.0, 1)
    small = {**terms, "lifetime_limit": Limit(spent, 1e-5)}
    new = Task("6" * 64, "evaluation", 1)
    with pytest.raises(Refused) as refused:
        ledger.charge(new, statistic, **small, population="holdout", split="a" * 64)  # type: ignore[arg-type]
    assert refused.value.code == "budget_exceeded" and "prepared anew" in str(refused.value)
    assert ledger.charge(new, statistic, **terms, population="holdout", split="a" * 64) is Standing.NEW  # type: ignore[arg-type]
    assert ledger.epsilon(1e-5, population="holdout") == pytest.approx(epsilon([block, statistic], 1e-5))


CHARGES = st.lists(
    st.tuples(st.sampled_from(["train", "holdout"]), st.sampled_from(["", "s", "t", "u"]), st.floats(0.8, 8.0)),
    max_size=6,
)


@given(CHARGES, st.sampled_from(["train", "holdout"]), st.sampled_from(["s", "t", "u", "new"]))
@settings(max_examples=150, deadline=None)
def test_no_patient_has_spent_more_than_the_account_says_wherever_they_were_before(
    charged: list[tuple[Population, str, float]], now: Population, split: str
) -> None:
    """A patient is of one population under each split, and of `now` under the present one; nobody knows the others."""
    entries = [
        Entry(i, "", "charge", {**body(sigma), "population": population, "split": under}, "", "")
        for i, (population, under, sigma) in enumerate(charged)
    ]
    stated = epsilon(_history(entries, None, now, split), 1e-5)
    # A charge under a split that is not known may have been under any: each is taken for one of its own.
    places = [under or f"unknown {i}" for i, (_, under, _) in enumerate(charged)]
    known = list(dict.fromkeys(place for place in places if place != split))
    for where in itertools.product(["train", "holdout"], repeat=len(known)):
        was: dict[str, str] = {**dict(zip(known, where, strict=True)), split: now}
        own = [
            Mechanism(1.0, sigma, 1) for place, (p, _, sigma) in zip(places, charged, strict=True) if was[place] == p
        ]
        assert epsilon(own, 1e-5) <= stated + 1e-9
    if all(under == split for _, under, _ in charged):  # nobody was moved: exactly the patient's own
        assert stated == epsilon([Mechanism(1.0, sigma, 1) for p, _, sigma in charged if p == now], 1e-5)


def body(sigma: float) -> dict[str, Any]:
    return {"study": "5" * 64, "module": "gan", "sample_rate": 1.0, "noise_multiplier": sigma, "steps": 1}


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_killed_between_charge_and_release_it_runs_again_under_its_charge(
    site: Site, plan: StudyPlan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "released", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(site, "evaluation", asked(plan))
    assert kinds(site) == ["charge"]
    unseen = load_file(next(site.folder.glob("outbox/*/evaluation-0001.safetensors")))["total"]
    spent = site.ledger().epsilon(1e-5, population="holdout")
    reply = ask(site, "evaluation", asked(plan))
    assert kinds(site) == ["charge", "resumed", "released", "sent"]
    assert site.ledger().epsilon(1e-5, population="holdout") == spent
    assert not np.array_equal(total_of(reply), unseen)  # fresh noise: nobody saw the first


def test_an_evaluation_that_failed_never_runs_again(
    site: Site, plan: StudyPlan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> BlockResult:
        raise ValueError("something about a patient")

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "evaluate_holdout", fails)
        assert code_of(ask(site, "evaluation", asked(plan))) == "internal_error"
    assert code_of(ask(site, "evaluation", asked(plan))) == "result_withheld"
    assert kinds(site) == ["charge", "withheld"]


def test_a_ledger_that_was_set_back_evaluates_nothing(site: Site, plan: StudyPlan, ask: Ask) -> None:
    assert code_of(ask(site, "evaluation", asked(plan, head="9" * 64))) == "ledger_set_back"


# --- what people read ------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_then_travels(site: Site, plan: StudyPlan, ask: Ask) -> None:
    planned = next(each for each in dry_run(plan, "a").exchanges if each.module == "evaluation")
    content = asked(plan)
    reply = ask(site, "evaluation", content)
    for listed, real in ((planned.arrives, asked(plan, head="0" * 64)), (planned.leaves, reply)):
        assert {r.name: r.bytes for r in listed} == {n: record.count_bytes() for n, record in real.items()}  # type: ignore[attr-defined]
    (leaves,) = [record for record in planned.leaves if record.kind == "arrays"]
    assert [(a.name, a.shape) for a in leaves.arrays] == [("total", [ROW_SIZE])]
    assert planned.message_type == "evaluate.holdout" and planned.rounds == 1
    assert recorddict_to_proto(reply).ByteSize() < 2000


def line_of(site: Site, plan: StudyPlan) -> Any:
    (line,) = [each for each in preflight(site, plan) if each.what.startswith("site evaluation")]
    return line


def test_a_check_before_the_study_says_whether_the_site_would_evaluate(
    site: Site, plan: StudyPlan, tiny_plan: StudyPlan, ask: Ask
) -> None:
    line = line_of(site, plan)
    assert line.state == "ok" and f"{HELD_OUT} held-out patients" in line.what and "2 allowed" in line.what
    assert not [each for each in preflight(site, tiny_plan) if "evaluation" in each.what]
    ask(site, "evaluation", asked(plan))
    done = line_of(site, plan)  # what was charged is not counted twice
    assert done.state == "ok" and "2.0" not in done.what.split("now")[0].split("epsilon")[0]
    change_policy(site, max_holdout_epsilon=0.0)
    refused = line_of(site, plan)
    assert (refused.state, refused.code, refused.ok) == ("warn", "holdout_epsilon_above_policy", True)
    change_policy(site, modules=list(MODULES))
    assert line_of(site, plan).code == "module_not_allowed"


def test_account_and_audit_tell_both_populations_apart(
    site: Site, plan: StudyPlan, ask: Ask, task_content: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(site, "autoencoder", task_content(plan, "autoencoder"))
    ask(site, "evaluation", asked(plan))
    current = account(site)
    assert [(s.module, s.population) for s in current.spendings] == [
        ("autoencoder", "train"),
        ("evaluation", "holdout"),
    ]
    assert current.epsilon == epsilon([mechanism(plan, "a", "autoencoder")], 1e-5)
    assert current.holdout_epsilon == epsilon([evaluation_mechanism(plan)], 1e-5)
    render(current)
    printed = capsys.readouterr().out
    assert f"Held-out patients, other people: epsilon {current.holdout_epsilon:.4f} of 2" in printed
    lines = audit(site)
    assert all(line.ok for line in lines), lines
    change_policy(site, max_holdout_epsilon=1.0)
    assert "holdout_budget_exceeded" in {line.code for line in audit(site) if not line.ok}


def test_a_person_reads_what_the_evaluation_asks_before_approving(plan: StudyPlan, tiny_plan: StudyPlan) -> None:
    text = plan_summary(plan, "a")
    assert "epsilon 2 of theirs" in text and f"{evaluation_mechanism(plan).noise_multiplier:g}" in text
    assert "held-out" not in plan_summary(tiny_plan, "a")
