"""Every way of making images goes through the coordinator's rounds and the sites' own app, to drawn patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsynth.models.growth import Stage, active_parameters
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan, save_plan
from fedsynth.records import progress_of
from fedsynth_client.app import app as client_app
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import first_state, load_state
from fedsynth_server.rounds import run_study
from fedsynth_server.synthesis import synthesise
from fedsynth_simulations.grid import InProcessGrid

NODES = {10: "a", 11: "b"}
SHORT = {"rounds": 1, "steps_per_round": 1}
GROWN = {"growth": [1, 1, 1], "rounds": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "progressive": {"architecture": "progressive", "loss": "wasserstein", "lipschitz": "gradient_penalty", **GROWN},
    "enhanced": {"architecture": "enhanced", "l1_weight": 1.0, **GROWN},
    "vae": {"architecture": "vae"},
    "auxiliary": {"l1_weight": 1.0, "feature_matching_weight": 1.0, "spectral_norm": True, "loss": "hinge"},
    "batch normalisation": {"discriminator_norm": "batch", "schedule": "cosine"},
}


def approved(folder: Path, plan: StudyPlan) -> None:
    for name in NODES.values():
        site = Site(folder / name)
        save_policy(site.policy().model_copy(update={"allow_not_private": True}), site.policy_path)
        site.approve(plan)
    save_plan(plan, folder / "study" / "plan.toml")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_study_of_every_architecture_ends_in_synthetic_patients(
    tiny_folder: Path, tiny_plan: StudyPlan, name: str
) -> None:
    values = tiny_plan.model_dump()
    for module in ("autoencoder", "radiogenomics", "gan"):
        values[module] |= SHORT | ({"rounds": 2, "steps_per_round": 2} if module == "gan" else {})
    values["gan"] |= OPTIONS[name]
    if name == "batch normalisation":
        values["privacy"]["epsilon"] = float("inf")
    plan = StudyPlan.model_validate(values)
    approved(tiny_folder, plan)
    study = tiny_folder / "study"
    state = run_study(
        InProcessGrid(client_app, {node: tiny_folder / site for node, site in NODES.items()}), plan, study
    )
    assert load_state(study, plan) is not None
    assert not state.missing_rounds(plan)
    start = first_state(plan, None).weights["generator"]
    assert {key: tensor.shape for key, tensor in state.weights["generator"].items()} == {
        key: tensor.shape for key, tensor in start.items()
    }
    assert any(not torch.equal(state.weights["generator"][key], start[key]) for key in start)
    row_keys = {"round", "site", *progress_of(plan, "gan")}
    assert [set(row) for row in state.curves["gan"]] == [row_keys] * 2 * plan.gan.rounds
    for site in NODES.values():
        assert state.receipts[site]["gan"].private is plan.privacy.private
        assert sum(m.steps for m in Site(tiny_folder / site).ledger().history(plan.digest, "gan")) == plan.gan.steps
    (patient,) = synthesise(plan, state, 1, torch.Generator().manual_seed(1))
    assert patient.images.shape == (3, plan.image.slices, 32, 32)
    if plan.gan.growth:
        # What has not trained before its resolution's turn is not averaged with what has.
        last = set(active_parameters(make_generator(plan), None)) - set(
            active_parameters(make_generator(plan), Stage(1))
        )
        assert all(torch.equal(state.weights["generator_ema"][key], state.weights["generator"][key]) for key in last)
