"""A public simulated cohort in prepared form, to pre-train a generator on.

Its scanners are of another style than any site's and its tumours have no cause in any gene, so nothing that a study
wants to learn from the sites can be learnt from it beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphology import FEATURES
from fedsynth.plan import StudyPlan
from fedsynth.progress import track
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.patient import on_study_grid
from fedsynth_client.ingest.refusals import Unusable
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.grid import axial_grid
from fedsynth_simulations.cohort.latents import draw_unlinked_drivers, grade
from fedsynth_simulations.cohort.patient import draw_acquisition, draw_head, scan
from fedsynth_simulations.cohort.style import PUBLIC_STYLE

_FIELD_OF_VIEW_MM = (150.0, 200.0)  # along S, and in plane: room for every head


@dataclass(frozen=True)
class PublicCohort:
    """Prepared patients as `fedsynth_client.cohort.Cohort` holds them, without genes.

    Attributes:
        images: (N, C, S, H, W) float16 in [0, 1], the plan's sequences.
        masks: (N, S, H, W) uint8 label map.
        morphology: (N, F) the plan's features in physical units.
        labels: (N,) int64 class codes of the plan's label.
    """

    images: NDArray[np.float16]
    masks: NDArray[np.uint8]
    morphology: NDArray[np.float64]
    labels: NDArray[np.int64]


def public_cohort(plan: StudyPlan, n: int, rng: np.random.Generator, anatomy: Anatomy | None = None) -> PublicCohort:
    """Draw `n` public patients and prepare them by the very functions of ingest.

    Args:
        plan: its image, label and morphology sections are used.
        n: number of patients.
        rng: source of all of them.
        anatomy: the atlas, when it is loaded already.

    Raises:
        ValueError: the plan asks for a sequence that is not simulated, or for other labels than ``low`` and ``high``.
    """
    image, label = plan.image, plan.label
    unknown = [name for name in image.sequences if name not in PUBLIC_STYLE.contrasts]
    if unknown or set(label.classes) != {"low", "high"}:
        raise ValueError(f"expected T1, T1c, FLAIR and the classes low and high; got {unknown or label.classes}")
    anatomy = Anatomy.load() if anatomy is None else anatomy
    wanted = [[feature.name for feature in FEATURES].index(name) for name in plan.morphology.features]
    slices = round(_FIELD_OF_VIEW_MM[0] / image.slice_spacing_mm)
    size = round(_FIELD_OF_VIEW_MM[1] / image.pixel_spacing_mm)
    grid = axial_grid(slices, size, image.slice_spacing_mm, image.pixel_spacing_mm)
    images = np.zeros((n, len(image.sequences), image.slices, image.size, image.size), dtype=np.float16)
    masks = np.zeros((n, image.slices, image.size, image.size), dtype=np.uint8)
    morphology = np.zeros((n, len(wanted)))
    labels = np.zeros(n, dtype=np.int64)
    for i in track(range(n), "Drawing public patients", n):
        while True:
            drivers = draw_unlinked_drivers(rng)
            head = draw_head(anatomy, PUBLIC_STYLE, drivers, rng)
            scanned, mask = scan(anatomy, head, draw_acquisition(PUBLIC_STYLE, rng).only(*image.sequences), grid, rng)
            try:
                volumes = [Volume(scanned[name], grid.affine) for name in image.sequences]
                prepared = on_study_grid(volumes, Volume(mask, grid.affine), image)
            except Unusable:
                continue  # A tumour beyond the plan's field of view: a public cohort has no such patient.
            break
        images[i], masks[i], morphology[i] = prepared.images, prepared.mask, prepared.morphology[wanted]
        labels[i] = label.classes.index(grade(drivers, rng))
    return PublicCohort(images, masks, morphology, labels)
