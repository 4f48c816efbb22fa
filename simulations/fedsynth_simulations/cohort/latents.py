"""What causes what: pathway activities drive both the expression profile and the tumour.

A patient's pathway activities are correlated normal variables (malignant tumours raise some together). A tumour
*driver* is a unit-variance mixture of activities plus noise of its own, so that a known share of its variance,
`explained`, can be learnt from expression at best. `LINK` is the ground truth against which a learnt radiogenomic model
is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.cohort.panel import pathways

# Loading of each pathway on a common malignancy factor; pathways that are not named are independent of it.
MALIGNANCY: dict[str, float] = {
    "cell_cycle": 0.5,
    "hypoxia_angiogenesis": 0.5,
    "tgf_beta_mesenchymal": 0.5,
    "myeloid": 0.35,
    "interferon_chemokine": 0.3,
    "neuronal": -0.45,
    "glial_progenitor": -0.25,
}


@dataclass(frozen=True)
class Driver:
    """A quantity of the tumour: the pathways that move it and the share of its variance that they explain."""

    name: str
    explained: float
    weights: dict[str, float]


LINK: tuple[Driver, ...] = (
    Driver("volume", 0.68, {"cell_cycle": 0.8, "receptor_tyrosine_kinase": 0.5, "neuronal": -0.35}),
    Driver(
        "enhancement", 0.72, {"hypoxia_angiogenesis": 0.8, "tgf_beta_mesenchymal": 0.5, "interferon_chemokine": 0.25}
    ),
    Driver("necrosis", 0.6, {"hypoxia_angiogenesis": 0.6, "cell_cycle": 0.5, "myeloid": 0.3}),
    Driver("oedema", 0.65, {"myeloid": 0.7, "lymphoid": 0.5, "interferon_chemokine": 0.4}),
    Driver("left", 0.4, {"glial_progenitor": 0.7, "notch_wnt_hippo": -0.6}),
    Driver("posterior", 0.4, {"neuronal": 0.6, "receptor_tyrosine_kinase": 0.6}),
    Driver("superior", 0.4, {"notch_wnt_hippo": 0.6, "dna_repair_chromatin": 0.6}),
    Driver("irregularity", 0.0, {}),
)
DRIVERS: tuple[str, ...] = tuple(driver.name for driver in LINK)

# The grade is a noisy threshold on what a radiologist would grade by.
_GRADE_WEIGHTS = {"enhancement": 0.9, "volume": 0.5, "necrosis": 0.3}
_GRADE_NOISE = 0.45


@dataclass(frozen=True)
class Latents:
    """One patient's hidden causes.

    Attributes:
        pathways: (P,) activities in the order of `panel.pathways`; standard normal in a site of severity 0.
        drivers: value of each of `DRIVERS`, standard normal likewise.
        label: grade, ``"low"`` or ``"high"``.
    """

    pathways: NDArray[np.float64]
    drivers: dict[str, float]
    label: str


def draw_latents(rng: np.random.Generator, severity: float = 0.0) -> Latents:
    """Draw one patient of a site whose mean malignancy is `severity` standard deviations."""
    loading = np.array([MALIGNANCY.get(name, 0.0) for name in pathways()])
    own = rng.standard_normal(loading.size)
    activities = loading * (severity + rng.standard_normal()) + np.sqrt(1 - loading**2) * own
    weights = link_matrix()
    explained = np.array([driver.explained for driver in LINK])
    values = weights @ activities + np.sqrt(1 - explained) * rng.standard_normal(len(LINK))
    drivers = dict(zip(DRIVERS, values.tolist(), strict=True))
    return Latents(activities, drivers, grade(drivers, rng))


def draw_unlinked_drivers(rng: np.random.Generator) -> dict[str, float]:
    """Independent standard normal drivers: tumours as varied as a site's, with no cause in any gene."""
    return dict(zip(DRIVERS, rng.standard_normal(len(DRIVERS)).tolist(), strict=True))


def grade(drivers: dict[str, float], rng: np.random.Generator) -> str:
    """``"high"`` or ``"low"`` by a noisy threshold on the drivers."""
    score = sum(weight * drivers[name] for name, weight in _GRADE_WEIGHTS.items())
    return "high" if score + _GRADE_NOISE * rng.standard_normal() > 0 else "low"


def link_matrix() -> NDArray[np.float64]:
    """(D, P) ground truth: drivers = matrix @ activities + noise; each row explains `Driver.explained`."""
    names = pathways()
    loading = np.array([MALIGNANCY.get(name, 0.0) for name in names])
    covariance = np.outer(loading, loading)
    np.fill_diagonal(covariance, 1.0)
    matrix = np.zeros((len(LINK), len(names)))
    for row, driver in zip(matrix, LINK, strict=True):
        for name, weight in driver.weights.items():
            row[names.index(name)] = weight
        variance = row @ covariance @ row
        if variance > 0:
            row *= np.sqrt(driver.explained / variance)
    return matrix
