"""A site in miniature, asked as a coordinator asks: what is charged for each round, what is computed, and what leaves.

The site's folder, policy, cohort of made-up patients and plan are written to a temporary folder; the plan keeps the
privacy section, the sites, rounds and steps of the plan that is audited, and has small networks and images.

The other checks and the canaries call the training functions themselves. That a site calls them with the mechanism that it
charges, with fresh randomness and with the right patients is shown here, from a task to its answer.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import RecordDict
from safetensors.numpy import save_file
from scipy.stats import chi2
from torch import Tensor

from fedsynth.auditing.values import MechanismCheck
from fedsynth.budget import charge, mechanism
from fedsynth.domains import source_and_target
from fedsynth.dp.accounting import Mechanism, epsilon
from fedsynth.dp.randomness import Randomness
from fedsynth.engines import embedding, moments
from fedsynth.errors import FedsynthError
from fedsynth.evaluation import site_scores
from fedsynth.models.dcgan import initialise
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.images import make_companion, make_generator
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.morphology import FEATURES
from fedsynth.plan import Activity, StudyPlan
from fedsynth.profiles import profile_model, profile_template
from fedsynth.records import EVALUATORS, PUBLIC, WEIGHTS, State, from_record, state_digest, task_record, to_record
from fedsynth.translation import make_networks
from fedsynth_client import rounds
from fedsynth_client.auditing.standins import IMAGES
from fedsynth_client.cohort import Cohort, load_cohort
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.ledger import Task
from fedsynth_client.outbox import Outbox
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_client.training import adversarial, profiles, statistic, translation
from fedsynth_client.training.adversarial import ImagePatients
from fedsynth_client.training.block import BlockResult, public_generator

# The closed list of what a reply holds beside weights, written down a second time on purpose: a quantity that is added
# to the list of `fedsynth.records` fails the audit until somebody has looked at it here as well.
PROGRESS: dict[Activity, frozenset[str]] = {
    "moments": frozenset(),
    "autoencoder": frozenset({"update_norm"}),
    "radiogenomics": frozenset({"update_norm"}),
    "embedding": frozenset(),
    "gan": frozenset({"update_norm", "generator_loss", "fake_score"}),
    "translation": frozenset({"update_norm"}),
    "evaluation": frozenset(),
}
RECEIPT = frozenset({"head", "epsilon", "epsilon_lifetime", "steps", "private"})

_PATIENTS, _HELD_OUT, _GENES, _ROUNDS = 12, 4, 8, 2
_STEPS = 20  # of a round whose answer is computed a second time; its noise is that of a plan of such rounds
_ALARM = 1e-6
# What a site keeps of an optimiser's first moments, where the noise is without being divided by second moments.
_FIRST_MOMENTS = tuple(f"{prefix}{moment}/" for prefix in ("", "moments/") for moment in ("exp_avg", "momentum_buffer"))
_SAME = 1e-3  # of an update: by what two runs of the same computation may differ


def told(plan: StudyPlan, activity: Activity) -> frozenset[str]:
    """What a reply of `activity` holds beside weights: of a variational autoencoder, which makes no fakes, less."""
    without_fakes = activity == "gan" and plan.gan.architecture == "vae"
    return frozenset({"update_norm"}) if without_fakes else PROGRESS[activity]


def rounds_are_charged_and_closed(plan: StudyPlan, site: str) -> MechanismCheck:
    """Whether a site that answers two rounds of every module charges both, and sends the closed list and nothing else.

    Held-out patients, of whom the evaluation takes one round, are to be charged for that and nothing else.
    """
    small, public = _small(plan)
    asked: list[Mechanism] = []
    wrong: list[str] = []
    answers, spent = 0, 0.0
    with tempfile.TemporaryDirectory() as folder, _site(small, site, Path(folder)) as place:
        for activity in small.activities:
            weights = _weights(small, public, activity)
            for number in range(1, min(small.rounds(activity), _ROUNDS) + 1):
                if activity == "evaluation":
                    own = [charge(small, site, activity).mechanism]
                    expected = epsilon(own, small.privacy.delta, small.privacy.accountant)
                else:
                    asked.append(mechanism(small, site, activity))
                    expected = spent = epsilon(asked, small.privacy.delta, small.privacy.accountant)
                answers += 1
                task = _task(small, weights, activity, number, site)
                found = _answer(place, activity, task, told(small, activity), expected)
                wrong += [f"{activity} round {number}: {what}" for what in found]
    return MechanismCheck(
        id="rounds",
        title="A site charges every round and sends the closed list",
        module=None,
        ok=not wrong,
        finding=f"A site in miniature answered {answers} rounds: "
        + (
            f"{'; '.join(wrong)}."
            if wrong
            else f"each charged, epsilon {spent:.4f} told in the end, nothing else sent."
        ),
    )


def answers_are_as_charged(plan: StudyPlan, site: str) -> MechanismCheck:
    """Whether a site answers with what the audited functions make of the charged mechanism, its patients and fresh noise.

    A site whose noise comes from a seed has to answer with exactly what the training functions give when they are called
    with the charged mechanism, the same seed and the right patients. Two sites of the same made-up patients whose noise
    comes from the operating system must not answer alike; where a sum is released, their difference has to have the
    variance of twice the charged noise.
    """
    small, public = _small(plan)
    short: dict[str, Any] = {}
    for module in small.modules:
        training = small.training(module)
        if module not in PUBLIC:
            steps = min(training.steps_per_round, _STEPS)
            short[module] = training.model_copy(update={"steps_per_round": steps})
    seeded, fresh = (
        small.model_copy(update={**short, "privacy": small.privacy.model_copy(update={"reproducible_seed": seed})})
        for seed in (1, None)
    )
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        _site(seeded, site, Path(folder) / "seeded") as place,
        _site(fresh, site, Path(folder) / "one") as one,
        _site(fresh, site, Path(folder) / "two") as two,
    ):
        for activity in small.activities:
            weights = _weights(small, public, activity)
            try:
                found = _unlike_its_charge(place, seeded, site, activity, weights)
                found += _unlike_fresh_noise((one, two), fresh, site, activity, weights)
            except FedsynthError as error:
                found = [f"it ended with {error.code}"]
            wrong += [f"{activity}: {what}" for what in found]
    return MechanismCheck(
        id="answers",
        title="A site computes what it charges",
        module=None,
        ok=not wrong,
        finding=f"Sites in miniature answered a round of {', '.join(small.activities)}: "
        + (f"{'; '.join(wrong)}." if wrong else "each as the charged mechanism gives it, with noise of its own."),
    )


def _unlike_its_charge(
    place: Site, plan: StudyPlan, site: str, activity: Activity, weights: Mapping[str, State]
) -> list[str]:
    """What is wrong with the answer of a site whose noise comes from a seed."""
    cohort, task = load_cohort(place.cohort_path, plan.morphology.features), Task(plan.digest, activity, 1)
    expected = _by_hand(plan, site, activity, weights, cohort, rounds._randomness(plan, task))
    found = _answered(place, plan, site, activity, weights, expected.weights)
    pairs = [("what it sent", found, expected.weights, weights.get(WEIGHTS[activity], {}))]
    if (
        activity in IMAGES
    ):  # there is noise in what stays at the site: in the weights and first moments of whatever trains
        kept = Outbox(place.folder).local_state(task)
        networks, first = (
            {name: tensor for name, tensor in expected.local.items() if name.startswith(prefixes)}
            for prefixes in ("model/", _FIRST_MOMENTS)
        )
        pairs.append(("what it kept", kept, networks, _kept_at_first(plan, activity, weights)))
        if first:  # gradient descent without momentum has none
            pairs.append(("what it kept of moments", kept, first, {}))
    return [
        f"{what} is not what the charged mechanism gives"
        for what, state, by_hand, start in pairs
        if not _root_mean_square(_apart(state, by_hand)) <= _SAME * _root_mean_square(_apart(by_hand, start))
    ]


def _unlike_fresh_noise(
    places: tuple[Site, Site], plan: StudyPlan, site: str, activity: Activity, weights: Mapping[str, State]
) -> list[str]:
    """What is wrong with the answers of two sites that have the same patients, and nothing else in common."""
    template = weights.get(WEIGHTS[activity])
    first, second = (_answered(place, plan, site, activity, weights, template) for place in places)
    difference = _apart(first, second)
    if template is not None:
        moved = _root_mean_square(_apart(first, template))
        return [] if _root_mean_square(difference) > _SAME * moved else ["two sites answered alike"]
    cost = charge(plan, site, activity)
    expected = math.sqrt(2) * cost.mechanism.noise_multiplier * cost.max_grad_norm
    count, ratio = difference.numel(), _root_mean_square(difference) / expected
    low, high = (math.sqrt(float(chi2.ppf(p, count)) / count) for p in (_ALARM / 2, 1 - _ALARM / 2))
    if low <= ratio <= high:
        return []
    return [f"the answers of two sites differ by {ratio:.3f} times the noise (by chance {low:.3f} to {high:.3f})"]


def _answered(
    place: Site,
    plan: StudyPlan,
    site: str,
    activity: Activity,
    weights: Mapping[str, State],
    template: State | None,
) -> State:
    """The weights of the site's answer to a first round; a sum is taken as it is when there is no `template`."""
    reply = rounds.answer(place, activity, _task(plan, weights, activity, 1, site), "the audit")
    name = WEIGHTS[activity]
    if template is None:
        return {key: torch.from_numpy(array.numpy().copy()) for key, array in reply.array_records[name].items()}
    return from_record(reply, name, template, largest_norm=math.inf)


def _by_hand(
    plan: StudyPlan,
    site: str,
    activity: Activity,
    weights: Mapping[str, State],
    cohort: Cohort,
    randomness: Randomness,
) -> BlockResult:
    """What `activity` gives with the charged mechanism and the patients whom it may use."""
    cost = charge(plan, site, activity)
    whose = cohort.rows(np.array([entry.split == cost.population for entry in cohort.entries], dtype=bool))
    if activity == "evaluation":
        rows = site_scores.rows(site_scores.evaluators(plan, weights), patients_of({"": whose}))
        return statistic.release_statistic(rows, cost.mechanism, cost.max_grad_norm, randomness)
    whose = whose.rows(whose.usable_for(activity))
    genes, morphology, labels = (torch.tensor(part) for part in (whose.genes, whose.morphology, whose.labels))
    if activity == "moments":
        rows = moments.rows(plan, weights[PUBLIC[activity]], genes, morphology, labels)
        return statistic.release_statistic(rows, cost.mechanism, cost.max_grad_norm, randomness)
    slices = rounds.image_slices(whose)
    if activity == "translation":
        domains = source_and_target(plan, slices)
        return translation.train_translation(plan, weights[WEIGHTS[activity]], {}, domains, cost.mechanism, randomness)
    if activity == "embedding":
        rows = embedding.rows(plan, weights[PUBLIC[activity]], slices, morphology, labels)
        return statistic.release_statistic(rows, cost.mechanism, cost.max_grad_norm, randomness)
    if activity == "autoencoder":
        return profiles.train_autoencoder(plan, weights["autoencoder"], genes, cost.mechanism, randomness)
    if activity == "radiogenomics":
        start = weights["radiogenomics"]
        return profiles.train_radiogenomics(plan, start, genes, morphology, labels, cost.mechanism, randomness)
    pool = profile_model(plan, weights).draw(rounds._POOL, public_generator(randomness))
    patients, local = ImagePatients(slices, morphology, labels), _kept_at_first(plan, activity, weights)
    return adversarial.train_gan(plan, weights[WEIGHTS["gan"]], local, pool, patients, cost.mechanism, randomness)


def _kept_at_first(plan: StudyPlan, activity: Activity, weights: Mapping[str, State]) -> State:
    """The networks that stay at a site, as they are before the first round of a module over images."""
    if activity == "translation":
        start = dict(make_networks(plan)["discriminators"].state_dict())
    else:
        start = weights["discriminator"]
    return {f"model/{name}": tensor for name, tensor in start.items()}


def _apart(state: State, other: State) -> Tensor:
    """The difference in each value, in a row; `other` may be empty, which stands for zeros."""
    return torch.cat(
        [(state[name].double() - (other[name].double() if other else 0.0)).flatten() for name in other or state]
    )


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _answer(place: Site, module: Activity, task: RecordDict, agreed: frozenset[str], expected: float) -> list[str]:
    """What is wrong with the site's answer."""
    try:
        return _not_as_agreed(rounds.answer(place, module, task, "the audit"), module, agreed, expected)
    except FedsynthError as error:
        return [f"it ended with {error.code}"]


def _not_as_agreed(reply: RecordDict, module: Activity, agreed: frozenset[str], expected: float) -> list[str]:
    """What is wrong with a reply, given what it may tell and the epsilon of all rounds so far."""
    records = {WEIGHTS[module], "progress", "receipt"}
    if set(reply) != records:
        return [f"it holds {', '.join(sorted(reply))} in place of {', '.join(sorted(records))}"]
    progress, receipt = reply.metric_records["progress"], reply.config_records["receipt"]
    wrong = []
    if set(progress) != agreed or set(receipt) != RECEIPT:
        extra = (set(progress) - agreed) | (set(receipt) - RECEIPT)
        wrong.append(f"{', '.join(sorted(extra)) or 'less than agreed'} is told")
    spent = receipt.get("epsilon")
    if not isinstance(spent, float) or abs(spent - expected) > 1e-6 * expected:
        wrong.append(f"epsilon {spent!r} is told where all rounds so far cost {expected:.6f}")
    return wrong


def _small(plan: StudyPlan) -> tuple[StudyPlan, dict[str, State]]:
    """The plan in miniature, valid and approvable, and the public weights of its statistics."""
    values: dict[str, Any] = plan.model_dump(mode="python")
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
    if values["gan"]["growth"]:  # from 8 to 32 pixels
        first, second, *rest = values["gan"]["growth"]
        values["gan"]["growth"] = [first, second, sum(rest)]
    if values["translation"] is not None:
        values["translation"]["width"] = 2
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


@contextmanager
def _site(plan: StudyPlan, name: str, folder: Path) -> Iterator[Site]:
    """A site that approved `plan`, with a cohort of made-up patients; its log is closed in the end."""
    folder.mkdir(exist_ok=True)
    place = Site(folder)
    policy = SitePolicy(
        site=name,
        max_epsilon=plan.privacy.epsilon,
        max_holdout_epsilon=0.0 if plan.site_evaluation is None else plan.site_evaluation.epsilon,
        max_delta=plan.privacy.delta,
        min_patients=1,
        declared_patients=plan.site(name).nominal_patients,
        modules=list(plan.activities),
        allow_reproducible_noise=plan.privacy.reproducible_seed is not None,
    )
    save_policy(policy, place.policy_path)
    place.approve(plan)
    _write_cohort(plan, place.cohort_path)
    try:
        yield place
    finally:
        for handler in list(place.log.handlers):
            place.log.removeHandler(handler)
            handler.close()


def _write_cohort(plan: StudyPlan, folder: Path) -> None:
    """Made-up training patients, and a few held out; the same at each call."""
    rng = np.random.default_rng(0)
    image, count = plan.image, _PATIENTS + _HELD_OUT
    grid = (image.slices, image.size, image.size)
    keys = [f"p{i:012x}" for i in range(count)]
    (folder / "patients").mkdir(parents=True)
    for key in keys:
        images = rng.random((len(image.sequences), *grid)).astype(np.float16)
        mask = (rng.random(grid) > 0.8).astype(np.uint8)
        mask[0] = 0  # an evaluation scores those who have slices with and without tumour
        save_file({"images": images, "mask": mask}, folder / "patients" / f"{key}.safetensors")
    index = pd.Index(keys, name="key")
    expression = rng.standard_normal((count, _GENES)).astype(np.float32)
    pd.DataFrame(expression, index, plan.genes.panel).to_parquet(folder / "expression.parquet")
    clinical = pd.DataFrame(rng.random((count, len(FEATURES))), index, [feature.name for feature in FEATURES])
    clinical["label"] = rng.integers(0, len(plan.label.classes), count)
    clinical.to_parquet(folder / "clinical.parquet")
    splits = ["train"] * _PATIENTS + ["holdout"] * _HELD_OUT
    manifest = {
        "image": image.model_dump(mode="json"),
        "genes": plan.genes.model_dump(mode="json"),
        "label": plan.label.model_dump(mode="json"),
        "patients": [
            {"key": key, "split": split, "has_images": True, "has_genes": True}
            for key, split in zip(keys, splits, strict=True)
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _weights(plan: StudyPlan, public: Mapping[str, State], activity: Activity) -> dict[str, State]:
    """What a coordinator sends for `activity`, by record."""
    if activity == "moments" or activity == "embedding":
        return {PUBLIC[activity]: public[activity]}
    if activity == "evaluation":
        return {EVALUATORS: site_scores.evaluators_template(plan), **profile_template(plan)}
    if activity == "translation":
        return {WEIGHTS[activity]: dict(make_networks(plan)["translators"].state_dict())}
    if activity != "gan":
        network = make_autoencoder(plan) if activity == "autoencoder" else make_radiogenomic_dnn(plan)
        return {WEIGHTS[activity]: network.state_dict()}
    generator, discriminator = make_generator(plan), make_companion(plan)
    for model in (generator, discriminator):
        initialise(model, torch.Generator().manual_seed(0))
    start = {WEIGHTS["gan"]: generator.state_dict(), "discriminator": discriminator.state_dict()}
    return {**start, **profile_template(plan)}


def _task(plan: StudyPlan, weights: Mapping[str, State], activity: Activity, number: int, site: str) -> RecordDict:
    """What a coordinator sends for one round."""
    task = task_record(plan.digest, activity, number, site)
    return RecordDict({"task": task, **{name: to_record(state) for name, state in weights.items()}})
