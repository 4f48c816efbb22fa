"""The report's training curves: noised quantities, or quantities computed from noised ones, by round and site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedsynth.plan import StudyPlan
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Series, line_chart

Curves = Mapping[str, Sequence[Mapping[str, float | int | str]]]

MODULE_TITLES = {
    "moments": "Moments of profiles",
    "autoencoder": "Gene autoencoder",
    "radiogenomics": "Radiogenomic DNN",
    "embedding": "Mean embedding of images",
    "gan": "Conditional GAN",
    "translation": "Translation between domains",
    "evaluation": "Evaluation by the sites",
}

# Captions of the quantities that sites send (`fedsynth.records.PROGRESS`); another one is shown by its name alone.
MEANINGS = {
    "update_norm": "how far a round moved the weights",
    "generator_loss": "lower: the sites’ discriminators take generated images for real",
    "fake_score": "the local discriminator’s mean logit on generated images",
}


@dataclass(frozen=True)
class Panel:
    """One quantity of a module."""

    quantity: str
    meaning: str
    chart: Markup


@dataclass(frozen=True)
class ModuleView:
    """A module's training curves, with the values that were drawn as a table."""

    title: str
    panels: list[Panel]
    columns: list[str]
    rows: list[list[str]]


def drawn_sites(curves: Curves, plan: StudyPlan) -> list[str]:
    """The names in `curves`, the plan's sites first and in its order: a site has one colour throughout."""
    named = {_site(row) for rows in curves.values() for row in rows}
    planned = [site.name for site in plan.sites if site.name in named]
    return planned + sorted(named - set(planned))


def training(curves: Curves, sites: Sequence[str]) -> list[ModuleView]:
    order = {module: place for place, module in enumerate(MODULE_TITLES)}
    # A statistic is released once and has no curve: its rows hold a round and a site alone.
    drawn = [module for module, rows in curves.items() if any(set(row) - {"round", "site"} for row in rows)]
    modules = sorted(drawn, key=lambda module: order.get(module, len(order)))
    return [_module(module, curves[module], sites) for module in modules]


def _module(module: str, rows: Sequence[Mapping[str, float | int | str]], sites: Sequence[str]) -> ModuleView:
    ordered = sorted(rows, key=lambda row: (_round(row), sites.index(_site(row))))
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("round", "site")))
    panels: list[Panel] = []
    for column in columns:
        series = [_series(site, place, column, ordered) for place, site in enumerate(sites)]
        if any(math.isfinite(value) for one in series for _, value in one.points):
            title = column.replace("_", " ")
            panels.append(
                Panel(title, MEANINGS.get(column, ""), line_chart(series, title, f"curve-{module}-{len(panels)}"))
            )
    return ModuleView(
        title=MODULE_TITLES.get(module, module),
        panels=panels,
        columns=["round", "site", *(column.replace("_", " ") for column in columns)],
        rows=[[f"{_round(row):g}", _site(row), *(_cell(row.get(column)) for column in columns)] for row in ordered],
    )


def _series(site: str, index: int, quantity: str, rows: Sequence[Mapping[str, float | int | str]]) -> Series:
    """The line of one site; a round in which it has no value is a gap, not a stretch drawn across."""
    values = {_round(row): row.get(quantity) for row in rows if _site(row) == site}
    points = []
    for at in sorted({_round(row) for row in rows if quantity in row}):
        value = values.get(at)
        points.append((at, float(value) if isinstance(value, int | float) else math.nan))
    return Series(site, index, tuple(points))


def _round(row: Mapping[str, float | int | str]) -> float:
    value = row.get("round")
    if not isinstance(value, int | float):
        raise ValueError("a row of training curves has no round")
    return float(value)


def _site(row: Mapping[str, float | int | str]) -> str:
    return str(row.get("site", "all sites"))


def _cell(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else wording.number(value, 4)
