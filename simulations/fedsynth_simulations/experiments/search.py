"""A search for training settings on public simulated slices, so that no private slice is looked at to choose them."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fedsynth.metrics.domain_extractor import extract
from fedsynth.metrics.frechet import frechet_distance
from fedsynth.plan import Count, Section
from fedsynth_simulations.experiments.bench import Bench, Measured
from fedsynth_simulations.experiments.data import simulated_images
from fedsynth_simulations.experiments.drawing import draw, even_labels
from fedsynth_simulations.experiments.measures.fidelity import domain_network
from fedsynth_simulations.experiments.run import Experiment
from fedsynth_simulations.experiments.spec import Column, merged
from fedsynth_simulations.experiments.training import train_column
from fedsynth_simulations.experiments.values import Cell, Row, Table


class Search(Section):
    """Grid and random search over keys of the plan's section ``gan``.

    Attributes:
        grid: all combinations of these values are tried.
        choices: random trials draw a value of each of these.
        random_trials: how many.
        rounds: of each trial.
        drawn: synthetic slices that a trial is judged by.
        scale: how many times the public simulated patients of a test are drawn.
    """

    grid: dict[str, list[Any]] = Field(default={})
    choices: dict[str, list[Any]] = Field(default={})
    random_trials: Annotated[int, Field(ge=0)] = 0
    rounds: Count = 5
    drawn: Count = 300
    scale: Count = 3


def searched(experiment: Experiment, search: Search) -> tuple[Experiment, Measured]:
    """The experiment with the settings of the best trial, and the table of all trials.

    A trial trains without privacy on public simulated slices, and is judged by its Fréchet distance to other simulated
    slices. Neither training nor test data of the experiment are looked at.
    """
    public = Experiment(
        experiment.spec.model_copy(update={"data": "simulated", "published": {}}),
        None,
        experiment.out,
        experiment.quick,
    )
    # Anything but the experiment's own seed: where those are simulated, too, they must be other patients.
    data = simulated_images({}, public.spec.seed + 1000, search.scale)
    trials = _trials(search, np.random.default_rng([public.spec.seed, 20]))
    bench = Bench(public, data, {}, {}, 150, 1)
    network = domain_network(bench)
    test = extract(network, bench.test.images)
    found: list[tuple[str, dict[str, Any], float]] = []
    for number, (kind, keys) in enumerate(trials, start=1):
        changes = {"gan": {**keys, "rounds": search.rounds}}
        column = Column(name=f"search {number}", plan=changes)
        trained = train_column(public, column, data)
        drawn = draw(trained.plan, trained.generator, even_labels(trained.plan, search.drawn), public.spec.seed)
        features = extract(network, drawn.images)
        found.append((kind, keys, frechet_distance(test, features, any_rank=True)))
    best = min(range(len(found)), key=lambda i: found[i][2])
    rows = [
        Row(
            what=f"{kind}: {', '.join(f'{key} {value}' for key, value in keys.items())}"
            + (" (best)" if i == best else ""),
            cells={"distance": Cell(value=distance)},
        )
        for i, (kind, keys, distance) in enumerate(found)
    ]
    table = Table(
        title="Search on public simulated slices (Fréchet distance, lower is better)", columns=["distance"], rows=rows
    )
    plan = merged(experiment.spec.plan, {"gan": found[best][1]})
    chosen = Experiment(
        experiment.spec.model_copy(update={"plan": plan}), experiment.data, experiment.out, experiment.quick
    )
    note = (
        f"Settings were searched on public simulated slices alone, {search.rounds} rounds a trial without privacy, and the "
        "best of them train all columns. What is best without noise on simulated slices need not be best with noise on real "
        "ones."
    )
    return chosen, Measured(tables=[table], notes=[note])


def _trials(search: Search, rng: np.random.Generator) -> list[tuple[str, dict[str, Any]]]:
    grid = [
        ("grid", dict(zip(search.grid, values, strict=True))) for values in itertools.product(*search.grid.values())
    ]
    drawn = [
        ("random", {key: values[int(rng.integers(len(values)))] for key, values in search.choices.items()})
        for _ in range(search.random_trials)
    ]
    return [*(grid if search.grid else []), *drawn]
