"""A site answers the coordinator: what is refused before anything is spent, what is told, and what never leaves.

Every question goes through the ClientApp over the in-process grid, as bytes.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedsynth.budget import mechanism
from fedsynth.errors import FedsynthError, JobFailed
from fedsynth.plan import MODULES, Module, StudyPlan, WarmStart
from fedsynth.records import WEIGHTS, State, from_record, state_digest, task_record, to_record
from fedsynth_client import rounds
from fedsynth_client.app import app as client_app
from fedsynth_client.app import make_app, site_folder
from fedsynth_client.ledger import Limit, Task
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.rounds import answer
from fedsynth_client.site import Site
from fedsynth_client.training.block import BlockResult
from fedsynth_server.checkpoint import first_state
from fedsynth_simulations.grid import InProcessGrid

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

Ask = Callable[[Site, Module, RecordDict], RecordDict]
Content = Callable[..., RecordDict]
NAME = "Ursula Beispiel"


def wire(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def code_of(reply: RecordDict) -> str:
    """The code of a refusal, which must hold nothing else."""
    assert set(reply) == {"refusal"}, f"not refused: {list(reply)}"
    assert set(reply.config_records["refusal"]) == {"code"}
    return str(reply.config_records["refusal"]["code"])


def kinds(site: Site) -> list[str]:
    return [entry.kind for entry in site.ledger().entries()]


def change_policy(site: Site, **changes: Any) -> None:
    save_policy(site.policy().model_copy(update=changes), site.policy_path)


def no_training(*_: Any) -> BlockResult:
    raise AssertionError("private data was touched")


# --- what a released task is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TRAINED)
def test_asked_twice_a_site_sends_the_same_bytes_and_charges_once(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, module: Module
) -> None:
    content = task_content(tiny_plan, module)
    first, second = ask(tiny_site, module, content), ask(tiny_site, module, content)
    for record in (WEIGHTS[module], "progress"):
        assert wire(RecordDict({record: first[record]})) == wire(RecordDict({record: second[record]}))
    assert kinds(tiny_site) == ["charge", "released", "sent", "sent"]
    assert first.config_records["receipt"]["epsilon"] == second.config_records["receipt"]["epsilon"]
    assert tiny_site.ledger().history() == [mechanism(tiny_plan, "a", module)]


def test_other_weights_do_not_get_a_second_result(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    first = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder"))
    other = task_content(tiny_plan, "autoencoder")
    other["autoencoder"] = ArrayRecord({k: Array(v.numpy() * 2) for k, v in other.array_records["autoencoder"].items()})
    second = ask(tiny_site, "autoencoder", other)
    assert wire(RecordDict({"w": first["autoencoder"]})) == wire(RecordDict({"w": second["autoencoder"]}))


def test_a_receipt_says_what_the_ledger_says(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    receipt = dict(ask(tiny_site, "gan", task_content(tiny_plan, "gan")).config_records["receipt"])
    ledger = tiny_site.ledger()
    assert receipt == {
        "head": ledger.head,
        "epsilon": ledger.epsilon(tiny_plan.privacy.delta),
        "epsilon_lifetime": ledger.epsilon(tiny_site.policy().max_delta),
        "steps": tiny_plan.gan.steps_per_round,
        "private": True,
    }


def test_what_is_sent_is_logged_with_its_bytes(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    reply = ask(tiny_site, "gan", task_content(tiny_plan, "gan"))
    (sent,) = [entry.body for entry in tiny_site.ledger().entries() if entry.kind == "sent"]
    assert sent["to"] == "node 1"
    assert sent["records"] == {name: record.count_bytes() for name, record in reply.items()}  # type: ignore[attr-defined]
    assert sent["records"]["generator"] >= sum(len(array.data) for array in reply.array_records["generator"].values())


def test_neither_discriminator_nor_counts_are_in_a_reply(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    reply = ask(tiny_site, "gan", task_content(tiny_plan, "gan"))
    assert set(reply) == {"generator", "progress", "receipt"}
    assert set(reply.array_records["generator"]) == set(first_state(tiny_plan, None).weights["generator"])
    state = next((tiny_site.folder / "state").rglob("*.safetensors"))
    from safetensors.torch import load_file

    for tensor in load_file(state).values():
        if tensor.numel() > 4:
            assert tensor.numpy().tobytes() not in wire(reply)


# --- refused before anything is spent ------------------------------------------------------------------------------


def _refuse_policy_missing(site: Site) -> None:
    site.policy_path.unlink()


def _refuse_policy_broken(site: Site) -> None:
    site.policy_path.write_text("max_epsilom = 3\n")


def _refuse_not_approved(site: Site) -> None:
    change_policy(site, approved_plans=[])


def _refuse_plan_gone(site: Site) -> None:
    shutil.rmtree(site.folder / "plans")


def _refuse_plan_altered(site: Site) -> None:
    (plan,) = (site.folder / "plans").glob("*.toml")
    text = plan.read_text()
    assert "epsilon = 10.0" in text
    plan.write_text(text.replace("epsilon = 10.0", "epsilon = 9.0"))


def _refuse_epsilon(site: Site) -> None:
    change_policy(site, max_epsilon=9.9)


def _refuse_delta(site: Site) -> None:
    change_policy(site, max_delta=1e-6)


def _refuse_module(site: Site) -> None:
    change_policy(site, modules=["radiogenomics", "gan"])


def _refuse_small_cohort(site: Site) -> None:
    change_policy(site, min_patients=41)


def _refuse_declared(site: Site) -> None:
    change_policy(site, declared_patients=50)


def _refuse_cohort_missing(site: Site) -> None:
    shutil.rmtree(site.cohort_path)


def _refuse_other_panel(site: Site) -> None:
    manifest = site.cohort_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"G0", "G1"', '"G1", "G0"'))


def _refuse_other_grid(site: Site) -> None:
    manifest = site.cohort_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pixel_spacing_mm": 3.0', '"pixel_spacing_mm": 2.0'))


def _refuse_ledger(site: Site) -> None:
    site.ledger_path.write_bytes(b"no database" * 500)


AT_THE_SITE: dict[str, Callable[[Site], None]] = {
    "policy_missing": _refuse_policy_missing,
    "policy_invalid": _refuse_policy_broken,
    "plan_not_approved": _refuse_not_approved,
    "plan_not_approved ": _refuse_plan_gone,
    "plan_altered": _refuse_plan_altered,
    "epsilon_above_policy": _refuse_epsilon,
    "delta_above_policy": _refuse_delta,
    "module_not_allowed": _refuse_module,
    "cohort_too_small": _refuse_small_cohort,
    "declared_size_differs": _refuse_declared,
    "cohort_missing": _refuse_cohort_missing,
    "cohort_of_other_settings": _refuse_other_panel,
    "cohort_of_other_settings ": _refuse_other_grid,
    "ledger_tampered": _refuse_ledger,
}


@pytest.mark.parametrize(("code", "spoil"), AT_THE_SITE.items(), ids=AT_THE_SITE.keys())
def test_what_the_site_does_not_allow_is_refused_before_anything_is_charged(
    tiny_site: Site,
    tiny_plan: StudyPlan,
    ask: Ask,
    task_content: Content,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    spoil: Callable[[Site], None],
) -> None:
    monkeypatch.setattr(rounds, "_train", no_training)
    spoil(tiny_site)
    reply = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder"))
    assert code_of(reply) == code.strip()
    if code != "ledger_tampered":
        assert kinds(tiny_site) == []
    log = (tiny_site.folder / "site.log").read_text()
    assert f"[{code.strip()}]" in log  # the site's people read the cause in full


def test_a_seeded_plan_is_refused_unless_the_policy_names_it(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    seeded = tiny_plan.model_copy(update={"privacy": tiny_plan.privacy.model_copy(update={"reproducible_seed": 1})})
    tiny_site.approve(seeded)
    assert (
        code_of(ask(tiny_site, "autoencoder", task_content(seeded, "autoencoder"))) == "reproducible_noise_not_allowed"
    )
    assert kinds(tiny_site) == []
    change_policy(tiny_site, allow_reproducible_noise=True)
    receipt = ask(tiny_site, "autoencoder", task_content(seeded, "autoencoder")).config_records["receipt"]
    assert receipt["private"] is False
    assert not tiny_site.ledger().is_private()


def _edit(content: RecordDict, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    arrays = {key: array.numpy().copy() for key, array in content.array_records[name].items()}
    content[name] = ArrayRecord({key: Array(value) for key, value in change(arrays).items()})


def _first(arrays: dict[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    key = next(iter(arrays))
    return {**arrays, key: change(arrays[key])}


def _lying(content: RecordDict) -> None:
    """Bytes of one number under a declaration of the right shape: would be spread over the whole array."""
    arrays = dict(content.array_records["autoencoder"])
    key, array = next(iter(arrays.items()))
    lie = Array(array.dtype, tuple(array.shape), array.stype, Array(np.ones(1, np.float32)).data)
    content["autoencoder"] = ArrayRecord({**arrays, key: lie})


def _garbage(content: RecordDict) -> None:
    arrays = dict(content.array_records["autoencoder"])
    key, array = next(iter(arrays.items()))
    lie = Array(array.dtype, tuple(array.shape), array.stype, b"\x80\x04K\x01.")  # a pickle, for good measure
    content["autoencoder"] = ArrayRecord({**arrays, key: lie})


def _set_task(**changes: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["task"] = ConfigRecord({**dict(content.config_records["task"]), **changes})

    return change


IN_THE_MESSAGE: list[tuple[str, str, Callable[[RecordDict], Any]]] = [
    ("weights missing", "record_missing", lambda c: c.pop("autoencoder")),
    ("weights as text", "record_missing", lambda c: c.update(autoencoder=ConfigRecord({"a": "b"}))),
    ("array missing", "arrays_differ", lambda c: _edit(c, "autoencoder", lambda a: dict(list(a.items())[1:]))),
    ("array too many", "arrays_differ", lambda c: _edit(c, "autoencoder", lambda a: {**a, "more": np.ones(3, "f4")})),
    ("other shape", "arrays_differ", lambda c: _edit(c, "autoencoder", lambda a: _first(a, lambda x: x[:1]))),
    ("other type", "arrays_differ", lambda c: _edit(c, "autoencoder", lambda a: _first(a, lambda x: x.astype("f8")))),
    ("not what it declares", "arrays_differ", _lying),
    ("not an array", "arrays_differ", _garbage),
    (
        "NaN",
        "arrays_not_finite",
        lambda c: _edit(c, "autoencoder", lambda a: _first(a, lambda x: x * np.float32("nan"))),
    ),
    (
        "infinite",
        "arrays_not_finite",
        lambda c: _edit(c, "autoencoder", lambda a: _first(a, lambda x: x + np.float32("inf"))),
    ),
    (
        "huge",
        "arrays_too_large",
        lambda c: _edit(c, "autoencoder", lambda a: _first(a, lambda x: x * 0 + np.float32(1e6))),
    ),
    ("round 0", "round_not_in_plan", _set_task(round=0)),
    ("round beyond the plan", "round_not_in_plan", _set_task(round=3)),
    ("round as text", "task_malformed", _set_task(round="1")),
    ("round as truth", "task_malformed", _set_task(round=True)),
    ("another module", "task_malformed", _set_task(module="gan")),
    ("unknown key", "task_malformed", _set_task(epochs=3)),
    ("no task", "task_malformed", lambda c: c.pop("task")),
    ("unknown plan", "plan_not_approved", _set_task(study="0" * 64)),
    ("path as plan", "task_malformed", _set_task(study="../policy")),
    ("very long plan", "task_malformed", _set_task(study="a" * 5000)),
    ("null byte", "task_malformed", _set_task(study="a\0b")),
    ("another site", "task_of_another_site", _set_task(site="b")),
    ("head is no digest", "task_malformed", _set_task(head="newest")),
    ("head as number", "task_malformed", _set_task(head=1)),
    ("head of another ledger", "ledger_set_back", _set_task(head="0" * 64)),
]


@pytest.mark.parametrize(
    ("code", "spoil"), [case[1:] for case in IN_THE_MESSAGE], ids=[case[0] for case in IN_THE_MESSAGE]
)
def test_a_wrong_message_is_refused_before_anything_is_charged(
    tiny_site: Site,
    tiny_plan: StudyPlan,
    ask: Ask,
    task_content: Content,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    spoil: Callable[[RecordDict], Any],
) -> None:
    monkeypatch.setattr(rounds, "_train", no_training)
    content = task_content(tiny_plan, "autoencoder")
    spoil(content)
    assert code_of(ask(tiny_site, "autoencoder", content)) == code
    assert kinds(tiny_site) == []


def test_a_discriminator_other_than_the_plan_names_is_refused(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = first_state(tiny_plan, None).weights
    named = WarmStart(
        generator_sha256=state_digest(weights["generator"]),
        discriminator_sha256=state_digest(weights["discriminator"]),
        provenance="made by this test",
    )
    plan = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": named})})
    tiny_site.approve(plan)
    content = task_content(tiny_plan, "gan")
    content["task"] = task_record(plan.digest, "gan", 1, "a")
    wrong = RecordDict(dict(content.items()))
    _edit(wrong, "discriminator", lambda a: _first(a, lambda x: x + np.float32(1e-3)))
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_train", no_training)
        assert code_of(ask(tiny_site, "gan", wrong)) == "warm_start_differs"
    assert kinds(tiny_site) == []
    assert "generator" in ask(tiny_site, "gan", content)


def test_a_round_that_the_study_left_behind_is_refused_and_an_old_released_one_is_sent_again(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    second = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 2))
    before = kinds(tiny_site)
    assert code_of(ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 1))) == "round_passed"
    assert kinds(tiny_site) == before
    again = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 2))
    assert wire(RecordDict({"w": second["autoencoder"]})) == wire(RecordDict({"w": again["autoencoder"]}))


def test_a_stored_reply_stays_once_its_module_or_plan_is_no_longer_allowed(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    content = task_content(tiny_plan, "autoencoder")
    assert "autoencoder" in ask(tiny_site, "autoencoder", content)
    change_policy(tiny_site, modules=["gan"])
    assert code_of(ask(tiny_site, "autoencoder", content)) == "module_not_allowed"
    change_policy(tiny_site, modules=list(MODULES), approved_plans=[])
    assert code_of(ask(tiny_site, "autoencoder", content)) == "plan_not_approved"


def test_a_spent_cohort_refuses_with_a_code_and_keeps_the_numbers_at_home(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    """The lifetime budget is used up by an earlier study."""
    block = mechanism(tiny_plan, "a", "gan", steps=100)
    ample = Limit(1e9, 1e-5)
    tiny_site.ledger().charge(
        Task("0" * 64, "gan", 1), block, max_grad_norm=1.0, private=True, study_limit=ample, lifetime_limit=ample
    )
    reply = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder"))
    assert code_of(reply) == "budget_exceeded"
    assert b"epsilon" not in wire(reply)
    assert kinds(tiny_site) == ["charge"]
    assert f"{tiny_site.ledger().epsilon(1e-5):.4f}" in (tiny_site.folder / "site.log").read_text()


# --- faults, crashes, full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError(NAME), KeyError(NAME), OSError(errno.EIO, NAME, f"/data/{NAME}.dcm")])
def test_the_text_of_an_exception_never_leaves(
    tiny_site: Site, tiny_plan: StudyPlan, task_content: Content, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> BlockResult:
        raise error

    monkeypatch.setattr(rounds, "_train", fails)
    tapped: list[bytes] = []
    grid = InProcessGrid(client_app, {1: tiny_site.folder}, wiretap=lambda _d, _n, data: tapped.append(data))
    content = task_content(tiny_plan, "autoencoder")
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=1, message_type="train.autoencoder")])
    assert not reply.has_error()
    assert code_of(reply.content) == "internal_error"
    assert all(b"Ursula" not in data and b"Beispiel" not in data for data in tapped)
    assert NAME in (tiny_site.folder / "site.log").read_text()


@pytest.mark.parametrize("question", ["query.site", "train.gan"])
def test_a_site_whose_folder_is_gone_or_unnamed_says_so_by_a_code(
    tmp_path: Path, tiny_plan: StudyPlan, task_content: Content, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.delenv("FEDSYNTH_SITE", raising=False)
    for folder in (str(tmp_path / NAME), ""):
        tapped: list[bytes] = []
        app = make_app(lambda _context, f=folder: Path(f) if f else site_folder(Context(1, 1, {}, RecordDict(), {})))  # type: ignore[misc]
        grid = InProcessGrid(app, {1: tmp_path}, wiretap=lambda _d, _n, data, t=tapped: t.append(data))  # type: ignore[misc]
        (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=1, message_type=question)])
        assert not reply.has_error()
        code_of(reply.content)
        assert all(NAME.encode() not in data and str(tmp_path).encode() not in data for data in tapped)


def test_a_policy_that_cannot_be_read_does_not_tell_its_path(tiny_site: Site) -> None:
    tiny_site.policy_path.unlink()
    grid = InProcessGrid(client_app, {1: tiny_site.folder})
    (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=1, message_type="query.site")])
    assert not reply.has_error()
    assert code_of(reply.content) == "policy_missing"


def test_an_interrupted_task_runs_again_under_its_charge(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> BlockResult:
        raise KeyboardInterrupt

    content = task_content(tiny_plan, "gan")
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(tiny_site, "gan", content)
    assert kinds(tiny_site) == ["charge"]
    spent = tiny_site.ledger().epsilon(1e-5)
    assert "generator" in ask(tiny_site, "gan", content)
    assert kinds(tiny_site) == ["charge", "resumed", "released", "sent"]
    assert tiny_site.ledger().epsilon(1e-5) == spent


def test_a_task_whose_training_failed_never_runs_again(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = task_content(tiny_plan, "gan")
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_train", no_training)
        assert code_of(ask(tiny_site, "gan", content)) == "internal_error"
    assert kinds(tiny_site) == ["charge", "withheld"]
    assert code_of(ask(tiny_site, "gan", content)) == "result_withheld"
    assert kinds(tiny_site) == ["charge", "withheld"]


def test_a_charge_stands_when_its_process_is_killed_in_training(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content
) -> None:
    program = f"""
import os, signal
from pathlib import Path
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from fedsynth_client import rounds
from fedsynth_client.site import Site
import fedsynth_client.training.profiles as profiles
site, step, taken = Site(Path({str(tiny_site.folder)!r})), profiles.private_step, []
def dies(*arguments):
    taken.append(step(*arguments))
    if len(taken) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
profiles.private_step = dies
content = recorddict_from_proto(Proto.FromString(Path({str(tiny_site.folder / "asked")!r}).read_bytes()))
rounds.answer(site, "autoencoder", content, "node 1")
"""
    content = task_content(tiny_plan, "autoencoder")
    (tiny_site.folder / "asked").write_bytes(wire(content))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert kinds(tiny_site) == ["charge"]
    spent = tiny_site.ledger().epsilon(1e-5)
    assert spent > 0
    assert "autoencoder" in ask(tiny_site, "autoencoder", content)
    assert tiny_site.ledger().epsilon(1e-5) == spent


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_keeps_the_charge_and_the_next_attempt_completes_under_it(
    tiny_site: Site,
    tiny_plan: StudyPlan,
    ask: Ask,
    task_content: Content,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    content = task_content(tiny_plan, "gan")

    def full(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("fedsynth_client.outbox.write_atomic", full)
        assert code_of(ask(tiny_site, "gan", content)) == ("disk_full" if number == errno.ENOSPC else "disk_error")
    assert kinds(tiny_site) == ["charge"]
    spent = tiny_site.ledger().epsilon(1e-5)
    assert "generator" in ask(tiny_site, "gan", content)
    assert tiny_site.ledger().epsilon(1e-5) == spent
    assert [kind for kind in kinds(tiny_site) if kind == "charge"] == ["charge"]


def test_no_training_without_a_ledger_that_takes_the_charge(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.setattr(rounds, "_train", no_training)
    tiny_site.ledger()
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options)
    )
    assert code_of(ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder"))) == "ledger_not_written"


def test_a_result_that_may_not_leave_ends_its_task(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal's code tells of the noisy result; a second run would be a second result under one charge."""
    content, runs = task_content(tiny_plan, "autoencoder"), []

    def diverges(_plan: StudyPlan, module: Module, incoming: dict[str, State], *_: Any) -> BlockResult:
        runs.append(module)
        return BlockResult({k: v * math.nan for k, v in incoming[module].items()}, {"update_norm": math.nan}, {})

    monkeypatch.setattr(rounds, "_train", diverges)
    assert code_of(ask(tiny_site, "autoencoder", content)) == "arrays_not_finite"
    assert code_of(ask(tiny_site, "autoencoder", content)) == "result_withheld"
    assert runs == ["autoencoder"]
    assert kinds(tiny_site) == ["charge", "withheld"]
    assert not list(tiny_site.folder.glob("outbox/*/*"))
    monkeypatch.undo()
    assert "autoencoder" in ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 2))


def test_asked_twice_at_once_a_site_trains_once(
    tiny_site: Site, tiny_plan: StudyPlan, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one site, or a message that was sent again while the first is still at work."""
    train, trained, replies = rounds._train, [], []
    both_are_here = threading.Barrier(2)

    def counts(*arguments: Any) -> BlockResult:
        trained.append(1)
        return train(*arguments)

    def send() -> None:
        content = task_content(tiny_plan, "gan")
        both_are_here.wait(60)
        replies.append(answer(Site(tiny_site.folder), "gan", content, "node 1"))

    monkeypatch.setattr(rounds, "_train", counts)
    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(trained) == 1
    first, second = replies
    assert wire(RecordDict({"w": first["generator"]})) == wire(RecordDict({"w": second["generator"]}))
    assert kinds(tiny_site) == ["charge", "released", "sent", "sent"]


def test_a_lost_or_altered_stored_reply_is_never_made_again(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = task_content(tiny_plan, "autoencoder")
    ask(tiny_site, "autoencoder", content)
    monkeypatch.setattr(rounds, "_train", no_training)
    (stored,) = tiny_site.folder.glob("outbox/*/*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x55")
    assert code_of(ask(tiny_site, "autoencoder", content)) == "reply_lost"
    stored.unlink()
    assert code_of(ask(tiny_site, "autoencoder", content)) == "reply_lost"


@pytest.mark.parametrize("how", ["removed", "older copy"])
def test_a_ledger_that_forgot_what_the_outbox_holds_trains_nothing(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, how: str
) -> None:
    ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 1))
    copy = tiny_site.ledger_path.read_bytes()
    ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 2))
    if how == "removed":
        tiny_site.ledger_path.unlink()
    else:
        tiny_site.ledger_path.write_bytes(copy)
    before = kinds(tiny_site)
    for module, number in (("autoencoder", 2), ("gan", 1)):
        assert code_of(ask(tiny_site, module, task_content(tiny_plan, module, number))) == "ledger_incomplete"  # type: ignore[arg-type]
    assert kinds(tiny_site) == before


def test_a_whole_site_that_was_set_back_spends_nothing_again(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, tmp_path: Path
) -> None:
    """A restored machine has ledger and outbox of the same old day; only the coordinator's receipt tells."""
    ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 1))
    shutil.copytree(tiny_site.folder, tmp_path / "snapshot")
    receipt = ask(tiny_site, "autoencoder", task_content(tiny_plan, "autoencoder", 2)).config_records["receipt"]
    head = str(receipt["head"])
    restored = Site(tmp_path / "snapshot")
    again = task_content(tiny_plan, "autoencoder", 2, head=head)
    before = kinds(restored)
    assert code_of(ask(restored, "autoencoder", again)) == "ledger_set_back"
    assert kinds(restored) == before
    # The site as it was answers, and a head from further back is as good as the newest.
    older = task_content(tiny_plan, "autoencoder", 2, head=tiny_site.ledger().entries()[0].digest)
    for content in (again, older):
        assert "autoencoder" in ask(tiny_site, "autoencoder", content)


def test_a_discriminator_goes_on_from_its_last_released_round(
    tiny_site: Site, tiny_plan: StudyPlan, ask: Ask, task_content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, starts = rounds._train, []

    def watched(plan: StudyPlan, module: Module, incoming: Any, local: State, *rest: Any) -> BlockResult:
        starts.append(local)
        return train(plan, module, incoming, local, *rest)

    monkeypatch.setattr(rounds, "_train", watched)
    ask(tiny_site, "gan", task_content(tiny_plan, "gan", 1))
    ask(tiny_site, "gan", task_content(tiny_plan, "gan", 2))
    public = first_state(tiny_plan, None).weights["discriminator"]
    assert all(torch.equal(starts[0][f"model/{name}"], tensor) for name, tensor in public.items())
    assert any(not torch.equal(starts[1][f"model/{name}"], tensor) for name, tensor in public.items())
    assert any(name.startswith("exp_avg/") for name in starts[1])


def test_weights_are_read_only_as_declared(tiny_plan: StudyPlan) -> None:
    state = first_state(tiny_plan, None).weights["autoencoder"]
    content = RecordDict({"autoencoder": to_record(state)})
    assert all(torch.equal(state[name], tensor) for name, tensor in from_record(content, "autoencoder", state).items())
    _lying(content)
    with pytest.raises(JobFailed) as failed:
        from_record(content, "autoencoder", state)
    assert isinstance(failed.value, FedsynthError)
    assert failed.value.code == "arrays_differ"


def test_the_policy_of_this_test_is_one_that_allows(tiny_site: Site) -> None:
    """The refusals above are due to what each test spoils."""
    assert isinstance(tiny_site.policy(), SitePolicy)
    assert tiny_site.policy().modules == list(MODULES)
