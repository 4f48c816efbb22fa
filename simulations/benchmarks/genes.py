"""Private models of genes, morphology and label: moments against networks, on simulated and on real profiles.

``python simulations/benchmarks/genes.py simulated --cohorts FOLDER --out FOLDER`` reads the cohorts that ``cohorts.py``
draws (three hospitals with batch effects, 100 held-out patients each) and measures, for 100, 300 and 1,000 patients a site
and epsilon 1, 3, 10 and infinity, with the whole budget spent on profiles: R2 and MAE of morphology and AUC of the grade
from genes on the held-out patients, and agreement of co-expression and of the gene-by-feature association map of as many
synthetic patients. About five minutes, ten with ``--networks``.

``python simulations/benchmarks/genes.py real --data FOLDER --out FOLDER`` reads the 484 glioma profiles of 33 hospitals and
measures, over three folds of hospitals, how well a classifier that is trained on synthetic profiles recognises glioma type
and RNA-seq cluster of real ones, and how much of the held-out profiles' variance the model's directions hold. About ten
minutes.

Both print a table and write it to ``<out>/genes-simulated.md`` or ``genes-real.md``, and the numbers as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from fedsynth.dp.accounting import Demand, Mechanism, allocate, noise_multiplier
from fedsynth.dp.randomness import SeededRandomness
from fedsynth.engines.moments import Sizes, pack_symmetric, rows_of_size, unpack_symmetric
from fedsynth.evaluation.linear import class_scores, ridge_predictions
from fedsynth.expression import to_panel_scale
from fedsynth.metrics.association import association_map, map_agreement
from fedsynth.metrics.coexpression import coexpression
from fedsynth.metrics.regression import mean_absolute_error, mean_r2
from fedsynth.metrics.roc_auc import macro_auc
from fedsynth.models.gene_autoencoder import generate_expression, make_autoencoder
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, public_prior
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, start_from_encoder
from fedsynth.plan import AutoencoderPlan, GenePlan, RadiogenomicsPlan, StudyPlan, TrainingPlan
from fedsynth.records import State
from fedsynth.synthesis import SyntheticProfiles, draw_profiles
from fedsynth_client.training.profiles import train_autoencoder, train_radiogenomics
from fedsynth_server.fitting.moments import fit_sum
from fedsynth_simulations.benchmarking.grid import benchmark_plan
from fedsynth_simulations.cohort.expression import public_profiles, reference_quantiles
from fedsynth_simulations.cohort.panel import load_panel, pathways
from fedsynth_simulations.gene_basis import public_moments_weights, weights_of_basis
from fedsynth_simulations.pretrain import pretrain_autoencoder

_COMPONENTS = (4, 8, 12, 16, 32)
SITES = ("north", "south", "east")
DELTA = 1e-5
Scores = dict[str, float]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["simulated", "real"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cohorts", type=Path, help="simulated: folder that cohorts.py wrote")
    parser.add_argument("--seed", type=int, default=7, help="simulated: seed of the cohorts")
    parser.add_argument("--networks", action="store_true", help="simulated: the autoencoder and the DNN as well")
    parser.add_argument("--data", type=Path, help="real: folder with tcga_glioma_expression and tcga_lgg")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of the noise")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    found: Iterator[tuple[str, str, Scores]]
    if given.which == "simulated":
        if given.cohorts is None:
            parser.error("simulated needs --cohorts")
        found = simulated(given.cohorts, given.seed, given.repeats, given.networks)
    else:
        if given.data is None:
            parser.error("real needs --data")
        found = real(given.data, given.repeats)
    measured: dict[tuple[str, str], list[Scores]] = defaultdict(list)
    for method, setting, scores in found:
        measured[method, setting].append(scores)
        print(method, setting, {name: round(value, 3) for name, value in scores.items()}, flush=True)
    table = markdown(measured)
    print(table)
    (given.out / f"genes-{given.which}.md").write_text(table, encoding="utf-8")
    numbers = [{"method": method, "setting": setting, "runs": runs} for (method, setting), runs in measured.items()]
    (given.out / f"genes-{given.which}.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


def markdown(measured: dict[tuple[str, str], list[Scores]]) -> str:
    """One row a method and setting: mean over runs and, where there are several, their standard deviation."""
    columns = list(dict.fromkeys(name for runs in measured.values() for name in runs[0]))
    lines = ["| method | setting | " + " | ".join(columns) + " |", "| --- | --- |" + " --- |" * len(columns)]
    for (method, setting), runs in measured.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            spread = f" ± {np.std(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}" if values else "-")
        lines.append(f"| {method} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Table:
    """Genes (N, G) on the plan's scale, morphology (N, F) in [0, 1], labels (N,)."""

    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three as tensors."""
        return torch.from_numpy(self.genes), torch.from_numpy(self.morphology), torch.from_numpy(self.labels)

    def where(self, rows: NDArray[np.bool_]) -> Table:
        """The patients chosen by a mask."""
        return Table(self.genes[rows], self.morphology[rows], self.labels[rows])


def join(parts: list[Table]) -> Table:
    """All patients of `parts`."""
    return Table(
        np.concatenate([part.genes for part in parts]),
        np.concatenate([part.morphology for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


@cache
def one_release(epsilon: float) -> float:
    """Noise multiplier of a statistic that spends `epsilon` at once."""
    return 0.0 if math.isinf(epsilon) else noise_multiplier(1.0, 1, epsilon, DELTA)


def fitted_moments(size: Sizes, public: State, sites: list[Table], sigma: float, seed: int) -> State:
    """The linear-Gaussian model of the sum that `sites` release, each with noise of standard deviation `sigma`."""
    sums = [rows_of_size(size, public, *site.tensors()).double().sum(0) for site in sites]
    draws = torch.Generator().manual_seed(seed)
    total = torch.stack([s + sigma * torch.randn(s.shape, generator=draws, dtype=s.dtype) for s in sums]).sum(0)
    patients = sum(len(site.labels) for site in sites)
    state, _ = fit_sum(size, public, total, sigma * math.sqrt(len(sites)), patients)
    return state


# ---- simulated hospitals ---------------------------------------------------------------------------------------------


def simulated(folder: Path, seed: int, repeats: int, networks: bool) -> Iterator[tuple[str, str, Scores]]:
    """Method, setting and scores on the held-out patients of the simulated hospitals."""
    plan = benchmark_plan(64, dict.fromkeys(SITES, 1000))
    profiles = public_profiles(plan.genes, 4000, np.random.default_rng([seed, 5]))
    morphology = _morphology(folder, "pretraining-*.npz")
    largest = {site: _table(folder, f"seed{seed}-{site}-train-*.npz") for site in SITES}
    test = join([_table(folder, f"seed{seed}-{site}-holdout-*.npz") for site in SITES])

    for components in _COMPONENTS:
        size = Sizes(2, components, test.morphology.shape[1])
        prior = public_prior(size, public_moments_weights(profiles, morphology, components))
        yield f"public weights alone (floor), r={components}", "-", _of_state(prior, plan, test, 0)
    for count in (100, 300, 1000):
        sites = [largest[site].where(np.arange(len(largest[site].labels)) < count) for site in SITES]
        pooled = join(sites)
        yield "ridge and logistic regression, real, not private", f"n={count}", _real_trained(pooled, test)
        for components in _COMPONENTS:
            public = public_moments_weights(profiles, morphology, components)
            size = Sizes(2, components, test.morphology.shape[1])
            for epsilon in (1.0, 3.0, 10.0, math.inf):
                for repeat in range(repeats if math.isfinite(epsilon) else 1):
                    state = fitted_moments(size, public, sites, one_release(epsilon), repeat)
                    scores = _of_state(state, plan, test, repeat)
                    yield f"moments, r={components}", f"n={count}, eps {epsilon:g}", scores
        if networks:
            start = _public_autoencoder(plan, profiles)
            for epsilon in (1.0, 3.0, 10.0):
                scores = _networks(plan, start, morphology, sites, epsilon, test)
                yield "autoencoder and DNN", f"n={count}, eps {epsilon:g}", scores


def _of_state(state: State, plan: StudyPlan, test: Table, seed: int) -> Scores:
    """Scores of the linear-Gaussian model of a state."""
    model = LinearGaussianProfiles(state, plan.genes.clip)
    drawn = model.draw(len(test.labels), torch.Generator().manual_seed(seed))
    return _scores(model.predict(torch.from_numpy(test.genes)), drawn, test)


def _table(folder: Path, pattern: str) -> Table:
    parts = []
    for path in sorted(folder.glob(pattern)):
        with np.load(path, allow_pickle=False) as arrays:  # images stay on disk
            parts.append(Table(arrays["genes"], arrays["morphology"], arrays["labels"]))
    if not parts:
        raise SystemExit(f"{folder} holds no {pattern}: run cohorts.py first")
    return join(parts)


def _morphology(folder: Path, pattern: str) -> NDArray[np.float32]:
    return _table(folder, pattern).morphology


def _of_predictions(predicted: NDArray[np.floating], test: Table) -> Scores:
    return {"R2": mean_r2(predicted, test.morphology), "MAE": mean_absolute_error(predicted, test.morphology)}


def _real_trained(train: Table, test: Table) -> Scores:
    predicted = ridge_predictions(train.genes, train.morphology, test.genes)
    grades = class_scores(train.genes, train.labels, test.genes, 2)
    rows = np.random.default_rng(0).permutation(len(train.labels))[: len(test.labels)]
    return {
        **_of_predictions(predicted, test),
        "AUC": macro_auc(grades, test.labels),
        "associations": map_agreement(
            association_map(train.genes[rows], train.morphology[rows]), association_map(test.genes, test.morphology)
        ),
        "co-expression": coexpression(test.genes, train.genes[rows])[0],
    }


def _scores(predicted: tuple[Tensor, Tensor], drawn: SyntheticProfiles, test: Table) -> Scores:
    morphology, logits = predicted
    genes, features = drawn.genes.numpy(), drawn.morphology.numpy()
    return {
        **_of_predictions(morphology.numpy(), test),
        "AUC": macro_auc(torch.softmax(logits, 1).numpy(), test.labels),
        "associations": map_agreement(association_map(genes, features), association_map(test.genes, test.morphology)),
        "co-expression": coexpression(test.genes, genes)[0],
    }


# What the plan recommended for profiles before there were moments, and still does for networks.
def _autoencoder(count: int, steps: int) -> AutoencoderPlan:
    return AutoencoderPlan(
        rounds=2,
        steps_per_round=steps,
        expected_batch=max(count // 2, 1),
        max_grad_norm=0.05,
        learning_rate=1e-3 if steps == 10 else 3e-3,
        budget_share=0.25,
    )


def _radiogenomics(count: int) -> RadiogenomicsPlan:
    return RadiogenomicsPlan(
        rounds=4,
        steps_per_round=40,
        expected_batch=max(count // 2, 1),
        max_grad_norm=1.0,
        learning_rate=1e-2,
        budget_share=0.75,
    )


def _public_autoencoder(plan: StudyPlan, profiles: NDArray[np.float32]) -> State:
    plan = plan.model_copy(update={"autoencoder": _autoencoder(100, 10)})
    return pretrain_autoencoder(plan, torch.from_numpy(profiles), torch.Generator().manual_seed(0))


def _networks(
    plan: StudyPlan,
    start: State,
    public_morphology: NDArray[np.float32],
    sites: list[Table],
    epsilon: float,
    test: Table,
) -> Scores:
    """Autoencoder and DNN, trained at the sites in turn and averaged after every round."""
    count = len(sites[0].labels)
    autoencoder, radiogenomics = _autoencoder(count, 10), _radiogenomics(count)
    plan = plan.model_copy(update={"autoencoder": autoencoder, "radiogenomics": radiogenomics})
    sections: dict[str, TrainingPlan] = {"autoencoder": autoencoder, "radiogenomics": radiogenomics}
    demands = {
        name: Demand(section.expected_batch / count, section.steps, section.budget_share)
        for name, section in sections.items()
    }
    sigma = allocate(demands, epsilon, DELTA)
    randomness = SeededRandomness(0)

    def mechanism(name: str) -> Mechanism:
        return Mechanism(demands[name].sample_rate, sigma[name], sections[name].steps_per_round)

    weights = start
    for _ in range(autoencoder.rounds):
        trained = [
            train_autoencoder(plan, weights, torch.from_numpy(site.genes), mechanism("autoencoder"), randomness)
            for site in sites
        ]
        weights = average([result.weights for result in trained])
    decoder = make_autoencoder(plan)
    decoder.load_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dnn = make_radiogenomic_dnn(plan)
    start_from_encoder(dnn, decoder)
    weights = {name: tensor.clone() for name, tensor in dnn.state_dict().items()}
    for _ in range(radiogenomics.rounds):
        trained = [
            train_radiogenomics(plan, weights, *site.tensors(), mechanism("radiogenomics"), randomness)
            for site in sites
        ]
        weights = average([result.weights for result in trained])
    dnn.load_state_dict(weights)
    drawn = draw_profiles(
        decoder,
        dnn,
        len(test.labels),
        torch.Generator().manual_seed(0),
        plan.genes.clip,
        public_morphology.std(axis=0).tolist(),
    )
    with torch.no_grad():
        return _scores(dnn.eval()(torch.from_numpy(test.genes)), drawn, test)


def average(states: list[State]) -> State:
    """Mean of the sites' weights."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


# ---- 484 real profiles -----------------------------------------------------------------------------------------------

_DRAWN = 600
_FOLDS = 3


def real(data: Path, repeats: int) -> Iterator[tuple[str, str, Scores]]:
    """Method, setting and scores over folds of hospitals; every fold is the test set once."""
    table, cluster, fold, genes = _glioma(data)
    for held_out in range(_FOLDS):
        first, second = (f for f in range(_FOLDS) if f != held_out)
        split = Split(
            table.where(fold != held_out),
            cluster[fold != held_out],
            table.where(fold == held_out),
            cluster[fold == held_out],
        )
        # For the rows with public directions: one third of the hospitals is declared public, the other private.
        halves = Split(table.where(fold == second), cluster[fold == second], split.test, split.test_cluster)
        public = table.where(fold == first).genes
        yield from _references(split)
        seeds = [held_out * repeats + repeat for repeat in range(repeats)]
        yield from _with_basis("random directions, r=16", split, _unscaled(_random_basis(len(genes), 16)), seeds)
        yield from _with_basis("pathways of the panel, r=12", split, _unscaled(_pathway_basis(genes)), seeds)
        for components in (8, 16):
            weights = public_moments_weights(public, np.zeros((2, 0)), components)
            yield from _with_basis(f"directions of a third of the hospitals, r={components}", halves, weights, seeds)
        yield from _with_basis("private principal directions, r=4", split, 4, seeds)
        for epsilon in (3.0, 10.0):
            made, rebuilt = _conditional_autoencoder(split.train, split.test, epsilon)
            scores = {**_recognised("type", made, split.test), "reconstruction R2": rebuilt}
            yield "class-conditional variational autoencoder", f"eps {epsilon:g}", scores


@dataclass(frozen=True)
class Split:
    """Profiles with glioma type to train and to test on, and their RNA-seq clusters (-1 where unknown)."""

    train: Table
    train_cluster: NDArray[np.int64]
    test: Table
    test_cluster: NDArray[np.int64]

    @property
    def by_cluster(self) -> tuple[Table, Table]:
        """Training and test profiles with the cluster in place of the type."""
        return (
            Table(self.train.genes, self.train.morphology, self.train_cluster),
            Table(self.test.genes, self.test.morphology, self.test_cluster),
        )


def _references(split: Split) -> Iterator[tuple[str, str, Scores]]:
    train, test = split.by_cluster
    yield (
        "real profiles, not private",
        "-",
        {**_recognised("type", split.train, split.test), **_recognised("cluster", train, test)},
    )
    most = np.bincount(split.train.labels).argmax()
    accuracy = float((split.test.labels == most).mean())
    of_cluster = np.bincount(train.labels[train.labels >= 0]).argmax()
    known = test.labels[test.labels >= 0]
    floor = {
        "type accuracy": accuracy,
        "type AUC": 0.5,
        "cluster accuracy": float((known == of_cluster).mean()),
        "cluster AUC": 0.5,
    }
    yield "most frequent class (floor)", "-", floor
    normal = {
        **_recognised("type", _normal(split.train, 0), split.test),
        **_recognised("cluster", _normal(train, 0), test),
    }
    yield "class-conditional multivariate normal, not private", "-", normal


def _with_basis(name: str, split: Split, basis: State | int, seeds: list[int]) -> Iterator[tuple[str, str, Scores]]:
    """Moments in public directions, or in `basis` many directions that the same budget has to find."""
    cluster_train, cluster_test = split.by_cluster
    for epsilon in (3.0, 10.0, math.inf):
        for seed in seeds if math.isfinite(epsilon) else seeds[:1]:
            if isinstance(basis, int):
                # Two statistics with noise sqrt(2) sigma cost what one with sigma does.
                sigma = math.sqrt(2.0) * one_release(epsilon)
                weights = _unscaled(_private_basis(split.train.genes, basis, sigma, seed))
            else:
                sigma, weights = one_release(epsilon), basis
            scores = {
                **_of_model("type", split.train, split.test, 6, weights, sigma, seed),
                **_of_model("cluster", cluster_train, cluster_test, 4, weights, sigma, seed),
                "reconstruction R2": _kept(weights["basis"].double().numpy(), split.test.genes),
            }
            yield f"moments, {name}", f"eps {epsilon:g}", scores


def _of_model(what: str, train: Table, test: Table, classes: int, weights: State, sigma: float, seed: int) -> Scores:
    """Scores of a classifier trained on draws of the model that is fitted to one noisy sum, and of the model itself."""
    weights = {**weights, "morphology_by_class": torch.zeros(classes, 0)}
    size = Sizes(classes, weights["basis"].shape[1], 0)
    model = LinearGaussianProfiles(fitted_moments(size, weights, [train], sigma, 1000 + seed), 4.0)
    drawn = model.draw(_DRAWN, torch.Generator().manual_seed(seed))
    made = Table(drawn.genes.numpy(), drawn.morphology.numpy(), drawn.labels.numpy())
    known = test.labels >= 0
    _, logits = model.predict(torch.from_numpy(test.genes[known]))
    of_model = macro_auc(torch.softmax(logits, dim=1).numpy(), test.labels[known])
    return {**_recognised(what, made, test), f"{what} AUC, model's own": of_model}


def _glioma(data: Path) -> tuple[Table, NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Profiles and glioma type, RNA-seq cluster (-1 where unknown), fold of the hospital, gene symbols."""
    expression = pd.read_csv(data / "tcga_glioma_expression" / "expression.tsv.gz", sep="\t", index_col=0)
    clinical = pd.read_csv(data / "tcga_glioma_expression" / "clinical.tsv", sep="\t", index_col=0).loc[
        expression.columns
    ]
    known = pd.concat(
        [
            pd.read_csv(path, sep="\t", index_col=0)["rnaseq_cluster"]
            for path in (data / "tcga_lgg").glob("*/clinical.tsv")
        ]
    )
    cluster = known.reindex(expression.columns).fillna(0).to_numpy().astype(np.int64) - 1
    genes = [str(gene) for gene in expression.index]
    scale = GenePlan(
        panel=genes,
        measure="zscore",
        reference_quantiles=reference_quantiles(),
        center=[0.0] * len(genes),
        scale=[1.0] * len(genes),
    )
    profiles = np.stack([to_panel_scale(expression[patient].to_numpy(), scale) for patient in expression.columns])
    types = sorted(clinical["oncotree_code"].unique())
    labels = clinical["oncotree_code"].map(types.index).to_numpy().astype(np.int64)
    return Table(profiles, np.zeros((len(labels), 0), np.float32), labels), cluster, _folds(clinical), genes


def _folds(clinical: pd.DataFrame) -> NDArray[np.int64]:
    """Hospitals dealt out by size, those with glioblastoma only and the others each in turn, so that types are balanced."""
    only = {str(site): bool((types == "GBM").all()) for site, types in clinical.groupby("site")["oncotree_code"]}
    size = clinical["site"].value_counts()
    of_site: dict[str, int] = {}
    for group in (True, False):
        load = [0] * _FOLDS
        for site in [site for site in size.index if only[site] == group]:
            of_site[site] = int(np.argmin(load))
            load[of_site[site]] += int(size[site])
    return clinical["site"].map(of_site).to_numpy().astype(np.int64)


def _recognised(what: str, train: Table, test: Table) -> Scores:
    """Accuracy and AUC on real `test` of a logistic regression trained on `train`."""
    known = test.labels >= 0
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    scores = class_scores(train.genes, train.labels, test.genes[known], classes)
    truth = test.labels[known]
    return {
        f"{what} accuracy": float((scores.argmax(1) == truth).mean()),
        f"{what} AUC": macro_auc(scores, truth),
    }


def _normal(train: Table, seed: int) -> Table:
    """Class means and one Ledoit-Wolf covariance of the labelled; labels in their real shares."""
    train = train.where(train.labels >= 0)
    rng = np.random.default_rng(seed)
    codes = np.unique(train.labels)
    means = np.stack([train.genes[train.labels == k].mean(0) for k in codes])
    covariance, _ = ledoit_wolf(train.genes - means[np.searchsorted(codes, train.labels)], assume_centered=True)
    root = np.linalg.cholesky(covariance)
    labels = rng.choice(train.labels, _DRAWN)
    genes = means[np.searchsorted(codes, labels)] + rng.standard_normal((_DRAWN, len(root))) @ root.T
    return Table(genes.clip(-4, 4).astype(np.float32), np.zeros((_DRAWN, 0), np.float32), labels)


def _random_basis(genes: int, components: int) -> NDArray[np.float64]:
    basis: NDArray[np.float64] = np.linalg.qr(np.random.default_rng(0).standard_normal((genes, components)))[0]
    return basis


def _pathway_basis(genes: list[str]) -> NDArray[np.float64]:
    """The mean of each pathway of the simulated studies' panel, which was put together from literature."""
    basis = np.zeros((len(genes), len(pathways())))
    for gene, pathway in load_panel():
        if gene in genes:
            basis[genes.index(gene), pathways().index(pathway)] = 1.0
    basis /= np.linalg.norm(basis, axis=0)
    return basis


def _private_basis(profiles: NDArray[np.float32], components: int, sigma: float, seed: int) -> NDArray[np.float64]:
    """Leading eigenvectors of the noisy sum of second moments of profiles of norm 1 ("Analyze Gauss")."""
    values = torch.from_numpy(profiles).double()
    values = values / values.norm(dim=1, keepdim=True)
    packed = pack_symmetric(values.T @ values)
    noise = sigma * torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed), dtype=packed.dtype)
    _, vectors = torch.linalg.eigh(unpack_symmetric(packed + noise, profiles.shape[1]))
    found: NDArray[np.float64] = vectors[:, -components:].flip(1).numpy()
    return found


def _unscaled(basis: NDArray[np.float64]) -> State:
    """Weights of a basis without public profiles: the scale supposes gene variances of 1 and correlations of 0.2."""
    weights = weights_of_basis(basis, np.zeros((2, len(basis))), np.zeros((2, 0)))
    together = np.square(basis.sum(axis=0))
    return {**weights, "genes_scale": torch.from_numpy(np.sqrt(0.8 + 0.2 * together)).to(torch.float32)}


def _kept(basis: NDArray[np.float64], genes: NDArray[np.float32]) -> float:
    """Share of the held-out profiles' sum of squares about the public centre that lies in the basis."""
    return float(np.square(genes @ basis).sum() / np.square(genes).sum())


_LABEL_SIZE = 10.0  # as loud beside 1,544 genes as a fifteenth of them


def _conditional_autoencoder(train: Table, test: Table, epsilon: float) -> tuple[Table, float]:
    """The private variational autoencoder, the label appended to each profile as further genes; from random weights."""
    classes = int(train.labels.max()) + 1

    def appended(table: Table) -> Tensor:
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(table.labels), classes) - 1 / classes
        return torch.cat([torch.from_numpy(table.genes), _LABEL_SIZE * one_hot], dim=1).to(torch.float32)

    section = _autoencoder(len(train.labels), 40)
    values = appended(train)
    width = values.shape[1]
    plan = benchmark_plan(64, {"all": len(train.labels)})
    genes = GenePlan(
        panel=[f"G{i}" for i in range(width)],
        reference_quantiles=[-3.0, 3.0],
        center=[0.0] * width,
        scale=[1.0] * width,
    )
    plan = plan.model_copy(update={"genes": genes, "autoencoder": section})
    rate = section.expected_batch / len(train.labels)
    sigma = noise_multiplier(rate, section.steps, epsilon, DELTA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_autoencoder(plan)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mechanism = Mechanism(rate, sigma, section.steps)
    model.load_state_dict(train_autoencoder(plan, weights, values, mechanism, SeededRandomness(0)).weights)
    drawn = generate_expression(model, _DRAWN, torch.Generator().manual_seed(0), 100.0)
    # The label is what the decoder says; the residual that gives genes their spread is not meant for it.
    labels = drawn[:, -classes:].argmax(1)
    made = Table(drawn[:, :-classes].clamp(-4, 4).numpy(), np.zeros((_DRAWN, 0), np.float32), labels.numpy())
    with torch.no_grad():
        held_out = appended(test)
        rebuilt, _ = model.eval()(held_out, torch.zeros(len(held_out), section.latent_dim))
    error = float((rebuilt - held_out)[:, :-classes].square().sum() / held_out[:, :-classes].square().sum())
    return made, 1 - error


if __name__ == "__main__":
    main()
