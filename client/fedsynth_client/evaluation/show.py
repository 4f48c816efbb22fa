"""Evaluations, attacks and audits on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsynth.attacks.values import Attacks, Rate
from fedsynth.auditing.values import Audit
from fedsynth.evaluation.values import Evaluation, Figure

_ARROWS = {"higher": "↑", "lower": "↓", "none": " "}
_VIEWS = {"release": "With the release alone", "coordinator": "With every message of the training"}


def show_evaluation(found: Evaluation, console: Console | None = None) -> None:
    """Print every figure with its interval, beside its ceiling and its floor."""
    console = console or Console()
    console.print(
        f"{found.n_synthetic} synthetic patients; {found.n_train} real patients that were trained on, {found.n_holdout} "
        f"held out. {escape(found.data)}.",
        soft_wrap=True,
    )
    for section in found.sections:
        table = Table(title=escape(section.title), title_justify="left", box=SIMPLE_HEAD)
        table.add_column("measure", ratio=1)
        for name in ("synthetic", "95 % interval", "real", "floor"):
            table.add_column(name, justify="right", no_wrap=True)
        for figure in section.figures:
            table.add_row(f"{_ARROWS[figure.better]} {escape(figure.metric)}", *_cells(figure))
        console.print(table)
        for reason, metrics in _unmeasured(section.figures).items():
            console.print(f"[dim]{escape('; '.join(metrics))}. {escape(reason)}[/]", soft_wrap=True)


def show_attacks(found: Attacks, console: Console | None = None) -> None:
    """Print every attack with its intervals."""
    console = console or Console()
    console.print(f"{found.n_synthetic} synthetic patients attacked. {escape(found.data)}.", soft_wrap=True)
    for view, title in _VIEWS.items():
        attacks = [attack for attack in found.membership if attack.view == view]
        if not attacks:
            continue
        table = Table(title=f"Who was trained on? {title} (AUC 0.5 is guessing)", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("attack")
        for name in ("members/others", "AUC", "found at 1 % false"):
            table.add_column(name, justify="right", no_wrap=True)
        for attack in attacks:
            at = next((point for point in attack.points if point.asked == 0.01), None)
            table.add_row(
                escape(attack.title) + (f", {escape(attack.site)}" if attack.site else ""),
                f"{attack.members}/{attack.non_members}",
                _rate(attack.area),
                "-" if at is None else _percents(at.true_positive_rate),
            )
        console.print(table)
    if found.attributes:
        table = Table(title="What can be guessed of a member", title_justify="left", box=SIMPLE_HEAD)
        for name in ("attack", "score"):
            table.add_column(name, min_width=10)
        for name in ("members", "others", "difference"):
            table.add_column(name, justify="right")
        for guess in found.attributes:
            scores = (_number(guess.members), _number(guess.non_members), _rate(guess.gap))
            table.add_row(escape(guess.title), escape(guess.metric), *scores)
        console.print(table)
    for copies in found.copies:
        console.print(
            f"Copies of {copies.of}: {copies.found} of {copies.compared} synthetic patients are as like a training patient "
            f"as a copy would be; {copies.found_holdout} are as like a held-out patient, whom nobody can have copied.",
            soft_wrap=True,
        )
    for line in found.not_done:
        console.print(f"[yellow]Not done:[/] {escape(line)}", soft_wrap=True)


def show_audit(found: Audit, console: Console | None = None) -> None:
    """Print the bound of every module beside what is claimed, and every direct check."""
    console = console or Console()
    table = Table(title="Least epsilon that the audit proves", title_justify="left", box=SIMPLE_HEAD)
    for name in ("module", "site"):
        table.add_column(name)
    for name in ("claimed", "at least", "could have shown", "right guesses"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.modules:
        colour = "green" if each.ok else "bold red"
        table.add_row(
            each.module,
            escape(each.site),
            _number(each.claimed_epsilon),
            f"[{colour}]{_number(each.epsilon_bound)}[/]",
            _number(each.reachable),
            f"{each.correct} of {each.guesses}",
        )
    console.print(table)
    for check in found.checks:
        verdict = "[green]ok[/]" if check.ok else "[bold red]failed[/]"
        about = f" ({check.module})" if check.module else ""
        console.print(f"{verdict} {escape(check.title)}{about}: {escape(check.finding)}", soft_wrap=True)
    console.print("[green]Nothing that is claimed was refuted.[/]" if found.ok else "[bold red]A claim was refuted.[/]")


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    ends = "" if figure.interval is None else f"{_number(figure.interval[0])} to {_number(figure.interval[1])}"
    return _number(figure.synthetic), ends, _number(figure.real), _number(figure.floor)


def _unmeasured(figures: Sequence[Figure]) -> dict[str, list[str]]:
    """The measures without a value by the reason, which the end of a note says."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        if figure.synthetic is None:
            reason = figure.note[max(figure.note.find("Not measured"), 0) :] or "Not measured."
            found.setdefault(reason, []).append(figure.metric)
    return found


def _rate(rate: Rate) -> str:
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f})"


def _percents(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
