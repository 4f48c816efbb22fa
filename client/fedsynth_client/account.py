"""The ledger as a data officer reads it: what was spent on what, and what is left."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from fedsynth.dp.accounting import PRV_LEAST_DELTA, Accountant, Mechanism, epsilon
from fedsynth.epsilons import Epsilon, shown
from fedsynth.errors import FedsynthError, UsageError
from fedsynth.plan import Population
from fedsynth_client.cohort import read_entries, split_digest
from fedsynth_client.ledger import Entry
from fedsynth_client.site import Site


class Spending(BaseModel):
    """What one module of one study was charged, and to whom.

    `epsilon_alone` is of this module by itself at the policy's delta; infinite (in JSON ``null``) without privacy. `private`
    is false of a study without privacy, and where the noise came from a fixed seed.
    """

    study: str
    module: str
    rounds: int
    steps: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    private: bool
    epsilon_alone: Epsilon
    population: Population = "train"


class Account(BaseModel):
    """The whole ledger of a site. `epsilon` composes all spendings at `delta`; it is less than the sum of its parts.

    `epsilon`, `max_epsilon` and `left` are of training patients; the same names with `holdout` are of held-out patients, who
    are other people. Where the cohort was prepared anew since a charge, that charge counts against both.
    `accountant` is that of the study charged last: as `epsilon` was judged then, so it reads here.
    Where these patients took part in a study without privacy their epsilon is infinite, in JSON ``null``. `marks` says in
    words why something of the account protects nobody; it is empty where all is private.
    """

    site: str
    marks: list[str]
    spendings: list[Spending]
    epsilon: Epsilon
    delta: float
    accountant: Accountant
    max_epsilon: float
    left: float
    holdout_epsilon: Epsilon
    max_holdout_epsilon: float
    holdout_left: float
    entries: int
    messages_sent: int
    head: str


def account(site: Site) -> Account:
    """Read the ledger, check its chain, and compose what it holds at the policy's delta.

    Raises:
        Refused: ``ledger_tampered`` or ``policy_missing``.
    """
    policy, ledger = site.policy(), site.ledger()
    entries = ledger.entries()
    charges = [entry for entry in entries if entry.kind == "charge"]
    groups = list(dict.fromkeys((entry.body["study"], entry.body["module"]) for entry in charges))
    delta = policy.max_delta or 1e-5
    by = _accountant(site, charges[-1].body["study"]) if charges else "rdp"
    if delta < PRV_LEAST_DELTA:  # the policy was tightened since
        by = "rdp"
    split = current_split(site)
    spent = epsilon(ledger.history(split=split), delta, by)
    held_out = epsilon(ledger.history(population="holdout", split=split), delta, by)
    return Account(
        site=policy.site,
        marks=_marks(charges),
        spendings=[
            _spending([e for e in charges if (e.body["study"], e.body["module"]) == group], delta, by)
            for group in groups
        ],
        epsilon=spent,
        delta=delta,
        accountant=by,
        max_epsilon=policy.max_epsilon,
        left=max(policy.max_epsilon - spent, 0.0),
        holdout_epsilon=held_out,
        max_holdout_epsilon=policy.max_holdout_epsilon,
        holdout_left=max(policy.max_holdout_epsilon - held_out, 0.0),
        entries=len(entries),
        messages_sent=sum(entry.kind == "sent" for entry in entries),
        head=ledger.head,
    )


def _marks(charges: list[Entry]) -> list[str]:
    """What was charged and protects nobody, in words."""
    bare = _studies(entry for entry in charges if entry.body["noise_multiplier"] == 0)
    seeded = _studies(entry for entry in charges if entry.body["noise_multiplier"] > 0 and not entry.body["private"])
    found = []
    if bare:
        found.append(
            f"NOT PRIVATE: this cohort took part in a study without privacy ({bare}). The epsilon of these patients is "
            "infinite, for ever, and no private study can use them."
        )
    if seeded:
        found.append(f"NOT PRIVATE: noise came from a fixed seed ({seeded}), so what it hid is not hidden.")
    return found


def _studies(charges: Iterable[Entry]) -> str:
    return ", ".join(dict.fromkeys(entry.body["study"][:8] for entry in charges))


def current_split(site: Site) -> str | None:
    """How the site's cohort is split now; None without a cohort."""
    try:
        return split_digest(read_entries(site.cohort_path))
    except UsageError:  # the ledger outlives cohorts
        return None


def _accountant(site: Site, study: str) -> Accountant:
    """The accountant of the approved plan of digest `study`."""
    try:
        return site.plan(study).privacy.accountant
    except FedsynthError:
        # The ledger outlives plans: one that was taken away or can no longer be read must not hide what was spent, and
        # RDP bounds it whatever the plan said.
        return "rdp"


def _spending(charges: list[Entry], delta: float, by: Accountant) -> Spending:
    body = charges[0].body
    history = [Mechanism(c.body["sample_rate"], c.body["noise_multiplier"], c.body["steps"]) for c in charges]
    return Spending(
        study=body["study"],
        module=body["module"],
        rounds=len(charges),
        steps=sum(m.steps for m in history),
        sample_rate=body["sample_rate"],
        noise_multiplier=body["noise_multiplier"],
        max_grad_norm=body["max_grad_norm"],
        private=all(c.body["private"] for c in charges),
        epsilon_alone=epsilon(history, delta, by),
        population=body.get("population", "train"),
    )


def render(current: Account) -> None:
    """Print the account as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"Privacy ledger of site {current.site} (unit: patient, delta {current.delta:g}, {current.accountant})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("study", "module", "steps", "q", "sigma", "clip", "eps", "private"):
        table.add_column(name, justify="left" if name in ("study", "module") else "right", no_wrap=name == "module")
    for s in current.spendings:
        table.add_row(
            s.study[:8],
            s.module,
            str(s.steps),
            f"{s.sample_rate:.3f}",
            f"{s.noise_multiplier:g}",
            f"{s.max_grad_norm:g}" if s.noise_multiplier else "none",
            shown(s.epsilon_alone),
            "yes" if s.private else "NO",
        )
    console.print(table)
    console.print("q: sample rate; sigma: noise multiplier; eps: epsilon of the module alone", style="dim")
    held_out = (
        f"Held-out patients, other people: epsilon {shown(current.holdout_epsilon, 4)} of {current.max_holdout_epsilon:g}; "
        f"left {current.holdout_left:.4f}.\n"
    )
    for mark in current.marks:
        console.print(f"[bold red]{mark}[/]")
    console.print(
        f"Spent, all composed: epsilon {shown(current.epsilon, 4)} of {current.max_epsilon:g}; left {current.left:.4f}.\n"
        + (held_out if any(s.population == "holdout" for s in current.spendings) or current.max_holdout_epsilon else "")
        + f"{current.entries} entries, chain intact, {current.messages_sent} replies sent; head {current.head[:16]}."
    )
