"""A study of one-shot statistics: both are released once, added up, fitted to, and survive a killed coordinator."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file

from fedsynth.budget import noise_multipliers, planned_epsilon
from fedsynth.engines.embedding import plan_embedding
from fedsynth.models.images import make_generator
from fedsynth.plan import GanPlan, Module, StudyPlan, TrainingPlan, save_plan
from fedsynth.records import LARGEST_NORM, PROFILES, PUBLIC, State, state_digest, task_record, to_record
from fedsynth_client import rounds as client_rounds
from fedsynth_client.app import app as client_app
from fedsynth_client.policy import save_policy
from fedsynth_client.site import Site
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.statistic import TOTAL
from fedsynth_server import rounds
from fedsynth_server.checkpoint import StudyState, load_state
from fedsynth_server.fitting.embedding import read_total
from fedsynth_server.fitting.fit import fit_statistic
from fedsynth_server.rounds import run_study
from fedsynth_server.statement import privacy_statement
from fedsynth_server.synthesis import synthesise
from fedsynth_simulations.feature_network import embedding_state
from fedsynth_simulations.gene_basis import public_moments_weights
from fedsynth_simulations.grid import InProcessGrid
from fedsynth_simulations.pretrain import PublicPatients

COMPONENTS, PUBLIC_PATIENTS = 4, 12
NODES = {10: "a", 11: "b"}


@pytest.fixture(scope="module")
def weights(tiny_plan: StudyPlan) -> dict[str, State]:
    """Public weights of both statistics, from patients made of noise."""
    rng, image = np.random.default_rng(5), tiny_plan.image
    grid = (PUBLIC_PATIENTS, image.slices, image.size, image.size)
    features = len(tiny_plan.morphology.features)
    images = rng.uniform(-1, 1, (PUBLIC_PATIENTS, len(image.sequences) + 1, *grid[1:]))
    public = PublicPatients(
        torch.from_numpy(images.astype(np.float16)),
        torch.from_numpy(rng.random((PUBLIC_PATIENTS, features)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 2, PUBLIC_PATIENTS)),
    )
    parts = rng.integers(0, 4, grid).astype(np.uint8)
    model = make_generator(tiny_plan)
    profiles = rng.normal(size=(50, len(tiny_plan.genes.panel)))
    return {
        PUBLIC["moments"]: public_moments_weights(profiles, rng.random((50, features)), COMPONENTS),
        PUBLIC["embedding"]: embedding_state(
            tiny_plan, public, parts, model, torch.Generator().manual_seed(1), steps=2
        ),
    }


def without_rounds(section: TrainingPlan) -> TrainingPlan:
    return section.model_copy(update={"rounds": 0})


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan, weights: dict[str, State]) -> StudyPlan:
    """Moments, embedding, and one round of the GAN."""
    gan: GanPlan = tiny_plan.gan.model_copy(update={"rounds": 1, "budget_share": 0.3})

    def public(module: Module) -> dict[str, str]:
        return {"sha256": state_digest(weights[PUBLIC[module]]), "provenance": "patients made of noise"}

    return StudyPlan.model_validate(
        {
            **tiny_plan.model_dump(),
            "autoencoder": without_rounds(tiny_plan.autoencoder).model_dump(),
            "radiogenomics": without_rounds(tiny_plan.radiogenomics).model_dump(),
            "moments": {"budget_share": 0.3, "public": public("moments"), "components": COMPONENTS},
            "embedding": {"budget_share": 0.4, "public": public("embedding"), "dimensions": 20, "fit_steps": 3},
            "gan": gan.model_dump(),
        }
    )


@pytest.fixture
def folder(tiny_folder: Path, plan: StudyPlan) -> Path:
    """Sites that approved the plan, and the study's folder."""
    for name in NODES.values():
        Site(tiny_folder / name).approve(plan)
    save_plan(plan, tiny_folder / "study" / "plan.toml")
    return tiny_folder


def grid_of(folder: Path, tap: Callable[[str, int, bytes], None] | None = None) -> InProcessGrid:
    sites = {node: folder / name for node, name in NODES.items()}
    return InProcessGrid(client_app, sites) if tap is None else InProcessGrid(client_app, sites, wiretap=tap)


@pytest.fixture(scope="module")
def finished(
    plan: StudyPlan, weights: dict[str, State], _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyState]:
    """The study, run once, and its folder."""
    root = tmp_path_factory.mktemp("finished") / "tiny"
    shutil.copytree(_tiny_template, root)
    for name in NODES.values():
        Site(root / name).approve(plan)
    save_plan(plan, root / "study" / "plan.toml")
    return root, run_study(grid_of(root), plan, root / "study", weights)


def test_the_whole_study_costs_what_the_plan_says(finished: tuple[Path, StudyState], plan: StudyPlan) -> None:
    root, state = finished
    assert not state.missing_rounds(plan)
    for name in NODES.values():
        ledger = Site(root / name).ledger()
        charges = [e.body for e in ledger.entries() if e.kind == "charge"]
        assert [(c["module"], c["sample_rate"], c["steps"]) for c in charges[:2]] == [
            ("moments", 1.0, 1),
            ("embedding", 1.0, 1),
        ]
        assert ledger.epsilon(plan.privacy.delta) == pytest.approx(planned_epsilon(plan, name), abs=1e-6)
        assert ledger.epsilon(plan.privacy.delta) <= plan.privacy.epsilon
    stated = privacy_statement(plan, state)
    assert [m.module for m in stated.sites[0].mechanisms] == ["moments", "embedding", "gan"]
    assert stated.sites[0].epsilon <= plan.privacy.epsilon


def test_the_server_adds_the_sums_and_fits_a_model_to_each(
    finished: tuple[Path, StudyState], plan: StudyPlan, weights: dict[str, State]
) -> None:
    root, state = finished
    sent = []
    for name in NODES.values():
        site = Site(root / name)
        content = RecordDict(
            {
                "task": task_record(plan.digest, "moments", 1, name),
                PUBLIC["moments"]: to_record(weights[PUBLIC["moments"]]),
            }
        )
        grid = InProcessGrid(client_app, {1: site.folder})
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=1, message_type="train.moments")])
        # A released statistic is sent again as it is: no new noise, no new charge.
        sent.append(torch.from_numpy(reply.content.array_records["moments"]["total"].numpy()))
    assert torch.allclose(state.weights["moments"]["total"], sent[0] + sent[1], atol=1e-5)
    assert PROFILES in state.weights
    assert set(state.fits) == {"moments", "embedding"}
    assert state.fits["embedding"]["noise_norm"] > 0


def test_a_fit_to_the_sum_of_one_site_takes_that_site_s_declared_patients_for_granted(
    finished: tuple[Path, StudyState], plan: StudyPlan
) -> None:
    _, state = finished
    alone = replace(state, curves={**state.curves, "embedding": [{"round": 1, "site": "a"}]})
    report = fit_statistic(plan, alone, "embedding").fits["embedding"]
    used = plan_embedding(plan, state.weights[PUBLIC["embedding"]])
    expected = read_total(
        used,
        state.weights["embedding"]["total"],
        noise_multipliers(plan, "a")["embedding"],
        plan.site("a").nominal_patients,
    )
    assert report["patients"] == pytest.approx(expected.patients)


def test_synthetic_patients_come_from_the_fitted_models(finished: tuple[Path, StudyState], plan: StudyPlan) -> None:
    _, state = finished
    patients = synthesise(plan, state, 5, torch.Generator().manual_seed(3))
    assert len(patients) == 5
    assert all(np.isfinite(patient.genes).all() and np.isfinite(patient.images).all() for patient in patients)


def test_what_a_site_sends_is_a_sum_with_the_noise_of_its_charge(
    finished: tuple[Path, StudyState], plan: StudyPlan
) -> None:
    """Without noise a coordinate of 40 patients' rows of norm 1 could be anything below 40; with it the spread over the
    coordinates that no patient fills must be that of the noise."""
    _, state = finished
    sigma = [noise_multipliers(plan, site)["embedding"] for site in NODES.values()]
    total = state.weights["embedding"]["total"].double()
    assert float(total.norm()) > 0.5 * float(np.sqrt(np.square(sigma).sum() * len(total)))


def test_a_coordinator_killed_before_the_fit_fits_when_it_goes_on(
    folder: Path, plan: StudyPlan, weights: dict[str, State]
) -> None:
    with pytest.MonkeyPatch.context() as patched:

        def killed(*_: object) -> StudyState:
            raise KeyboardInterrupt

        patched.setattr(rounds, "fit_statistic", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study(grid_of(folder), plan, folder / "study", weights)
    paused = load_state(folder / "study", plan)
    assert paused is not None
    assert paused.rounds["moments"] == 1
    assert paused.missing_rounds(plan)["moments"] == 1
    with pytest.raises(Exception, match="study_not_finished"):
        synthesise(plan, paused, 2, torch.Generator())
    state = run_study(grid_of(folder), plan, folder / "study", weights)
    assert not state.missing_rounds(plan)
    assert torch.equal(state.weights["moments"]["total"], paused.weights["moments"]["total"])
    for name in NODES.values():
        ledger = Site(folder / name).ledger()
        assert ledger.epsilon(plan.privacy.delta) == pytest.approx(planned_epsilon(plan, name), abs=1e-6)


@pytest.mark.parametrize("module", ["moments", "embedding"])
def test_other_public_weights_than_those_approved_are_refused_before_anything_is_spent(
    folder: Path,
    plan: StudyPlan,
    weights: dict[str, State],
    ask: Callable[[Site, Module, RecordDict], RecordDict],
    module: Module,
) -> None:
    other = {name: tensor + 0.5 for name, tensor in weights[PUBLIC[module]].items()}
    content = RecordDict({"task": task_record(plan.digest, module, 1, "a"), PUBLIC[module]: to_record(other)})
    site = Site(folder / "a")
    assert ask(site, module, content).config_records["refusal"]["code"] == "public_weights_differ"
    assert not site.ledger().entries()


def test_a_module_without_rounds_is_refused(
    folder: Path, plan: StudyPlan, ask: Callable[[Site, Module, RecordDict], RecordDict]
) -> None:
    content = RecordDict({"task": task_record(plan.digest, "autoencoder", 1, "a")})
    reply = ask(Site(folder / "a"), "autoencoder", content)
    assert reply.config_records["refusal"]["code"] == "round_not_in_plan"


def embedding_task(plan: StudyPlan, weights: dict[str, State]) -> RecordDict:
    name = PUBLIC["embedding"]
    return RecordDict({"task": task_record(plan.digest, "embedding", 1, "a"), name: to_record(weights[name])})


def charges_of(site: Site) -> list[str]:
    return [entry.body["study"] for entry in site.ledger().entries() if entry.kind == "charge"]


def test_a_statistic_that_was_interrupted_is_charged_once_and_leaves_once(
    folder: Path,
    plan: StudyPlan,
    weights: dict[str, State],
    ask: Callable[[Site, Module, RecordDict], RecordDict],
) -> None:
    site, task = Site(folder / "a"), embedding_task(plan, weights)
    with pytest.MonkeyPatch.context() as patched:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(client_rounds.Ledger, "released", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(site, "embedding", task)
    unseen = load_file(next((site.folder / "outbox").rglob("embedding-0001.safetensors")))
    first, second = (ask(site, "embedding", task).array_records["embedding"]["total"].numpy() for _ in range(2))
    assert charges_of(site) == [plan.digest]
    assert np.array_equal(first, second)
    assert not np.array_equal(first, unseen["total"].numpy())


def test_a_statistic_that_failed_is_withheld_for_good(
    folder: Path,
    plan: StudyPlan,
    weights: dict[str, State],
    ask: Callable[[Site, Module, RecordDict], RecordDict],
) -> None:
    site, task = Site(folder / "a"), embedding_task(plan, weights)
    with pytest.MonkeyPatch.context() as patched:

        def failing(*_: object) -> None:
            raise ValueError("something about a patient")

        patched.setattr(client_rounds.embedding, "rows", failing)
        assert ask(site, "embedding", task).config_records["refusal"]["code"] == "internal_error"
    assert ask(site, "embedding", task).config_records["refusal"]["code"] == "result_withheld"
    assert charges_of(site) == [plan.digest]
    assert not list((site.folder / "outbox").rglob("embedding-0001.safetensors"))


def test_the_same_statistic_under_another_plan_is_charged_again(
    folder: Path,
    plan: StudyPlan,
    weights: dict[str, State],
    ask: Callable[[Site, Module, RecordDict], RecordDict],
) -> None:
    site = Site(folder / "a")
    save_policy(site.policy().model_copy(update={"max_epsilon": 30.0}), site.policy_path)
    again = plan.model_copy(update={"purpose": "The same once more, for another purpose."})
    ask(site, "embedding", embedding_task(plan, weights))
    once = site.ledger().epsilon(plan.privacy.delta)
    assert (
        ask(site, "embedding", embedding_task(again, weights)).config_records["refusal"]["code"] == "plan_not_approved"
    )
    assert charges_of(site) == [plan.digest]
    site.approve(again)
    assert "refusal" not in ask(site, "embedding", embedding_task(again, weights))
    assert charges_of(site) == [plan.digest, again.digest]
    assert site.ledger().epsilon(plan.privacy.delta) > 1.2 * once


def test_the_sum_of_a_large_cohort_is_sent_and_accepted(
    folder: Path, plan: StudyPlan, weights: dict[str, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of such a norm would be a fault; the sums of a hundred thousand declared patients have it."""

    def large(rows: torch.Tensor, *_: object) -> BlockResult:
        return BlockResult({TOTAL: torch.full((rows.shape[1],), 1e5 / rows.shape[1] ** 0.5)}, {}, {})

    monkeypatch.setattr(client_rounds, "release_statistic", large)
    declared = [site.model_copy(update={"nominal_patients": 100_000}) for site in plan.sites]
    statistics = plan.model_copy(update={"gan": plan.gan.model_copy(update={"rounds": 0}), "sites": declared})
    for name in NODES.values():
        site = Site(folder / name)
        save_policy(site.policy().model_copy(update={"declared_patients": 100_000}), site.policy_path)
        site.approve(statistics)
    state = run_study(grid_of(folder), statistics, folder / "statistics", weights)
    assert float(state.weights["embedding"]["total"].norm()) > LARGEST_NORM


def test_a_sum_that_the_declared_patients_cannot_make_is_refused_by_the_coordinator(
    folder: Path, plan: StudyPlan, weights: dict[str, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = iter([True, False])

    def poison(rows: torch.Tensor, *rest: Any) -> BlockResult:
        size = 1e6 if next(poisoned, False) else 1.0
        return BlockResult({TOTAL: torch.full((rows.shape[1],), size)}, {}, {})

    monkeypatch.setattr(client_rounds, "release_statistic", poison)
    alone = plan.model_copy(update={"gan": plan.gan.model_copy(update={"rounds": 0})})
    for name in NODES.values():
        Site(folder / name).approve(alone)
    state = run_study(grid_of(folder), alone, folder / "poisoned", weights)
    assert [row["site"] for row in state.curves["moments"]] == ["b"]
