"""Nobody phones home: the processes of a whole study run where every packet to anybody else is written down."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from federation import STUDY
from parted import Parted

from fedsynth.deployment.supervisor import script

pytestmark = pytest.mark.network

# Importing Flower and telling it that something happened, as its processes do when they start.
_REPORTING = """
from flwr.supercore import telemetry
done = telemetry.event(telemetry.EventType.PING)
done.result(20)
"""


@pytest.fixture(scope="module")
def over(parted: Parted) -> Iterator[Parted]:
    """The federation after its study has ended; the sites' nodes run."""
    parted.wait_until(lambda: parted.started[STUDY].poll() is not None, 180, "the end of the study")
    yield parted


def test_a_whole_study_is_silent(over: Parted) -> None:
    assert over.status().phase == "finished"
    assert over.elsewhere() == []


def test_commands_are_silent(over: Parted) -> None:
    study, site = str(over.folder(STUDY)), str(over.folder("a"))
    commands = [
        (STUDY, ["study", "doctor", study]),
        ("a", ["site", "check", site]),
        ("a", ["site", "audit", "verify", site]),
    ]
    for whose, command in commands:
        # Somebody's own settings must not switch reporting on.
        done = over.run_in(whose, script("fedsynth", *command), FLWR_TELEMETRY_ENABLED="1")
        assert done.returncode != 2, (command, done.stderr)  # understood, whatever the answer
    assert over.elsewhere() == []


def test_a_process_that_reports_would_be_seen(over: Parted) -> None:
    """The same namespaces notice Flower's own reporting where it is not switched off."""
    before = len(over.elsewhere())
    loud = [sys.executable, "-c", _REPORTING]
    over.run_in("a", loud, FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    assert len(over.elsewhere()) == before
    over.run_in("a", loud, FLWR_TELEMETRY_ENABLED="1")
    over.wait_until(lambda: len(over.elsewhere()) > before, 20, "a question for a name server")
    sender, protocol, target, port = over.elsewhere()[before].split()
    assert (sender, protocol, target, port) == ("10.99.0.11", "17", "192.0.2.53", "53")
