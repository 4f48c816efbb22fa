"""Where a study stands, gathered from status file, registry, supervisor and SuperLink, and what a person can do about it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from fedsynth.deployment.supervisor import is_running, read_status
from fedsynth.errors import FedsynthError
from fedsynth.marks import marks
from fedsynth_server.coordinator.progress import progress_of
from fedsynth_server.coordinator.registry import Registry, read_registry
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.status import StudyStatus
from fedsynth_server.status import read_status as read_study_status


class SiteView(BaseModel):
    """One site of the plan.

    Attributes:
        name: its name.
        fingerprint: of its key; None while it was not added.
        revoked: whether it was added, and its key revoked since.
        registered: whether SuperLink knows its key; None while SuperLink does not answer.
        online: whether it is connected; None while SuperLink does not answer.
        last_seen: when it last connected or left.
        head: the newest entry of its ledger that the coordinator has a receipt of; for `fedsynth site audit verify --head`.
        state: what the study last saw of it, with `code`, `module`, `round` and `since`.
    """

    name: str
    fingerprint: str | None = None
    revoked: bool = False
    registered: bool | None = None
    online: bool | None = None
    last_seen: datetime | None = None
    head: str = ""
    state: str = "unknown"
    code: str = ""
    module: str = ""
    round: int = 0
    since: datetime | None = None


class ProcessView(BaseModel):
    """One supervised process."""

    name: str
    state: str
    pid: int | None
    restarts: int


class Overview(BaseModel):
    """Everything that `fedsynth study status` shows; `marks` says why the study protects nobody, if so."""

    marks: list[str] = []
    study: str
    digest: str
    running: bool
    superlink: bool
    processes: list[ProcessView]
    phase: str
    code: str
    message: str
    module: str
    round: int
    rounds: int
    done: str
    since: datetime | None
    run: str
    min_sites: int
    sites: list[SiteView]
    advice: list[str]


# What a coordinator can do about a site's refusal; codes that are not listed are explained by the site's own log.
_REMEDIES = {
    "plan_not_approved": "has not approved this plan; it does so with `fedsynth site approve` (digest {digest})",
    "plan_altered": "holds a plan that was changed after its approval; it approves the plan anew",
    "site_not_in_plan": "runs under another name than the plan's; it corrects its policy",
    "task_of_another_site": "is not the site under whose name its key was added; revoke it, and add the right key",
    "policy_missing": "has no policy, so it allows nothing",
    "module_not_allowed": "does not allow this module",
    "not_private_not_allowed": "does not allow studies without privacy",
    "reproducible_noise_not_allowed": "does not allow reproducible noise",
    "epsilon_above_policy": "allows less epsilon than the plan asks for",
    "budget_exceeded": "has not enough budget left for this plan",
    "cohort_too_small": "has fewer patients than its policy wants for this module",
    "cohort_missing": "has prepared no cohort",
    "cohort_of_other_settings": "prepared its cohort for another plan; it prepares one for this plan",
    "bundle_not_allowed": "has another version of fedsynth; both sides install the same",
    "disk_full": "has a full disk",
    "ledger_went_back": "sent a receipt of a ledger that holds less than before; ask what was restored there",
    "epsilon_above_plan": "sent a receipt that the plan does not allow; its answers are left out; ask the site",
    "steps_above_plan": "sent a receipt that the plan does not allow; its answers are left out; ask the site",
    "receipt_not_private": "states that it added no noise, or noise from a seed; its answers are left out; ask the site",
    "epsilon_below_charges": "states less than its answers must have cost; both sides install the same version",
    "ledger_set_back": "has a ledger that was set back, e.g. restored from a copy; it must not go on with that one",
    "no_answer": "did not answer within the round's time; it goes on, and is asked again",
    "not_sent": "was not there any more when it was to be asked; it is asked again",
}


def overview(study: Study) -> Overview:
    """Gather; asks SuperLink only when the processes run.

    Raises:
        UsageError: of plan, settings or registry.
    """
    plan, status = study.plan, read_study_status(study.folder)
    supervisor = read_status(study.folder)
    running = is_running(study.folder)
    registry = read_registry(study.folder)
    known, run = _asked(study) if running else (None, "")
    processes = [
        ProcessView(name=child.name, state=child.state, pid=child.pid, restarts=child.restarts)
        for child in (supervisor.children if supervisor is not None else [])
    ]
    try:
        progress = progress_of(study.folder, plan)
        done, finished = (progress.summary(plan), progress.finished(plan)) if progress else ("nothing", False)
        heads = progress.heads if progress else {}
    except FedsynthError as error:
        done, finished, heads = error.message, False, {}
    gathered = Overview(
        marks=marks(plan.privacy),
        study=plan.name,
        digest=plan.digest,
        running=running,
        superlink=known is not None,
        processes=processes,
        phase=_phase(status, running, finished),
        code=status.code if status else "",
        message=status.message if status else "",
        module=status.module if status else "",
        round=status.round if status else 0,
        rounds=status.rounds if status else 0,
        done=done,
        since=status.since if status else None,
        run=run,
        min_sites=plan.aggregation.min_sites,
        sites=[_site(site.name, status, registry, known, heads.get(site.name, "")) for site in plan.sites],
        advice=[],
    )
    return gathered.model_copy(update={"advice": advice(gathered, study.folder)})


def _phase(status: StudyStatus | None, running: bool, finished: bool) -> str:
    """The phase; ``stopped`` where the status file tells of processes that are no more."""
    if finished:
        return "finished"
    if status is None:
        return "waiting" if running else "not started"
    return status.phase if running or status.phase in ("finished", "failed") else "stopped"


def _asked(study: Study) -> tuple[dict[str, Any] | None, str]:
    """Nodes by public key, and a line on the newest run; None when SuperLink does not answer."""
    from fedsynth_server.coordinator.control import SuperlinkUnreachable, open_control

    try:
        with open_control(study) as control:
            nodes = {node.public_key.decode("ascii", "replace").strip(): node for node in control.nodes()}
            runs = control.runs()
    except SuperlinkUnreachable:
        return None, ""
    if not runs:
        return nodes, "none yet"
    outcome = f": {runs[0].outcome} {runs[0].details}".rstrip() if not runs[0].active else ""
    return nodes, f"{runs[0].status}{outcome}"


def _site(
    name: str, status: StudyStatus | None, registry: Registry, known: dict[str, Any] | None, head: str
) -> SiteView:
    record = registry.valid().get(name)
    node = known.get(record.public_key.strip()) if record is not None and known is not None else None
    seen = status.sites.get(name) if status is not None else None
    return SiteView(
        name=name,
        fingerprint=record.fingerprint if record is not None else None,
        revoked=record is None and any(each.name == name for each in registry.sites),
        registered=None if known is None else node is not None,
        online=None if known is None else node is not None and node.online,
        last_seen=node.last_seen if node is not None else None,
        head=head,
        **(seen.model_dump() if seen is not None else {}),
    )


def advice(view: Overview, folder: object) -> list[str]:
    """What is missing and what to do, most pressing first."""
    if view.phase == "finished":
        return [f"The study is finished: fedsynth release make {folder} --out RELEASE --key KEY"]
    found: list[str] = []
    if view.phase == "failed":
        found.append(f"Mend the cause ({view.code}), then: fedsynth study start {folder}")
    elif not view.running:
        left = [process.name for process in view.processes if process.pid is not None]
        found.append(
            f"Nothing supervises this study. Start it, or go on: fedsynth study start {folder}"
            + (f" (it takes over what was left running: {', '.join(left)})" if left else "")
        )
    elif not view.superlink:
        found.append("SuperLink does not answer: it is starting, or logs/superlink.log says why not.")
    found += [
        f"{p.name} was started again {_times(p.restarts)}: logs/{p.name}.log" for p in view.processes if p.restarts
    ]
    for site in view.sites:
        if site.fingerprint is None and not site.revoked:
            found.append(f"{site.name} is not added: fedsynth study add-site {folder} KEY.pub --name {site.name}")
        elif site.revoked:
            found.append(f"{site.name}'s key is revoked; with a new one it can be added anew")
        elif site.registered is False and view.superlink:
            found.append(f"{site.name} is added and will be registered within seconds")
        elif site.online is False and view.superlink:
            found.append(f"{site.name} is not connected: there, `fedsynth site check` and `fedsynth site start`")
        elif site.code in _REMEDIES and site.state in ("refused", "lost"):
            found.append(f"{site.name} {_REMEDIES[site.code].format(digest=view.digest)} [{site.code}]")
        elif site.state == "refused":
            found.append(f"{site.name} refused [{site.code}]; its own log says why")
    if view.phase == "paused":
        online = sum(site.online is True for site in view.sites)
        found.append(
            f"The study needs {view.min_sites} sites that take part and asks again by itself; {online} are connected."
        )
    return found


def render(view: Overview) -> list[str]:
    """The overview as lines of text."""
    where = f"{view.module} round {view.round} of {view.rounds}" if view.module else "before the first round"
    lines = [
        f"study      {view.study} ({view.digest[:12]})",
        *(f"           {mark}" for mark in view.marks),
        f"phase      {view.phase}{_since(view.since)}: {where}",
        *([f"           {view.message}"] if view.message and view.phase in ("paused", "failed", "running") else []),
        f"done       {view.done}",
        f"processes  {', '.join(_process(process) for process in view.processes) or 'none'}",
        *([f"run        {view.run}"] if view.run else []),
        f"sites      {len(view.sites)} in the plan, {view.min_sites} needed",
    ]
    width = max(len(site.name) for site in view.sites)
    lines += [f"  {site.name:{width}}  {_site_line(site)}" for site in view.sites]
    return lines + [f"- {line}" for line in view.advice]


def _process(process: ProcessView) -> str:
    return f"{process.name} {process.state}" + (
        f" (started again {process.restarts} times)" if process.restarts else ""
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _site_line(site: SiteView) -> str:
    if site.fingerprint is None:
        return "revoked" if site.revoked else "not added"
    presence = {None: "added", True: "connected", False: "not connected"}[site.online]
    if site.registered is False:
        presence = "added, not registered yet"
    seen = f"{site.state} {site.module} {site.round}".strip() if site.module else ""
    code = f" [{site.code}]" if site.code else ""
    ledger = f", ledger {site.head[:12]}" if site.head else ""
    return f"{presence}" + (f", {seen}{code}{_since(site.since)}" if seen else "") + ledger


def _since(moment: datetime | None) -> str:
    """How long ago, in the unit that a person would use."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f" for {seconds / size:.0f} {unit}"
    return f" for {seconds:.0f} s"
