"""A study that is killed goes on from where it stopped, and no patient pays twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsynth.budget import planned_epsilon
from fedsynth.plan import Module, StudyPlan
from fedsynth_client.app import app as client_app
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import StudyState, load_state
from fedsynth_simulations.grid import InProcessGrid, run_in_process

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

NODES = {10: "a", 11: "b"}

# Runs the federation as the command line does; `STOP` patches one function so that the process ends itself there.
PROGRAM = """
import os, signal, sys
from pathlib import Path
# A process started in the background inherits that Ctrl-C is ignored; one at a terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
import typer
import fedsynth.cli as cli
import fedsynth_client.rounds as site_rounds
import fedsynth_client.training.learner as learner
import fedsynth_server.rounds as server_rounds
from fedsynth_client.app import app as client_app
from fedsynth_server.app import app as server_app
from fedsynth_simulations.grid import InProcessGrid, run_in_process

folder, how = Path(sys.argv[1]), getattr(signal, sys.argv[2])
seen = []

def at(owner, name, number, after=False):
    original = getattr(owner, name)
    def patched(*arguments, **more):
        seen.append(name)
        result = original(*arguments, **more) if after else None
        if len(seen) == number:
            os.kill(os.getpid(), how)
        return result if after else original(*arguments, **more)
    setattr(owner, name, patched)

STOP

def federation():
    grid = InProcessGrid(client_app, {10: folder / "a", 11: folder / "b"})
    run_in_process(server_app, grid, {"study-folder": str(folder / "study")})

root = typer.Typer()
root.command()(federation)
cli.build, sys.argv = lambda: root, ["fedsynth"]
cli.main()
"""

MOMENTS = {
    "right after the second charge, before its first step": 'at(site_rounds, "_train", 2)',
    # The first saving is that of the start; the third would be that of round 2, which both sites have released.
    "between the sites' release and the coordinator's checkpoint": 'at(server_rounds, "save_state", 3)',
    "between a stored result and its entry in the ledger": 'at(site_rounds.Outbox, "store", 6, after=True)',
    "in the middle of training the discriminator": 'at(learner, "private_step_of", 8)',
}


def start_and_stop(folder: Path, stop: str, how: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = PROGRAM.replace("STOP", stop)
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), how], env=environment, capture_output=True, text=True, timeout=300
    )


def finish(folder: Path, plan: StudyPlan) -> StudyState:
    grid = InProcessGrid(client_app, {node: folder / name for node, name in NODES.items()})
    run_in_process(server_app, grid, {"study-folder": str(folder / "study")})
    state = load_state(folder / "study", plan)
    assert state is not None
    return state


def check_the_same_price(folder: Path, plan: StudyPlan, state: StudyState) -> None:
    """Everything is done, each task was charged once, and epsilon is that of a run which nobody disturbed."""
    assert not state.missing_rounds(plan)
    for name in NODES.values():
        ledger = Site(folder / name).ledger()
        tasks = [(e.body["module"], e.body["round"]) for e in ledger.entries() if e.kind == "charge"]
        released = [(e.body["module"], e.body["round"]) for e in ledger.entries() if e.kind == "released"]
        assert len(tasks) == len(set(tasks))
        assert sorted(tasks) == sorted(released) == sorted((m, n) for m in TRAINED for n in (1, 2))
        assert ledger.epsilon(plan.privacy.delta) == pytest.approx(planned_epsilon(plan, name), rel=1e-12)
        assert state.receipts[name]["gan"].epsilon == pytest.approx(planned_epsilon(plan, name), rel=1e-12)


@pytest.mark.slow
def test_an_undisturbed_run_costs_what_was_planned(tiny_folder: Path, tiny_plan: StudyPlan) -> None:
    check_the_same_price(tiny_folder, tiny_plan, finish(tiny_folder, tiny_plan))


@pytest.mark.slow
@pytest.mark.parametrize("stop", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_killed_study_resumes_at_no_further_cost(tiny_folder: Path, tiny_plan: StudyPlan, stop: str) -> None:
    done = start_and_stop(tiny_folder, stop, "SIGKILL")
    assert done.returncode == -signal.SIGKILL, done.stderr
    held = load_state(tiny_folder / "study", tiny_plan)
    assert held is not None
    assert sum(held.rounds.values()) < 6
    before = {name: Site(tiny_folder / name).ledger().entries() for name in NODES.values()}
    assert any(entry.kind == "charge" for entries in before.values() for entry in entries)

    check_the_same_price(tiny_folder, tiny_plan, finish(tiny_folder, tiny_plan))
    for name, entries in before.items():
        assert Site(tiny_folder / name).ledger().entries()[: len(entries)] == entries
    if "save_state" not in stop:
        kinds = {entry.kind for name in NODES.values() for entry in Site(tiny_folder / name).ledger().entries()}
        assert "resumed" in kinds  # the moment was one at which a charge stood without a result


@pytest.mark.slow
def test_an_interrupted_study_ends_with_one_line_and_resumes(tiny_folder: Path, tiny_plan: StudyPlan) -> None:
    done = start_and_stop(tiny_folder, MOMENTS["in the middle of training the discriminator"], "SIGINT")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Interrupted. Nothing that was finished is lost")
    check_the_same_price(tiny_folder, tiny_plan, finish(tiny_folder, tiny_plan))
