"""The same apps over Flower's Ray engine give a finished study; skipped where Ray is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsynth.plan import Module, StudyPlan
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import load_state
from fedsynth_simulations.ray import run_over_ray

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")


@pytest.mark.slow
@pytest.mark.network
def test_a_study_over_ray_finishes_and_charges_what_the_plan_says(tiny_folder: Path, tiny_plan: StudyPlan) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra 'ray')")
    run_over_ray(tiny_folder / "study", [tiny_folder / site.name for site in tiny_plan.sites])
    state = load_state(tiny_folder / "study", tiny_plan)
    assert state is not None
    assert all(state.rounds[module] == tiny_plan.training(module).rounds for module in TRAINED)
    for site in tiny_plan.sites:
        ledger = Site(tiny_folder / site.name).ledger()
        for module in TRAINED:
            assert sum(m.steps for m in ledger.history(tiny_plan.digest, module)) == tiny_plan.training(module).steps
