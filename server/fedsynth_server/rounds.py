"""The round loop over the plan's modules; one checkpoint a round, and one after each fit to a statistic.

Flower's ready-made strategies start at round 1 and wait for everybody; here a killed coordinator goes on where its last
checkpoint stands, a lost task is sent again, slow or refusing sites are left out of a round, a study with too few sites
pauses, and weights of the average are public constants.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedsynth.budget import evaluation_mechanism, noise_multipliers
from fedsynth.errors import FedsynthError, JobFailed
from fedsynth.marks import marks
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn, start_from_encoder
from fedsynth.plan import Activity, Module, StudyPlan
from fedsynth.progress import say
from fedsynth.records import (
    EVALUATORS,
    MESSAGE_TYPES,
    PUBLIC,
    WEIGHTS,
    State,
    check_reply,
    from_record,
    norm_limit,
    progress_of,
    task_record,
    task_weights,
    to_record,
)
from fedsynth_server.aggregation import averaging_decay, bounded, combined, moving_average, site_weights, summed
from fedsynth_server.checkpoint import CurveRow, Evaluated, Receipt, StudyState, first_state, load_state, save_state
from fedsynth_server.fitting.fit import fit_statistic, statistic_template
from fedsynth_server.site_evaluation import TOTAL, evaluation_template, make_evaluators, save_site_evaluation
from fedsynth_server.statement import check_holdout_receipt, check_receipts
from fedsynth_server.status import StatusFile

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0  # between two looks at which nodes are connected
_HELLO_TIMEOUT_SECONDS = 120.0
# What Flower reports when a task or its reply did not arrive. Sending it again is safe: a site answers a task that it has
# done from its stored reply, and goes on with one that was cut short under the charge that it made.
_LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
_LOSSES_A_ROUND = 5  # a site whose process dies of every task is not asked for ever


@dataclass(frozen=True)
class Patience:
    """How long a coordinator waits for sites that are not there.

    Attributes:
        absent_s: how long a round that has enough sites stays open for sites of the plan that are not connected.
        shortage_s: how long the study pauses when fewer than ``aggregation.min_sites`` took part, before it gives up.
        retry_s: between two attempts while it pauses.
        silent_s: after how long a task is sent again to a site that is connected and says nothing; the next time after
            twice as long, and so on. Flower gives some replies up without a word, e.g. when a connection ends within the
            TLS handshake; a site that is still at work answers the second task from what it stores for the first.
    """

    absent_s: float = 0.0
    shortage_s: float = 0.0
    retry_s: float = 15.0
    silent_s: float = math.inf


@dataclass(frozen=True)
class SiteReply:
    """A site's accepted reply."""

    weights: State
    progress: CurveRow
    receipt: Receipt


@dataclass
class _Round:
    """What a round has gathered so far."""

    module: Activity
    number: int
    content: dict[str, RecordDict]
    expected: State
    accepted: dict[str, SiteReply] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def run_study(
    grid: Grid,
    plan: StudyPlan,
    folder: Path,
    warm_start: dict[str, State] | None = None,
    patience: Patience = Patience(),
) -> StudyState:
    """Run, or resume, the study of `plan`; its checkpoint and status lie in `folder`.

    Raises:
        JobFailed: ``too_few_sites``: fewer than ``aggregation.min_sites`` took part in a round for as long as `patience`
            allows. The checkpoint of the last complete round stays, and the same call goes on from there.
    """
    status = StatusFile(folder, plan)
    try:
        state = _run(grid, plan, folder, warm_start, patience, status)
    except FedsynthError as error:
        status.phase("failed", error.message, error.code)
        raise
    status.phase("finished", "All rounds are done; the study can be released.")
    return state


def _run(
    grid: Grid,
    plan: StudyPlan,
    folder: Path,
    warm_start: dict[str, State] | None,
    patience: Patience,
    status: StatusFile,
) -> StudyState:
    state = load_state(folder, plan)
    if state is None:
        state = first_state(plan, warm_start)
        save_state(state, folder)
    sites = _Sites(grid, plan)
    for module in plan.modules:
        rounds = plan.training(module).rounds
        for number in range(state.rounds[module] + 1, rounds + 1):
            if module == "radiogenomics" and number == 1 and plan.radiogenomics.start_from_encoder:
                state = state.with_weights(radiogenomics=_from_encoder(plan, state))
            started = time.monotonic()
            status.round(module, number, rounds)
            replies = _gather(grid, plan, state, module, number, sites, patience, status)
            state = _aggregate(plan, state, module, number, replies)
            save_state(state, folder)
            say(f"{module} round {number}/{rounds}: {len(replies)} sites, {time.monotonic() - started:.1f} s")
        if module in PUBLIC and module not in state.fits:
            status.phase("running", f"Fitting to the statistic of {module}.")
            state = fit_statistic(plan, state, module)
            save_state(state, folder)
    if plan.site_evaluation is not None:
        if state.evaluated is None:
            state = _evaluate(grid, plan, state, folder, sites, patience, status)
        save_site_evaluation(plan, state, folder)
    return state


def _evaluate(
    grid: Grid,
    plan: StudyPlan,
    state: StudyState,
    folder: Path,
    sites: _Sites,
    patience: Patience,
    status: StatusFile,
) -> StudyState:
    """Let those sites that trained evaluate the finished generator on held-out patients.

    One attempt: the study is complete without, so a site that is absent, refuses or is broken costs its scores and nothing
    else. The evaluators are in the checkpoint before they are sent, so that after a restart all sites get the same.
    """
    started = time.monotonic()
    status.round("evaluation", 1, 1)
    if EVALUATORS not in state.weights:
        status.phase("running", "Training evaluators on synthetic patients.")
        state = state.with_weights(**{EVALUATORS: make_evaluators(plan, state)})
        save_state(state, folder)
    status.phase("running", "The sites evaluate the generator on held-out patients.")
    content = {site: _task_content(plan, state, "evaluation", 1, site) for site in sorted(state.receipts)}
    current = _Round("evaluation", 1, content, evaluation_template())
    _attempt(grid, plan, state, current, sites, patience, status)
    missing = {site.name: current.missing.get(site.name, "took_no_part") for site in plan.sites}
    evaluated = Evaluated(
        {site: reply.receipt for site, reply in sorted(current.accepted.items())},
        {site: code for site, code in sorted(missing.items()) if site not in current.accepted},
    )
    sums = {site: reply.weights[TOTAL] for site, reply in current.accepted.items()}
    state = replace(state.with_weights(**{WEIGHTS["evaluation"]: sums}), evaluated=evaluated)
    save_state(state, folder)
    for site, code in evaluated.missing.items():
        say(f"evaluation: site {site} left out ({code})")
    say(f"evaluation: {len(evaluated.receipts)} sites, {time.monotonic() - started:.1f} s")
    return state


class _Sites:
    """Which node is which site of the plan, as far as is known; nodes that are new are looked at once."""

    def __init__(self, grid: Grid, plan: StudyPlan) -> None:
        self._grid, self._plan = grid, plan
        self._names: dict[int, str] = {}
        self._looked = -math.inf
        self._connected: dict[str, int] = {}

    def connected(self, *, anew: bool = False) -> dict[str, int]:
        """Connected sites of the plan and their nodes; looked up every few seconds, or at once."""
        if anew or time.monotonic() - self._looked >= _LOOK_SECONDS:
            registered = {node.node_id: node.name for node in self._grid.get_nodes()}
            new = {node: name for node, name in registered.items() if node not in self._names}
            self._names |= find_sites(self._grid, self._plan, new)
            self._connected = {self._names[node]: node for node in registered if self._names.get(node)}
            self._looked = time.monotonic()
        return self._connected


def find_sites(grid: Grid, plan: StudyPlan, nodes: dict[int, str]) -> dict[int, str]:
    """Which site each node is; a node that is no site of the plan gets an empty name and takes no part.

    In a deployment the name is the one under which the coordinator registered the node's key; what the node says of itself
    counts for nothing. Where nodes are not registered (on one machine) they are asked.

    Args:
        grid: the grid.
        plan: the study plan.
        nodes: node id -> registered name, or empty. A node that does not answer is left out, and can be asked again.

    Raises:
        JobFailed: ``two_nodes_one_site``: two nodes say that they are the same site.
    """
    known = {site.name for site in plan.sites}
    found = {node: name if name in known else "" for node, name in nodes.items() if name}
    asked = [
        Message(RecordDict(), dst_node_id=node, message_type="query.site", ttl=_HELLO_TIMEOUT_SECONDS)
        for node, name in nodes.items()
        if not name
    ]
    for node, reply in _exchange(grid, asked, _HELLO_TIMEOUT_SECONDS).items():
        if reply.has_error() or "site" not in reply.content.config_records:
            say(f"node {node} names no site ({_refusal_code(reply)})")
            continue
        stated = str(reply.content.config_records["site"].get("name", ""))
        if stated in known and stated in found.values():
            raise JobFailed("two_nodes_one_site", f"Two nodes say that they are site {stated!r}.")
        found[node] = stated if stated in known else ""
    return found


def _gather(
    grid: Grid,
    plan: StudyPlan,
    state: StudyState,
    module: Module,
    number: int,
    sites: _Sites,
    patience: Patience,
    status: StatusFile,
) -> dict[str, SiteReply]:
    """The accepted replies of one round, at least ``aggregation.min_sites`` of them; pauses until there are."""
    current = _Round(
        module,
        number,
        {site.name: _task_content(plan, state, module, number, site.name) for site in plan.sites},
        statistic_template(plan, module) if module in PUBLIC else state.weights[WEIGHTS[module]],
    )
    began, absent_s = time.monotonic(), patience.absent_s
    while True:
        status.phase("running", f"{module} round {number} of {plan.training(module).rounds}.")
        _attempt(grid, plan, state, current, sites, replace(patience, absent_s=absent_s), status)
        absent_s = 0.0  # who was waited for once is not waited for again: a paused study asks whoever is there
        for site, code in sorted(current.missing.items()):
            say(f"{module} round {number}: site {site} left out ({code})")
        if len(current.accepted) >= plan.aggregation.min_sites:
            return current.accepted
        causes = ", ".join(f"{site}: {code}" for site, code in sorted(current.missing.items()))
        shortage = (
            f"{module} round {number}: {len(current.accepted)} sites took part, the plan wants "
            f"{plan.aggregation.min_sites} ({causes})."
        )
        if time.monotonic() - began >= patience.shortage_s:
            hint = "The last complete round is stored; the same command goes on from there."
            raise JobFailed("too_few_sites", shortage, hint)
        status.phase("paused", shortage, "too_few_sites")
        time.sleep(patience.retry_s)


def _attempt(
    grid: Grid,
    plan: StudyPlan,
    state: StudyState,
    current: _Round,
    sites: _Sites,
    patience: Patience,
    status: StatusFile,
) -> None:
    """Ask every site that the round has a task for and that has not answered yet, and wait for answers.

    Ends when nobody who is there is left to answer, and those who are not there have been waited for; at the latest after
    the plan's ``round_timeout_s``.
    """
    module, number = current.module, current.number
    began = time.monotonic()
    deadline = began + plan.aggregation.round_timeout_s
    open_sites = set(current.content) - set(current.accepted)
    current.missing = dict.fromkeys(open_sites, "not_connected")
    waiting: dict[str, str] = {}  # message -> site
    losses = dict.fromkeys(open_sites, 0)
    send_at = dict.fromkeys(open_sites, began)
    silence = dict.fromkeys(open_sites, patience.silent_s)
    order = 1 + max((r.order for by_module in state.receipts.values() for r in by_module.values()), default=0)
    connected = sites.connected(anew=True)
    while (now := time.monotonic()) < deadline:
        for site in sorted(open_sites):
            node = connected.get(site)
            if node is None and current.missing[site] == "not_connected":
                status.site(site, "absent", "not_connected")
            if node is None or losses[site] >= _LOSSES_A_ROUND or now < send_at[site]:
                continue
            message = Message(
                current.content[site],
                dst_node_id=node,
                message_type=MESSAGE_TYPES[module],
                group_id=str(number),
                ttl=max(1.0, deadline - now),
            )
            pushed = list(grid.push_messages([message]))
            if pushed and pushed[0]:
                waiting[pushed[0]] = site
                send_at[site], silence[site] = now + silence[site], 2 * silence[site]
                current.missing[site] = "no_answer"
                status.site(site, "asked")
            else:
                losses[site], send_at[site] = losses[site] + 1, now + _LOOK_SECONDS
                current.missing[site] = "not_sent"
                status.site(site, "lost", "not_sent")
        for reply in grid.pull_messages(list(waiting)):
            # An error about a lost node names the wrong source, so replies are matched by the message that they answer.
            answering = waiting.pop(reply.metadata.reply_to_message_id, None)
            if answering is None or answering not in open_sites:  # answered before, to a task that was sent twice
                continue
            if reply.has_error() and reply.error.code in _LOST:
                losses[answering] += 1
                if answering not in waiting.values():
                    send_at[answering] = now + _LOOK_SECONDS
                    current.missing[answering] = _refusal_code(reply)
                    status.site(answering, "lost", current.missing[answering])
                continue
            open_sites.discard(answering)
            waiting = {message: site for message, site in waiting.items() if site != answering}
            try:
                answer = _accept(plan, reply, current, answering, order)
                _check_receipt(plan, answering, module, state.receipts.get(answering, {}), answer.receipt)
            except FedsynthError as error:
                current.missing[answering] = error.code
                status.site(answering, "refused", error.code)
                continue
            current.accepted[answering] = answer
            del current.missing[answering]
            status.site(answering, "answered")
        if not open_sites:
            return
        can_still = {site for site in open_sites if losses[site] < _LOSSES_A_ROUND}
        if not waiting and (not can_still or (not can_still & set(connected) and now - began >= patience.absent_s)):
            return
        time.sleep(_POLL_SECONDS)
        connected = sites.connected()


def _task_content(plan: StudyPlan, state: StudyState, module: Activity, number: int, site: str) -> RecordDict:
    newest = state.newest_receipt(site)
    content = RecordDict({"task": task_record(plan.digest, module, number, site, newest.head if newest else "")})
    for name in task_weights(plan, module):
        content[name] = to_record(state.weights[name])
    return content


def _accept(plan: StudyPlan, reply: Message, current: _Round, site: str, order: int) -> SiteReply:
    module = current.module
    if reply.has_error():
        raise JobFailed(_refusal_code(reply), "Flower could not deliver the task or its reply.")
    check_reply(reply.content, module, progress_of(plan, module))
    if "refusal" in reply.content:
        raise JobFailed(_refusal_code(reply), "The site refused.")
    largest = norm_limit(module)
    if math.isinf(largest):  # of a sum, which has no norm that holds at every site
        largest = largest_statistic(plan, module, site, current.expected)
    weights = from_record(reply.content, WEIGHTS[module], current.expected, largest_norm=largest)
    progress: CurveRow = {key: _number(value) for key, value in reply.content.metric_records["progress"].items()}
    stated = reply.content.config_records["receipt"]
    endless = not plan.privacy.private and module != "evaluation"
    receipt = Receipt(
        head=str(stated["head"]),
        epsilon=_epsilon(stated["epsilon"], endless),
        epsilon_lifetime=_epsilon(stated["epsilon_lifetime"], endless),
        steps=int(_number(stated["steps"])),
        private=stated["private"] is True,
        order=order,
    )
    if not re.fullmatch(r"[0-9a-f]{64}", receipt.head) or receipt.steps < 1:
        raise JobFailed("reply_malformed", "A receipt names no ledger entry, or no steps.")
    return SiteReply(weights, progress, receipt)


def largest_statistic(plan: StudyPlan, module: Activity, site: str, template: State) -> float:
    """Largest L2 norm with which a site's noisy sum is taken: twice its declared patients, and more noise than it will have.

    A row's norm is at most 1, so the sum's is at most the number of patients, which a declaration rounds. The norm of D
    Gaussian values of deviation sigma exceeds ``sigma * (sqrt(D) + 6)`` with a probability below 1e-7 (concentration of
    Lipschitz functions of Gaussians).
    """
    dimensions = sum(tensor.numel() for tensor in template.values())
    return 2.0 * plan.site(site).nominal_patients + _noise(plan, module, site) * (math.sqrt(dimensions) + 6.0)


def _noise(plan: StudyPlan, module: Activity, site: str) -> float:
    if module == "evaluation":
        return evaluation_mechanism(plan).noise_multiplier
    return noise_multipliers(plan, site)[module]


def _check_receipt(
    plan: StudyPlan, site: str, module: Activity, earlier: dict[Module, Receipt], receipt: Receipt
) -> None:
    """Refuse a receipt that one site could spoil the whole study's release with, while the study can go on without it.

    Raises:
        JobFailed: ``ledger_went_back``: a ledger only grows, so a site that states less than before has lost entries, and
            with them what it spent. ``receipt_not_private``: no noise or noise from a seed, which the plan does not ask for.
        Refused: as `check_receipts`, of an evaluation as `check_holdout_receipt`.
    """
    if not marks(plan.privacy) and not receipt.private:
        raise JobFailed("receipt_not_private", "A site states that it added no noise, or noise from a seed.")
    if module == "evaluation":  # of other people: nothing of theirs was stated before
        check_holdout_receipt(plan, site, receipt)
        return
    # Of a study without privacy every epsilon is infinite, so there the steps alone tell.
    fewer = module in earlier and receipt.steps < earlier[module].steps
    if fewer or any(receipt.epsilon < before.epsilon - 1e-9 for before in earlier.values()):
        raise JobFailed("ledger_went_back", "A site's ledger holds less of this study than it did before.")
    check_receipts(plan, site, {**earlier, module: receipt})


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


def _epsilon(value: object, endless: bool) -> float:
    """An epsilon of a receipt; infinite only where the plan itself is without privacy."""
    return math.inf if endless and value == math.inf else _number(value)


def _aggregate(
    plan: StudyPlan, state: StudyState, module: Module, number: int, replies: dict[str, SiteReply]
) -> StudyState:
    sites = sorted(replies)
    received = {site: replies[site].weights for site in sites}
    if module in PUBLIC:
        result = summed(received)
    else:
        sent, limit = state.weights[WEIGHTS[module]], plan.aggregation.max_update_norm
        if limit is not None:
            received = {site: bounded(sent, weights, limit) for site, weights in received.items()}
        result = combined(received, site_weights(plan, sites), plan.aggregation)
    weights = {**state.weights, WEIGHTS[module]: result}
    if module == "gan":
        weights["generator_ema"] = moving_average(state.weights["generator_ema"], result, averaging_decay(plan, number))
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
