"""Does everything that the site holds agree: ledger, plans, stored answers? Nothing is changed and nothing is contacted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from fedsynth.budget import charge
from fedsynth.deployment.checks import Doubt, Line, check
from fedsynth.errors import Refused
from fedsynth_client.account import account
from fedsynth_client.ledger import Entry, Task
from fedsynth_client.outbox import Outbox, check_ledger_is_whole
from fedsynth_client.site import Site

_TASK = frozenset({"study", "module", "round"})
# What an entry of each kind holds; `_WHOM` was not written by versions that knew training patients only.
_WHOM = frozenset({"population", "split"})
_HOLDS: dict[str, frozenset[str]] = {
    "charge": _TASK | {"sample_rate", "noise_multiplier", "steps", "max_grad_norm", "private"},
    "resumed": _TASK,
    "released": _TASK | {"sha256"},
    "withheld": _TASK | {"code"},
    "sent": _TASK | {"sha256", "records", "to"},
}

_SHORTEST_HEAD = 12  # digits; what `fedsynth study status` shows


def audit(site: Site, head: str | None = None) -> list[Line]:
    """Check the site's whole history, one line a question.

    Args:
        site: the site.
        head: a head that somebody else noted (the coordinator's status, a release); it must be in the chain.
    """
    chain = check(lambda: _chain(site))
    if not chain.ok:  # nothing else can be told from a broken chain
        return [chain]
    entries = site.ledger().entries()
    order = check(lambda: _order(entries))
    if not order.ok:  # nor from a history that could not have been
        return [chain, order]
    questions: list[Callable[[], str]] = [
        lambda: _whole(site),
        lambda: _stored(site, entries),
        lambda: _plans(site, entries),
        lambda: _budget(site),
    ]
    if head is not None:
        questions.append(lambda: _head(entries, head))
    return [chain, order, *(check(question) for question in questions)]


def _chain(site: Site) -> str:
    if not site.ledger_path.is_file():
        raise Refused(
            "ledger_missing", f"There is no ledger in {site.folder}.", "It is made by the first check or task."
        )
    entries = site.ledger().entries()
    return f"chain: {len(entries)} entries, each covers the one before; head {site.ledger().head}"


def _order(entries: list[Entry]) -> str:
    """Every task was charged once before anything else, came to one end, and sent only what it released."""
    stories: dict[Task, list[Entry]] = defaultdict(list)
    for entry in entries:
        held = frozenset(entry.body)
        if entry.kind == "charge" and held >= _WHOM:
            held -= _WHOM
        if held != _HOLDS.get(entry.kind):
            raise Refused("entry_unknown", f"Entry {entry.sequence} is of a kind that this version does not write.")
        stories[_task(entry)].append(entry)
    for task, story in stories.items():
        _check_story(task, [entry.kind for entry in story], story)
    counts = {kind: sum(entry.kind == kind for entry in entries) for kind in ("charge", "released", "withheld", "sent")}
    still_open = sum(not {"released", "withheld"} & {entry.kind for entry in story} for story in stories.values())
    return (
        f"order: {counts['charge']} charges, {counts['released']} releases, {counts['withheld']} withheld, "
        f"{still_open} without a result, {counts['sent']} sent"
    )


def _check_story(task: Task, kinds: list[str], story: list[Entry]) -> None:
    name = f"{task.module} round {task.round} of {task.study[:12]}"
    if kinds[0] != "charge" or kinds.count("charge") != 1:
        raise Refused("result_without_charge", f"{name} was not charged exactly once before anything else.")
    ends = [entry for entry in story if entry.kind in ("released", "withheld")]
    if len(ends) > 1:
        raise Refused("released_twice", f"{name} came to its end {len(ends)} times.")
    for entry in story:
        if entry.kind == "sent" and not (ends and _released(ends[0], entry)):
            raise Refused("sent_without_release", f"{name}: entry {entry.sequence} sent what was not released before.")


def _released(end: Entry, sent: Entry) -> bool:
    return end.kind == "released" and end.sequence < sent.sequence and end.body["sha256"] == sent.body["sha256"]


def _whole(site: Site) -> str:
    check_ledger_is_whole(site.ledger(), Outbox(site.folder))
    return "outbox: no stored answer that the ledger has not charged"


def _stored(site: Site, entries: list[Entry]) -> str:
    released = [entry for entry in entries if entry.kind == "released"]
    outbox = Outbox(site.folder)
    for entry in released:
        outbox.reply(_task(entry), entry.body["sha256"])
    return f"answers: {len(released)} stored, each the one that was released"


def _plans(site: Site, entries: list[Entry]) -> str:
    """Every charge is what its plan asks for: sample rate, noise, steps and clip."""
    charges = [entry for entry in entries if entry.kind == "charge"]
    name = site.policy().site
    gone = []
    for study in dict.fromkeys(entry.body["study"] for entry in charges):
        try:
            plan = site.plan(study)
        except Refused as error:
            if error.code != "plan_not_approved":
                raise
            gone.append(study[:12])
            continue
        for entry in (each for each in charges if each.body["study"] == study):
            module = entry.body["module"]
            cost = charge(plan, name, module)
            asked = cost.mechanism
            terms = (asked.sample_rate, asked.noise_multiplier, asked.steps, cost.max_grad_norm, cost.population)
            names = ("sample_rate", "noise_multiplier", "steps", "max_grad_norm")
            if (*(entry.body[each] for each in names), entry.body.get("population", "train")) != terms:
                raise Refused(
                    "charge_differs_from_plan", f"Entry {entry.sequence} charged other terms than its plan's."
                )
    if gone:
        raise Doubt(
            "plan_gone", f"The plans {', '.join(gone)} were charged, but are not kept here any more.", "Put them back."
        )
    return f"plans: {len(charges)} charges, each with the terms of its plan"


def _budget(site: Site) -> str:
    """What was spent in all is within the policy, and was spent with unpredictable noise."""
    current, policy = account(site), site.policy()
    charged = any(spending.population == "holdout" for spending in current.spendings)
    if charged and current.holdout_epsilon > current.max_holdout_epsilon + 1e-9:
        raise Refused(
            "holdout_budget_exceeded",
            f"Held-out patients have spent epsilon {current.holdout_epsilon:.4f}; the policy allows "
            f"{current.max_holdout_epsilon:g}.",
            "The policy was tightened, or the cohort prepared anew, since. No evaluation can run under it.",
        )
    if math.isinf(current.epsilon) and current.marks:
        if policy.allow_not_private:
            raise Doubt("not_private", f"budget: {' '.join(current.marks)}", "See the ledger.")
        raise Refused(
            "not_private_not_allowed",
            f"The policy does not allow what was done. {' '.join(current.marks)}",
            "The policy was tightened since. No private study can use these patients any more.",
        )
    if current.epsilon > current.max_epsilon + 1e-9:
        raise Refused(
            "budget_exceeded",
            f"This cohort has spent epsilon {current.epsilon:.4f}; the policy allows {current.max_epsilon:g}.",
            "The policy was tightened since. Nothing more can run under it.",
        )
    if not all(spending.private for spending in current.spendings):
        raise Doubt("not_private", " ".join(current.marks), "See the ledger.")
    text = f"budget: epsilon {current.epsilon:.4f} of {current.max_epsilon:g} at delta {current.delta:g}"
    if charged:
        text += f"; of held-out patients {current.holdout_epsilon:.4f} of {current.max_holdout_epsilon:g}"
    return text


def _head(entries: list[Entry], head: str) -> str:
    for entry in entries:
        if len(head) >= _SHORTEST_HEAD and entry.digest.startswith(head.lower()):
            return f"head: the one given is entry {entry.sequence} of {len(entries)}"
    raise Refused(
        "head_unknown",
        f"The head given (at least {_SHORTEST_HEAD} digits) is no entry of this ledger: the ledger is an older copy, or "
        "another one.",
        "Restore the newest ledger.",
    )


def _task(entry: Entry) -> Task:
    return Task(entry.body["study"], entry.body["module"], entry.body["round"])
