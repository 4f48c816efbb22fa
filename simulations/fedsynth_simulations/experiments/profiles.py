"""What the experiments on expression profiles share: tables of real profiles, plans of one network, and its rounds.

A round is the client's own block at each site and the server's own average. What is left out against a study: messages,
ledger, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedsynth.budget import mechanism, planned_epsilon
from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness, SeededRandomness
from fedsynth.errors import UsageError
from fedsynth.expression import to_panel_scale
from fedsynth.plan import GenePlan, Section, StudyPlan
from fedsynth.recommend import PublicStarts
from fedsynth.records import State
from fedsynth_client.training.block import BlockResult
from fedsynth_server.aggregation import site_weights, weighted_average
from fedsynth_simulations.cohort.expression import reference_quantiles
from fedsynth_simulations.plans import study_plan

EXPRESSION_FOLDER = (
    "a folder with expression.tsv.gz (genes x patients, z-scores) and clinical.tsv (columns patient_id and site), as of the "
    "TCGA glioma cohorts in cBioPortal."
)
_PLACEHOLDER = 1.0  # a budget for what is checked before the column's own is set
# Weights of a site, the site, number of the round's first step, mechanism, randomness -> its block.
Block = Callable[[State, str, int, Mechanism, Randomness], BlockResult]
Network = Literal["autoencoder", "radiogenomics"]


@dataclass(frozen=True)
class Profiles:
    """Expression of real patients.

    Attributes:
        genes: the panel, in order.
        values: (N, G) float32 on the scale of `genes`.
        patients: (N,) identifiers, to keep one person out of two sets; they go no further.
        hospitals: (N,) code of the hospital.
    """

    genes: GenePlan
    values: NDArray[np.float32]
    patients: NDArray[np.str_]
    hospitals: NDArray[np.str_]

    def rows(self, keep: NDArray[np.bool_]) -> Profiles:
        """The patients for whom `keep` (N,) is true."""
        return Profiles(self.genes, self.values[keep], self.patients[keep], self.hospitals[keep])


def zscore_panel(names: list[str], count: int) -> GenePlan:
    """`count` of the genes `names`, evenly spread over their alphabetical order: chosen without a look at any value.

    Raises:
        UsageError: ``data_wrong``: there are fewer.
    """
    if len(names) < count:
        raise UsageError("data_wrong", f"The table has {len(names)} genes; the experiment takes {count}.")
    ordered = sorted(names)
    panel = [ordered[place] for place in np.linspace(0, len(ordered) - 1, count).round().astype(int)]
    return GenePlan(
        panel=panel,
        measure="zscore",
        reference_quantiles=reference_quantiles(),
        center=[0.0] * count,
        scale=[1.0] * count,
    )


def read_profiles(folder: Path, count: int) -> Profiles:
    """Profiles of `count` genes, mapped to the plan's scale as ingest does.

    Raises:
        UsageError: ``data_wrong``: a file is missing, or has too few genes.
    """
    if not all((folder / name).is_file() for name in ("expression.tsv.gz", "clinical.tsv")):
        raise UsageError("data_wrong", f"{folder} holds no profiles.", f"Expected {EXPRESSION_FOLDER}")
    table = pd.read_csv(folder / "expression.tsv.gz", sep="\t", index_col=0)
    clinical = pd.read_csv(folder / "clinical.tsv", sep="\t", dtype=str).set_index("patient_id")
    genes = zscore_panel([str(name) for name in table.index], count)
    raw = table.loc[genes.panel].to_numpy(dtype=np.float64).T
    patients = np.asarray(table.columns, dtype=np.str_)
    hospitals = np.asarray(clinical.loc[list(table.columns), "site"], dtype=np.str_)
    return Profiles(genes, np.stack([to_panel_scale(row, genes) for row in raw]), patients, hospitals)


def network_plan(
    network: Network,
    sections: Mapping[str, Mapping[str, Any]],
    sizes: dict[str, int],
    genes: GenePlan,
    epsilon: float,
) -> StudyPlan:
    """A plan of one network alone, which spends the whole budget.

    A plan that makes no images is no plan of a study, so it is checked as a whole and run without the other modules.

    Args:
        network: which one.
        sections: keys of the plan that differ from those that `fedsynth.recommend` would choose.
        sizes: site -> training patients.
        genes: the panel.
        epsilon: the budget; infinite without privacy.

    Raises:
        pydantic.ValidationError: the keys do not fit together.
    """
    base = study_plan(
        "experiment",
        "Compare networks over expression profiles.",
        sizes,
        genes=genes,
        epsilon=_PLACEHOLDER,
        starts=PublicStarts(),
    )
    whole = base.model_dump()
    whole["morphology"]["reference_sd"] = []  # for synthetic patients, of whom there are none here
    for name, keys in sections.items():
        whole[name] = whole[name] | dict(keys)
    whole["privacy"]["epsilon"] = epsilon
    plan = StudyPlan.model_validate(whole)
    silent: dict[str, Section] = {
        module: getattr(plan, module).model_copy(update={"rounds": 0})
        for module in ("autoencoder", "radiogenomics", "gan")
        if module != network
    }
    return plan.model_copy(update=silent)


def run_rounds(
    plan: StudyPlan,
    network: Network,
    start: State,
    block: Block,
    seed: int,
    observe: Callable[[int, State], None] = lambda number, state: None,
) -> State:
    """All rounds of one network over the plan's sites.

    Args:
        plan: of `network_plan`.
        network: which one.
        start: weights to start from.
        block: trains at a site.
        seed: of draws and noise. The noise is that of the plan; seeded, so that an experiment can be repeated, it
            protects nobody, and the data are public.
        observe: told of the round's number, from 1, and of the average after it.
    """
    section = plan.training(network)
    sites = [site.name for site in plan.sites]
    randomness = {name: SeededRandomness(1000 * seed + place) for place, name in enumerate(sites)}
    mechanisms = {name: mechanism(plan, name, network) for name in sites}
    weights, state = site_weights(plan, sites), start
    for number in range(section.rounds):
        first = number * section.steps_per_round
        replies = {name: block(state, name, first, mechanisms[name], randomness[name]).weights for name in sites}
        state = weighted_average(replies, weights)
        observe(number + 1, state)
    return state


def spent(plan: StudyPlan, network: Network) -> float:
    """Epsilon of a patient at the dearest site; infinite without privacy."""
    return max(planned_epsilon(plan, site.name, network) for site in plan.sites)


def budget_text(plan: StudyPlan, network: Network) -> str:
    """Epsilon and noise of `network`, for a note."""
    if not plan.privacy.private:
        return "no privacy"
    sigmas = [mechanism(plan, site.name, network).noise_multiplier for site in plan.sites]
    return (
        f"epsilon {spent(plan, network):.2f} a patient at delta {plan.privacy.delta:g}, noise multiplier "
        + (f"{sigmas[0]:.2f}" if math.isclose(min(sigmas), max(sigmas)) else f"{min(sigmas):.2f} to {max(sigmas):.2f}")
        + f" over {plan.training(network).steps} steps"
    )


def tensor(values: NDArray[np.floating]) -> torch.Tensor:
    """As float32."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
