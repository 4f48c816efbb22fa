"""Public start weights: the plan's digests are of what is read, and the provenance comes along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsynth.errors import UsageError
from fedsynth.plan import StudyPlan
from fedsynth.records import state_digest
from fedsynth_server.checkpoint import first_state
from fedsynth_server.warm_start import check_made_for, load_warm_start, save_warm_start

PROVENANCE = {"data": "public simulated cohort", "licence": "Apache-2.0"}


@pytest.fixture
def warm(tiny_plan: StudyPlan, tmp_path: Path) -> Path:
    weights = first_state(tiny_plan, None).weights
    start = {name: weights[name] for name in ("generator", "discriminator")}
    save_warm_start(tmp_path / "warm.safetensors", start, PROVENANCE)
    return tmp_path / "warm.safetensors"


def test_digests_bind_what_is_read_and_provenance_is_kept(tiny_plan: StudyPlan, warm: Path) -> None:
    weights, named = load_warm_start(warm)
    assert named.provenance == "data: public simulated cohort; licence: Apache-2.0"
    assert named.generator_sha256 == state_digest(weights["generator"])
    assert {tensor.dtype for state in weights.values() for tensor in state.values()} == {torch.float32}
    plan = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": named})})
    assert first_state(plan, weights).weights["discriminator"] is weights["discriminator"]
    assert load_warm_start(warm)[1] == named


def test_one_changed_number_is_another_warm_start(tiny_plan: StudyPlan, warm: Path) -> None:
    weights, named = load_warm_start(warm)
    plan = tiny_plan.model_copy(update={"gan": tiny_plan.gan.model_copy(update={"warm_start": named})})
    name = next(iter(weights["discriminator"]))
    weights["discriminator"][name] = weights["discriminator"][name].clone()
    weights["discriminator"][name].view(-1)[0] += 1e-3
    with pytest.raises(UsageError) as refused:
        first_state(plan, weights)
    assert refused.value.code == "warm_start_differs"


@pytest.mark.parametrize("what", ["absent", "text", "truncated", "no provenance", "another model", "half of it"])
def test_a_file_that_is_no_warm_start_is_named(tmp_path: Path, warm: Path, what: str) -> None:
    path = tmp_path / "wrong.safetensors"
    if what == "text":
        path.write_text("no tensors")
    elif what == "truncated":
        path.write_bytes(warm.read_bytes()[:-10])
    elif what == "no provenance":
        save_file({"generator/x": torch.ones(1)}, path)
    elif what == "another model":
        save_file({"classifier/x": torch.ones(1)}, path, {"provenance": '{"data": "public images"}'})
    elif what == "half of it":
        save_file({"generator/x": torch.ones(1)}, path, {"provenance": '{"data": "public images"}'})
    with pytest.raises(UsageError) as refused:
        load_warm_start(path)
    assert refused.value.code == "warm_start_unreadable"


@pytest.mark.parametrize("changed", ["sequences", "features", "panel", "classes", "nothing"])
def test_weights_of_the_same_shapes_for_other_data_are_refused(tiny_plan: StudyPlan, warm: Path, changed: str) -> None:
    weights, named = load_warm_start(warm)
    start = {"sha256": "0" * 64, "provenance": "made for another plan"}
    values = tiny_plan.model_dump() | {
        "gan": tiny_plan.gan.model_dump() | {"warm_start": named.model_dump()},
        "autoencoder": tiny_plan.autoencoder.model_dump() | {"warm_start": start},
    }
    save_warm_start(warm, weights, PROVENANCE, tiny_plan)
    other = {
        "sequences": {"image": values["image"] | {"sequences": ["T1", "T2", "FLAIR"]}},
        "features": {"morphology": values["morphology"] | {"features": values["morphology"]["features"][::-1]}},
        "panel": {"genes": values["genes"] | {"panel": values["genes"]["panel"][::-1]}},
        "classes": {
            "label": values["label"] | {"classes": values["label"]["classes"][::-1]},
            "embedding": {"budget_share": 0.1, "public": start},
            "gan": values["gan"] | {"budget_share": 0.4},
        },
        "nothing": {},
    }[changed]
    plan = StudyPlan.model_validate(values | other)
    if changed == "nothing":
        check_made_for(warm, plan)
        return
    with pytest.raises(UsageError) as refused:
        check_made_for(warm, plan)
    assert refused.value.code == "warm_start_of_other_data"
