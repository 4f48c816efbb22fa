"""What `fedsynth study check` prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsynth.cli import envelope
from fedsynth.epsilons import finite, shown
from fedsynth.errors import UsageError
from fedsynth.marks import CONSEQUENCES, marks
from fedsynth.plan import StudyPlan
from fedsynth.recommend import PublicStarts
from fedsynth.records import PUBLIC, State, state_digest
from fedsynth_server.engine_advice import EngineAdvice, engine_advice
from fedsynth_server.forecast import Forecast, forecast
from fedsynth_server.levers import levers
from fedsynth_server.warm_start import load_warm_start, public_starts

_COLOURS = {"learns": "green", "partly": "yellow", "drowns": "red"}


def show_forecast(plan: StudyPlan, as_json: bool, weights: Path | None = None) -> None:
    """Print cost and noise of `plan` by site and module, which engines suit it, and what would help.

    Args:
        plan: the study plan.
        as_json: one JSON object instead of tables.
        weights: file of public weights, for a sharper forecast and for the advice on engines.

    Raises:
        UsageError: ``warm_start_unreadable``; ``warm_start_differs``: the plan names other weights than the file holds.
    """
    starts, public = _read_weights(plan, weights)
    found = forecast(plan, public)
    # Without noise there is no trade between engines, and no delta.
    private = plan.privacy.private
    engines, helps = (engine_advice(plan, starts, public), levers(plan, found, public)) if private else ([], [])
    warnings = [each.sentence for each in helps] + (_loose_delta(plan) if private else [])
    if as_json:
        told = {
            "digest": plan.digest,
            "marks": marks(plan.privacy),
            "epsilon": found.epsilon,
            **asdict(found),
            "engines": [asdict(each) | {"follows": each.follows} for each in engines],
            "levers": [asdict(each) for each in helps],
            "advice": warnings,
        }
        envelope(finite(told))  # an infinite epsilon is null
        return
    _print(plan, found, engines, Console())
    for line in warnings:
        Console().print(f"[bold yellow]Warning:[/] {line}", soft_wrap=True)


def _read_weights(plan: StudyPlan, path: Path | None) -> tuple[PublicStarts, dict[str, State]]:
    if path is None:
        return PublicStarts(), {}
    weights, _ = load_warm_start(path)
    public: dict[str, State] = {}
    for name, section in ((PUBLIC["moments"], plan.moments), (PUBLIC["embedding"], plan.embedding)):
        if section is None:
            continue
        if name not in weights or state_digest(weights[name]) != section.public.sha256:
            raise UsageError(
                "warm_start_differs",
                f"{path} does not hold the weights {name} whose digest the plan names.",
                "Name the file that the plan was made with.",
            )
        public[name] = weights[name]
    return public_starts(path, plan.genes), public


def _loose_delta(plan: StudyPlan) -> list[str]:
    small = [site.name for site in plan.sites if plan.privacy.delta > 1 / (10 * site.nominal_patients)]
    if not small:
        return []
    return [
        f"delta {plan.privacy.delta:g} is above 1 / (10 n) for {', '.join(small)}: "
        "a delta near 1 / n allows a mechanism that reveals whole patients."
    ]


def _print(plan: StudyPlan, found: Forecast, engines: list[EngineAdvice], console: Console) -> None:
    console.print(f"Study {plan.name}, digest {plan.digest}", soft_wrap=True)
    for mark in marks(plan.privacy):
        console.print(f"[bold red]{mark}[/]", soft_wrap=True)
    if not plan.privacy.private:
        console.print(CONSEQUENCES, soft_wrap=True)
    table = Table(
        title=f"Before anything is spent (unit: patient, delta {plan.privacy.delta:g})",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("site", "module", "q", "sigma", "steps", "eps", "sigma/B", "n/s"):
        table.add_column(column, justify="left" if column in ("site", "module") else "right", no_wrap=True)
    for m in found.modules:
        table.add_row(
            m.site,
            m.module,
            f"{m.sample_rate:.3f}",
            f"{m.noise_multiplier:g}",
            str(m.steps),
            shown(m.epsilon_alone),
            f"{m.noise_to_batch:.3f}",
            f"[{_COLOURS[m.reading]}]{m.noise_to_signal:.2f}[/]",
        )
    console.print(table)
    console.print(
        "q: sample rate; sigma: noise multiplier; eps: epsilon of the module alone; B: expected batch, of a statistic "
        "all patients; n/s: noise to signal over the run, of a statistic over all sites",
        style="dim",
    )
    for budget in found.budgets:
        if not plan.privacy.private:
            console.print(
                f"{budget.site}: all modules together epsilon infinite: no patient is protected", soft_wrap=True
            )
            continue
        text = f"{budget.site}: all modules together epsilon {budget.epsilon:.4f} of {plan.privacy.epsilon:g}"
        if len(budget.split_noise) > 1:
            more = max(budget.split_noise.values())
            text += f" (added up {budget.epsilon_summed:.2f}; epsilon split by shares would need {more:.2f} times the noise)"
        console.print(text, soft_wrap=True)
    for statistic in found.statistics:
        console.print(statistic.sentence, soft_wrap=True)
    if found.site_evaluation is not None:
        console.print(found.site_evaluation.sentence, soft_wrap=True)
    for advice in engines:
        verdict = "the plan follows it" if advice.follows else f"the plan has {advice.planned}"
        console.print(
            f"Recommended for {advice.part}: [bold]{advice.recommended}[/] ({verdict}). {advice.reason}", soft_wrap=True
        )
