"""Gene expression: pathway activity on top of each gene's own abundance, noise, and the batch effect of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedsynth.expression import to_panel_scale
from fedsynth.plan import GenePlan
from fedsynth_simulations.cohort.latents import draw_latents
from fedsynth_simulations.cohort.panel import BYSTANDERS, load_panel, pathways

# What a gene is like does not differ between sites or runs: biology has one seed, patients have another.
_BIOLOGY_SEED = 20_190_218
_LARGEST_SCORE = 3.0


@dataclass(frozen=True)
class Biology:
    """Constants of each gene: log abundance, response to its pathway, and noise, all on the natural-log TPM scale.

    Attributes:
        genes: the panel, then genes that belong to no pathway.
        baseline: (G,) mean log TPM.
        response: (G, P) change of log TPM by one standard deviation of a pathway's activity.
        noise: (G,) standard deviation of a patient's own deviation.
        length_kb: (G,) transcript length, by which counts differ from TPM.
    """

    genes: tuple[str, ...]
    baseline: NDArray[np.float64]
    response: NDArray[np.float64]
    noise: NDArray[np.float64]
    length_kb: NDArray[np.float64]


@cache
def biology() -> Biology:
    """The constants of all genes; the same in every call, process and run."""
    rng = np.random.default_rng(_BIOLOGY_SEED)
    panel, names = load_panel(), pathways()
    genes = tuple(gene for gene, _ in panel) + BYSTANDERS
    response = np.zeros((len(genes), len(names)))
    strength = rng.uniform(0.3, 0.9, len(panel)) * np.where(rng.random(len(panel)) < 0.12, -1.0, 1.0)
    for row, (_, pathway), value in zip(response, panel, strength, strict=False):
        row[names.index(pathway)] = value
    return Biology(
        genes,
        baseline=rng.normal(2.6, 1.2, len(genes)),
        response=response,
        noise=rng.uniform(0.25, 0.6, len(genes)),
        length_kb=np.exp(rng.normal(0.7, 0.25, len(genes))),
    )


def draw_batch_effect(rng: np.random.Generator, strength: float = 0.2) -> NDArray[np.float64]:
    """(G,) shift of log TPM that every sample of one laboratory shares; `strength` is its standard deviation."""
    return strength * rng.standard_normal(len(biology().genes))


def draw_tpm(
    activities: NDArray[np.float64], batch_effect: NDArray[np.float64] | float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """One patient's expression.

    Args:
        activities: (P,) pathway activities.
        batch_effect: (G,) shift of the laboratory, or 0.
        rng: source of the patient's own noise.

    Returns:
        (G,) transcripts per million of `biology().genes`, positive.
    """
    constants = biology()
    noise = constants.noise * rng.standard_normal(constants.noise.size)
    return np.exp(constants.baseline + constants.response @ activities + batch_effect + noise)


def draw_counts(tpm: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Read counts at a random depth; they follow TPM times transcript length (Wagner et al., 2012)."""
    depth = np.exp(rng.normal(3.0, 0.3))
    return rng.poisson(tpm * biology().length_kb * depth)


def public_expression_reference(
    panel: Sequence[str], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per-gene mean and standard deviation of within-sample normal scores in a simulated public population.

    The population has no batch effect of any study site, so a plan with these constants rests on public data alone.

    Args:
        panel: genes to describe; all must be in `biology().genes`. Ranks are taken among them.
        n: patients of the public population, at least 2.
        rng: source of the population.

    Returns:
        center (G,), scale (G,), on the scale of `reference_quantiles`.

    Raises:
        ValueError: an unknown gene, or fewer than two patients.
    """
    if n < 2:
        raise ValueError(f"expected at least two patients, got {n}")
    # The very mapping of ingest, before any gene has a centre or scale.
    uncentred = GenePlan(
        panel=list(panel),
        reference_quantiles=reference_quantiles(),
        center=[0.0] * len(panel),
        scale=[1.0] * len(panel),
        clip=2 * _LARGEST_SCORE,
    )
    scores = public_profiles(uncentred, n, rng).astype(np.float64)
    return scores.mean(axis=0), scores.std(axis=0, ddof=1)


def public_profiles(genes: GenePlan, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Profiles (n, G) of a simulated public population, without any site's batch effect, on the plan's scale.

    Raises:
        ValueError: the panel names an unknown gene.
    """
    known = {gene: i for i, gene in enumerate(biology().genes)}
    unknown = [gene for gene in genes.panel if gene not in known]
    if unknown:
        raise ValueError(f"expected known genes, got {unknown}")
    columns = [known[gene] for gene in genes.panel]
    return np.stack([to_panel_scale(draw_tpm(draw_latents(rng).pathways, 0.0, rng)[columns], genes) for _ in range(n)])


def reference_quantiles(points: int = 201) -> list[float]:
    """Standard normal quantile function on an even grid of `points` over [0, 1], clipped to +-3."""
    from scipy.stats import norm

    return np.clip(norm.ppf(np.linspace(0, 1, points)), -_LARGEST_SCORE, _LARGEST_SCORE).tolist()
