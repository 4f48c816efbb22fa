"""The round loop over the plan's modules; one checkpoint a round, and one after each fit to a statistic.

Flower's ready-made strategies start at round 1 and wait for everybody; here a killed coordinator goes on where its last
checkpoint stands, slow or refusing sites are left out of a round, and weights of the average are public constants.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsynth.errors import FedsynthError, JobFailed
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, start_from_encoder
from fedsynth.plan import Module, StudyPlan
from fedsynth.progress import say
from fedsynth.records import (
    MESSAGE_TYPES,
    PUBLIC,
    WEIGHTS,
    State,
    check_reply,
    from_record,
    norm_limit,
    task_record,
    task_weights,
    to_record,
)
from fedsynth_server.aggregation import moving_average, site_weights, summed, weighted_average
from fedsynth_server.checkpoint import CurveRow, Receipt, StudyState, first_state, load_state, save_state
from fedsynth_server.fitting.fit import fit_statistic, statistic_template

_POLL_SECONDS = 0.5
_HELLO_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class SiteReply:
    """A site's accepted reply."""

    weights: State
    progress: CurveRow
    receipt: Receipt


def run_study(grid: Grid, plan: StudyPlan, folder: Path, warm_start: dict[str, State] | None = None) -> StudyState:
    """Run, or resume, the study of `plan`; its checkpoint lies in `folder`.

    Raises:
        JobFailed: ``too_few_sites``: fewer than ``aggregation.min_sites`` took part in a round. The checkpoint of the last
            complete round stays, and the same call goes on from there.
    """
    state = load_state(folder, plan)
    if state is None:
        state = first_state(plan, warm_start)
        save_state(state, folder)
    nodes = find_sites(grid, plan)
    for module in plan.modules:
        rounds = plan.training(module).rounds
        for number in range(state.rounds[module] + 1, rounds + 1):
            if module == "radiogenomics" and number == 1 and plan.radiogenomics.start_from_encoder:
                state = state.with_weights(radiogenomics=_from_encoder(plan, state))
            started = time.monotonic()
            state = _round(grid, plan, state, module, number, nodes)
            save_state(state, folder)
            sites = [row for row in state.curves[module] if row["round"] == number]
            say(f"{module} round {number}/{rounds}: {len(sites)} sites, {time.monotonic() - started:.1f} s")
        if module in PUBLIC and module not in state.fits:
            state = fit_statistic(plan, state, module)
            save_state(state, folder)
    return state


def find_sites(grid: Grid, plan: StudyPlan) -> dict[int, str]:
    """Ask every node for its site's name; nodes that the plan does not name take no part.

    Raises:
        JobFailed: ``two_nodes_one_site``: two nodes claim the same site.
    """
    asked = [
        Message(RecordDict(), dst_node_id=node, message_type="query.site", ttl=_HELLO_TIMEOUT_SECONDS)
        for node in grid.get_node_ids()
    ]
    known = {site.name for site in plan.sites}
    found: dict[int, str] = {}
    for node, reply in _exchange(grid, asked, _HELLO_TIMEOUT_SECONDS).items():
        if reply.has_error() or "site" not in reply.content.config_records:
            say(f"node {node} names no site ({_refusal_code(reply)})")
            continue
        name = str(reply.content.config_records["site"].get("name", ""))
        if name in found.values():
            raise JobFailed("two_nodes_one_site", f"Two nodes say that they are site {name!r}.")
        if name in known:
            found[node] = name
    return found


def _round(
    grid: Grid, plan: StudyPlan, state: StudyState, module: Module, number: int, nodes: dict[int, str]
) -> StudyState:
    timeout = plan.aggregation.round_timeout_s
    content = _task_content(plan, state, module, number)
    messages = [
        Message(content, dst_node_id=node, message_type=MESSAGE_TYPES[module], group_id=str(number), ttl=timeout)
        for node in nodes
    ]
    answers = _exchange(grid, messages, timeout)
    accepted: dict[str, SiteReply] = {}
    missing: dict[str, str] = {site.name: "no_answer" for site in plan.sites}
    expected = statistic_template(plan, module) if module in PUBLIC else state.weights[WEIGHTS[module]]
    order = 1 + max((r.order for by_module in state.receipts.values() for r in by_module.values()), default=0)
    for node, reply in answers.items():
        try:
            answer = _accept(reply, module, expected, order)
            _check_not_forgotten(state.receipts.get(nodes[node], {}), answer.receipt)
            accepted[nodes[node]] = answer
            del missing[nodes[node]]
        except FedsynthError as error:
            missing[nodes[node]] = error.code
    for site, code in sorted(missing.items()):
        say(f"{module} round {number}: site {site} left out ({code})")
    if len(accepted) < plan.aggregation.min_sites:
        causes = ", ".join(f"{site}: {code}" for site, code in sorted(missing.items()))
        raise JobFailed(
            "too_few_sites",
            f"{module} round {number}: {len(accepted)} sites took part, the plan wants {plan.aggregation.min_sites} "
            f"({causes}).",
            "The last complete round is stored; the same command goes on from there.",
        )
    return _aggregate(plan, state, module, number, accepted)


def _task_content(plan: StudyPlan, state: StudyState, module: Module, number: int) -> RecordDict:
    content = RecordDict({"task": task_record(plan.digest, module, number)})
    for name in task_weights(plan, module):
        content[name] = to_record(state.weights[name])
    return content


def _accept(reply: Message, module: Module, expected: State, order: int) -> SiteReply:
    if reply.has_error():
        raise JobFailed(_refusal_code(reply), "Flower could not deliver the task or its reply.")
    check_reply(reply.content, module)
    if "refusal" in reply.content:
        raise JobFailed(_refusal_code(reply), "The site refused.")
    weights = from_record(reply.content, WEIGHTS[module], expected, largest_norm=norm_limit(module))
    progress: CurveRow = {key: _number(value) for key, value in reply.content.metric_records["progress"].items()}
    stated = reply.content.config_records["receipt"]
    receipt = Receipt(
        head=str(stated["head"]),
        epsilon=_number(stated["epsilon"]),
        epsilon_lifetime=_number(stated["epsilon_lifetime"]),
        steps=int(_number(stated["steps"])),
        private=stated["private"] is True,
        order=order,
    )
    if not re.fullmatch(r"[0-9a-f]{64}", receipt.head) or receipt.steps < 1:
        raise JobFailed("reply_malformed", "A receipt names no ledger entry, or no steps.")
    return SiteReply(weights, progress, receipt)


def _check_not_forgotten(earlier: dict[Module, Receipt], receipt: Receipt) -> None:
    """A ledger only grows: a site that states less than before has lost entries, and with them what it spent.

    Raises:
        JobFailed: ``ledger_went_back``.
    """
    if any(receipt.epsilon < before.epsilon - 1e-9 for before in earlier.values()):
        raise JobFailed("ledger_went_back", "A site's ledger holds less of this study than it did before.")


def _refusal_code(reply: Message) -> str:
    """The code of a refusal or of Flower's error; nothing but a code is taken from a site to the screen."""
    if reply.has_error():
        return f"flower_error_{reply.error.code}"
    record = reply.content.config_records.get("refusal")
    code = record.get("code") if record is not None else None
    return code if isinstance(code, str) and re.fullmatch(r"[a-z0-9_]{1,64}", code) else "reply_malformed"


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise JobFailed("reply_malformed", "A reply holds something else where a finite number belongs.")
    return float(value)


def _aggregate(
    plan: StudyPlan, state: StudyState, module: Module, number: int, replies: dict[str, SiteReply]
) -> StudyState:
    sites = sorted(replies)
    received = {site: replies[site].weights for site in sites}
    result = summed(received) if module in PUBLIC else weighted_average(received, site_weights(plan, sites))
    weights = {**state.weights, WEIGHTS[module]: result}
    if module == "gan":
        weights["generator_ema"] = moving_average(state.weights["generator_ema"], result, plan.gan.ema_decay)
    rows: list[CurveRow] = [{"round": number, "site": site, **replies[site].progress} for site in sites]
    receipts = {**state.receipts}
    for site in sites:
        receipts[site] = {**receipts.get(site, {}), module: replies[site].receipt}
    return replace(
        state,
        weights=weights,
        rounds={**state.rounds, module: number},
        curves={**state.curves, module: state.curves[module] + rows},
        receipts=receipts,
    )


def _from_encoder(plan: StudyPlan, state: StudyState) -> State:
    autoencoder, dnn = make_autoencoder(plan), make_radiogenomic_dnn(plan)
    autoencoder.load_state_dict(state.weights["autoencoder"])
    dnn.load_state_dict(state.weights["radiogenomics"])
    start_from_encoder(dnn, autoencoder)
    return {name: tensor.clone() for name, tensor in dnn.state_dict().items()}


def _exchange(grid: Grid, messages: Iterable[Message], timeout: float) -> dict[int, Message]:
    """Send `messages` and gather replies by node until all are in or `timeout` seconds have passed.

    An error about a lost node names the wrong source, so replies are matched by the message that they answer.
    """
    messages = list(messages)
    waiting = dict(zip(grid.push_messages(messages), (m.metadata.dst_node_id for m in messages), strict=True))
    replies: dict[int, Message] = {}
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = reply
        if waiting:
            time.sleep(_POLL_SECONDS)
    return replies
