"""A study to its end, then evaluated by its sites: what the file says against what is true, which only a test can know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fedsynth.budget import evaluation_mechanism, planned_epsilon
from fedsynth.evaluation.site_scores import ROW_SIZE, evaluators, noisy_scores, rows
from fedsynth.evaluation.site_values import FILE, SiteEvaluation
from fedsynth.plan import MODULES, Module, Section, SiteEvaluationPlan, StudyPlan, save_plan
from fedsynth_client.app import app as client_app
from fedsynth_client.cohort import load_cohort
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.ingest.prepare import prepare
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server import site_evaluation
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import StudyState, load_state
from fedsynth_server.warm_start import public_starts
from fedsynth_simulations.grid import InProcessGrid, run_in_process
from fedsynth_simulations.hospitals import write_hospitals
from fedsynth_simulations.plans import simulated_genes, study_plan
from fedsynth_simulations.weights import packaged_warm_start

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")


def true_rows(plan: StudyPlan, state: StudyState, site: Site) -> Tensor:
    """What the site's held-out patients scored, without noise."""
    held_out = load_cohort(site.cohort_path, plan.morphology.features).split("holdout")
    return rows(evaluators(plan, state.weights), patients_of({"": held_out}))


def finished(folder: Path, plan: StudyPlan) -> tuple[StudyState, SiteEvaluation]:
    state = load_state(folder, plan)
    assert state is not None and state.finished(plan)
    return state, SiteEvaluation.model_validate_json((folder / FILE).read_text())


@pytest.mark.parametrize("epsilon", [0.05, 40.0])
def test_noisy_means_are_near_the_true_ones_or_called_drowned(
    tiny_plan: StudyPlan, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    monkeypatch.setattr(site_evaluation, "STEPS", 5)
    monkeypatch.setattr(site_evaluation, "PATIENTS", 10)
    short = {m: tiny_plan.training(m).model_copy(update={"rounds": 1, "steps_per_round": 1}) for m in TRAINED}
    plan = tiny_plan.model_copy(update={**short, "site_evaluation": SiteEvaluationPlan(epsilon=epsilon)})
    save_plan(plan, tiny_folder / "study" / "plan.toml")
    sites = {name: Site(tiny_folder / name) for name in ("a", "b")}
    for site in sites.values():
        path = site.cohort_path / "manifest.json"
        manifest = json.loads(path.read_text())
        for row in manifest["patients"][:16]:
            row["split"] = "holdout"
        path.write_text(json.dumps(manifest))
        for patient in (site.cohort_path / "patients").iterdir():  # tumour in some slices and none in others
            held = load_file(patient)
            held["mask"][:2] = 0
            save_file(held, patient)
        allowed = {"modules": [*MODULES, "evaluation"], "max_holdout_epsilon": epsilon}
        save_policy(site.policy().model_copy(update=allowed), site.policy_path)
        site.approve(plan)
    grid = InProcessGrid(client_app, {1: tiny_folder / "a", 2: tiny_folder / "b"})
    run_in_process(server_app, grid, {"study-folder": str(tiny_folder / "study")})
    state, found = finished(tiny_folder / "study", plan)

    sigma = evaluation_mechanism(plan).noise_multiplier
    true = {name: true_rows(plan, state, site) for name, site in sites.items()}
    off = torch.stack([state.weights["evaluation"][name] - true[name].sum(0) for name in sites]).double()
    assert float(off.abs().max()) < 5 * sigma and float(off.abs().min()) > 0
    assert float(off.std()) > sigma / 4  # the noise is there
    exact = noisy_scores(sum(each.sum(0) for each in true.values()), 1e-9)  # type: ignore[arg-type]
    assert all(score.patients == pytest.approx(32) for score in exact)
    if epsilon < 1:
        assert all(score.drowned for score in found.pooled)
        return
    for score, real in zip(found.pooled, exact, strict=True):
        assert score.value is not None and score.standard_error is not None and real.value is not None
        assert abs(score.value - real.value) < 5 * score.standard_error < 0.2
        assert not score.drowned


@dataclass
class Study:
    """A study over simulated hospitals, and all that went to the coordinator."""

    folder: Path
    plan: StudyPlan
    sites: dict[str, Site]
    leaving: list[tuple[int, bytes]] = field(default_factory=list)

    def tap(self, direction: str, node: int, content: bytes) -> None:
        if direction == "to coordinator":
            self.leaving.append((node, content))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """Three hospitals, moments and a short embedding; the third does not allow the evaluation."""
    root = tmp_path_factory.mktemp("evaluated")
    write_hospitals(root / "hospitals", 40, 11)
    sources = {path.parent.name: path for path in sorted((root / "hospitals").glob("*/sources.toml"))}
    genes, file = simulated_genes(), packaged_warm_start()
    plan = study_plan(
        "evaluated",
        "A small study that its sites evaluate.",
        dict.fromkeys(sources, 25),
        genes=genes,
        epsilon=20.0,
        starts=public_starts(file, genes),
    )
    short: dict[str, Section] = {"site_evaluation": SiteEvaluationPlan(epsilon=6.0)}
    if plan.embedding is not None:
        short["embedding"] = plan.embedding.model_copy(update={"fit_steps": 5})
    plan = StudyPlan.model_validate(plan.model_copy(update=short).model_dump())
    (root / "study").mkdir()
    save_plan(plan, root / "study" / "plan.toml")
    shutil.copyfile(file, root / "study" / "warm-start.safetensors")
    made = Study(root / "study", plan, {name: Site(root / "sites" / name) for name in sources})
    for number, (name, site) in enumerate(made.sites.items()):
        site.folder.mkdir(parents=True)
        evaluates = number < 2
        policy = SitePolicy(
            site=name,
            max_epsilon=plan.privacy.epsilon,
            max_delta=plan.privacy.delta,
            min_patients=5,
            declared_patients=25,
            modules=[*plan.modules, "evaluation"] if evaluates else list(plan.modules),
            max_holdout_epsilon=6.0 if evaluates else 0.0,
        )
        save_policy(policy, site.policy_path)
        prepare(plan, sources[name], site.cohort_path, np.random.default_rng(number))
        site.approve(plan)
    folders = {node: site.folder for node, site in enumerate(made.sites.values(), start=1)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(site_evaluation, "PATIENTS", 40)
        patched.setattr(site_evaluation, "STEPS", 60)
        grid = InProcessGrid(client_app, folders, wiretap=made.tap)
        run_in_process(server_app, grid, {"study-folder": str(made.folder)})
    yield made


@pytest.mark.slow
def test_two_hospitals_evaluate_and_the_third_only_trains(study: Study) -> None:
    state, found = finished(study.folder, study.plan)
    first, second, third = study.sites
    assert [site.site for site in found.sites] == [first, second]
    assert found.missing == {third: "module_not_allowed"}
    sigma = evaluation_mechanism(study.plan).noise_multiplier
    true = {name: true_rows(study.plan, state, study.sites[name]) for name in (first, second)}
    assert all(float(each.norm(dim=1).max()) <= 1 for each in true.values())
    pooled = sum(each.sum(0) for each in true.values())
    for score, real in zip(found.pooled, noisy_scores(pooled, 1e-9), strict=True):  # type: ignore[arg-type]
        # A count is off by its noise alone: that of two sites, in units of a row's entries.
        assert abs(score.patients - real.patients) < 5 * sigma * 2**0.5 * ROW_SIZE**0.5
        if score.value is not None and score.standard_error is not None and real.value is not None:
            assert abs(score.value - real.value) < 6 * score.standard_error


@pytest.mark.slow
def test_training_patients_spent_what_the_plan_says_and_held_out_patients_their_own(study: Study) -> None:
    delta = study.plan.privacy.delta
    for number, (name, site) in enumerate(study.sites.items()):
        ledger = site.ledger()
        assert ledger.epsilon(delta) == pytest.approx(planned_epsilon(study.plan, name), abs=1e-6)
        assert ledger.epsilon(delta) <= study.plan.privacy.epsilon
        held_out = ledger.epsilon(delta, population="holdout")
        assert 5.9 < held_out <= 6.0 if number < 2 else held_out == 0.0


@pytest.mark.slow
def test_of_an_evaluation_nothing_leaves_but_a_noisy_sum_and_a_receipt(study: Study) -> None:
    state, _ = finished(study.folder, study.plan)
    seen = 0
    for node, data in study.leaving:
        content = recorddict_from_proto(RecordDictProto.FromString(data))
        if "evaluation" not in content:
            continue
        seen += 1
        assert set(content) == {"evaluation", "progress", "receipt"} and not content.metric_records["progress"]
        (total,) = content.array_records["evaluation"].values()
        name = list(study.sites)[node - 1]
        real = true_rows(study.plan, state, study.sites[name])
        assert total.numpy().shape == (ROW_SIZE,)
        # No entry is the true one, neither as a row's nor as a sum's.
        true = torch.cat([real, real.sum(0, keepdim=True)])
        assert float((torch.from_numpy(total.numpy()) - true).abs().min()) > 0
        numbers = [x for x in true.flatten().tolist() if x not in (0.0, 1 / 3, -1 / 3)]
        assert numbers and not any(np.float64(x).tobytes() in data for x in numbers)
        # The coordinator keeps what arrived, to the last bit.
        assert np.array_equal(total.numpy(), state.weights["evaluation"][name].numpy())
    assert seen == 2
