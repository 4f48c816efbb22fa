"""`fedsynth study new`: a first plan from a gene panel and the sites' declared sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from pydantic import ValidationError
from scipy.stats import norm

from fedsynth.errors import UsageError
from fedsynth.plan import AggregationPlan, GenePlan, PrivacyPlan, SitePlan, StudyPlan
from fedsynth.recommend import PublicStarts, recommend
from fedsynth_server.warm_start import public_starts

_QUANTILE_POINTS = 201
_LARGEST_SCORE = 3.0


def new_plan(
    *,
    name: str,
    purpose: str,
    panel: Path,
    sites: list[str],
    epsilon: float,
    delta: float,
    measure: str,
    warm_start: Path | None,
) -> StudyPlan:
    """A plan with recommended training sections.

    Args:
        name, purpose: as in `StudyPlan`.
        panel: TSV with columns ``gene``, ``center`` and ``scale``: per gene the public mean and standard deviation of the
            normal score of its within-sample rank.
        sites: ``NAME=PATIENTS`` each.
        epsilon, delta: the budget.
        measure: ``"abundance"`` or ``"zscore"``.
        warm_start: file of public weights.

    Raises:
        UsageError: ``panel_unreadable``, ``site_malformed`` or ``plan_invalid``.
    """
    table = _panel(panel)
    declared = [_site(text) for text in sites]
    try:
        genes = GenePlan.model_validate(
            {
                "panel": table["gene"].tolist(),
                "measure": measure,
                "reference_quantiles": _normal_quantiles(),
                "center": table["center"].tolist(),
                "scale": table["scale"].tolist(),
            }
        )
        starts = public_starts(warm_start, genes) if warm_start else PublicStarts()
        recommended = recommend([s.nominal_patients for s in declared], starts, epsilon, delta)
        return StudyPlan(
            name=name,
            purpose=purpose,
            genes=genes,
            privacy=PrivacyPlan(epsilon=epsilon, delta=delta),
            **vars(recommended),
            aggregation=AggregationPlan(min_sites=math.ceil(len(declared) / 2)),
            sites=declared,
        )
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'plan'}: {fault['msg']}" for fault in error.errors(include_url=False)
        )
        raise UsageError("plan_invalid", f"These values make no valid plan: {faults}.") from None


def _panel(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t", dtype={"gene": str})
    except (OSError, ValueError) as error:
        raise UsageError("panel_unreadable", f"{path} cannot be read as a TSV ({type(error).__name__}).") from None
    missing = [column for column in ("gene", "center", "scale") if column not in table.columns]
    if missing or table.isna().any(axis=None):
        raise UsageError(
            "panel_unreadable",
            f"{path} needs columns gene, center and scale with a value in every row"
            + (f"; it lacks {', '.join(missing)}." if missing else "."),
        )
    return table


def _site(text: str) -> SitePlan:
    name, _, count = text.partition("=")
    if not count.isdigit() or int(count) < 1:
        raise UsageError("site_malformed", f"--site {text!r} is not NAME=PATIENTS.", "For example --site north=180.")
    try:
        return SitePlan(name=name, nominal_patients=int(count))
    except ValidationError:
        raise UsageError(
            "site_malformed", f"{name!r} is not a site name: lower-case letters, digits, dashes."
        ) from None


def _normal_quantiles() -> list[float]:
    even = [i / (_QUANTILE_POINTS - 1) for i in range(_QUANTILE_POINTS)]
    return [round(min(max(float(norm.ppf(p)), -_LARGEST_SCORE), _LARGEST_SCORE), 4) for p in even]
