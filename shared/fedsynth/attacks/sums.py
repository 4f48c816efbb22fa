"""Membership inference from the noisy sum that a site released: matched filters.

A statistic is the sum of one row a patient plus Gaussian noise, and everything but the rows is public. Whether a known row
is in the sum is then a question with a best answer, the likelihood ratio (Neyman and Pearson, 1933).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from fedsynth.engines import embedding, moments
from fedsynth.evaluation.patients import Patients
from fedsynth.metrics.measurable import require_rows
from fedsynth.plan import Module, StudyPlan
from fedsynth.records import State

_AT_ONCE = 32  # patients
MIN_REFERENCE = 10

Rows = NDArray[np.float64]


def usable(module: Module, patients: Patients) -> NDArray[np.bool_]:
    """(N,) who has what `module` needs; a site trains on no others."""
    images, genes = patients.has_images, patients.has_genes
    return {
        "moments": genes | images,
        "autoencoder": genes,
        "radiogenomics": genes & images,
        "embedding": images,
        "gan": images,
        "translation": images,
    }[module]


def statistic_rows(plan: StudyPlan, module: Module, public: State, patients: Patients) -> Rows:
    """(N, D) the rows that a site computes of these patients, by the engine's own functions."""
    labels = torch.from_numpy(patients.labels)
    morphology = torch.from_numpy(patients.morphology)
    if module == "moments":
        genes = torch.from_numpy(np.where(patients.has_genes[:, None], patients.genes, np.float32(np.nan)))
        return moments.rows(plan, public, genes, morphology, labels).double().numpy()
    engine = embedding.plan_embedding(plan, public)
    found = [
        engine.rows(volumes, morphology[some], labels[some]).double().numpy() for some, volumes in _volumes(patients)
    ]
    return np.concatenate(found) if found else np.zeros((0, engine.size))


def filter_with_the_rest_known(total: Rows, members: Rows, others: Rows) -> tuple[Rows, Rows]:
    """Scores (N,), (M,) by an attacker who knows every patient of the site but the one in question.

    This is the attacker whom differential privacy is defined against; for Gaussian noise nobody can do better (Dong et al.,
    2022). For the patient's row r and d, what is left of the sum after all others are subtracted, the logarithm of the
    likelihood ratio is ``<d, r> - |r|^2 / 2``, in units of the noise's variance.

    All scores of a run share its noise, and what rows have in common shifts all of them alike: an attacker of one patient
    does not know that shift, but a threshold that is chosen among the scores does. So within a run members and others are
    told apart as well as theory says only if rows have little in common, and better else; on average over runs, for a fixed
    threshold, the theory holds. `fedsynth.attacks.rates.epsilon_bound` must not be asked of them.

    Args:
        total: (D,) the noisy sum.
        members: (N, D) rows of *all* patients whom the site summed.
        others: (M, D) rows of patients whom it did not.
    """
    left = total - members.sum(axis=0)
    squares = np.square(members).sum(axis=1)
    return members @ left + squares / 2, others @ left - np.square(others).sum(axis=1) / 2


def filter_with_the_population_known(
    total: Rows, members: Rows, others: Rows, reference: Rows, patients: int, noise_sd: float
) -> tuple[Rows, Rows]:
    """Scores by an attacker who knows the noise, about how many patients there are, and a sample of the population.

    The other patients' sum is then Gaussian noise as well, of mean and covariance as the reference says, and the filter
    weighs coordinates by it (Homer et al., 2008; Sankararaman et al., 2009). The covariance is shrunk (Ledoit and Wolf,
    2004), since there may be more coordinates than reference patients.

    Args:
        total, members, others: as above.
        reference: (R, D) rows of patients who are neither.
        patients: declared number of patients in the sum.
        noise_sd: standard deviation of the noise in each coordinate.

    Raises:
        NotMeasurable: too few reference patients.
    """
    require_rows("reference patients", reference, MIN_REFERENCE)
    mean = reference.mean(axis=0)
    spread = patients * ledoit_wolf(reference)[0] + noise_sd**2 * np.eye(len(total))
    inverse = np.linalg.inv(spread)
    weights = inverse @ (total - patients * mean)

    def scores(rows: Rows) -> Rows:
        different = rows - mean
        return np.asarray(different @ weights - 0.5 * np.einsum("nd,de,ne->n", different, inverse, different))

    return scores(members), scores(others)


def volumes(patients: Patients) -> torch.Tensor:
    """(N, C + 1, S, H, W) float16 in [-1, 1], image channels and mask channel, as sites make them of a cohort."""
    images = torch.from_numpy(patients.images) * 2 - 1
    mask = torch.from_numpy(patients.masks > 0).to(torch.float16)[:, None] * 2 - 1
    return torch.cat([images, mask], dim=1)


def _volumes(patients: Patients) -> Iterator[tuple[slice, torch.Tensor]]:
    """`volumes` of a few patients at a time."""
    for start in range(0, len(patients), _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, len(patients)))
        yield some, volumes(patients.rows(np.arange(len(patients))[some]))
