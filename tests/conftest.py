"""A tiny study that everybody can train in seconds: two sites of 40 patients made of noise, and the coordinator's folder."""

from __future__ import annotations

import os

# Flower reports use and looks for updates unless told otherwise before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message, RecordDict
from safetensors.numpy import save_file

from fedsynth.morphology import FEATURES
from fedsynth.plan import MODULES, Module, StudyPlan, save_plan
from fedsynth.records import MESSAGE_TYPES, WEIGHTS, task_record, to_record
from fedsynth_client.app import app as client_app
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import first_state
from fedsynth_simulations.grid import InProcessGrid

PATIENTS, SITES = 40, ("a", "b")


@pytest.fixture(scope="session")
def tiny_plan() -> StudyPlan:
    """Two rounds of a few steps a module; all networks narrow."""
    training = {"rounds": 2, "steps_per_round": 3, "expected_batch": 10, "max_grad_norm": 1.0, "learning_rate": 1e-3}
    genes = 20
    return StudyPlan.model_validate(
        {
            "name": "tiny",
            "purpose": "A study that trains in seconds",
            "image": {"size": 32, "slices": 4},
            "genes": {
                "panel": [f"G{i}" for i in range(genes)],
                "reference_quantiles": [-2.0, 2.0],
                "center": [0.0] * genes,
                "scale": [1.0] * genes,
            },
            "privacy": {"epsilon": 10.0},
            "autoencoder": {**training, "budget_share": 0.25, "hidden": [16, 8], "latent_dim": 4},
            "radiogenomics": {**training, "budget_share": 0.25, "hidden": [16, 8]},
            "gan": {
                **training,
                "budget_share": 0.5,
                "latent_dim": 8,
                "generator_width": 4,
                "discriminator_width": 4,
                "generator_batch": 8,
            },
            "sites": [{"name": name, "nominal_patients": PATIENTS} for name in SITES],
        }
    )


@pytest.fixture(scope="session")
def _tiny_template(tiny_plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    rng = np.random.default_rng(0)
    for name in SITES:
        _write_cohort(root / name / "cohort", tiny_plan, rng)
        policy = SitePolicy(
            site=name,
            max_epsilon=10,
            max_delta=1e-5,
            min_patients=20,
            declared_patients=PATIENTS,
            modules=list(MODULES),
        )
        save_policy(policy, root / name / "policy.toml")
        Site(root / name).approve(tiny_plan)
    (root / "study").mkdir()
    save_plan(tiny_plan, root / "study" / "plan.toml")
    return root


def _write_cohort(folder: Path, plan: StudyPlan, rng: np.random.Generator) -> None:
    (folder / "patients").mkdir(parents=True)
    image = plan.image
    grid = (image.slices, image.size, image.size)
    keys = [f"p{rng.integers(16**12):012x}" for _ in range(PATIENTS)]
    for key in keys:
        images = rng.random((len(image.sequences), *grid)).astype(np.float16)
        mask = (rng.random(grid) > 0.8).astype(np.uint8)
        save_file({"images": images, "mask": mask}, folder / "patients" / f"{key}.safetensors")
    manifest = {
        "image": image.model_dump(),
        "genes": plan.genes.model_dump(),
        "label": plan.label.model_dump(),
        "patients": [{"key": key, "split": "train", "has_images": True, "has_genes": True} for key in keys],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    index = pd.Index(keys, name="key")
    panel = plan.genes.panel
    profiles = rng.normal(size=(PATIENTS, len(panel))).astype(np.float32)
    pd.DataFrame(profiles, index=index, columns=panel).to_parquet(folder / "expression.parquet")
    clinical = pd.DataFrame(
        rng.random((PATIENTS, len(FEATURES))), index=index, columns=[feature.name for feature in FEATURES]
    )
    clinical["label"] = rng.integers(0, len(plan.label.classes), PATIENTS)
    clinical.to_parquet(folder / "clinical.parquet")


@pytest.fixture
def tiny_folder(_tiny_template: Path, tmp_path: Path) -> Path:
    """A folder of its own for each test: sites ``a`` and ``b``, which approved the plan, and ``study/plan.toml``."""
    folder = tmp_path / "tiny"
    shutil.copytree(_tiny_template, folder)
    return folder


@pytest.fixture
def tiny_site(tiny_folder: Path) -> Site:
    """Site ``a`` of `tiny_folder`."""
    return Site(tiny_folder / "a")


@pytest.fixture(scope="session")
def task_content() -> Callable[..., RecordDict]:
    """What the coordinator asks in a round: task and weights, here those that the study starts from."""

    def content(plan: StudyPlan, module: Module, number: int = 1, site: str = "a", head: str = "") -> RecordDict:
        weights = first_state(plan, None).weights
        names = [WEIGHTS[module], *(("autoencoder", "radiogenomics", "discriminator") if module == "gan" else ())]
        task = task_record(plan.digest, module, number, site, head)
        return RecordDict({"task": task, **{name: to_record(weights[name]) for name in names}})

    return content


@pytest.fixture(scope="session")
def ask() -> Callable[[Site, Module, RecordDict], RecordDict]:
    """Send a task to a site's ClientApp over the in-process grid; returns the reply's content."""

    def send(site: Site, module: Module, content: RecordDict) -> RecordDict:
        grid = InProcessGrid(client_app, {1: site.folder})
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=1, message_type=MESSAGE_TYPES[module])])
        return reply.content

    return send
