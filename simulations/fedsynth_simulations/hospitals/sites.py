"""The three hospitals: who their patients are and how their scanners see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.cohort.expression import draw_batch_effect
from fedsynth_simulations.cohort.style import Style, style

SiteName = Literal["north", "south", "east"]


@dataclass(frozen=True)
class Site:
    """A hospital.

    Attributes:
        name: of its folder.
        number: by which its random streams differ from the other sites'.
        style: of its scanner.
        severity: mean malignancy of its patients, in standard deviations.
        labels: word of its clinical table for each grade.
        faults: what goes wrong with one patient each, see `cases`.
        orientation_unknown: share of its patients whose files do not say how they lie.
    """

    name: SiteName
    number: int
    style: Style
    severity: float
    labels: Mapping[str, str]
    faults: tuple[str, ...]
    orientation_unknown: float = 0.0


SITES: tuple[Site, ...] = (
    Site(
        "north",
        1,
        style("north", 0.68, 0.12, 1.45, 0.05, noise=(0.01, 0.025)),
        severity=0.1,
        labels={"low": "II", "high": "IV"},
        faults=("truncated_file", "missing_slice", "burned_in_annotation", "empty_mask", "second_study"),
    ),
    Site(
        "south",
        2,
        style("south", 0.78, 0.2, 1.6, 0.05, noise=(0.015, 0.035), shading=(0.05, 0.14)),
        severity=0.35,
        labels={"low": "LGG", "high": "HGG"},
        faults=("four_dimensions", "corrupt_gzip", "empty_mask", "duplicate_clinical_row", "unknown_mask_code"),
    ),
    Site(
        "east",
        3,
        style("east", 0.73, 0.1, 1.35, 0.07, noise=(0.015, 0.05), shading=(0.03, 0.12)),
        severity=-0.25,
        labels={"low": "glioma, low grade", "high": "glioblastoma"},
        faults=("corrupt_gzip", "four_dimensions", "empty_mask", "empty_folder", "duplicate_expression_column"),
        orientation_unknown=0.04,
    ),
)


def generator(seed: int, site: Site, purpose: int, index: int = 0) -> np.random.Generator:
    """The random stream of one purpose at one site: patients can be drawn in any order, by any process."""
    return np.random.default_rng([seed, site.number, purpose, index])


def batch_effect(seed: int, site: Site) -> NDArray[np.float64]:
    """(G,) shift of log TPM of the site's laboratory."""
    return draw_batch_effect(generator(seed, site, purpose=1))
