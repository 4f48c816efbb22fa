"""Training a column that translates: its domains, its study plan, and the rounds of the project's own training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.domains import Domain, source_and_target
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.errors import UsageError
from fedsynth.plan import Section, StudyPlan, TranslationPlan
from fedsynth.progress import say
from fedsynth.recommend import PublicStarts
from fedsynth.records import State
from fedsynth.translation import TO_SOURCE, TO_TARGET, make_networks
from fedsynth_client.training.translation import train_translation
from fedsynth_server.aggregation import site_weights, weighted_average
from fedsynth_simulations.experiments.data import ImageData
from fedsynth_simulations.experiments.run import Experiment, Kept
from fedsynth_simulations.experiments.spec import Column, merged
from fedsynth_simulations.plans import study_plan, zscore_genes

Translates = Literal["sequences", "tumour", "sites"]
_HOLDOUT = 4  # of sites that are translated, every fourth patient is held out
_BLANK = 0.05  # share of a slice that must be brighter than this for it to show anything
_BRIGHT = 0.1
_LEAST = 8  # slices of a domain
_PLACEHOLDER = 1.0  # a budget for what is checked before the column's own is set
# Where neither experiment nor column says otherwise.
_TRANSLATION: Mapping[str, object] = {
    "rounds": 10,
    "steps_per_round": 20,
    "expected_batch": 4,
    "max_grad_norm": 1.0,
    "learning_rate": 2e-4,
    "width": 8,
}


class ColumnOptions(Section):
    """Of a column.

    Attributes:
        translate: between two sequences, between slices without and with tumour (both of the plan's section), or between
            two sites, whose patients are then in one place: no federation could do that, and no site would be protected.
        sequence: what is translated between sites.
        source_site, target_site: which sites, by their place in the data.
    """

    translate: Translates = "sequences"
    sequence: str = ""
    source_site: Annotated[int, Field(ge=0)] = 0
    target_site: Annotated[int, Field(ge=0)] = 1


@dataclass(frozen=True)
class Task:
    """What a column translates.

    Attributes:
        kind: between what.
        source, target: names of the two domains, for tables.
        plan: the study plan.
        sites: the two domains at each place that trains.
        test: the two domains of held-out patients.
    """

    kind: Translates
    source: str
    target: str
    plan: StudyPlan
    sites: dict[str, tuple[Domain, Domain]]
    test: tuple[Domain, Domain]

    @property
    def key(self) -> str:
        """What columns of one table have in common."""
        return f"{self.source} to {self.target}"

    @property
    def train(self) -> tuple[Domain, Domain]:
        """The two domains of all that train."""
        pairs = list(self.sites.values())
        first, second = (
            Domain(torch.cat([pair[i].slices for pair in pairs]), torch.cat([pair[i].member for pair in pairs]))
            for i in (0, 1)
        )
        return first, second


@dataclass(frozen=True)
class Translators:
    """A trained column.

    Attributes:
        task: what it was trained for.
        weights: of the two generators, as a server would release them.
        cycle: mean absolute error of the held-out source's cycle (of intensities in [0, 1]) after each round.
        epsilon: what the training spent at its dearest site; infinite without privacy.
        seconds: of training.
    """

    task: Task
    weights: State
    cycle: list[float]
    epsilon: float
    seconds: float

    def translate(self, planes: NDArray[np.float32], direction: str = TO_TARGET) -> NDArray[np.float32]:
        """Slices (M, C, H, W) in [0, 1] of one domain as the other, in [0, 1]."""
        return translated(self.task.plan, self.weights, planes, direction)


def make_task(experiment: Experiment, column: Column, data: ImageData) -> Task:
    """The domains and the plan of a column.

    Raises:
        UsageError: ``experiment_invalid``: translation between sites under privacy, or of unknown sites or sequences.
    """
    options = ColumnOptions.model_validate(column.options)
    if options.translate == "sites":
        return _between_sites(experiment, column, data, options)
    sites = data.at(column.sites or experiment.spec.sites)
    plan = _plan(experiment, column, data, {name: len(site) for name, site in sites.items()}, {})
    section = _section(plan)
    if section.domains != options.translate:
        raise UsageError("experiment_invalid", f"column {column.name}: plan.translation.domains is {section.domains!r}")
    names = (section.source, section.target) if section.domains == "sequences" else ("no tumour", "tumour")
    return Task(
        options.translate,
        *names,
        plan,
        {name: source_and_target(plan, site.slices()) for name, site in sites.items()},
        source_and_target(plan, data.test.slices()),
    )


def _between_sites(experiment: Experiment, column: Column, data: ImageData, options: ColumnOptions) -> Task:
    if column.private:
        raise UsageError(
            "experiment_invalid",
            f"column {column.name}: the images of two sites lie in one place, which is for public data and without privacy.",
        )
    places, known = {options.source_site, options.target_site}, list(data.sites)
    if len(places) < 2 or max(places) >= len(known) or options.sequence not in data.image.sequences:
        raise UsageError(
            "experiment_invalid",
            f"column {column.name}: two of the {len(known)} sites, one of the sequences {', '.join(data.image.sequences)}.",
        )
    names = known[options.source_site], known[options.target_site]
    channel = data.image.sequences.index(options.sequence)
    volumes = [data.sites[name].slices()[:, channel : channel + 1] for name in names]
    of_first = torch.arange(sum(map(len, volumes))) < len(volumes[0])
    held = torch.cat([torch.arange(len(each)) % _HOLDOUT == _HOLDOUT - 1 for each in volumes])
    whole, depth = torch.cat(volumes), volumes[0].shape[2]

    def domains(rows: torch.Tensor) -> tuple[Domain, Domain]:
        member = of_first[rows, None].expand(-1, depth)
        return Domain(whole[rows], member), Domain(whole[rows], ~member)

    # One sequence on either side: the plan's two names give the networks their one channel.
    other = next(name for name in data.image.sequences if name != options.sequence)
    sizes = {"both": int((~held).sum())}
    plan = _plan(experiment, column, data, sizes, {"source": options.sequence, "target": other})
    return Task("sites", f"site {names[0]}", f"site {names[1]}", plan, {"both": domains(~held)}, domains(held))


def _plan(
    experiment: Experiment, column: Column, data: ImageData, sizes: dict[str, int], own: Mapping[str, object]
) -> StudyPlan:
    """The study plan of a column: nothing but the translation runs, and the whole budget is spent on it."""
    changes = merged(experiment.spec.plan, column.plan)
    base = study_plan(
        "experiment",
        "Compare translations between domains.",
        sizes,
        genes=zscore_genes(),
        epsilon=_PLACEHOLDER,
        starts=PublicStarts(),
    )
    shares = {name: getattr(base, name).model_dump() | {"budget_share": 0.2} for name in ("autoencoder", "gan")}
    whole = base.model_dump() | {
        **shares,
        "radiogenomics": base.radiogenomics.model_dump() | {"budget_share": 0.2},
        "image": data.image.model_dump(),
        "label": data.label.model_dump(),
        "privacy": base.privacy.model_dump() | {"epsilon": column.epsilon},
        "translation": {**_TRANSLATION, "budget_share": 0.2, **changes.get("translation", {}), **own},
    }
    plan = StudyPlan.model_validate(whole)
    # A plan that makes neither profiles nor images is no plan of a study: it is checked with them and run without.
    silent: dict[str, Section] = {
        name: getattr(plan, name).model_copy(update={"rounds": 0}) for name in ("autoencoder", "radiogenomics", "gan")
    }
    return plan.model_copy(update=silent)


def _section(plan: StudyPlan) -> TranslationPlan:
    assert plan.translation is not None
    return plan.translation


def train_task(experiment: Experiment, column: Column, task: Task, data: ImageData) -> Translators:
    """Train a column, or take up what an earlier run kept of it."""
    section = _section(task.plan)
    inputs = {
        "plan": section.model_dump(),
        "epsilon": task.plan.privacy.epsilon,
        "sites": {site.name: site.nominal_patients for site in task.plan.sites},
        "options": column.options,
        "seed": experiment.spec.seed,
        "data": data.description,
    }
    kept = experiment.kept(column.slug, inputs, lambda: _train(experiment, column, task))
    spent = kept.facts["epsilon"]
    return Translators(
        task,
        dict(kept.arrays),
        kept.facts["cycle"],
        math.inf if spent is None else spent,
        kept.facts["seconds"],
    )


def _train(experiment: Experiment, column: Column, task: Task) -> Kept:
    plan, section = task.plan, _section(task.plan)
    shared: State = dict(make_networks(plan)["translators"].state_dict())
    local: dict[str, State] = {name: {} for name in task.sites}
    # Seeded, so that an experiment can be repeated: the noise is that of the plan, but not private, and the data are public.
    randomness = {name: SeededRandomness(1000 * experiment.spec.seed + i) for i, name in enumerate(task.sites)}
    weights = site_weights(plan, list(task.sites))
    shown = planes(task.test[0]).images
    cycle = []
    for number in range(section.rounds):
        replies: dict[str, State] = {}
        for name, domains in task.sites.items():
            block = train_translation(
                plan,
                shared,
                local[name],
                domains,
                mechanism(plan, name, "translation"),
                randomness[name],
                number * section.steps_per_round,
            )
            replies[name], local[name] = block.weights, block.local
        shared = weighted_average(replies, weights)
        back = translated(plan, shared, translated(plan, shared, shown, TO_TARGET), TO_SOURCE)
        cycle.append(float(np.abs(back - shown).mean()))
        if (number + 1) % max(section.rounds // 5, 1) == 0:
            say(f"  {column.name}: round {number + 1} of {section.rounds}, cycle {cycle[-1]:.3f}")
    spent = max(planned_epsilon(plan, name, "translation") for name in task.sites)
    return Kept(shared, {"cycle": cycle, "epsilon": spent if math.isfinite(spent) else None})


@dataclass(frozen=True)
class Planes:
    """Slices (M, C, H, W) in [0, 1], whose each is (M,), and where in that patient's volume (M,)."""

    images: NDArray[np.float32]
    owners: NDArray[np.int64]
    places: NDArray[np.int64]


def planes(domain: Domain) -> Planes:
    """The slices of a domain that show anything.

    Raises:
        UsageError: ``data_wrong``: there are fewer than a handful.
    """
    images = (domain.slices.float().transpose(1, 2) + 1) / 2
    kept = domain.member & ((images.mean(dim=2) > _BRIGHT).flatten(2).float().mean(dim=2) > _BLANK)
    if int(kept.sum()) < _LEAST:
        raise UsageError(
            "data_wrong", f"a domain has {int(kept.sum())} slices that show anything; {_LEAST} are needed."
        )
    owners, places = kept.nonzero(as_tuple=True)
    return Planes(images[kept].numpy(), owners.numpy(), places.numpy())


@torch.no_grad()
def translated(plan: StudyPlan, weights: State, slices: NDArray[np.float32], direction: str) -> NDArray[np.float32]:
    """Slices (M, C, H, W) in [0, 1] as the generator `direction` translates them, in [0, 1]."""
    model = make_networks(plan)["translators"]
    model.load_state_dict(weights)
    generator = model.eval().get_submodule(direction)
    parts = [(generator(part * 2 - 1) + 1) / 2 for part in torch.from_numpy(slices).split(64)]
    return np.asarray(torch.cat(parts).numpy())
