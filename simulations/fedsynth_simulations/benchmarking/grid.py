"""The study plan of the benchmarks, on one of two grids over the same field of view."""

from __future__ import annotations

from functools import cache
from typing import Literal

from fedsynth.plan import GenePlan, ImagePlan, StudyPlan, WarmStart
from fedsynth.recommend import PublicStarts
from fedsynth_simulations.plans import simulated_genes, study_plan

Size = Literal[32, 64]


def benchmark_plan(
    size: Size, sites: dict[str, int], *, epsilon: float = 10.0, warm_start: WarmStart | None = None
) -> StudyPlan:
    """The plan of a simulated study, its defaults for these sites, with `size` pixels over 192 mm."""
    plan = study_plan(
        "benchmark",
        "Compare recipes of private training.",
        sites,
        genes=_genes(),
        epsilon=epsilon,
        starts=PublicStarts(gan=warm_start),
    )
    return plan.model_copy(update={"image": ImagePlan(size=size, pixel_spacing_mm=192.0 / size)})


@cache
def _genes() -> GenePlan:
    return simulated_genes()
