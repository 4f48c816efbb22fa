"""The plans of the studies that `fedsynth simulate` runs."""

from __future__ import annotations

import numpy as np

from fedsynth.errors import UsageError
from fedsynth.plan import (
    AggregationPlan,
    GenePlan,
    LabelPlan,
    MorphologyPlan,
    PrivacyPlan,
    SiteEvaluationPlan,
    SitePlan,
    StudyPlan,
)
from fedsynth.recommend import PublicStarts, recommend
from fedsynth_simulations.cohort.expression import public_expression_reference, reference_quantiles
from fedsynth_simulations.cohort.panel import load_panel

_PUBLIC_PROFILES = 400
_DELTA = 1e-5
_HOLDOUT_EPSILON = 4.0  # below, 48 held-out patients a site say little about the link of genes and morphology
_REFERENCE_SEED = 1  # the public reference population is the same in every study

# Standard deviation of each feature on the normalised scale, over 1,600 public simulated patients (`cohort.public`).
_PUBLIC_SD = {
    "volume": 0.115,
    "enhancing_fraction": 0.151,
    "oedema_fraction": 0.249,
    "sphericity": 0.056,
    "position_left": 0.211,
    "position_posterior": 0.172,
    "position_superior": 0.132,
    "t1c_ratio": 0.055,
    "flair_ratio": 0.045,
}


def simulated_genes() -> GenePlan:
    """The panel with per-gene centre and scale of a simulated public population."""
    panel = [gene for gene, _ in load_panel()]
    center, scale = public_expression_reference(panel, _PUBLIC_PROFILES, np.random.default_rng(_REFERENCE_SEED))
    return GenePlan(
        panel=panel,
        reference_quantiles=reference_quantiles(),
        center=np.round(center, 4).tolist(),
        scale=np.round(scale, 4).tolist(),
    )


def zscore_genes() -> GenePlan:
    """The panel for tables of per-gene z-scores, whose public centre is 0 and scale 1."""
    panel = [gene for gene, _ in load_panel()]
    return GenePlan(
        panel=panel,
        measure="zscore",
        reference_quantiles=reference_quantiles(),
        center=[0.0] * len(panel),
        scale=[1.0] * len(panel),
    )


def study_plan(
    name: str,
    purpose: str,
    sites: dict[str, int],
    *,
    genes: GenePlan,
    epsilon: float,
    starts: PublicStarts,
    reproducible_seed: int | None = None,
) -> StudyPlan:
    """A plan for sites of a few dozen to a few hundred patients.

    Args:
        name: the study's name.
        purpose: one sentence for those who approve it.
        sites: site name -> declared (public, rounded) number of training patients.
        genes: panel and references.
        epsilon: budget of a patient, all modules together.
        starts: the public weights at hand, which decide the engines; without any all networks start from random ones.
        reproducible_seed: makes the run reproducible and *not private*.

    Raises:
        UsageError: ``site_too_small``: a site declares fewer than five patients.
    """
    if min(sites.values()) < 5:
        raise UsageError("site_too_small", "A site needs at least five training patients to take part.")
    return StudyPlan(
        name=name,
        purpose=purpose,
        genes=genes,
        morphology=MorphologyPlan(features=list(_PUBLIC_SD), reference_sd=list(_PUBLIC_SD.values())),
        label=LabelPlan(name="grade", classes=["low", "high"]),
        privacy=PrivacyPlan(epsilon=epsilon, delta=_DELTA, reproducible_seed=reproducible_seed),
        **vars(recommend(list(sites.values()), starts, epsilon, _DELTA)),
        aggregation=AggregationPlan(min_sites=min(2, len(sites))),
        site_evaluation=SiteEvaluationPlan(epsilon=_HOLDOUT_EPSILON),
        sites=[SitePlan(name=site, nominal_patients=count) for site, count in sites.items()],
    )
