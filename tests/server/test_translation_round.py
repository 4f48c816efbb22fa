"""A study with translation: real sites and coordinator, a block killed and gone on with, and what its patients look like."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from safetensors.torch import load_file

from fedsynth.attacks.coordinator import coordinator_attacks
from fedsynth.attacks.updates import loss_drop, network, translation_loss, update_alignment
from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.domains import source_and_target
from fedsynth.models.images import make_generator
from fedsynth.models.trainable import trainable_parameters
from fedsynth.plan import Module, StudyPlan, save_plan
from fedsynth.profiles import profile_model
from fedsynth.records import PROGRESS, WEIGHTS, check_reply, task_record, to_record
from fedsynth.synthesis import draw_patients
from fedsynth.synthetic import SyntheticPatient
from fedsynth.translation import make_translator
from fedsynth_client.app import app as client_app
from fedsynth_client.cohort import load_cohort
from fedsynth_client.dry_run import dry_run
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.policy import save_policy
from fedsynth_client.preflight import preflight
from fedsynth_client.rounds import image_slices
from fedsynth_client.site import Site
from fedsynth_client.training import translation as training
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import StudyState, first_state, load_state
from fedsynth_server.coordinator.bounded_grid import reply_limit
from fedsynth_server.forecast import forecast
from fedsynth_server.levers import levers
from fedsynth_server.outcome import study_outcome
from fedsynth_server.release.wording import image_method
from fedsynth_server.statement import privacy_statement
from fedsynth_server.synthesis import synthesise
from fedsynth_simulations.grid import InProcessGrid, run_in_process
from fedsynth_simulations.transcript import TranscriptTap

NODES = {10: "a", 11: "b"}
Ask = Callable[[Site, Module, RecordDict], RecordDict]


def with_translation(tiny_plan: StudyPlan, **changes: Any) -> StudyPlan:
    """The tiny plan, everything else in one short round, and two rounds of translation of T1 to T1c."""
    short = {"rounds": 1, "steps_per_round": 1}
    section = {
        **short,
        "rounds": 2,
        "steps_per_round": 2,
        "expected_batch": 6,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
        "budget_share": 0.2,
        "width": 2,
        "domains": "sequences",
        "source": "T1",
        "target": "T1c",
        **changes,
    }
    values = tiny_plan.model_dump()
    for module in ("autoencoder", "radiogenomics", "gan"):
        values[module] |= {**short, "budget_share": 0.25}
    return StudyPlan.model_validate({**values, "translation": section})


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    return with_translation(tiny_plan)


@dataclass(frozen=True)
class Study:
    folder: Path
    state: StudyState
    tap: TranscriptTap
    replies: list[RecordDict] = field(default_factory=list)


def federation(folder: Path, wiretap: Callable[[str, int, bytes], None]) -> None:
    grid = InProcessGrid(client_app, {node: folder / name for node, name in NODES.items()}, wiretap=wiretap)
    run_in_process(server_app, grid, {"study-folder": str(folder / "study")})


@pytest.fixture(scope="module")
def finished(plan: StudyPlan, _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study, stopped in the middle of a step of the second site's second round, and gone on with to its end."""
    folder = tmp_path_factory.mktemp("translation") / "tiny"
    shutil.copytree(_tiny_template, folder)
    for name in NODES.values():
        Site(folder / name).approve(plan)
    save_plan(plan, folder / "study" / "plan.toml")
    tap, replies = TranscriptTap(folder / "transcript"), []

    def watch(direction: str, node: int, content: bytes) -> None:
        if direction == "to coordinator":
            replies.append(recorddict_from_proto(RecordDictProto.FromString(content)))
        tap(direction, node, content)

    steps, step = [], training.private_step_of

    def stopped(*arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "private_step_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            federation(folder, watch)
    half = load_state(folder / "study", plan)
    assert half is not None and half.rounds["translation"] == 1
    federation(folder, watch)
    state = load_state(folder / "study", plan)
    assert state is not None
    return Study(folder, state, tap, replies)


def test_the_study_ends_and_each_round_was_charged_once(finished: Study, plan: StudyPlan) -> None:
    assert plan.modules[-1] == "translation"
    assert not finished.state.missing_rounds(plan)
    for name in NODES.values():
        ledger = Site(finished.folder / name).ledger()
        charged = [(e.body["module"], e.body["round"]) for e in ledger.entries() if e.kind == "charge"]
        assert charged == [("autoencoder", 1), ("radiogenomics", 1), ("gan", 1), ("translation", 1), ("translation", 2)]
        assert ledger.history(plan.digest, "translation") == [mechanism(plan, name, "translation", steps=4)]
        assert ledger.epsilon(plan.privacy.delta) == pytest.approx(planned_epsilon(plan, name), rel=1e-9)
    kinds = [entry.kind for entry in Site(finished.folder / "b").ledger().entries()]
    assert kinds.count("resumed") == 1


def test_what_leaves_are_the_generators_and_one_number(finished: Study, plan: StudyPlan) -> None:
    own = [reply for reply in finished.replies if WEIGHTS["translation"] in reply]
    assert len(own) == 5  # of the round that was cut short, one site answered twice, from what it had stored
    planned = {each.module: each for each in dry_run(plan, "a").exchanges}["translation"]
    names = {array.name for record in planned.leaves for array in record.arrays}
    wires = [recorddict_to_proto(reply).SerializeToString() for reply in own]
    for reply in own:
        check_reply(reply, "translation")
        assert set(reply) == {"translation", "progress", "receipt"}
        assert set(reply.metric_records["progress"]) == PROGRESS["translation"] == {"update_norm"}
        assert set(reply.array_records["translation"]) == names
        assert {name.split(".")[0] for name in names} == {"to_target", "to_source"}
        assert reply.array_records["translation"].count_bytes() == planned.leaves[0].bytes
    for name in NODES.values():
        for path in (finished.folder / name / "state" / plan.digest).glob("translation-*.safetensors"):
            for tensor in load_file(path).values():
                if tensor.numel() > 4:
                    assert not any(tensor.numpy().tobytes() in wire for wire in wires)


def test_the_next_round_goes_on_from_the_discriminators_that_stayed(finished: Study, plan: StudyPlan) -> None:
    folder = finished.folder / "a" / "state" / plan.digest
    first, second = (load_file(folder / f"translation-{number:04d}.safetensors") for number in (1, 2))
    steps = {float(tensor) for name, tensor in second.items() if name.startswith("moments/step/")}
    assert steps == {4.0}
    assert set(first) == set(second)


def test_the_generators_are_the_average_of_the_sites(finished: Study, plan: StudyPlan) -> None:
    replies = [finished.tap.transcript.reply("translation", 2, site) for site in NODES.values()]
    start = first_state(plan, None).weights["translation"]
    for name, tensor in finished.state.weights["translation"].items():
        torch.testing.assert_close(tensor, (replies[0][name] + replies[1][name]) / 2)
    assert any(not torch.equal(start[name], tensor) for name, tensor in finished.state.weights["translation"].items())


def drawn_without(plan: StudyPlan, state: StudyState, count: int) -> list[SyntheticPatient]:
    """The same draw of the same generator, left as it was drawn."""
    generator = torch.Generator().manual_seed(4)
    model = make_generator(plan)
    model.load_state_dict(state.weights["generator_ema"])
    return draw_patients(plan, model, profile_model(plan, state.weights).draw(count, generator), generator)


def test_a_synthetic_patients_target_sequence_is_translated_from_its_source(finished: Study, plan: StudyPlan) -> None:
    patients = synthesise(plan, finished.state, 2, torch.Generator().manual_seed(4))
    translator = make_translator(plan, finished.state.weights["translation"])
    for patient, drawn in zip(patients, drawn_without(plan, finished.state, 2), strict=True):
        source = torch.from_numpy(patient.images[0])[:, None] * 2 - 1
        with torch.no_grad():
            expected = (translator(source)[:, 0] + 1) / 2
        np.testing.assert_allclose(patient.images[1], expected.numpy(), atol=1e-5)
        assert not np.allclose(patient.images[1], drawn.images[1], atol=1e-3)
        for same in (0, 2):  # source and the third sequence are as the generator drew them
            np.testing.assert_array_equal(patient.images[same], drawn.images[same])
        np.testing.assert_array_equal(patient.mask, drawn.mask)


def test_tumours_that_are_translated_are_no_part_of_the_chain(
    finished: Study, plan: StudyPlan, tiny_plan: StudyPlan
) -> None:
    other = with_translation(tiny_plan, domains="tumour", source="", target="")
    start = first_state(other, None)
    state = StudyState(
        other.digest,
        {**finished.state.weights, "translation": start.weights["translation"]},
        finished.state.rounds,
        finished.state.curves,
        finished.state.receipts,
    )
    patients = synthesise(other, state, 1, torch.Generator().manual_seed(4))
    np.testing.assert_array_equal(patients[0].images, drawn_without(plan, state, 1)[0].images)


def test_statement_forecast_and_outcome_know_the_module(finished: Study, plan: StudyPlan) -> None:
    (site, _) = privacy_statement(plan, finished.state).sites
    (own,) = [each for each in site.mechanisms if each.module == "translation"]
    assert (own.steps, own.max_grad_norm) == (4, 1.0)
    found = forecast(plan)
    worst = found.worst("translation")
    sigma = mechanism(plan, "a", "translation").noise_multiplier
    expected = sigma * trainable_parameters(plan, "translation") ** 0.5 / (6 * 4**0.5)
    assert worst.noise_to_signal == pytest.approx(expected)
    assert any(each.module == "translation" and "twice the sites" not in each.changes for each in levers(plan, found))
    verdicts = {each.module: each.verdict for each in study_outcome(plan, finished.state).modules}
    assert verdicts["translation"] == "open"
    assert reply_limit(plan).objects > len(finished.state.weights["translation"])


def test_a_release_says_which_sequence_is_translated_and_which_translation_is_not_used(
    plan: StudyPlan, tiny_plan: StudyPlan
) -> None:
    said = image_method(plan)
    assert "T1c is translated from its T1" in said and "in 2 rounds" in said and "DP-SGD" in said
    unused = image_method(with_translation(tiny_plan, domains="tumour", source="", target=""))
    assert "no synthetic patient was drawn with them" in unused
    none = image_method(with_translation(tiny_plan, rounds=0))
    assert "translat" not in none


def test_a_site_whose_policy_does_not_list_the_module_refuses(tiny_site: Site, plan: StudyPlan, ask: Ask) -> None:
    tiny_site.approve(plan)
    policy = tiny_site.policy()
    allowed = [module for module in policy.modules if module != "translation"]
    save_policy(policy.model_copy(update={"modules": allowed}), tiny_site.policy_path)
    weights = first_state(plan, None).weights["translation"]
    task = task_record(plan.digest, "translation", 1, "a", "")
    reply = ask(tiny_site, "translation", RecordDict({"task": task, "translation": to_record(weights)}))
    assert dict(reply.config_records["refusal"]) == {"code": "module_not_allowed"}
    assert not tiny_site.ledger().entries()
    assert any(line.code == "module_not_allowed" for line in preflight(tiny_site, plan))


def test_weights_of_other_networks_are_refused_before_anything_is_charged(
    tiny_site: Site, plan: StudyPlan, tiny_plan: StudyPlan, ask: Ask
) -> None:
    tiny_site.approve(plan)
    wider = first_state(with_translation(tiny_plan, width=3), None).weights["translation"]
    task = task_record(plan.digest, "translation", 1, "a", "")
    reply = ask(tiny_site, "translation", RecordDict({"task": task, "translation": to_record(wider)}))
    assert dict(reply.config_records["refusal"]) == {"code": "arrays_differ"}
    assert not tiny_site.ledger().entries()


def test_a_member_of_an_update_without_noise_is_found_by_its_cycle(
    finished: Study, plan: StudyPlan, tmp_path: Path
) -> None:
    """The attack must be able to find something: an update that is one patient's own gradient points at that patient."""
    site = Site(finished.folder / "a")
    cohort = load_cohort(site.cohort_path, plan.morphology.features)
    volumes = image_slices(cohort)[:12]
    model, loss = network(plan, "translation"), translation_loss(plan, volumes)
    sent = first_state(plan, None).weights["translation"]
    model.load_state_dict(sent)
    parameters = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss(model, 5), list(parameters.values()))
    scale = 1e-2 / float(torch.cat([g.flatten() for g in gradient]).norm())
    reply = {name: sent[name] - scale * g for name, g in zip(parameters, gradient, strict=True)}
    tap = TranscriptTap(tmp_path).transcript
    tap.write_sent("translation", 1, {"translation": sent})
    tap.write_reply("translation", 1, "a", reply)
    rows = {"a": list(range(8))}
    aligned = update_alignment(model, loss, rows, [8, 9, 10, 11], tap, "translation", 1.0)["a"]
    assert aligned.argmax() == 5
    assert loss_drop(model, loss, rows, tap, "translation")["a"].argmax() == 5
    assert source_and_target(plan, volumes)[0].slices.shape == (12, 1, 4, 32, 32)


def test_a_coordinator_attacks_the_translators_site_by_site(finished: Study, plan: StudyPlan) -> None:
    cohorts = {name: load_cohort(Site(finished.folder / name).cohort_path, plan.morphology.features) for name in "ab"}
    train = patients_of(cohorts)
    others = train.rows(
        np.arange(len(train)) % 3 == 0
    )  # any others will do: what counts is that they can be told apart
    nothing: Any = None
    attempts = dict(
        coordinator_attacks(
            plan,
            finished.tap.transcript,
            train.rows(np.arange(len(train)) % 3 != 0),
            others,
            nothing,
            np.arange(6),
            nothing,
            np.random.default_rng(1),
        )
    )
    found = attempts["Updates of the translators"]()
    assert [(each.id, each.site) for each in found] == [
        (f"{attack}-translation", site) for site in "ab" for attack in ("update-alignment", "loss-drop")
    ]
    assert all("discriminators" in each.note for each in found)
    assert all(np.isfinite(each.members).all() and np.isfinite(each.others).all() for each in found)


def test_without_privacy_the_same_round_is_marked(tiny_site: Site, tiny_plan: StudyPlan, ask: Ask) -> None:
    values = with_translation(tiny_plan).model_dump()
    bare = StudyPlan.model_validate({**values, "privacy": {"epsilon": float("inf")}})
    save_policy(tiny_site.policy().model_copy(update={"allow_not_private": True}), tiny_site.policy_path)
    tiny_site.approve(bare)
    weights = first_state(bare, None).weights["translation"]
    task = task_record(bare.digest, "translation", 1, "a", "")
    reply = ask(tiny_site, "translation", RecordDict({"task": task, "translation": to_record(weights)}))
    assert reply.config_records["receipt"]["private"] is False
    assert reply.config_records["receipt"]["epsilon"] == float("inf")
