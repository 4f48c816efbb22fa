"""What marks a study that protects nobody, in the same words wherever it can be met."""

from __future__ import annotations

from fedsynth.plan import PrivacyPlan

# ASCII, each one sentence: they stand in headers of files, too.
NO_PRIVACY = "NOT PRIVATE: a study without privacy (epsilon infinite), nothing of its patients is clipped or noised."
NO_GUARANTEE = "NOT PRIVATE: the noise of this run was reproducible, its epsilon guarantees nothing."

CONSEQUENCES = (
    "What it means: what the site computes from its patients leaves as it is. Whoever receives it, or what is made from it, "
    "may be able to tell who took part and what their data look like. It cannot be taken back: from its first round on "
    "their epsilon is infinite, and this cohort can take part in no private study any more. It is for public or simulated "
    "data only."
)
"""What approving a study without privacy means, for whoever has to decide."""


def marks(privacy: PrivacyPlan) -> list[str]:
    """Why a study under `privacy` protects nobody, one sentence a cause; empty where it is private.

    >>> marks(PrivacyPlan(epsilon=8.0))
    []
    >>> [mark[:11] for mark in marks(PrivacyPlan(epsilon=float("inf"), reproducible_seed=1))]
    ['NOT PRIVATE', 'NOT PRIVATE']
    """
    found = [] if privacy.private else [NO_PRIVACY]
    return found if privacy.reproducible_seed is None else [*found, NO_GUARANTEE]
