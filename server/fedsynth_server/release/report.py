"""The report of a release: one HTML file that a clinician, a hospital's data officer and a statistician can read.

The file stands alone: no script, no font, no picture from elsewhere; a content security policy in its head says so to
the browser. Everything it shows was public or privatised before it came here: noised or post-processed curves, the
privacy statement, the evaluation, and pictures of synthetic patients.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedsynth.errors import UsageError
from fedsynth.evaluation.values import Evaluation, Figure
from fedsynth.files import write_atomic
from fedsynth.plan import StudyPlan
from fedsynth.records import PUBLIC
from fedsynth.statement import PrivacyStatement, SiteStatement
from fedsynth_server.outcome import ModuleOutcome, Outcome
from fedsynth_server.release import wording
from fedsynth_server.release.charts import Series, line_chart, place_chart
from fedsynth_server.release.manifest import PUBLIC_KEY, SIGNATURE, SUMS

Curves = Mapping[str, Sequence[Mapping[str, float | int | str]]]

_TEMPLATES = Path(__file__).parent / "templates"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SOFTWARE = ("fedsynth", "flwr", "opacus", "torch")

# What a recipient types, and what it shows.
VERIFICATION = (
    ("fedsynth release verify .", "Everything: integrity, signature, structure"),
    (f"sha256sum --check --quiet {SUMS}", "Integrity, without fedsynth"),
    (
        f"openssl pkeyutl -verify -rawin -pubin -inkey {PUBLIC_KEY} -sigfile {SIGNATURE} -in {SUMS}",
        "Signature (Ed25519), without fedsynth",
    ),
    (f"openssl pkey -pubin -in {PUBLIC_KEY} -outform DER | sha256sum", "The key's fingerprint"),
)

# Captions of the quantities that sites send (`fedsynth.records.PROGRESS`); another one is shown by its name alone.
MEANINGS = {
    "update_norm": "how far a round moved the weights",
    "generator_loss": "lower: the sites’ discriminators take generated images for real",
    "fake_score": "the local discriminator’s mean logit on generated images",
}

MODULE_TITLES = {
    "moments": "Moments of profiles",
    "autoencoder": "Gene autoencoder",
    "radiogenomics": "Radiogenomic DNN",
    "embedding": "Mean embedding of images",
    "gan": "Conditional GAN",
}


def write_report(
    path: Path,
    *,
    plan: StudyPlan,
    statement: PrivacyStatement,
    evaluation: Evaluation | None,
    curves: dict[str, list[dict[str, float | int | str]]],
    preview_png: bytes,
    released: datetime,
    n_patients: int,
    comparison_png: bytes | None = None,
    outcome: Outcome | None = None,
) -> None:
    """Write the report to `path`, whole or not at all; equal arguments and versions give equal bytes.

    Args:
        path: the HTML file.
        plan: the study's plan.
        statement: its privacy statement; a statement that is not private puts a warning before everything else.
        evaluation: what was measured, or None when nothing was.
        curves: for each module the rows ``{"round": r, "site": name, quantity: value, ...}``, one a round and site, of
            quantities that are noised or computed from noised ones.
        preview_png: a sheet of synthetic patients (PNG).
        released: when, with its time zone; printed in UTC.
        n_patients: number of synthetic patients in the release.
        comparison_png: synthetic patients beside originals that may be shown (simulated or public ones).
        outcome: what the forecast had said and what came of it, if that was compared.

    Raises:
        UsageError: ``report_plan_mismatch`` (statement or outcome are about another plan) or ``report_not_png``.
        ValueError: `released` has no time zone, or a row of `curves` has no round.
        OSError: e.g. a full disk.
    """
    if statement.plan_digest != plan.digest:
        raise UsageError(
            "report_plan_mismatch",
            f"The privacy statement is about plan {statement.plan_digest[:12]}, the report about {plan.digest[:12]}.",
            "Make the release with the plan that the sites approved and trained under.",
        )
    if outcome is not None and outcome.plan_digest != plan.digest:
        raise UsageError(
            "report_plan_mismatch",
            f"The outcome is that of plan {outcome.plan_digest[:12]}, the report about {plan.digest[:12]}.",
            "Compare the forecast again with the plan of this study.",
        )
    if released.tzinfo is None:
        raise ValueError("the time of release needs a time zone")
    drawn = _drawn_sites(curves, plan)
    template = _environment().get_template("report.html.j2")
    page = template.render(
        plan=plan,
        statement=statement,
        privacy=_privacy(statement),
        evaluation=evaluation,
        quality=[] if evaluation is None else _quality(evaluation),
        summary=None if evaluation is None else _summary(evaluation),
        legend=[Series(site, place, ()) for place, site in enumerate(drawn)],
        training=_training(curves, drawn),
        released_once=[_in_a_sentence(MODULE_TITLES[module]) for module in plan.modules if module in PUBLIC],
        outcome=[] if outcome is None else [_outcome_row(each) for each in outcome.modules],
        methods=[("Profiles", wording.profile_method(plan)), ("Images", wording.image_method(plan))],
        preview=_picture(preview_png),
        comparison=None if comparison_png is None else _picture(comparison_png),
        released=released.astimezone(UTC),
        n_patients=n_patients,
        verification=VERIFICATION,
        software=[(name, version(name)) for name in _SOFTWARE],
    )
    write_atomic(path, page.encode("utf-8"))


@dataclass(frozen=True)
class Picture:
    """A PNG for an ``img`` element: data URI and size in pixels."""

    source: str
    width: int
    height: int


@dataclass(frozen=True)
class SiteView:
    """A site's statement beside the budget.

    Attributes:
        share: composed epsilon over budget.
        bar, budget_mark: both as shares of the bar, which ends at the budget or at the largest epsilon above it.
        over: the composed epsilon is above the budget.
        thin: delta times the number of patients is above 0.1, too much for a chance of no protection at all.
    """

    statement: SiteStatement
    share: float
    bar: float
    budget_mark: float
    over: bool
    thin: bool


@dataclass(frozen=True)
class PrivacyView:
    """The statement as the template needs it; `worst` is the site whose patients are protected least."""

    worst: SiteStatement
    sites: list[SiteView]
    earlier_studies: bool
    strength: str
    odds_factor: str
    attacker_accuracy: str


@dataclass(frozen=True)
class FigureView:
    """One row of a quality table, every cell as text."""

    figure: Figure
    synthetic: str
    interval: str
    public_only: str
    real: str
    floor: str
    reading: wording.Reading
    chart: Markup


@dataclass(frozen=True)
class SectionView:
    """One quality table."""

    id: str
    title: str
    explanation: str
    figures: list[FigureView]
    has_public_only: bool


@dataclass(frozen=True)
class Summary:
    """How many figures lie where.

    Attributes:
        placed: those with a floor and a better ceiling; the sum of `near_ceiling`, `near_floor` and `at_floor`.
        near_ceiling: at least half-way from the floor to the ceiling.
        near_floor: less than half-way.
        at_floor: at the floor, below it, or with an interval that reaches it.
        unplaced: measured, but without a floor or a ceiling that is better.
        unmeasured: no value.
        compared, better_than_public: those with a public-only value, and those better than it.
    """

    placed: int
    near_ceiling: int
    near_floor: int
    at_floor: int
    unplaced: int
    unmeasured: int
    compared: int
    better_than_public: int


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


@dataclass(frozen=True)
class OutcomeRow:
    """One module's forecast and outcome, every cell as text; `state` names the verdict for the style sheet."""

    title: str
    forecast: str
    found: str
    verdict: str
    state: str
    foretold: str
    sentence: str


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": wording.number, "epsilon": wording.epsilon, "percent": wording.percent}
    environment.globals |= {"module_titles": MODULE_TITLES, "statistics": frozenset(PUBLIC)}
    return environment


def _picture(png: bytes) -> Picture:
    if not png.startswith(_PNG_SIGNATURE) or len(png) < 24:
        raise UsageError("report_not_png", "A picture for the report is not a PNG file.")
    width, height = struct.unpack(">II", png[16:24])
    return Picture("data:image/png;base64," + base64.b64encode(png).decode("ascii"), width, height)


def _privacy(statement: PrivacyStatement) -> PrivacyView:
    worst = max(statement.sites, key=lambda site: site.epsilon)
    budget = statement.epsilon_budget
    scale = max(budget, *(site.epsilon for site in statement.sites if math.isfinite(site.epsilon)), 0.0)
    return PrivacyView(
        worst=worst,
        sites=[
            SiteView(
                statement=site,
                share=site.epsilon / budget,
                bar=min(1.0, site.epsilon / scale),
                budget_mark=budget / scale,
                over=site.epsilon > budget * (1 + 1e-9),
                thin=statement.delta * site.nominal_patients > 0.1,
            )
            for site in statement.sites
        ],
        earlier_studies=any(site.epsilon_lifetime > site.epsilon * (1 + 1e-9) for site in statement.sites),
        strength=wording.strength(worst.epsilon),
        odds_factor=wording.odds_factor(worst.epsilon),
        attacker_accuracy=wording.attacker_accuracy(worst.epsilon, statement.delta),
    )


def _quality(evaluation: Evaluation) -> list[SectionView]:
    return [
        SectionView(
            id=section.id,
            title=section.title,
            explanation=section.explanation,
            figures=[_figure(figure, f"{section.id}-{place}") for place, figure in enumerate(section.figures)],
            has_public_only=any(figure.public_only is not None for figure in section.figures),
        )
        for section in evaluation.sections
    ]


def _figure(figure: Figure, identifier: str) -> FigureView:
    places = wording.decimals(figure)

    def cell(value: float | None) -> str:
        if value is None:
            return "–"
        return wording.number(value) if places is None else wording.fixed(value, places)

    interval = "" if figure.interval is None else f"{cell(figure.interval[0])} to {cell(figure.interval[1])}"
    read = wording.reading(figure)
    return FigureView(
        figure=figure,
        synthetic=cell(figure.synthetic),
        interval=interval,
        public_only=cell(figure.public_only),
        real=cell(figure.real),
        floor=cell(figure.floor),
        reading=read,
        chart=_place_chart(figure, read.place, identifier),
    )


def _place_chart(figure: Figure, place: float | None, identifier: str) -> Markup:
    if place is None or figure.floor is None or figure.real is None:
        return Markup("")
    floor, span = figure.floor, figure.real - figure.floor
    interval = None
    if figure.interval is not None:
        interval = ((figure.interval[0] - floor) / span, (figure.interval[1] - floor) / span)
    public_only = None if figure.public_only is None else (figure.public_only - floor) / span
    return place_chart(place, public_only, interval, identifier)


def _summary(evaluation: Evaluation) -> Summary:
    figures = [figure for section in evaluation.sections for figure in section.figures]
    measured = [figure for figure in figures if figure.synthetic is not None]
    readings = [wording.reading(figure) for figure in measured]
    at_floor = sum(reading.verdict == "floor" for reading in readings)
    near_ceiling = sum(reading.verdict == "ceiling" for reading in readings)
    placed = sum(reading.verdict != "open" for reading in readings)
    against_public = [reading.beats_public_only for reading in readings if reading.beats_public_only is not None]
    return Summary(
        placed=placed,
        near_ceiling=near_ceiling,
        near_floor=placed - near_ceiling - at_floor,
        at_floor=at_floor,
        unplaced=len(readings) - placed,
        unmeasured=len(figures) - len(measured),
        compared=len(against_public),
        better_than_public=sum(against_public),
    )


def _in_a_sentence(title: str) -> str:
    return title[0].lower() + title[1:]


def _outcome_row(found: ModuleOutcome) -> OutcomeRow:
    foretold = {None: "", True: "as foretold", False: "not as foretold"}[found.as_forecast]
    return OutcomeRow(
        title=MODULE_TITLES[found.module],
        forecast=f"{wording.number(found.forecast_noise_to_signal, 2)}: {wording.FORECASTS[found.forecast]}",
        found="–" if found.noise_to_signal is None else wording.number(found.noise_to_signal, 2),
        verdict=wording.VERDICTS[found.verdict],
        state=found.verdict,
        foretold=foretold,
        sentence=found.sentence,
    )


def _drawn_sites(curves: Curves, plan: StudyPlan) -> list[str]:
    """The names in `curves`, the plan's sites first and in its order: a site has one colour throughout."""
    named = {_site(row) for rows in curves.values() for row in rows}
    planned = [site.name for site in plan.sites if site.name in named]
    return planned + sorted(named - set(planned))


def _training(curves: Curves, sites: Sequence[str]) -> list[ModuleView]:
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
