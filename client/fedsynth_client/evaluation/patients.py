"""From prepared cohorts to the patients of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedsynth.evaluation.patients import Patients
from fedsynth_client.cohort import Cohort


def patients_of(cohorts: Mapping[str, Cohort]) -> Patients:
    """All patients of the sites' `cohorts`, which share one plan, site by site; keys stay behind.

    Raises:
        ValueError: there are no cohorts, or their arrays differ in any dimension but the first.
    """
    parts = list(cohorts.values())
    return Patients(
        np.concatenate([cohort.images for cohort in parts]),
        np.concatenate([cohort.masks for cohort in parts]),
        np.concatenate([cohort.genes for cohort in parts]),
        np.concatenate([cohort.morphology for cohort in parts]),
        np.concatenate([cohort.labels for cohort in parts]),
        np.concatenate([cohort.has_images for cohort in parts]),
        np.concatenate([cohort.has_genes for cohort in parts]),
        np.repeat(np.arange(len(parts)), [len(cohort) for cohort in parts]),
        tuple(cohorts),
    )
