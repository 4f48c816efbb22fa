"""What `fedsynth study check` prints."""

from __future__ import annotations

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsynth.cli import envelope
from fedsynth.plan import StudyPlan
from fedsynth_server.forecast import HARD, HOPELESS, Forecast, forecast


def show_forecast(plan: StudyPlan, as_json: bool) -> None:
    """Print cost and noise of `plan` by site and module, and the advice."""
    found = forecast(plan)
    if as_json:
        envelope({"digest": plan.digest, **asdict(found)})
        return
    _print(plan, found, Console())


def _print(plan: StudyPlan, found: Forecast, console: Console) -> None:
    console.print(f"Study {plan.name}, digest {plan.digest}", soft_wrap=True)
    table = Table(
        title=f"Before anything is spent (unit: patient, delta {plan.privacy.delta:g})",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("site", "module", "q", "sigma", "steps", "eps", "sigma/B", "n/s"):
        table.add_column(column, justify="left" if column in ("site", "module") else "right", no_wrap=True)
    for m in found.modules:
        colour = "red" if m.noise_to_signal > HOPELESS else "yellow" if m.noise_to_signal > HARD else "green"
        table.add_row(
            m.site,
            m.module,
            f"{m.sample_rate:.3f}",
            f"{m.noise_multiplier:g}",
            str(m.steps),
            f"{m.epsilon_alone:.3f}",
            f"{m.noise_to_batch:.3f}",
            f"[{colour}]{m.noise_to_signal:.2f}[/]",
        )
    console.print(table)
    console.print(
        "q: sample rate; sigma: noise multiplier; eps: epsilon of the module alone; B: expected batch; "
        "n/s: noise to signal over the run",
        style="dim",
    )
    for site, value in found.epsilon.items():
        console.print(f"{site}: all modules together epsilon {value:.4f} of {plan.privacy.epsilon:g}")
    for line in found.advice:
        console.print(f"[bold yellow]Warning:[/] {line}", soft_wrap=True)
