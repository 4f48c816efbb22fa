"""What a site's node is doing: its processes, the way to the coordinator, what it answered and sent last."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from fedsynth.deployment.checks import Line, State
from fedsynth.deployment.supervisor import SupervisorStatus, read_status
from fedsynth_client.node.doctor import coordinator_line, running_lines
from fedsynth_client.node.runner import RunnerStatus, read_runner_status
from fedsynth_client.node.settings import load_settings
from fedsynth_client.sent import Sent, sent
from fedsynth_client.site import Site


class Answer(BaseModel):
    """A check's outcome; the fields of `fedsynth.deployment.checks.Line`."""

    state: State
    what: str
    remedy: str
    code: str


class NodeStatus(BaseModel):
    """Everything that `fedsynth site status` shows. `running` is whether a supervisor runs; None stands for never.

    `private` is whether all that the ledger charged was noised, and unpredictably.
    """

    running: bool
    supervisor: SupervisorStatus | None
    runner: RunnerStatus | None
    node: Answer
    coordinator: Answer | None
    last_sent: Sent | None
    private: bool


def node_status(folder: Path, ask_coordinator: bool = True) -> NodeStatus:
    """Gather the status; only the coordinator's gateway is contacted, and only if `ask_coordinator`.

    Raises:
        UsageError: ``node_settings_missing`` and its like.
        Refused: ``ledger_tampered``.
    """
    settings, supervisor = load_settings(folder), read_status(folder)
    site = Site(folder)
    found = sent(site) if site.ledger_path.is_file() else []
    (node,) = running_lines(folder, settings)
    return NodeStatus(
        running=supervisor is not None and supervisor.state in ("running", "stopping"),
        supervisor=supervisor,
        runner=read_runner_status(folder),
        node=_answer(node),
        coordinator=_answer(coordinator_line(folder, settings)) if ask_coordinator else None,
        last_sent=found[-1] if found else None,
        private=not site.ledger_path.is_file() or site.ledger().is_private(),
    )


def _answer(line: Line) -> Answer:
    return Answer(state=line.state, what=line.what, remedy=line.remedy, code=line.code)


def lines_of(status: NodeStatus) -> list[Line]:
    """The status as a person reads it."""
    lines = [_supervisor(status.supervisor)]
    for child in status.supervisor.children if status.supervisor is not None and status.running else []:
        what = f"{child.name}: {child.state}" + (f", process {child.pid}" if child.pid else "")
        if child.restarts:
            what += f", started again {child.restarts} times (last exit code {child.exit_code})"
        fine = child.state == "running"
        lines.append(Line("ok" if fine else "warn", what, "" if fine else f"See logs/{child.name}.log."))
    lines += [Line(each.state, each.what, each.remedy, each.code) for each in (status.node, status.coordinator) if each]
    last = status.runner.last if status.runner is not None else None
    lines.append(
        Line(
            "ok",
            f"last task: {last.what}, {last.outcome}, {last.at:%Y-%m-%d %H:%M:%S} UTC" if last else "last task: none",
        )
    )
    out = status.last_sent
    lines.append(
        Line(
            "ok",
            f"last sent: {out.module} round {out.round}, {out.bytes:,} bytes, {out.at}"
            if out
            else "last sent: nothing",
        )
    )
    if not status.private:
        what = "ledger: NOT PRIVATE, something was charged without noise or with noise from a fixed seed"
        lines.append(Line("warn", what, "fedsynth site ledger FOLDER", "not_private"))
    return lines


def _supervisor(status: SupervisorStatus | None) -> Line:
    if status is None:
        return Line("warn", "never started", "fedsynth site start FOLDER")
    what = f"{status.state} since {status.since:%Y-%m-%d %H:%M:%S} UTC (process {status.pid})"
    if status.state == "running":
        return Line("ok", what)
    if status.state == "failed":
        return Line("fail", f"{status.state} (process {status.pid})", "See logs/, then start it again.", "node_failed")
    return Line("warn", what if status.state == "stopping" else "stopped", "fedsynth site start FOLDER")
