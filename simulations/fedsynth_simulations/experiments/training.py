"""Training one column: its study plan, the rounds of the project's own training, and what is kept of them."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.errors import UsageError
from fedsynth.files import read_json
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.dcgan import initialise
from fedsynth.models.images import make_companion, make_generator
from fedsynth.plan import MorphologyPlan, Section, StudyPlan
from fedsynth.progress import say
from fedsynth.recommend import PublicStarts
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles
from fedsynth_server.aggregation import site_weights
from fedsynth_simulations.benchmarking.rounds import Standing, train_rounds
from fedsynth_simulations.experiments.data import ImageData, as_image_patients
from fedsynth_simulations.experiments.run import Experiment, Kept
from fedsynth_simulations.experiments.spec import Column, merged
from fedsynth_simulations.plans import study_plan, zscore_genes

_POOL = 2000  # synthetic conditions
_PLACEHOLDER = 1.0  # a budget for what is checked before the column's own is set
_IMAGE_SECTIONS = ("image", "label", "morphology", "privacy", "gan", "aggregation")
# Where neither experiment nor column says otherwise; the shares of other modules do not matter, since none runs.
_GAN: Mapping[str, object] = {
    "rounds": 10,
    "steps_per_round": 20,
    "expected_batch": 32,
    "max_grad_norm": 1.0,
    "learning_rate": 2e-4,
    "budget_share": 0.2,
}


@dataclass(frozen=True)
class Trained:
    """A trained column.

    Attributes:
        plan: what it was trained by.
        generator: weights that a server would release.
        companions: of each site, what stayed there: a discriminator, or an encoder.
        snapshots: the generator after some rounds, by round.
        history: by quantity that sites report, its value after each round (mean over sites).
        epsilon: what the training spent at its dearest site; infinite without privacy.
        seconds: of training.
    """

    plan: StudyPlan
    generator: State
    companions: dict[str, State]
    snapshots: dict[int, State]
    history: dict[str, list[float]]
    epsilon: float
    seconds: float


def column_plan(experiment: Experiment, column: Column, data: ImageData) -> StudyPlan:
    """The study plan of a column: only images are made, and the whole budget is spent on them.

    Raises:
        UsageError: ``experiment_invalid``: the keys do not fit together.
    """
    changes = merged(experiment.spec.plan, column.plan)
    sizes = {name: len(site) for name, site in data.at(column.sites or experiment.spec.sites).items()}
    base = _base(sizes)
    sections: dict[str, dict[str, object]] = {
        "image": data.image.model_dump(),
        "label": data.label.model_dump(),
        "morphology": MorphologyPlan(features=["volume"]).model_dump(),
        "gan": {**_GAN, **changes.get("gan", {})},
        "privacy": base.privacy.model_dump() | {"epsilon": column.epsilon} | changes.get("privacy", {}),
        "aggregation": changes.get("aggregation", {}),
    }
    try:
        return images_only(StudyPlan.model_validate(base.model_dump() | sections))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False))
        raise UsageError("experiment_invalid", f"The column {column.name!r} is no plan: {faults}.") from None


def images_only(plan: StudyPlan) -> StudyPlan:
    """`plan` without the modules that make profiles, so that its whole budget is the images'.

    A plan that makes no profiles is no plan of a study, so it is checked with them and run without.
    """
    silent: dict[str, Section] = {
        "autoencoder": plan.autoencoder.model_copy(update={"rounds": 0}),
        "radiogenomics": plan.radiogenomics.model_copy(update={"rounds": 0}),
    }
    return plan.model_copy(update=silent)


def plan_text(plan: StudyPlan) -> str:
    """What of a plan says how images are made, as TOML (JSON has no infinite epsilon)."""
    sections = {name: getattr(plan, name).model_dump(mode="python", exclude_none=True) for name in _IMAGE_SECTIONS}
    return tomli_w.dumps(sections | {"sites": [site.model_dump(exclude_none=True) for site in plan.sites]})


def plan_from(text: str) -> StudyPlan:
    """The plan of a text by `plan_text`."""
    kept = tomllib.loads(text)
    sizes = {site["name"]: site["nominal_patients"] for site in kept.pop("sites")}
    return images_only(StudyPlan.model_validate(_base(sizes).model_dump() | kept))


def _base(sizes: dict[str, int]) -> StudyPlan:
    return study_plan(
        "experiment",
        "Compare systems that make images.",
        sizes,
        genes=zscore_genes(),
        epsilon=_PLACEHOLDER,
        starts=PublicStarts(),
    )


def train_column(experiment: Experiment, column: Column, data: ImageData, snapshots: int = 0) -> Trained:
    """Train a column, or take up what an earlier run kept of it.

    Args:
        experiment: the run.
        column: what to train.
        data: real images.
        snapshots: after how many evenly spread rounds the generator is kept; of one that grows, after each resolution too.
    """
    plan = column_plan(experiment, column, data)
    wanted = _snapshot_rounds(plan, snapshots)
    inputs = {"plan": plan_text(plan), "seed": experiment.spec.seed, "snapshots": sorted(wanted)}
    inputs |= {"data": data.description, "sites": {name: len(site) for name, site in data.sites.items()}}
    kept = experiment.kept(column.slug, inputs, lambda: _train(experiment, plan, column, data, wanted))
    return trained_from(plan, kept)


def trained_from(plan: StudyPlan, kept: Kept) -> Trained:
    """What was kept of a training by `plan`."""
    taken = {int(number): _under(kept.arrays, f"round-{number}/") for number in kept.facts["snapshots"]}
    return Trained(
        plan,
        _under(kept.arrays, "generator/"),
        {name: _under(kept.arrays, f"site-{name}/") for name in kept.facts["sites"]},
        taken,
        kept.facts["history"],
        math.inf if kept.facts["epsilon"] is None else kept.facts["epsilon"],
        kept.facts["seconds"],
    )


def trained_in(run: Path, column: str = "", data: str = "") -> Trained:
    """A trained column from the folder of a run.

    Args:
        run: the folder.
        column: its name; empty for the first that was trained.
        data: the kind of data that it has to be trained on, where that matters.

    Raises:
        UsageError: ``result_missing``, ``column_unknown``, ``data_differ``.
    """
    parts = [(path.parent, read_json(path)["facts"]) for path in sorted(run.glob("parts/*/facts.json"))]
    found = {facts["column"]: (folder, facts) for folder, facts in parts if "plan" in facts}
    if not found:
        raise UsageError("result_missing", f"There is no trained generator in {run}.")
    chosen = column or next(iter(found))
    if chosen not in found:
        raise UsageError("column_unknown", f"The run {run} has no column {chosen!r}.", f"Known: {', '.join(found)}.")
    folder, facts = found[chosen]
    if data and facts["data"] != data:
        raise UsageError("data_differ", f"The run {run} is of {facts['data']}, not of {data}.")
    return trained_from(plan_from(facts["plan"]), Kept(load_file(folder / "arrays.safetensors"), facts))


def conditions(plan: StudyPlan, generator: torch.Generator) -> SyntheticProfiles:
    """Public conditions to train under: classes in equal parts, no morphology."""
    labels = torch.randperm(_POOL, generator=generator) % len(plan.label.classes)
    return SyntheticProfiles(torch.zeros(_POOL, 0), torch.full((_POOL, 1), 0.5), labels)


def code(plan: StudyPlan, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Condition vectors of classes (B,) at slices (B,), as training states them."""
    positions = slice_positions(plan.image.slices)[places]
    return condition(labels, torch.full((len(labels), 1), 0.5), positions, len(plan.label.classes))


def _train(experiment: Experiment, plan: StudyPlan, column: Column, data: ImageData, wanted: set[int]) -> Kept:
    sites = data.at(column.sites or experiment.spec.sites)
    seed = experiment.spec.seed
    draws = torch.Generator().manual_seed(seed)
    generator, companion = make_generator(plan), make_companion(plan)
    initialise(generator, draws)
    initialise(companion, draws)
    history: dict[str, list[float]] = {}
    taken: dict[int, State] = {}

    def observe(number: int, standing: Standing) -> None:
        for quantity in standing.progress[next(iter(sites))]:
            values = [progress[quantity] for progress in standing.progress.values()]
            history.setdefault(quantity, []).append(sum(values) / len(values))
        if number in wanted:
            taken[number] = standing.average
        if number == plan.gan.rounds or number % max(plan.gan.rounds // 5, 1) == 0:
            say(f"  {column.name}: round {number} of {plan.gan.rounds}")

    standing = train_rounds(
        plan,
        generator.state_dict(),
        companion.state_dict(),
        {name: as_image_patients(site) for name, site in sites.items()},
        {name: mechanism(plan, name, "gan") for name in sites},
        # Seeded, so that an experiment can be repeated: the noise is that of the plan, but not private, and the data are
        # public.
        {name: SeededRandomness(1000 * seed + i) for i, name in enumerate(sites)},
        site_weights(plan, list(sites)),
        conditions(plan, draws),
        observe,
    )
    arrays = _over(standing.average, "generator/")
    for name, local in standing.local.items():
        arrays |= _over(_under(local, "model/"), f"site-{name}/")
    for number, state in taken.items():
        arrays |= _over(state, f"round-{number}/")
    spent = max(planned_epsilon(plan, name, "gan") for name in sites)
    return Kept(
        arrays,
        {
            "sites": list(sites),
            "snapshots": sorted(taken),
            "history": history,
            "epsilon": spent if math.isfinite(spent) else None,
            "plan": plan_text(plan),
            "column": column.name,
            "data": experiment.spec.data,
        },
    )


def _snapshot_rounds(plan: StudyPlan, count: int) -> set[int]:
    rounds = plan.gan.rounds
    evenly = {round(rounds * (i + 1) / count) for i in range(count)} if count else set()
    ends = {sum(plan.gan.growth[: i + 1]) for i in range(len(plan.gan.growth))} if count else set()
    return (evenly | ends) - {0}


def _over(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _under(arrays: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in arrays.items() if name.startswith(prefix)}
