"""Which patients lack what, and with which of them something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsynth_simulations.hospitals.sites import Site

_NO_EXPRESSION, _NO_IMAGES, _NO_SEQUENCE, _NO_LABEL = 0.08, 0.05, 0.05, 0.03


@dataclass(frozen=True)
class Case:
    """One patient's file situation.

    Attributes:
        index: number of the patient at the site.
        fault: one of the site's faults, or None.
        missing_sequence: a sequence that was not acquired, or None.
        has_images, has_expression, has_label: what the hospital holds of the patient.
        orientation_known: false where the image files do not say how they lie.
    """

    index: int
    fault: str | None
    missing_sequence: str | None
    has_images: bool
    has_expression: bool
    has_label: bool
    orientation_known: bool


def draw_cases(site: Site, patients: int, rng: np.random.Generator) -> list[Case]:
    """Deal absences and faults out to the patients of a site.

    A fault has its patient to itself, who lacks nothing else, so that each refusal has one cause. Every fault occurs
    once from `4 * len(site.faults)` patients on; smaller sites have as many faults as a quarter of their patients.
    """
    order = rng.permutation(patients).tolist()
    faults = dict(zip(order[: patients // 4], site.faults, strict=False))
    cases = []
    for index in range(patients):
        draws = rng.random(5)
        sequence = str(rng.choice(list(site.style.contrasts)))
        if index in faults:
            cases.append(Case(index, faults[index], None, True, True, True, True))
            continue
        has_images = draws[0] >= _NO_IMAGES
        cases.append(
            Case(
                index,
                fault=None,
                missing_sequence=sequence if has_images and draws[1] < _NO_SEQUENCE else None,
                has_images=bool(has_images),
                # Every patient has images or a profile: a hospital would not list the others.
                has_expression=bool(draws[2] >= _NO_EXPRESSION or not has_images),
                has_label=bool(draws[3] >= _NO_LABEL),
                orientation_known=bool(draws[4] >= site.orientation_unknown),
            )
        )
    return cases
