"""Runner: the gene autoencoder on profiles of hospitals that it has not seen, beside PCA with as many directions.

Whole hospitals are held out, so no patient, and no laboratory, is on both sides. A federation has groups of hospitals for
its sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.expression import to_panel_scale
from fedsynth.models.gene_autoencoder import GeneAutoencoder, make_autoencoder
from fedsynth.plan import Count, Section, StudyPlan
from fedsynth.records import State
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.profiles import train_autoencoder
from fedsynth_simulations.cohort.expression import biology, draw_batch_effect, draw_tpm
from fedsynth_simulations.cohort.latents import draw_latents
from fedsynth_simulations.experiments.profiles import (
    EXPRESSION_FOLDER,
    Profiles,
    budget_text,
    network_plan,
    read_profiles,
    run_rounds,
    tensor,
)
from fedsynth_simulations.experiments.run import Experiment, Findings, Kept
from fedsynth_simulations.experiments.spec import Column, merged
from fedsynth_simulations.experiments.values import Cell, Curves, Line, Row, Table
from fedsynth_simulations.plans import simulated_genes

_RESAMPLES = 2000
_SIMULATED_HOSPITALS = 12
SECTIONS = frozenset({"autoencoder", "privacy", "aggregation"})  # of the plan, that a specification may set
Floats = NDArray[np.float64]


class Options(Section):
    """Options of the runner.

    `genes` are taken evenly spread over the table's alphabetical order. Hospitals are held out until `test_share` of all
    patients are. A quick run draws `simulated` patients of the simulated panel.
    """

    genes: Count = 1300
    test_share: float = Field(default=0.2, gt=0, lt=1)
    simulated: Count = 120


class ColumnOptions(Section):
    """A column has no options of its own."""


@dataclass(frozen=True)
class Split:
    """Training profiles of each of three groups of hospitals, and those of hospitals that are held out.

    Attributes:
        sites: training profiles.
        test: held-out profiles.
        description: source, sizes, split, unit.
    """

    sites: dict[str, Profiles]
    test: Profiles
    description: str

    @property
    def train(self) -> NDArray[np.float32]:
        """(N, G) all training profiles."""
        return np.concatenate([site.values for site in self.sites.values()])

    def at(self, sites: int) -> dict[str, NDArray[np.float32]]:
        """Training profiles at `sites` places: all pooled in one, or each group by itself."""
        return {"pooled": self.train} if sites == 1 else {name: site.values for name, site in self.sites.items()}


@dataclass(frozen=True)
class Errors:
    """Squared errors of a reconstruction of the test profiles.

    Attributes:
        of_patients: (N, G) squared error of each value.
        of_mean: (N, G) squared distance to the training patients' mean.
    """

    of_patients: Floats
    of_mean: Floats

    @property
    def mse(self) -> float:
        """Mean squared error of a value, on the plan's scale (a gene's public standard deviation is 1)."""
        return float(self.of_patients.mean())

    @property
    def r2(self) -> float:
        """Share of the variation about the training mean that is reconstructed; 0 is that mean itself."""
        return 1 - float(self.of_patients.sum() / self.of_mean.sum())

    def r2_of_genes(self) -> Floats:
        """(G,) the same, gene by gene."""
        return 1 - self.of_patients.sum(axis=0) / self.of_mean.sum(axis=0)


def run(experiment: Experiment) -> Findings:
    """Train every column, and hold it against PCA on the held-out hospitals."""
    split = load_split(experiment)
    spec = experiment.spec
    mean = split.train.astype(np.float64).mean(axis=0)
    plans = {column.name: _plan(experiment, column, split) for column in spec.columns}
    kept = {column.name: _kept(experiment, column, plans[column.name], split) for column in spec.columns}
    sizes = sorted({plan.autoencoder.latent_dim for plan in plans.values()})
    errors = {name: _errors(kept[name].arrays["test"].numpy(), split.test.values, mean) for name in plans}
    linear = {_name_of_pca(size): pca(split.train, split.test.values, size) for size in sizes}
    errors |= {name: _errors(found, split.test.values, mean) for name, found in linear.items()}
    baseline = {name: _name_of_pca(plan.autoencoder.latent_dim) for name, plan in plans.items()}
    table = Table(
        title="Reconstruction of profiles from hospitals that were held out",
        columns=list(errors),
        rows=_rows(experiment, errors, baseline, sizes, kept, split),
    )
    notes = [f"{name}: {budget_text(plan, 'autoencoder')}." for name, plan in plans.items() if plan.privacy.private]
    notes.append("PCA is of all training profiles pooled, without privacy: the best linear code of its size for them.")
    return Findings(split.description, [table], _curves(kept, plans, errors, linear), [], notes)


def pca(train: NDArray[np.floating], test: NDArray[np.floating], size: int) -> Floats:
    """Test profiles (M, G) as reconstructed from their projections on the `size` first principal directions of `train`."""
    mean = train.astype(np.float64).mean(axis=0)
    _, _, directions = np.linalg.svd(train - mean, full_matrices=False)
    basis = directions[:size]
    return mean + (test - mean) @ basis.T @ basis


def _name_of_pca(size: int) -> str:
    return f"PCA, {size} directions, not private"


def held_out_hospitals(hospitals: NDArray[np.str_], share: float, rng: np.random.Generator) -> set[str]:
    """Hospitals drawn at random, as many as fit into `share` of all patients."""
    names, counts = np.unique(hospitals, return_counts=True)
    room, chosen = int(share * len(hospitals)), set()
    for place in rng.permutation(len(names)):
        if counts[place] <= room:
            chosen.add(str(names[place]))
            room -= int(counts[place])
    return chosen


def groups_of_hospitals(hospitals: NDArray[np.str_], count: int) -> list[set[str]]:
    """`count` groups of whole hospitals, about equal in patients: the largest hospital first, into the smallest group."""
    names, counts = np.unique(hospitals, return_counts=True)
    groups: list[set[str]] = [set() for _ in range(count)]
    sizes = [0] * count
    for place in sorted(range(len(names)), key=lambda i: (-counts[i], names[i])):
        smallest = sizes.index(min(sizes))
        groups[smallest].add(str(names[place]))
        sizes[smallest] += int(counts[place])
    return groups


def load_split(experiment: Experiment) -> Split:
    """The experiment's profiles: real ones, or simulated ones for a quick run."""
    options = experiment.options()
    assert isinstance(options, Options)
    rng = np.random.default_rng(experiment.spec.seed)
    if experiment.quick:
        everybody = simulated_profiles(options.simulated, rng)
        source = f"{len(everybody.values)} simulated patients: nobody's"
    else:
        everybody = read_profiles(experiment.real_data(EXPRESSION_FOLDER), options.genes)
        source = f"{len(everybody.values)} glioma patients (TCGA, through cBioPortal), z-scores"
    out = held_out_hospitals(everybody.hospitals, options.test_share, rng)
    held = np.isin(everybody.hospitals, list(out))
    rest = everybody.rows(~held)
    groups = groups_of_hospitals(rest.hospitals, 3)
    sites = {
        f"group-{place}": rest.rows(np.isin(rest.hospitals, list(group))) for place, group in enumerate(groups, start=1)
    }
    test = everybody.rows(held)
    counts = ", ".join(str(len(site.values)) for site in sites.values())
    return Split(
        sites,
        test,
        f"{source}; {len(everybody.genes.panel)} genes, evenly spread over the table's alphabetical order, ranked within "
        f"each profile and mapped to a normal scale as ingest does. {len(np.unique(everybody.hospitals))} hospitals, of "
        f"which {len(out)} with {len(test.values)} patients are held out whole; the others form three sites of {counts} "
        "patients. The unit of privacy is the patient.",
    )


def simulated_profiles(count: int, rng: np.random.Generator) -> Profiles:
    """Profiles of simulated patients at twelve hospitals, each with a batch effect of its own."""
    genes = simulated_genes()
    columns = [biology().genes.index(gene) for gene in genes.panel]
    effects = [draw_batch_effect(rng) for _ in range(_SIMULATED_HOSPITALS)]
    rows = [
        draw_tpm(draw_latents(rng).pathways, effects[number % _SIMULATED_HOSPITALS], rng)[columns]
        for number in range(count)
    ]
    return Profiles(
        genes,
        np.stack([to_panel_scale(row, genes) for row in rows]),
        np.array([f"simulated-{number}" for number in range(count)]),
        np.array([f"{number % _SIMULATED_HOSPITALS:02d}" for number in range(count)]),
    )


def reconstruct(model: GeneAutoencoder, genes: torch.Tensor) -> torch.Tensor:
    """(N, G) as `model` gives it back, from the mean of its code."""
    with torch.no_grad():
        found, _ = model(genes, torch.zeros(len(genes), model.latent_dim))
    return found


def _plan(experiment: Experiment, column: Column, split: Split) -> StudyPlan:
    sites = split.at(column.sites or experiment.spec.sites)
    sizes = {name: len(values) for name, values in sites.items()}
    changes = merged(experiment.spec.plan, column.plan)
    return network_plan("autoencoder", changes, sizes, split.test.genes, column.epsilon)


def _kept(experiment: Experiment, column: Column, plan: StudyPlan, split: Split) -> Kept:
    inputs = {"plan": plan.digest, "seed": experiment.spec.seed, "data": split.description}
    return experiment.kept(column.slug, inputs, lambda: _train(experiment, column, plan, split))


def _train(experiment: Experiment, column: Column, plan: StudyPlan, split: Split) -> Kept:
    sites = {name: tensor(values) for name, values in split.at(column.sites or experiment.spec.sites).items()}
    train, test = tensor(split.train), tensor(split.test.values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.spec.seed)
        model = make_autoencoder(plan)

    def block(state: State, site: str, first: int, noise: Mechanism, randomness: Randomness) -> BlockResult:
        return train_autoencoder(plan, state, sites[site], noise, randomness, first_step=first)

    curve: dict[str, list[float]] = {"train": [], "test": []}

    def observe(_: int, state: State) -> None:
        model.load_state_dict(state)
        for name, rows in (("train", train), ("test", test)):
            curve[name].append(float((reconstruct(model, rows) - rows).square().mean()))

    start = {name: value.clone() for name, value in model.state_dict().items()}
    observe(0, start)
    state = run_rounds(plan, "autoencoder", start, block, experiment.spec.seed, observe)
    model.load_state_dict(state)
    return Kept({"train": reconstruct(model, train), "test": reconstruct(model, test)}, {"curve": curve})


def _errors(found: NDArray[np.floating], real: NDArray[np.floating], mean: Floats) -> Errors:
    return Errors((real.astype(np.float64) - found) ** 2, (real - mean) ** 2)


def _rows(
    experiment: Experiment,
    errors: dict[str, Errors],
    baseline: dict[str, str],
    sizes: list[int],
    kept: dict[str, Kept],
    split: Split,
) -> list[Row]:
    rng = np.random.default_rng(experiment.spec.seed)
    draws = _resampled(split.test.hospitals, rng)
    r2 = {name: Cell(value=one.r2, interval=_interval(partial(_r2_of, one), draws)) for name, one in errors.items()}
    ahead = {
        name: Cell(
            value=errors[name].r2 - errors[linear].r2,
            interval=_interval(partial(_difference, errors[name], errors[linear]), draws),
        )
        for name, linear in baseline.items()
    }
    train, centre = split.train.astype(np.float64), split.train.astype(np.float64).mean(axis=0)
    given_back = {name: one.arrays["train"].numpy() for name, one in kept.items()}
    given_back |= {_name_of_pca(size): pca(train, train, size) for size in sizes}
    fitted = {name: Cell(value=_errors(found, train, centre).r2) for name, found in given_back.items()}
    genes = {name: one.r2_of_genes() for name, one in errors.items()}
    return [
        experiment.row(
            "r2",
            "R2 over all genes (higher is better; 0: the training mean)",
            r2,
            "Intervals: held-out hospitals drawn anew.",
        ),
        Row(what="R2 above that of PCA with as many directions", cells=ahead, note="Paired over the same hospitals."),
        experiment.row(
            "mse",
            "MSE (lower is better)",
            {name: Cell(value=one.mse) for name, one in errors.items()},
            "On the plan's scale, where a gene's public standard deviation is 1.",
        ),
        Row(what="median R2 of a gene", cells={name: Cell(value=float(np.median(g))) for name, g in genes.items()}),
        Row(
            what="genes with R2 above 0.5 (share)",
            cells={name: Cell(value=float((g > 0.5).mean())) for name, g in genes.items()},
        ),
        Row(what="R2 on the training patients", cells=fitted),
    ]


def _resampled(hospitals: NDArray[np.str_], rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """Rows of the test patients when the held-out hospitals are drawn again, with replacement."""
    rows = [np.flatnonzero(hospitals == name) for name in np.unique(hospitals)]
    return [np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(_RESAMPLES)]


def _r2_of(errors: Errors, rows: NDArray[np.intp]) -> float:
    return 1 - float(errors.of_patients.sum(axis=1)[rows].sum() / errors.of_mean.sum(axis=1)[rows].sum())


def _difference(errors: Errors, linear: Errors, rows: NDArray[np.intp]) -> float:
    return _r2_of(errors, rows) - _r2_of(linear, rows)


def _interval(measure: partial[float], draws: list[NDArray[np.intp]]) -> tuple[float, float]:
    low, high = np.quantile([measure(rows) for rows in draws], [0.025, 0.975])
    return float(low), float(high)


def _curves(
    kept: dict[str, Kept], plans: dict[str, StudyPlan], errors: dict[str, Errors], linear: dict[str, Floats]
) -> list[Curves]:
    plots = []
    for private, title in ((False, "Learning curves without privacy"), (True, "Learning curves with privacy")):
        lines = []
        for name, plan in plans.items():
            if plan.privacy.private is not private:
                continue
            curve = kept[name].facts["curve"]
            steps = [float(number * plan.autoencoder.steps_per_round) for number in range(len(curve["test"]))]
            lines += [Line(name=f"{name}, {part}", x=steps, y=curve[part]) for part in ("train", "test")]
        if lines:
            end = max(line.x[-1] for line in lines)
            lines += [Line(name=f"{name}, test", x=[0.0, end], y=[errors[name].mse] * 2) for name in linear]
            plots.append(Curves(title=title, x_label="steps at each site", y_label="mean squared error", lines=lines))
    return plots
