"""A site in miniature, asked as a coordinator asks: what is charged for each round, and what leaves.

The site's folder, policy, cohort of made-up patients and plan are written to a temporary folder; the plan keeps the
privacy section, the sites, rounds and steps of the plan that is audited, and has small networks and images.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import RecordDict
from safetensors.numpy import save_file

from fedsynth.auditing.values import MechanismCheck
from fedsynth.budget import mechanism
from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.engines import embedding, moments
from fedsynth.errors import FedsynthError
from fedsynth.models.dcgan import initialise, make_discriminator, make_generator
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.morphology import FEATURES
from fedsynth.plan import Activity, Module, StudyPlan
from fedsynth.profiles import profile_template
from fedsynth.records import PUBLIC, WEIGHTS, State, state_digest, task_record, to_record
from fedsynth_client import rounds
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site

# The closed list of what a reply holds beside weights, written down a second time on purpose: a quantity that is added
# to the list of `fedsynth.records` fails the audit until somebody has looked at it here as well.
PROGRESS: dict[Activity, frozenset[str]] = {
    "moments": frozenset(),
    "autoencoder": frozenset({"update_norm"}),
    "radiogenomics": frozenset({"update_norm"}),
    "embedding": frozenset(),
    "gan": frozenset({"update_norm", "generator_loss", "fake_score"}),
    "evaluation": frozenset(),
}
RECEIPT = frozenset({"head", "epsilon", "epsilon_lifetime", "steps", "private"})

_PATIENTS, _GENES, _ROUNDS = 12, 8, 2


def rounds_are_charged_and_closed(plan: StudyPlan, site: str) -> MechanismCheck:
    """Whether a site that answers two rounds of every module charges both, and sends the closed list and nothing else."""
    small, public = _small(plan)
    asked: list[Mechanism] = []
    wrong: list[str] = []
    told = 0.0
    with tempfile.TemporaryDirectory() as folder:
        place = _site(small, site, Path(folder))
        try:
            for module in small.modules:
                for number in range(1, min(small.training(module).rounds, _ROUNDS) + 1):
                    asked.append(mechanism(small, site, module))
                    told = epsilon(asked, small.privacy.delta, small.privacy.accountant)
                    found = _answer(place, module, _task(small, public, module, number, site), told)
                    wrong += [f"{module} round {number}: {what}" for what in found]
        finally:
            for handler in list(place.log.handlers):
                place.log.removeHandler(handler)
                handler.close()
    return MechanismCheck(
        id="rounds",
        title="A site charges every round and sends the closed list",
        module=None,
        ok=not wrong,
        finding=f"A site in miniature answered {len(asked)} rounds: "
        + (
            f"{'; '.join(wrong)}." if wrong else f"each charged, epsilon {told:.4f} told in the end, nothing else sent."
        ),
    )


def _answer(place: Site, module: Module, task: RecordDict, expected: float) -> list[str]:
    """What is wrong with the site's answer."""
    try:
        return _not_as_agreed(rounds.answer(place, module, task, "the audit"), module, expected)
    except FedsynthError as error:
        return [f"it ended with {error.code}"]


def _not_as_agreed(reply: RecordDict, module: Module, expected: float) -> list[str]:
    """What is wrong with a reply, given the epsilon of all rounds so far."""
    records = {WEIGHTS[module], "progress", "receipt"}
    if set(reply) != records:
        return [f"it holds {', '.join(sorted(reply))} in place of {', '.join(sorted(records))}"]
    progress, receipt = reply.metric_records["progress"], reply.config_records["receipt"]
    wrong = []
    if set(progress) != PROGRESS[module] or set(receipt) != RECEIPT:
        extra = (set(progress) - PROGRESS[module]) | (set(receipt) - RECEIPT)
        wrong.append(f"{', '.join(sorted(extra)) or 'less than agreed'} is told")
    told = receipt.get("epsilon")
    if not isinstance(told, float) or abs(told - expected) > 1e-6 * expected:
        wrong.append(f"epsilon {told!r} is told where all rounds so far cost {expected:.6f}")
    return wrong


def _small(plan: StudyPlan) -> tuple[StudyPlan, dict[str, State]]:
    """The plan in miniature, valid and approvable, and the public weights of its statistics."""
    values: dict[str, Any] = plan.model_dump(mode="python")
    values["site_evaluation"] = None  # of other people, charged apart; its release is checked as a statistic's
    values["image"] |= {"size": 32, "slices": 2}
    values["genes"] |= {
        "panel": [f"G{i}" for i in range(_GENES)],
        "center": [0.0] * _GENES,
        "scale": [1.0] * _GENES,
    }
    values["autoencoder"] |= {"hidden": [4], "latent_dim": 2, "warm_start": None}
    values["radiogenomics"] |= {"hidden": [4]}
    values["gan"] |= {"latent_dim": 2, "generator_width": 2, "discriminator_width": 2, "generator_batch": 2}
    values["gan"]["warm_start"] = None
    if values["moments"] is not None:
        values["moments"]["components"] = 2
    if values["embedding"] is not None:
        values["embedding"]["dimensions"] = 16
    small = StudyPlan.model_validate(values)
    generator = torch.Generator().manual_seed(0)
    public: dict[str, State] = {}
    for name, template in (("moments", moments.public_template), ("embedding", embedding.public_template)):
        if values[name] is not None:
            state = {
                key: 0.1 + 0.8 * torch.rand(tensor.shape, generator=generator)
                for key, tensor in template(small).items()
            }
            public[name] = state
            values[name]["public"]["sha256"] = state_digest(state)
    return StudyPlan.model_validate(values), public


def _site(plan: StudyPlan, name: str, folder: Path) -> Site:
    """A site that approved `plan`, with a cohort of made-up patients."""
    place = Site(folder)
    policy = SitePolicy(
        site=name,
        max_epsilon=plan.privacy.epsilon,
        max_delta=plan.privacy.delta,
        min_patients=1,
        declared_patients=plan.site(name).nominal_patients,
        modules=list(plan.modules),
        allow_reproducible_noise=plan.privacy.reproducible_seed is not None,
    )
    save_policy(policy, place.policy_path)
    place.approve(plan)
    rng = np.random.default_rng(0)
    image = plan.image
    grid = (image.slices, image.size, image.size)
    keys = [f"p{i:012x}" for i in range(_PATIENTS)]
    (place.cohort_path / "patients").mkdir(parents=True)
    for key in keys:
        images = rng.random((len(image.sequences), *grid)).astype(np.float16)
        mask = (rng.random(grid) > 0.8).astype(np.uint8)
        save_file({"images": images, "mask": mask}, place.cohort_path / "patients" / f"{key}.safetensors")
    index = pd.Index(keys, name="key")
    profiles = rng.standard_normal((_PATIENTS, _GENES)).astype(np.float32)
    pd.DataFrame(profiles, index, plan.genes.panel).to_parquet(place.cohort_path / "expression.parquet")
    clinical = pd.DataFrame(rng.random((_PATIENTS, len(FEATURES))), index, [feature.name for feature in FEATURES])
    clinical["label"] = rng.integers(0, len(plan.label.classes), _PATIENTS)
    clinical.to_parquet(place.cohort_path / "clinical.parquet")
    manifest = {
        "image": image.model_dump(mode="json"),
        "genes": plan.genes.model_dump(mode="json"),
        "label": plan.label.model_dump(mode="json"),
        "patients": [{"key": key, "split": "train", "has_images": True, "has_genes": True} for key in keys],
    }
    (place.cohort_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return place


def _task(plan: StudyPlan, public: dict[str, State], module: Module, number: int, site: str) -> RecordDict:
    """What a coordinator sends for one round."""
    task = task_record(plan.digest, module, number, site)
    if module == "moments" or module == "embedding":
        return RecordDict({"task": task, PUBLIC[module]: to_record(public[module])})
    if module != "gan":
        network = make_autoencoder(plan) if module == "autoencoder" else make_radiogenomic_dnn(plan)
        return RecordDict({"task": task, WEIGHTS[module]: to_record(network.state_dict())})
    generator, discriminator = make_generator(plan), make_discriminator(plan)
    for model in (generator, discriminator):
        initialise(model, torch.Generator().manual_seed(0))
    profiles = {name: to_record(state) for name, state in profile_template(plan).items()}
    return RecordDict(
        {
            "task": task,
            WEIGHTS["gan"]: to_record(generator.state_dict()),
            "discriminator": to_record(discriminator.state_dict()),
            **profiles,
        }
    )
