"""Real patients as an evaluation takes them: of one or several sites, with nothing that names anybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsynth.plan import StudyPlan
from fedsynth.selection import channels_of


@dataclass(frozen=True)
class Patients:
    """Real patients, one row each; parts that a patient lacks are NaN (genes, morphology) or zeros (images, masks).

    Attributes:
        images: (N, C, S, H, W) float16 in [0, 1].
        masks: (N, S, H, W) uint8 label map (`fedsynth.morphology`).
        genes: (N, G) float32 on the plan's normalised scale.
        morphology: (N, F) float32 normalised to [0, 1].
        labels: (N,) int64 class codes; -1 where unknown.
        has_images: (N,) whether images and mask are usable.
        has_genes: (N,) whether the expression profile is usable.
        sites: (N,) int64 code of each patient's site in `site_names`.
        site_names: the sites, in the order of their codes.
    """

    images: NDArray[np.float16]
    masks: NDArray[np.uint8]
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    labels: NDArray[np.int64]
    has_images: NDArray[np.bool_]
    has_genes: NDArray[np.bool_]
    sites: NDArray[np.int64]
    site_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, keep: NDArray[np.bool_] | NDArray[np.integer]) -> Patients:
        """The patients for whom `keep` (N,) is true, or those with the row numbers `keep`."""
        return Patients(
            self.images[keep],
            self.masks[keep],
            self.genes[keep],
            self.morphology[keep],
            self.labels[keep],
            self.has_images[keep],
            self.has_genes[keep],
            self.sites[keep],
            self.site_names,
        )


def seen(patients: Patients, plan: StudyPlan, sequences: Sequence[str]) -> Patients:
    """`patients` of `plan` with the channels of `sequences` alone, as a release that holds no others shows its own."""
    if list(sequences) == plan.image.sequences:
        return patients
    return replace(patients, images=patients.images[:, channels_of(plan, sequences)])
