"""The site's own evaluation of the finished generator: scores of held-out patients, which leave as one noisy sum."""

from __future__ import annotations

from fedsynth.dp.accounting import Mechanism
from fedsynth.dp.randomness import Randomness
from fedsynth.evaluation.site_scores import Evaluators, rows
from fedsynth_client.cohort import Cohort
from fedsynth_client.evaluation.patients import patients_of
from fedsynth_client.training.block import BlockResult
from fedsynth_client.training.statistic import release_statistic


def evaluate_holdout(
    used: Evaluators, holdout: Cohort, mechanism: Mechanism, max_norm: float, randomness: Randomness
) -> BlockResult:
    """Score every patient of `holdout` and release the noisy sum of the rows (`fedsynth.evaluation.site_scores`).

    An empty `holdout` is no error, since an error would tell of it: noise is released, as large as any other's.

    Args:
        used: networks that were trained on synthetic patients, as the coordinator sent them.
        holdout: held-out patients only.
        mechanism: one release of all of them.
        max_norm: to which a row is clipped, whatever the networks made of it.
        randomness: source of the noise.

    Raises:
        ValueError: `holdout` holds a patient who was trained on.
    """
    if any(entry.split != "holdout" for entry in holdout.entries):
        raise ValueError("only held-out patients may be evaluated on")
    return release_statistic(rows(used, patients_of({"": holdout})), mechanism, max_norm, randomness)
