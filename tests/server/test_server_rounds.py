"""The coordinator's round loop with sites that are slow, absent, unwilling or broken, and with sites as they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from fedsynth.errors import JobFailed
from fedsynth.plan import MODULES, Module, SitePlan, StudyPlan, load_plan
from fedsynth.records import State, refusal
from fedsynth_client.app import app as client_app
from fedsynth_client.site import Site
from fedsynth_server import rounds
from fedsynth_server.aggregation import update_norm, weighted_average
from fedsynth_server.checkpoint import FILE, StudyState, first_state, load_state, save_state
from fedsynth_server.forecast import forecast
from fedsynth_server.rounds import Patience, run_study
from fedsynth_server.status import StatusFile, StudyStatus, read_status
from fedsynth_simulations.grid import InProcessGrid

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

NODES = {10: "a", 11: "b"}
Spoil = Callable[[Message], Message | None]


class SpoilingGrid(InProcessGrid):
    """Changes, delays or drops replies to training messages on their way back; counts what was asked."""

    def __init__(self, folder: Path, spoil: dict[int, Spoil], app: ClientApp = client_app) -> None:
        super().__init__(app, {node: folder / name for node, name in NODES.items()})
        self.spoil = spoil
        self.asked: list[tuple[int, str, str]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.asked += [(m.metadata.dst_node_id, m.metadata.message_type, m.metadata.group_id) for m in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies: list[Message] = []
        for reply in super().pull_messages(message_ids):
            spoil = self.spoil.get(reply.metadata.src_node_id)
            spoiled = spoil(reply) if spoil and reply.metadata.message_type.startswith("train.") else reply
            if spoiled is not None:
                replies.append(spoiled)
        return replies


@pytest.fixture
def quick(tiny_plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    """The plan of `tiny_folder`, with short waits at the coordinator."""
    monkeypatch.setattr(rounds, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(rounds, "_HELLO_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(rounds, "_LOOK_SECONDS", 0.02)
    return tiny_plan


def changed(edit: Callable[[RecordDict], None]) -> Spoil:
    def spoil(reply: Message) -> Message:
        content = RecordDict(dict(reply.content.items()))
        edit(content)
        return make_message(reply.metadata, content)

    return spoil


def weights_changed(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def edit(content: RecordDict) -> None:
        (name,) = content.array_records
        arrays = {key: array.numpy() for key, array in content.array_records[name].items()}
        first = next(iter(arrays))
        content[name] = ArrayRecord({key: Array(change(v) if key == first else v) for key, v in arrays.items()})

    return changed(edit)


def record_set(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> Spoil:
    return changed(lambda content: content.update({name: record}))


def only(content: RecordDict) -> Spoil:
    return lambda reply: make_message(reply.metadata, content)


def receipt_with(**values: object) -> Spoil:
    def edit(content: RecordDict) -> None:
        content["receipt"] = ConfigRecord({**dict(content.config_records["receipt"]), **values})  # type: ignore[dict-item]

    return changed(edit)


def lying(reply: Message) -> Message:
    content = RecordDict(dict(reply.content.items()))
    (name,) = content.array_records
    arrays = dict(content.array_records[name])
    key, array = next(iter(arrays.items()))
    arrays[key] = Array(array.dtype, tuple(array.shape), array.stype, Array(np.ones(1, np.float32)).data)
    content[name] = ArrayRecord(arrays)
    return make_message(reply.metadata, content)


BROKEN: dict[str, tuple[str, Spoil]] = {
    "refuses": ("budget_exceeded", only(refusal("budget_exceeded"))),
    "refuses with text": ("reply_malformed", only(refusal("Mrs Example, born 1950\x1b[2J"))),
    "refuses with arrays": ("reply_malformed", only(RecordDict({"refusal": ArrayRecord({})}))),
    "says nothing": ("reply_not_in_closed_list", only(RecordDict())),
    "handler raised": ("flower_error_2", lambda reply: make_message(reply.metadata, error=Error(2, "text"))),
    "NaN weights": ("arrays_not_finite", weights_changed(lambda x: x * np.float32("nan"))),
    "huge weights": ("arrays_too_large", weights_changed(lambda x: x * 0 + np.float32(1e9))),
    "other shape": ("arrays_differ", weights_changed(lambda x: x[:1])),
    "other type": ("arrays_differ", weights_changed(lambda x: x.astype(np.float64))),
    "bytes of another shape": ("arrays_differ", lying),
    "one record more": ("reply_not_in_closed_list", record_set("patients", MetricRecord({"count": 37}))),
    "another quantity": ("reply_not_in_closed_list", record_set("progress", MetricRecord({"real_loss": 0.1}))),
    "NaN progress": ("reply_malformed", record_set("progress", MetricRecord({"update_norm": float("nan")}))),
    "no receipt": ("reply_not_in_closed_list", changed(lambda content: content.pop("receipt"))),  # type: ignore[arg-type,return-value]
    "text for epsilon": ("reply_malformed", receipt_with(epsilon="small")),
    "head is no digest": ("reply_malformed", receipt_with(head="../../etc")),
    "no steps": ("reply_malformed", receipt_with(steps=0)),
    # What the release would be refused for, or marked as not private.
    "epsilon above the plan": ("epsilon_above_plan", receipt_with(epsilon=1e6)),
    "more steps than the plan": ("steps_above_plan", receipt_with(steps=10**9)),
    "less than it cost": ("epsilon_below_charges", receipt_with(epsilon=1e-4)),
    "noise from a seed": ("receipt_not_private", receipt_with(private=False)),
}


@pytest.mark.parametrize(("code", "spoil"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_reply_leaves_its_site_out_of_the_round(
    tiny_folder: Path, quick: StudyPlan, capsys: pytest.CaptureFixture[str], code: str, spoil: Spoil
) -> None:
    plan = quick.model_copy(update={"autoencoder": quick.autoencoder.model_copy(update={"rounds": 1})})
    for name in NODES.values():
        Site(tiny_folder / name).approve(plan)
    grid = SpoilingGrid(tiny_folder, {11: spoil})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        state = run_study(grid, plan, tiny_folder / "study")
    assert [row["site"] for row in state.curves["autoencoder"]] == ["a"]
    assert set(state.receipts) == {"a"}
    told = capsys.readouterr().err
    assert f"site b left out ({code})" in told
    assert "Example" not in told and "\x1b" not in told
    # What is left is the one good reply.
    (ours,) = (tiny_folder / "a" / "outbox").glob("*/autoencoder-0001.safetensors")
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, state.weights["autoencoder"][name]) for name, tensor in load_file(ours).items())


def test_a_silent_site_is_waited_for_and_then_left_out(
    tiny_folder: Path, quick: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregation = quick.aggregation.model_copy(update={"round_timeout_s": 0.3})
    plan = quick.model_copy(update={"aggregation": aggregation})
    for name in NODES.values():
        Site(tiny_folder / name).approve(plan)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        state = run_study(SpoilingGrid(tiny_folder, {11: lambda _reply: None}), plan, tiny_folder / "study")
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a"}
    assert "site b left out (no_answer)" in capsys.readouterr().err


def test_too_few_sites_pause_the_study_and_the_same_call_goes_on(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = quick.model_copy(update={"aggregation": quick.aggregation.model_copy(update={"min_sites": 2})})
    sites = [Site(tiny_folder / name) for name in NODES.values()]
    for site in sites:
        site.approve(plan)
    study = tiny_folder / "study"
    refuses: Spoil = lambda reply: (  # noqa: E731
        make_message(reply.metadata, refusal("disk_full"))
        if (reply.metadata.message_type, reply.metadata.group_id) == ("train.radiogenomics", "2")
        else reply
    )
    with pytest.raises(JobFailed) as failed:
        run_study(SpoilingGrid(tiny_folder, {11: refuses}), plan, study)
    assert failed.value.code == "too_few_sites"
    assert "b: disk_full" in failed.value.message
    paused = load_state(study, plan)
    assert paused is not None
    assert paused.rounds == {
        "moments": 0,
        "autoencoder": 2,
        "radiogenomics": 1,
        "embedding": 0,
        "gan": 0,
        "translation": 0,
    }
    charges = [[e for e in site.ledger().entries() if e.kind == "charge"] for site in sites]

    grid = SpoilingGrid(tiny_folder, {})
    state = run_study(grid, plan, study)
    assert not state.missing_rounds(plan)
    assert {module: state.rounds[module] for module in plan.modules} == dict.fromkeys(TRAINED, 2)
    first = next(asked for asked in grid.asked if asked[1].startswith("train"))
    assert first == (10, "train.radiogenomics", "2")
    for site, before in zip(sites, charges, strict=True):
        entries = site.ledger().entries()
        tasks = [(e.body["module"], e.body["round"]) for e in entries if e.kind == "charge"]
        assert len(tasks) == len(set(tasks)) == 6
        assert [e for e in entries if e.kind == "charge"][: len(before)] == before
        assert "resumed" not in {e.kind for e in entries}  # what was released before was sent again


def test_after_a_full_study_ledgers_receipts_and_forecast_agree(tiny_folder: Path, quick: StudyPlan) -> None:
    state = run_study(SpoilingGrid(tiny_folder, {}), quick, tiny_folder / "study")
    foretold = forecast(quick)
    delta = quick.privacy.delta
    for name in NODES.values():
        ledger = Site(tiny_folder / name).ledger()
        newest = state.receipts[name]["gan"]
        assert newest.head == ledger.head
        assert newest.epsilon == pytest.approx(ledger.epsilon(delta)) == pytest.approx(foretold.epsilon[name])
        assert newest.epsilon <= quick.privacy.epsilon
        for row in (module for module in foretold.modules if module.site == name):
            (charged,) = ledger.history(quick.digest, row.module)
            assert (charged.sample_rate, charged.noise_multiplier, charged.steps) == (
                row.sample_rate,
                row.noise_multiplier,
                row.steps,
            )
            assert state.receipts[name][row.module].steps == row.steps
    assert run_study(SpoilingGrid(tiny_folder, {}), quick, tiny_folder / "study").weights.keys() == state.weights.keys()


def test_the_average_of_a_round_is_that_of_the_released_weights(tiny_folder: Path, quick: StudyPlan) -> None:
    from safetensors.torch import load_file

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        state = run_study(SpoilingGrid(tiny_folder, {}), quick, tiny_folder / "study")
    released: dict[str, State] = {
        name: load_file(next((tiny_folder / name / "outbox").glob("*/autoencoder-0002.safetensors")))
        for name in NODES.values()
    }
    expected = weighted_average(released, {"a": 0.5, "b": 0.5})
    assert all(torch.equal(tensor, state.weights["autoencoder"][name]) for name, tensor in expected.items())


def test_a_study_that_is_done_asks_for_nothing_more(tiny_folder: Path, quick: StudyPlan) -> None:
    study = tiny_folder / "study"
    run_study(SpoilingGrid(tiny_folder, {}), quick, study)
    before, grid = (study / FILE).read_bytes(), SpoilingGrid(tiny_folder, {})
    run_study(grid, quick, study)
    assert [asked for asked in grid.asked if asked[1].startswith("train")] == []
    assert (study / FILE).read_bytes() == before


def test_replies_are_matched_by_the_message_that_they_answer(tiny_folder: Path, quick: StudyPlan) -> None:
    """Flower's own error for a lost node names node 1 as its source."""

    def lost(reply: Message) -> Message:
        error = make_message(reply.metadata, error=Error(5, "no reply"))
        error.metadata.__dict__["_src_node_id"] = 1
        return error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        state = run_study(SpoilingGrid(tiny_folder, {10: lost}), quick, tiny_folder / "study")
    assert {row["site"] for row in state.curves["autoencoder"]} == {"b"}


def test_a_site_whose_ledger_went_back_is_left_out(
    tiny_folder: Path, quick: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets(reply: Message) -> Message | None:
        forgetful = reply.metadata.group_id == "2"
        return receipt_with(epsilon=0.1)(reply) if forgetful else reply

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        state = run_study(SpoilingGrid(tiny_folder, {11: forgets}), quick, tiny_folder / "study")
    assert [(row["round"], row["site"]) for row in state.curves["autoencoder"]] == [(1, "a"), (1, "b"), (2, "a")]
    assert "site b left out (ledger_went_back)" in capsys.readouterr().err


def test_nodes_that_the_plan_does_not_name_or_that_name_nothing_take_no_part(
    tiny_folder: Path, quick: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "b" / "policy.toml").unlink()
    grid = InProcessGrid(client_app, {10: tiny_folder / "a", 11: tiny_folder / "b"})
    assert rounds.find_sites(grid, quick, {10: "", 11: ""}) == {10: "a"}
    assert "node 11 names no site (policy_missing)" in capsys.readouterr().err
    only_b = quick.model_copy(update={"sites": [quick.site("b")]})
    assert rounds.find_sites(grid, only_b, {10: "", 11: ""}) == {10: ""}


def test_two_nodes_of_one_site_are_refused(tiny_folder: Path, quick: StudyPlan) -> None:
    grid = InProcessGrid(client_app, {10: tiny_folder / "a", 11: tiny_folder / "a"})
    with pytest.raises(JobFailed) as failed:
        rounds.find_sites(grid, quick, {10: "", 11: ""})
    assert failed.value.code == "two_nodes_one_site"


def test_a_registered_name_counts_and_the_node_is_not_asked(tiny_folder: Path, quick: StudyPlan) -> None:
    grid = SpoilingGrid(tiny_folder, {})
    registered = {10: "b", 11: "a", 12: "elsewhere"}
    assert rounds.find_sites(grid, quick, registered) == {10: "b", 11: "a", 12: ""}
    assert grid.asked == []


class Registered(SpoilingGrid):
    """Nodes with registered names that come and go, and tasks that are lost on the way."""

    def __init__(self, folder: Path, names: dict[int, str], spoil: dict[int, Spoil] | None = None) -> None:
        super().__init__(folder, spoil or {})
        self.names = names
        self.lose: dict[int, list[int]] = {}  # node -> Flower's error codes, one for each task lost
        self.joins: dict[int, int] = {}  # node -> how many looks it is away

    def get_nodes(self) -> list[NodeInfo]:
        self.joins = {node: looks - 1 for node, looks in self.joins.items()}
        return [NodeInfo(node_id=n, name=name) for n, name in self.names.items() if self.joins.get(n, -1) < 0]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies: list[Message] = []
        for reply in super().pull_messages(message_ids):
            codes = self.lose.get(reply.metadata.src_node_id, [])
            replies.append(make_message(reply.metadata, error=Error(codes.pop(0), "lost")) if codes else reply)
        return replies


def one_module(plan: StudyPlan, folder: Path, **aggregation: object) -> StudyPlan:
    """`plan` with one round of the autoencoder and both sites' approval."""
    plan = plan.model_copy(
        update={
            "autoencoder": plan.autoencoder.model_copy(update={"rounds": 1}),
            "aggregation": plan.aggregation.model_copy(update=aggregation),
        }
    )
    for name in NODES.values():
        Site(folder / name).approve(plan)
    return plan


@pytest.fixture
def only_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudyPlan, "modules", ("autoencoder",))


@pytest.mark.usefixtures("only_autoencoder")
@pytest.mark.parametrize("codes", [[5], [8, 8], [3], [4]])
def test_a_lost_task_is_sent_again_and_charged_once(tiny_folder: Path, quick: StudyPlan, codes: list[int]) -> None:
    plan = one_module(quick, tiny_folder)
    grid = Registered(tiny_folder, NODES)
    grid.lose = {11: list(codes)}
    state = run_study(grid, plan, tiny_folder / "study")
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a", "b"}
    assert len([asked for asked in grid.asked if asked[0] == 11]) == 1 + len(codes)
    kinds = [entry.kind for entry in Site(tiny_folder / "b").ledger().entries()]
    assert kinds.count("charge") == 1 and kinds.count("released") == 1
    assert kinds.count("sent") == 1 + len(codes)


@pytest.mark.usefixtures("only_autoencoder")
def test_a_site_whose_process_dies_of_every_task_is_not_asked_for_ever(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = one_module(quick, tiny_folder)
    grid = Registered(tiny_folder, NODES)
    grid.lose = {11: [8] * 100}
    state = run_study(grid, plan, tiny_folder / "study")
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a"}
    assert len([asked for asked in grid.asked if asked[0] == 11]) == rounds._LOSSES_A_ROUND
    status = read_status(tiny_folder / "study")
    assert status is not None and (status.sites["b"].state, status.sites["b"].code) == ("lost", "flower_error_8")


@pytest.mark.usefixtures("only_autoencoder")
def test_a_connected_site_that_says_nothing_is_asked_again_and_answers_once(
    tiny_folder: Path, quick: StudyPlan
) -> None:
    plan = one_module(quick, tiny_folder, round_timeout_s=30.0)
    swallowed = iter([True])
    grid = Registered(tiny_folder, NODES, {11: lambda reply: None if next(swallowed, False) else reply})
    state = run_study(grid, plan, tiny_folder / "study", patience=Patience(silent_s=0.1))
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a", "b"}
    assert [asked[0] for asked in grid.asked].count(11) == 2
    kinds = [entry.kind for entry in Site(tiny_folder / "b").ledger().entries()]
    assert (kinds.count("charge"), kinds.count("released"), kinds.count("sent")) == (1, 1, 2)


@pytest.mark.usefixtures("only_autoencoder")
def test_a_site_that_stays_silent_is_asked_later_and_later(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = one_module(quick, tiny_folder, round_timeout_s=1.0)
    grid = Registered(tiny_folder, NODES, {11: lambda _reply: None})
    run_study(grid, plan, tiny_folder / "study", patience=Patience(silent_s=0.1))
    # At 0, 0.1, 0.3 and 0.7 s.
    assert 3 <= [asked[0] for asked in grid.asked].count(11) <= 4
    status = read_status(tiny_folder / "study")
    assert status is not None and status.sites["b"].state == "asked"


@pytest.mark.usefixtures("only_autoencoder")
def test_a_site_that_connects_during_the_round_takes_part(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = one_module(quick, tiny_folder)
    grid = Registered(tiny_folder, NODES)
    grid.joins = {11: 3}
    state = run_study(grid, plan, tiny_folder / "study", patience=Patience(absent_s=30))
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a", "b"}


@pytest.mark.usefixtures("only_autoencoder")
def test_a_study_with_too_few_sites_pauses_says_so_and_goes_on(
    tiny_folder: Path, quick: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = one_module(quick, tiny_folder, min_sites=2)
    grid = Registered(tiny_folder, NODES)
    grid.joins = {11: 4}
    seen: list[tuple[str, str, str]] = []
    write = StatusFile._write

    def spy(file: StatusFile, status: StudyStatus) -> None:
        seen.append((status.phase, status.code, status.sites["b"].state))
        write(file, status)

    monkeypatch.setattr(StatusFile, "_write", spy)
    study = tiny_folder / "study"
    state = run_study(grid, plan, study, patience=Patience(shortage_s=60, retry_s=0.02))
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a", "b"}
    assert ("paused", "too_few_sites", "absent") in seen
    status = read_status(study)
    assert status is not None and status.phase == "finished"
    assert {site.state for site in status.sites.values()} == {"answered"}
    # The site that was there answered once, in the first attempt.
    assert len([asked for asked in grid.asked if asked[0] == 10]) == 1


@pytest.mark.usefixtures("only_autoencoder")
def test_a_study_that_gives_up_says_why_in_its_status(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = one_module(quick, tiny_folder, min_sites=2)
    with pytest.raises(JobFailed):
        run_study(Registered(tiny_folder, {10: "a"}), plan, tiny_folder / "study")
    status = read_status(tiny_folder / "study")
    assert status is not None and (status.phase, status.code) == ("failed", "too_few_sites")
    assert "b: not_connected" in status.message


@pytest.mark.usefixtures("only_autoencoder")
def test_a_node_registered_for_another_site_is_refused_by_the_site(
    tiny_folder: Path, quick: StudyPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = one_module(quick, tiny_folder)
    grid = Registered(tiny_folder, {10: "a", 11: "b"})
    # The folder of node 11 says that it is site a.
    policy = tiny_folder / "b" / "policy.toml"
    policy.write_text((tiny_folder / "a" / "policy.toml").read_text(encoding="utf-8"), encoding="utf-8")
    state = run_study(grid, plan, tiny_folder / "study")
    assert {row["site"] for row in state.curves["autoencoder"]} == {"a"}
    assert "site b left out (task_of_another_site)" in capsys.readouterr().err
    assert Site(tiny_folder / "b").ledger().entries() == []


@pytest.mark.usefixtures("only_autoencoder")
def test_a_poisoned_update_is_shortened_to_the_bound(tiny_folder: Path, quick: StudyPlan) -> None:
    plan = one_module(quick, tiny_folder, max_update_norm=0.01, weighting="equal")
    poison = weights_changed(lambda x: x + np.float32(100.0))
    state = run_study(Registered(tiny_folder, NODES, {11: poison}), plan, tiny_folder / "study")
    start = first_state(plan, None).weights["autoencoder"]
    assert update_norm(start, state.weights["autoencoder"]) <= 0.01 + 1e-6


def test_a_statistic_larger_than_its_patients_can_make_it_is_refused() -> None:
    template = {"sum": torch.zeros(100)}
    plan = StudyPlan.model_construct(sites=[SitePlan(name="a", nominal_patients=50)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds, "noise_multipliers", lambda _plan, _site: {"moments": 5.0})
        assert rounds.largest_statistic(plan, "moments", "a", template) == pytest.approx(100 + 5 * (10 + 6))


def test_the_dnn_starts_from_the_averaged_encoder(tiny_folder: Path, quick: StudyPlan) -> None:
    sent: list[RecordDict] = []

    class Watching(SpoilingGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            sent.extend(m.content for m in messages if m.metadata.message_type == "train.radiogenomics")
            return super().push_messages(messages)

    state = run_study(Watching(tiny_folder, {}), quick, tiny_folder / "study")
    encoder = {tuple(tensor.shape): tensor for name, tensor in state.weights["autoencoder"].items() if "weight" in name}
    first = next(array.numpy() for name, array in sent[0].array_records["radiogenomics"].items() if "weight" in name)
    assert np.array_equal(first, encoder[first.shape].numpy())


def test_a_checkpoint_saved_by_hand_is_gone_on_from(tiny_folder: Path, quick: StudyPlan) -> None:
    """A coordinator killed between a site's release and its own checkpoint repeats the round for nothing."""
    study = tiny_folder / "study"
    assert load_plan(study / "plan.toml") == quick
    before: StudyState | None = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StudyPlan, "modules", ("autoencoder",))
        run_study(SpoilingGrid(tiny_folder, {}), quick, study)
        before = load_state(study, quick)
        assert before is not None
        spent = [Site(tiny_folder / name).ledger().epsilon(1e-5) for name in NODES.values()]
        lost = replace(before, rounds={**before.rounds, "autoencoder": 1}, curves={m: [] for m in MODULES})
        save_state(lost, study)
        again = run_study(SpoilingGrid(tiny_folder, {}), quick, study)
    assert [Site(tiny_folder / name).ledger().epsilon(1e-5) for name in NODES.values()] == spent
    assert all(
        torch.equal(tensor, before.weights["autoencoder"][name])
        for name, tensor in again.weights["autoencoder"].items()
    )
