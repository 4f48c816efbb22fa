"""The privacy ledger: what this cohort has spent, over all modules, rounds and studies, for the cohort's whole life.

Training patients and held-out patients are different people, so each population has an account of its own: a charge names
whom it is of, and under which split of the cohort. A cohort that is prepared anew is split anew, and nobody can tell who was
where before; a charge of the other population under another split therefore counts against both. Charges of a version that
knew no populations are of training patients under a split that is not known.

One SQLite file, append-only (triggers refuse UPDATE and DELETE) and hash-chained (each entry's digest covers the one
before). A block of private steps is charged *before* its first step; if the process dies, the charge stands.

A block is one task: (study, module, round). Its charge covers the one result that the task releases. A task that died
before anything of it was released may run again, with fresh noise and fresh draws, under the same charge: what nobody
saw costs nothing. A task that has released its result never runs again; its stored reply is sent instead. A task whose
training failed, or whose result was withheld for what it holds (weights that are not finite), never runs again either:
that it failed is told, and may tell something of who was drawn.

A study without privacy is charged, too: as a mechanism without noise, whose epsilon is infinite. From then on the account of
those people is infinite, and nothing private can be charged to them any more.

The chain shows any change of a past entry. That entries were cut off at the end shows against the head digests which
the coordinator received with each reply and which a release quotes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from fedsynth.dp.accounting import Accountant, Mechanism, epsilon
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.plan import Activity, Population

_GENESIS = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    sequence INTEGER PRIMARY KEY,
    recorded_at TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    previous TEXT NOT NULL,
    digest TEXT NOT NULL UNIQUE
);
CREATE TRIGGER IF NOT EXISTS entry_is_never_changed BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_is_never_deleted BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class Task:
    """A block of private steps: one round of one module of one study (`study` is the plan's digest), or an evaluation."""

    study: str
    module: Activity
    round: int


@dataclass(frozen=True)
class Limit:
    """An upper bound on epsilon at `delta`."""

    epsilon: float
    delta: float


class Standing(Enum):
    """What a charge found: the task is new, died before it released anything, has released its result, or had to
    withhold it."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    RELEASED = "released"
    WITHHELD = "withheld"


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    sequence: int
    recorded_at: str
    kind: str
    body: dict[str, Any]
    previous: str
    digest: str


class Ledger:
    """A site's ledger at `path`, created when absent.

    Args:
        path: the SQLite file.
        clock: gives the time written into entries.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = path
        self._clock = clock
        with self._connection() as connection:
            connection.executescript(_SCHEMA)

    def charge(
        self,
        task: Task,
        mechanism: Mechanism,
        *,
        max_grad_norm: float,
        private: bool,
        study_limit: Limit,
        lifetime_limit: Limit,
        accountant: Accountant = "rdp",
        population: Population = "train",
        split: str = "",
    ) -> Standing:
        """Charge `task` before its first step, durably, or say that it was charged before.

        Args:
            task: what is about to run.
            mechanism: all steps of the block.
            max_grad_norm: clipping norm, for the record.
            private: whether the noise is unpredictable; false marks the study as not private, as a mechanism without any
                noise does by itself.
            study_limit: budget of `population` in this study.
            lifetime_limit: budget of `population` over all studies; infinite for a study without privacy that is allowed.
            accountant: how mechanisms are composed.
            population: whose data the block uses.
            split: which patients are of which population (`fedsynth_client.cohort.split_digest`); empty when not known.

        Returns:
            Whether the task may run (`NEW`, `INTERRUPTED`), its stored reply must be sent (`RELEASED`), or neither
            (`WITHHELD`).

        Raises:
            Refused: ``budget_exceeded``: the block would cross a limit; nothing is charged. ``charge_differs``: the task
                was charged before as another mechanism, or of other people.
        """
        terms = {
            **_task_body(task),
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "steps": mechanism.steps,
            "max_grad_norm": max_grad_norm,
            "private": private and mechanism.noise_multiplier > 0,
            "population": population,
            "split": split,
        }
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            entries = list(_entries(connection))
            _check_chain(entries)
            earlier = [e for e in entries if e.kind == "charge" and _is_task(e, task)]
            if earlier:
                if not _same_terms(earlier[0].body, terms):
                    raise Refused(
                        "charge_differs",
                        f"{task.module} round {task.round} was charged before with other parameters, or of a cohort that "
                        "was split otherwise; it cannot run again.",
                    )
                for standing in (Standing.RELEASED, Standing.WITHHELD):
                    if any(e.kind == standing.value and _is_task(e, task) for e in entries):
                        return standing
                self._append(connection, "resumed", _task_body(task))
                return Standing.INTERRUPTED
            people = "training" if population == "train" else "held-out"
            for limit, history, whose in (
                (study_limit, _history(entries, task.study, population, split), f"the study for {people} patients"),
                (lifetime_limit, _history(entries, None, population, split), f"this cohort's {people} patients"),
            ):
                spent = epsilon(history, limit.delta, accountant)
                after = epsilon([*history, mechanism], limit.delta, accountant)
                if after > limit.epsilon + 1e-9:
                    if any(each.noise_multiplier == 0 for each in history):
                        raise Refused("budget_exceeded", _unprotected(people, task), _FOR_EVER)
                    raise Refused(
                        "budget_exceeded",
                        f"{task.module} round {task.round} would raise the epsilon of {whose} from {spent:.4f} to "
                        f"{after:.4f}, above its budget of {limit.epsilon:g} (delta {limit.delta:g}).",
                        "Nothing was charged. A larger budget needs a new plan and the site's approval."
                        + _moved(entries, population, split),
                    )
            self._append(connection, "charge", terms)
            return Standing.NEW

    def released(self, task: Task, reply_sha256: str) -> None:
        """Record that `task` has its one result, stored as a file of digest `reply_sha256`, ready to be sent.

        Raises:
            Refused: ``not_open``: the task was never charged, or has come to its end before.
        """
        self._close(task, "released", {"sha256": reply_sha256})

    def withheld(self, task: Task, code: str) -> None:
        """Record that the result of `task` may not leave, with the cause's code, so that the task never runs again.

        Raises:
            Refused: ``not_open``.
        """
        self._close(task, "withheld", {"code": code})

    def sent(self, task: Task, records: dict[str, int], sha256: str, recipient: str) -> None:
        """Record that the stored reply of `task` goes out: names and bytes of its records, digest, to whom."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            body = {**_task_body(task), "records": records, "sha256": sha256, "to": recipient}
            self._append(connection, "sent", body)

    def reply_digest(self, task: Task) -> str | None:
        """Digest of the stored reply of `task`; None when it has released nothing."""
        found = [e for e in self.entries() if e.kind == "released" and _is_task(e, task)]
        return found[0].body["sha256"] if found else None

    def last_released_round(self, study: str, module: Activity) -> int:
        """The highest released round of `module` in `study`; 0 when there is none."""
        rounds = [
            e.body["round"]
            for e in self.entries()
            if e.kind == "released" and e.body["study"] == study and e.body["module"] == module
        ]
        return max(rounds, default=0)

    def entries(self) -> list[Entry]:
        """All entries, oldest first, after checking the chain.

        Raises:
            Refused: ``ledger_tampered``.
        """
        with self._connection() as connection:
            entries = list(_entries(connection))
        _check_chain(entries)
        return entries

    def history(
        self,
        study: str | None = None,
        module: Activity | None = None,
        *,
        population: Population = "train",
        split: str | None = None,
    ) -> list[Mechanism]:
        """Charged mechanisms that count; equal ones merged.

        Args:
            study: of this study alone.
            module: of this module or evaluation alone, whomever it was charged to.
            population: that count against these patients.
            split: how the cohort is split now; by default as at the last charge (of `study`).
        """
        entries = self.entries()
        return _history(entries, study, population, _newest_split(entries, study) if split is None else split, module)

    def epsilon(
        self,
        delta: float,
        accountant: Accountant = "rdp",
        study: str | None = None,
        *,
        population: Population = "train",
        split: str | None = None,
    ) -> float:
        """Epsilon of a patient of `population` at `delta`, by one study or over all of them; `split` as in `history`."""
        return epsilon(self.history(study, population=population, split=split), delta, accountant)

    def check_not_moved(self, study: str, split: str) -> None:
        """Refuse to evaluate a study on a cohort that was split anew since it was trained on: held-out patients may be
        among those who trained the generator.

        Raises:
            Refused: ``split_changed``.
        """
        charges = [e.body for e in self.entries() if e.kind == "charge" and e.body["study"] == study]
        if any(_population(body) == "train" and _split(body) != split for body in charges):
            raise Refused(
                "split_changed",
                "The cohort was prepared anew since this study trained on it, so patients who are held out now may have "
                "been training patients then.",
                "The study goes on without this site's evaluation.",
            )

    def is_private(self, study: str | None = None) -> bool:
        """Whether every charge (of one study, or at all) was made with noise, and unpredictable noise."""
        return all(e.body["private"] for e in self.entries() if e.kind == "charge" and study in (None, e.body["study"]))

    @property
    def head(self) -> str:
        """Digest of the newest entry."""
        entries = self.entries()
        return entries[-1].digest if entries else _GENESIS

    def _close(self, task: Task, kind: str, more: dict[str, Any]) -> None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            kinds = {e.kind for e in _entries(connection) if _is_task(e, task)}
            if "charge" not in kinds or kinds & {"released", "withheld"}:
                raise Refused("not_open", f"{task.module} round {task.round} has no open charge.")
            self._append(connection, kind, {**_task_body(task), **more})

    def _append(self, connection: sqlite3.Connection, kind: str, body: dict[str, Any]) -> None:
        row = connection.execute("SELECT sequence, digest FROM entry ORDER BY sequence DESC LIMIT 1").fetchone()
        sequence, previous = (row[0] + 1, row[1]) if row else (1, _GENESIS)
        recorded_at = self._clock().isoformat(timespec="seconds")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        digest = _digest(sequence, recorded_at, kind, text, previous)
        connection.execute(
            "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)", (sequence, recorded_at, kind, text, previous, digest)
        )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._path, timeout=30.0, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise UsageError("ledger_unavailable", f"The ledger {self._path} cannot be opened: {error}.") from None
        try:
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise JobFailed(
                "ledger_not_written",
                f"The ledger {self._path} could not be read or written: {error}.",
                "Nothing ran without a charge. Check disk space and permissions, then try again.",
            ) from None
        except sqlite3.DatabaseError as error:
            raise Refused("ledger_tampered", f"The ledger {self._path} is not an intact database: {error}.") from None
        finally:
            connection.close()  # rolls an open transaction back


def _task_body(task: Task) -> dict[str, Any]:
    return {"study": task.study, "module": task.module, "round": task.round}


def _is_task(entry: Entry, task: Task) -> bool:
    return all(entry.body.get(key) == value for key, value in _task_body(task).items())


def _entries(connection: sqlite3.Connection) -> Iterator[Entry]:
    for sequence, recorded_at, kind, text, previous, digest in connection.execute(
        "SELECT sequence, recorded_at, kind, body, previous, digest FROM entry ORDER BY sequence"
    ):
        if digest != _digest(sequence, recorded_at, kind, text, previous):
            raise _tampered(sequence)
        yield Entry(sequence, recorded_at, kind, json.loads(text), previous, digest)


def _check_chain(entries: list[Entry]) -> None:
    previous = _GENESIS
    for place, entry in enumerate(entries, start=1):
        if entry.sequence != place or entry.previous != previous:
            raise _tampered(place)
        previous = entry.digest


def _tampered(sequence: int) -> Refused:
    return Refused(
        "ledger_tampered",
        f"The ledger's chain is broken at entry {sequence}: an entry was changed, removed or put in.",
        "Restore the ledger from a backup whose head the coordinator knows. Nothing can be trained until then.",
    )


def _digest(sequence: int, recorded_at: str, kind: str, text: str, previous: str) -> str:
    return hashlib.sha256(json.dumps([sequence, recorded_at, kind, text, previous]).encode()).hexdigest()


def _population(body: dict[str, Any]) -> Population:
    return "holdout" if body.get("population") == "holdout" else "train"


def _split(body: dict[str, Any]) -> str:
    return str(body.get("split", ""))


def _newest_split(entries: list[Entry], study: str | None) -> str:
    charges = (e.body for e in reversed(entries) if e.kind == "charge" and study in (None, e.body["study"]))
    return next((_split(body) for body in charges), "")


def _counts(body: dict[str, Any], population: Population, split: str) -> bool:
    """Whether a charge counts against `population` of a cohort that is split so.

    It does when it is of that population, under whatever split. One of the other population does not when nobody was moved
    since; under another split, or one that is not known, a patient may have been of the other population then.
    """
    return _population(body) == population or not split or _split(body) != split


def _moved(entries: list[Entry], population: Population, split: str) -> str:
    """What to say where charges of the other population count."""
    if not any(
        e.kind == "charge" and _population(e.body) != population and _counts(e.body, population, split) for e in entries
    ):
        return ""
    return (
        " Counted are also charges of the other patients (training or held-out), made before the cohort was prepared anew: "
        "who was where then is not known."
    )


_FOR_EVER = (
    "Nothing was charged, and nothing private can be promised to these patients any more. Other patients can take part, in "
    "a site's folder of their own."
)


def _unprotected(people: str, task: Task) -> str:
    """Why nothing can be charged to a cohort that took part in a study without privacy."""
    return (
        f"This cohort took part in a study without privacy, so the epsilon of its {people} patients is infinite: "
        f"{task.module} round {task.round} would be above any budget."
    )


def _same_terms(charged: dict[str, Any], terms: dict[str, Any]) -> bool:
    """Whether a task goes on as it was charged; an older version did not write who was charged under which split."""
    known = {"population": "train", **charged}
    return {**known, "split": terms["split"]} == terms and _split(charged) in ("", terms["split"])


def _history(
    entries: list[Entry], study: str | None, population: Population, split: str, module: Activity | None = None
) -> list[Mechanism]:
    steps: Counter[tuple[float, float]] = Counter()
    for entry in entries:
        if entry.kind != "charge" or (study is not None and entry.body["study"] != study):
            continue
        if entry.body["module"] == module or (module is None and _counts(entry.body, population, split)):
            steps[entry.body["sample_rate"], entry.body["noise_multiplier"]] += entry.body["steps"]
    return [Mechanism(rate, sigma, count) for (rate, sigma), count in steps.items()]
