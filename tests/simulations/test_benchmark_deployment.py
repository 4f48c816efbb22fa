"""Pure parts of the deployment benchmark: what is computed from notes, and the page; and its relay, over loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedsynth.plan import StudyPlan
from fedsynth_client.cohort import load_cohort
from fedsynth_simulations.benchmarking.cohorts import Patients
from fedsynth_simulations.benchmarking.deployment import Missed, Relay, free_port, wait_until, write_cohort
from fedsynth_simulations.benchmarking.deployment_figures import (
    Checkpoint,
    Sample,
    TaskDone,
    Traffic,
    charged_twice,
    page,
    passed,
    rounds_of,
    slowest,
    task_round,
    usage_between,
)


def test_rounds_lie_between_checkpoints_and_a_fit_is_no_round() -> None:
    notes = [
        Checkpoint(0.0, {"embedding": 0, "gan": 0}),
        Checkpoint(4.0, {"embedding": 1, "gan": 0}),
        Checkpoint(9.0, {"embedding": 1, "gan": 0}),  # the fit
        Checkpoint(12.0, {"embedding": 1, "gan": 1}),
    ]
    assert [(r.module, r.number, r.seconds) for r in rounds_of(notes)] == [("embedding", 1, 4.0), ("gan", 1, 3.0)]


def test_a_checkpoint_that_was_missed_makes_no_round_of_twice_the_length() -> None:
    assert rounds_of([Checkpoint(0.0, {"gan": 1}), Checkpoint(9.0, {"gan": 3})]) == []


def test_tasks_are_known_by_module_and_round_and_only_answers_count() -> None:
    assert task_round("'query.site'") is None
    answered = [
        TaskDone(site, "'train.gan' round 2", "answered", seconds, 0.2) for site, seconds in (("a", 3.5), ("b", 4.0))
    ]
    others = [
        TaskDone("c", "'train.gan' round 2", "internal_error", 9.0, 0.0),
        TaskDone("c", "'query.site'", "answered", 9.0, 0.0),
    ]
    assert slowest([*answered, *others]) == {("gan", 2): answered[1]}


def test_bytes_are_counted_after_the_beginning_and_up_to_the_end() -> None:
    traffic = [Traffic(1.0, 1, 0, 1), Traffic(2.0, 10, 0, 1), Traffic(3.0, 0, 100, 1), Traffic(4.0, 1000, 0, 2)]
    assert passed(traffic, 1.0, 3.0) == (10, 100)


def test_usage_is_of_the_window_and_of_processes_that_ran_in_it() -> None:
    samples = [
        Sample(0.0, {"a/runner": (9 * 2**20, 0.0)}),
        Sample(10.0, {"a/runner": (2 * 2**20, 1.0), "a/gone": (0, 0.0)}),
        Sample(20.0, {"a/runner": (4 * 2**20, 6.0), "a/gone": (0, 0.0)}),
    ]
    found = usage_between(samples, 5.0, 25.0)
    assert found == {"a/runner": {"mean_mib": 3.0, "peak_mib": 4.0, "cpu_percent": 50.0}}


def test_a_second_charge_for_a_round_is_named() -> None:
    assert charged_twice({"a": [("gan", 1), ("gan", 2)]}) == {}
    assert charged_twice({"a": [("gan", 2), ("gan", 1), ("gan", 2)]}) == {"a": ["gan 2"]}


def _found(finished: bool, twice: dict[str, list[str]]) -> dict[str, object]:
    machine = {"date": "2026-01-01", "version": "1", "flower": "1", "python": "3", "cores": 2, "load": 0.1}
    spread = {"median": 5.0, "min": 4.0, "max": 6.0, "count": 3}
    fault = {
        "fault": "SuperLink killed",
        "down_seconds": 0.0,
        "recovery_seconds": 12.5,
        "sites_in_round": 3,
        "sites": 3,
    }
    return {
        "runs": {"kills": {**machine, "command": "python benchmark.py"}},
        "kills": {
            "round_timeout_s": 240.0,
            "faults": [{**fault, "charged_twice": twice}],
            "tried": ["SuperLink killed"],
            "undisturbed_seconds": spread,
            "finished": finished,
            "rounds": 9,
            "charges": 27,
            "charged_twice": twice,
        },
    }


def test_the_page_says_when_a_study_did_not_finish_or_paid_twice() -> None:
    fine, bad = page(_found(True, {})), page(_found(False, {"a": ["gan 2"]}))
    assert "The study then finished, and no round was charged twice" in fine
    assert "| SuperLink killed |  | 12.5 | 3 of 3 | none |" in fine
    assert "did not finish" in bad
    assert "charged twice: {'a': ['gan 2']}" in bad


def test_a_written_cohort_is_one_that_sites_read(tiny_plan: StudyPlan, tmp_path: Path) -> None:
    image, features, rng = tiny_plan.image, tiny_plan.morphology.features, np.random.default_rng(0)
    shape = (3, len(image.sequences), image.slices, image.size, image.size)
    patients = Patients(
        rng.random(shape).astype(np.float16),
        np.ones((3, *shape[2:]), dtype=np.uint8),
        rng.normal(size=(3, len(tiny_plan.genes.panel))).astype(np.float32),
        rng.random((3, len(features))).astype(np.float32),
        np.array([0, 1, 1]),
    )
    write_cohort(tmp_path / "cohort", tiny_plan, patients)
    read = load_cohort(tmp_path / "cohort", features).split("train")
    np.testing.assert_array_equal(read.images, patients.images)
    np.testing.assert_array_equal(read.labels, patients.labels)
    np.testing.assert_allclose(read.genes, patients.genes)


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends everything back twice; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the test is over
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(1024):
                        connection.sendall(data * 2)
                except OSError:  # the relay broke the connection
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_the_relay_counts_both_ways_and_breaks_and_mends(echo: int) -> None:
    port = free_port()
    with closing(Relay(port, echo)) as relay:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"12345")
            assert connection.recv(10, socket.MSG_WAITALL) == b"1234512345"
            wait_until(lambda: passed(relay.traffic, 0, float("inf")) == (5, 10), 5, "the count")
            relay.refuse()
            with pytest.raises(ConnectionError):
                _ask(connection)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)
        relay.restore()
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"1")
            assert connection.recv(2, socket.MSG_WAITALL) == b"11"
        assert relay.traffic[-1].connection == 2


def _ask(connection: socket.socket) -> None:
    """Send until the broken connection shows."""
    connection.settimeout(5)
    for _ in range(3):
        connection.sendall(b"1")
        if not connection.recv(1):
            raise ConnectionResetError


def test_a_relay_that_hangs_up_takes_connections_and_ends_them(echo: int) -> None:
    port = free_port()
    with closing(Relay(port, echo)) as relay:
        relay.hang_up()
        with socket.create_connection(("127.0.0.1", port), 5) as connection, pytest.raises(ConnectionError):
            _ask(connection)


def test_a_silent_relay_passes_later_what_was_said_meanwhile(echo: int) -> None:
    port = free_port()
    with closing(Relay(port, echo)) as relay, socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"1")
        assert connection.recv(2, socket.MSG_WAITALL) == b"11"
        relay.hold()
        connection.sendall(b"2")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        relay.restore()
        connection.settimeout(5)
        assert connection.recv(2, socket.MSG_WAITALL) == b"22"


def test_waiting_ends() -> None:
    with pytest.raises(Missed, match="the end: not within 0 s"):
        wait_until(lambda: False, 0.1, "the end")
