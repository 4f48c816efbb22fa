"""The ledger as a data officer relies on it: what is in it stays in it, and what it allows is never crossed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth_client import ledger as ledger_module
from fedsynth_client.ledger import Entry, Ledger, Limit, Standing, Task

STUDY, OTHER = "5" * 64, "6" * 64
AMPLE = Limit(1e3, 1e-5)
BLOCK = Mechanism(0.1, 1.0, 10)


def charge(
    ledger: Ledger,
    task: Task,
    block: Mechanism = BLOCK,
    *,
    study: Limit = AMPLE,
    lifetime: Limit = AMPLE,
    private: bool = True,
    clip: float = 1.0,
) -> Standing:
    return ledger.charge(task, block, max_grad_norm=clip, private=private, study_limit=study, lifetime_limit=lifetime)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite", lambda: datetime(2026, 11, 20, tzinfo=UTC))


@pytest.fixture
def written(ledger: Ledger) -> Ledger:
    """Two rounds of one module, the first released and sent."""
    first = Task(STUDY, "gan", 1)
    charge(ledger, first)
    ledger.released(first, "a" * 64)
    ledger.sent(first, {"generator": 10}, "a" * 64, "node 1")
    charge(ledger, Task(STUDY, "gan", 2))
    return ledger


def path_of(ledger: Ledger) -> Path:
    return ledger._path


def behind_its_back(ledger: Ledger, *statements: str) -> None:
    """What somebody with write access to the file can do: drop the triggers, then change what they like."""
    with sqlite3.connect(path_of(ledger)) as connection:
        connection.execute("DROP TRIGGER entry_is_never_changed")
        connection.execute("DROP TRIGGER entry_is_never_deleted")
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_a_task_is_new_then_interrupted_then_released(ledger: Ledger) -> None:
    task = Task(STUDY, "gan", 1)
    assert charge(ledger, task) is Standing.NEW
    assert charge(ledger, task) is Standing.INTERRUPTED
    ledger.released(task, "a" * 64)
    assert charge(ledger, task) is Standing.RELEASED
    assert [entry.kind for entry in ledger.entries()] == ["charge", "resumed", "released"]
    assert ledger.history() == [BLOCK]  # once


def test_a_task_has_one_result(ledger: Ledger) -> None:
    task = Task(STUDY, "gan", 1)
    with pytest.raises(Refused, match="no open charge") as refused:
        ledger.released(task, "a" * 64)
    assert refused.value.code == "not_open"
    charge(ledger, task)
    ledger.released(task, "a" * 64)
    for close in (lambda: ledger.released(task, "b" * 64), lambda: ledger.withheld(task, "arrays_not_finite")):
        with pytest.raises(Refused) as refused:
            close()
        assert refused.value.code == "not_open"
    assert ledger.reply_digest(task) == "a" * 64


def test_a_withheld_task_never_runs_again(ledger: Ledger) -> None:
    task = Task(STUDY, "gan", 1)
    charge(ledger, task)
    ledger.withheld(task, "arrays_not_finite")
    assert charge(ledger, task) is Standing.WITHHELD
    assert ledger.reply_digest(task) is None
    assert ledger.last_released_round(STUDY, "gan") == 0
    assert ledger.history() == [BLOCK]  # its charge stands


@pytest.mark.parametrize(
    "statement", ["UPDATE entry SET body = '{}'", "DELETE FROM entry", "DELETE FROM entry WHERE sequence = 4"]
)
def test_entries_can_only_be_added(written: Ledger, statement: str) -> None:
    connection = sqlite3.connect(path_of(written))
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert len(written.entries()) == 4


CHANGES = {
    "cheaper charge": ["UPDATE entry SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE sequence = 1"],
    "another time": ["UPDATE entry SET recorded_at = '2020-01-01T00:00:00+00:00' WHERE sequence = 2"],
    "another kind": ["UPDATE entry SET kind = 'note' WHERE sequence = 1"],
    "first entry removed": ["DELETE FROM entry WHERE sequence = 1"],
    "middle entry removed": ["DELETE FROM entry WHERE sequence = 2"],
    "removed and renumbered": [
        "DELETE FROM entry WHERE sequence = 2",
        "UPDATE entry SET sequence = sequence - 1 WHERE sequence > 2",
    ],
    "two swapped": [
        "UPDATE entry SET sequence = 99 WHERE sequence = 2",
        "UPDATE entry SET sequence = 2 WHERE sequence = 3",
        "UPDATE entry SET sequence = 3 WHERE sequence = 99",
    ],
    "entry put in": ["INSERT INTO entry VALUES (5, 't', 'released', '{}', 'p', 'd')"],
    "copy put in": [
        "INSERT INTO entry SELECT 5, recorded_at, kind, body, previous, 'other' FROM entry WHERE sequence = 4"
    ],
}


@pytest.mark.parametrize("statements", CHANGES.values(), ids=CHANGES.keys())
def test_any_change_is_noticed_and_nothing_can_be_charged_any_more(written: Ledger, statements: list[str]) -> None:
    behind_its_back(written, *statements)
    attempts: list[Callable[[], object]] = [
        written.entries,
        lambda: charge(written, Task(STUDY, "gan", 3)),
        lambda: charge(Ledger(path_of(written)), Task(STUDY, "gan", 3)),
        lambda: written.head,
        lambda: written.epsilon(1e-5),
    ]
    for attempt in attempts:
        with pytest.raises(Refused) as refused:
            attempt()
        assert refused.value.code == "ledger_tampered"


def test_a_change_with_a_digest_of_its_own_breaks_the_next_link(written: Ledger) -> None:
    """Whoever also recomputes the changed entry's digest has to recompute all after it, up to the head that left."""
    entry = written.entries()[0]
    body = json.dumps({**entry.body, "steps": 1}, sort_keys=True, separators=(",", ":"))
    digest = ledger_module._digest(1, entry.recorded_at, entry.kind, body, entry.previous)
    behind_its_back(written, f"UPDATE entry SET body = '{body}', digest = '{digest}' WHERE sequence = 1")
    with pytest.raises(Refused) as refused:
        written.entries()
    assert refused.value.code == "ledger_tampered"
    assert "entry 2" in refused.value.message


def test_cutting_off_the_end_shows_against_the_head_that_was_told(written: Ledger) -> None:
    told = written.head
    assert told == written.entries()[-1].digest
    behind_its_back(written, "DELETE FROM entry WHERE sequence = 4")
    assert told not in {entry.digest for entry in written.entries()}  # the chain is whole, but the head is gone
    charge(written, Task(STUDY, "gan", 2), Mechanism(0.1, 1.5, 10))  # and nothing brings it back
    assert told not in {entry.digest for entry in written.entries()}


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(Refused) as refused:
        Ledger(path)
    assert refused.value.code == "ledger_tampered"
    assert path.read_bytes().startswith(b"not a database")  # it is not replaced by an empty one


def test_everything_is_composed_over_modules_rounds_and_studies(ledger: Ledger) -> None:
    blocks = {
        Task(STUDY, "autoencoder", 1): Mechanism(0.1, 1.1, 10),
        Task(STUDY, "autoencoder", 2): Mechanism(0.1, 1.1, 10),
        Task(STUDY, "gan", 1): Mechanism(0.3, 2.0, 7),
        Task(OTHER, "gan", 1): Mechanism(0.05, 0.9, 20),
    }
    for task, block in blocks.items():
        charge(ledger, task, block)
    mine = [block for task, block in blocks.items() if task.study == STUDY]
    assert ledger.epsilon(1e-5) == pytest.approx(epsilon(list(blocks.values()), 1e-5))
    assert ledger.epsilon(1e-5, study=STUDY) == pytest.approx(epsilon(mine, 1e-5))
    assert ledger.epsilon(1e-5, study=OTHER) < ledger.epsilon(1e-5)
    assert ledger.history(STUDY, "autoencoder") == [Mechanism(0.1, 1.1, 20)]
    # Each study by itself would say less than what a patient of this cohort has lost.
    assert ledger.epsilon(1e-5) > max(ledger.epsilon(1e-5, study=study) for study in (STUDY, OTHER))


@given(
    blocks=st.lists(
        st.tuples(st.sampled_from([0.05, 0.2]), st.sampled_from([0.8, 2.0]), st.integers(1, 30)), min_size=1, max_size=6
    ),
    budget=st.floats(0.5, 6.0),
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_asked_for_the_budget_is_never_crossed(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[tuple[float, float, int]], budget: float
) -> None:
    ledger, limit = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite"), Limit(budget, 1e-5)
    charged: list[Mechanism] = []
    for number, block in enumerate(blocks, start=1):
        mechanism = Mechanism(*block)
        fits = epsilon([*charged, mechanism], 1e-5) <= budget + 1e-9
        if fits:
            charge(ledger, Task(STUDY, "gan", number), mechanism, lifetime=limit)
            charged.append(mechanism)
        else:
            with pytest.raises(Refused):
                charge(ledger, Task(STUDY, "gan", number), mechanism, lifetime=limit)
    assert ledger.epsilon(1e-5) == pytest.approx(epsilon(charged, 1e-5))
    assert ledger.epsilon(1e-5) <= budget + 1e-9


@pytest.mark.parametrize("whose", ["study", "lifetime"])
def test_a_charge_beyond_a_budget_is_refused_with_the_true_numbers(ledger: Ledger, whose: str) -> None:
    spent_on = STUDY if whose == "study" else OTHER
    charge(ledger, Task(spent_on, "gan", 1))
    spent, after = epsilon([BLOCK], 1e-5), epsilon([BLOCK, Mechanism(0.5, 0.8, 50)], 1e-5)
    before = ledger.entries()
    tight = Limit(spent + 1.0, 1e-5)
    limits = {"study": tight if whose == "study" else AMPLE, "lifetime": tight if whose == "lifetime" else AMPLE}
    with pytest.raises(Refused) as refused:
        charge(ledger, Task(STUDY, "gan", 2), Mechanism(0.5, 0.8, 50), **limits)
    assert refused.value.code == "budget_exceeded"
    assert ("the study" if whose == "study" else "this cohort") in refused.value.message
    for number in (f"{spent:.4f}", f"{after:.4f}", f"{tight.epsilon:g}"):
        assert number in refused.value.message
    assert ledger.entries() == before
    assert charge(ledger, Task(STUDY, "gan", 2), Mechanism(0.1, 5.0, 1), **limits) is Standing.NEW


@pytest.mark.parametrize(
    ("block", "more"),
    [
        (Mechanism(0.2, 1.0, 10), {}),
        (Mechanism(0.1, 0.9, 10), {}),
        (Mechanism(0.1, 1.0, 11), {}),
        (BLOCK, {"clip": 2.0}),
        (BLOCK, {"private": False}),
    ],
)
def test_the_same_task_with_other_parameters_is_refused(
    ledger: Ledger, block: Mechanism, more: dict[str, bool]
) -> None:
    charge(ledger, Task(STUDY, "gan", 1))
    before = ledger.entries()
    with pytest.raises(Refused) as refused:
        charge(ledger, Task(STUDY, "gan", 1), block, **more)
    assert refused.value.code == "charge_differs"
    assert ledger.entries() == before


def test_a_seeded_charge_marks_its_study_and_the_life_of_the_cohort(ledger: Ledger) -> None:
    charge(ledger, Task(STUDY, "gan", 1))
    assert ledger.is_private()
    charge(ledger, Task(OTHER, "gan", 1), private=False)
    assert (ledger.is_private(STUDY), ledger.is_private(OTHER), ledger.is_private()) == (True, False, False)


def test_an_entry_holds_nothing_but_public_plan_values_and_digests(written: Ledger) -> None:
    terms = {"sample_rate", "noise_multiplier", "steps", "max_grad_norm", "private"}
    allowed = {
        "charge": {"study", "module", "round", *terms, "population", "split"},
        "released": {"study", "module", "round", "sha256"},
        "sent": {"study", "module", "round", "records", "sha256", "to"},
    }
    for entry in written.entries():
        assert isinstance(entry, Entry)
        assert set(entry.body) == allowed[entry.kind]


def _race(path: Path, worker: int, tasks: list[Task], limit: Limit) -> None:
    ledger = Ledger(path)
    for task in tasks if worker % 2 else tasks[::-1]:
        try:
            charge(ledger, task, lifetime=limit)
        except Refused as refused:
            assert refused.code == "budget_exceeded"


def test_processes_that_charge_at_once_never_overspend_and_never_charge_a_task_twice(tmp_path: Path) -> None:
    path, tasks = tmp_path / "ledger.sqlite", [Task(STUDY, "gan", number) for number in range(1, 16)]
    limit = Limit(epsilon([Mechanism(0.1, 1.0, 10 * 9)], 1e-5) + 1e-6, 1e-5)  # room for nine of them
    epsilon([BLOCK], 1e-5)  # computed here once for all children
    context = get_context("fork")  # the children do no more than Python, numpy and SQLite
    workers = [context.Process(target=_race, args=(path, worker, tasks, limit)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    ledger = Ledger(path)
    charged = [entry.body["round"] for entry in ledger.entries() if entry.kind == "charge"]
    assert len(charged) == len(set(charged)) == 9
    assert ledger.epsilon(1e-5) <= limit.epsilon


def test_a_full_disk_is_named_and_charges_nothing(written: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before, connect = written.entries(), sqlite3.connect

    def full(path: Path, **options: float | None) -> sqlite3.Connection:
        connection = connect(path, **options)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says what it says on a full disk
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", full)
        with pytest.raises(JobFailed, match="full") as failed:
            for number in range(3, 500):
                charge(written, Task(STUDY, "gan", number), Mechanism(0.001, 50.0, 1))
    assert failed.value.code == "ledger_not_written"
    after = written.entries()
    assert after[:4] == before
    assert charge(written, Task(STUDY, "autoencoder", 1)) is Standing.NEW


def test_a_ledger_that_cannot_be_written_is_named(written: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options)
    )
    with pytest.raises(JobFailed, match="readonly") as failed:
        charge(written, Task(STUDY, "gan", 3))
    assert failed.value.code == "ledger_not_written"
    assert len(written.entries()) == 4


def test_a_ledger_in_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((JobFailed, UsageError)) as failed:
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")
    assert failed.value.code in ("ledger_not_written", "ledger_unavailable")
