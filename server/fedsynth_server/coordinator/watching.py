"""Watching a study: a live view on a terminal, one line a change elsewhere."""

from __future__ import annotations

import sys
import time

from fedsynth_server.coordinator.overview import Overview, overview, render
from fedsynth_server.coordinator.settings import Study

_OVER = ("finished", "failed")


def watch_study(study: Study, seconds: float) -> None:
    """Show the study's overview every `seconds` until it has ended."""
    if sys.stdout.isatty():
        _live(study, seconds)
    else:
        _lines(study, seconds)


def _live(study: Study, seconds: float) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        while True:
            view = overview(study)
            live.update(Text("\n".join(render(view))), refresh=True)
            if view.phase in _OVER:
                return
            time.sleep(seconds)


def _lines(study: Study, seconds: float) -> None:
    before: dict[str, str] = {}
    while True:
        view = overview(study)
        now = _facts(view)
        for what, fact in now.items():
            if before.get(what) != fact:
                print(f"{what}: {fact}", flush=True)
        if view.phase in _OVER:
            return
        before = now
        time.sleep(seconds)


def _facts(view: Overview) -> dict[str, str]:
    """What a line is printed for when it changes."""
    where = f"{view.module} round {view.round} of {view.rounds}" if view.module else "before the first round"
    facts = {view.study: f"{view.phase}, {where}" + (f" [{view.code}]" if view.code else "")}
    for site in view.sites:
        presence = {None: "", True: "connected", False: "not connected"}[site.online]
        code = f" [{site.code}]" if site.code else ""
        facts[site.name] = ", ".join(part for part in (presence, site.state) if part) + code
    for process in view.processes:
        again = f", started again, {process.restarts} in all" if process.restarts else ""
        facts[process.name] = process.state + again
    return facts
