"""What networks and machines do, one thing after another to one study, which goes on through all of it.

The tests of this file follow one another in the life of a single federation, as faults do; each leaves it running. What is
asserted is what people see: status, ledgers, files, exit codes. Throughout: no task is charged twice, none has two results,
no round is lost.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from federation import STUDY, Federation

from fedsynth.plan import StudyPlan

pytestmark = pytest.mark.network

Round = tuple[str, int]
DEADLINE_S = 15.0
RESTART_S = 60.0  # a process of ours on a busy machine: import, connect, take the next task
DISK_MIB = 96


@pytest.fixture(scope="module")
def federation(
    new_federation: Callable[..., Federation],
    network_plan: Callable[..., StudyPlan],
    request: pytest.FixtureRequest,
) -> Iterator[Federation]:
    """A study of many small rounds, begun with the sites a and b; two of three are enough."""
    plan = network_plan(
        rounds={"autoencoder": 15, "radiogenomics": 1, "gan": 1},
        autoencoder={"steps_per_round": 20},
        aggregation={"min_sites": 2, "round_timeout_s": DEADLINE_S},
    )
    federation = new_federation(plan, {"a": DISK_MIB, STUDY: 2 * DISK_MIB}, absent_s=4.0)
    federation.start_study()
    federation.wait_until(federation.is_open, RESTART_S, "a gateway that knows the sites")
    federation.start("a", "b")
    federation.wait_until(lambda: federation.done() >= 1, 2 * RESTART_S, "the first round")
    if any("clean_study" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("clean_study")  # runs beside this one, which waits most of the time
    yield federation
    federation.close()


@pytest.fixture(autouse=True)
def nothing_twice_nothing_lost(federation: Federation) -> Iterator[None]:
    """What holds after every fault."""
    before = federation.done()
    yield
    assert federation.done() >= before
    for site in federation.sites:
        charges = Counter(_round(entry.body) for entry in federation.entries(site, "charge"))
        results = Counter(_round(entry.body) for entry in federation.entries(site, "released"))
        assert not [each for each, count in charges.items() if count > 1], f"{site} was charged twice"
        assert not [each for each, count in results.items() if count > 1], f"{site} has two results of one charge"
        digests: dict[Round, set[str]] = {}
        for each in federation.sent(site):
            digests.setdefault((each.module, each.round), set()).add(each.sha256)
        assert all(len(found) == 1 for found in digests.values()), f"{site} sent two results of one round"


def _round(body: dict[str, object]) -> Round:
    return str(body["module"]), int(str(body["round"]))


def charged(federation: Federation, site: str) -> list[Round]:
    return [_round(entry.body) for entry in federation.entries(site, "charge")]


def kinds(federation: Federation, site: str, task: Round) -> list[str]:
    """What a site's ledger holds of one task, in order."""
    return [entry.kind for entry in federation.entries(site) if _round(entry.body) == task]


def sent_digests(federation: Federation, site: str, task: Round) -> list[str]:
    return [each.sha256 for each in federation.sent(site) if (each.module, each.round) == task]


def halt_in_training(federation: Federation, site: str) -> Round:
    """Halt (SIGSTOP) a site's runner right after it charged a task and before it has the result; returns the task."""
    for _ in range(5):
        before = len(charged(federation, site))
        deadline = time.monotonic() + RESTART_S
        while len(charged(federation, site)) == before:
            assert time.monotonic() < deadline, f"{site} charged nothing.\n{federation.describe()}"
            time.sleep(0.02)
        federation.kill(site, "runner", signal.SIGSTOP)
        task = charged(federation, site)[-1]
        if "released" not in kinds(federation, site, task):
            return task
        federation.kill(site, "runner", signal.SIGCONT)
    raise AssertionError("the site was always faster")


def test_a_study_goes_on_with_enough_sites_and_takes_in_one_that_comes_later(federation: Federation) -> None:
    assert federation.status().sites["c"].state == "absent"
    assert federation.done() >= 1
    federation.start_site("c")
    old = federation.kill(STUDY, "gateway")  # which it meets while it is down, or started again
    federation.wait_until(lambda: federation.is_back(STUDY, "gateway", old), 20, "another gateway")
    federation.wait_for_answers(federation.sites, 2 * RESTART_S)
    assert charged(federation, "c")[0][1] > 1  # rounds that it missed are not asked for again


def test_a_slow_site_is_left_out_of_a_round_and_lost_replies_are_sent_again(federation: Federation) -> None:
    slow = halt_in_training(federation, "c")
    federation.wait_for_round(DEADLINE_S + RESTART_S)
    assert slow not in federation.answered("c")
    assert slow in federation.answered("a") and slow in federation.answered("b")

    # The next round is open for as long as c is slow. The study runner dies when it may have taken some of its answers.
    task = (slow[0], slow[1] + 1)
    federation.wait_until(lambda: len(sent_digests(federation, "a", task)) == 1, DEADLINE_S, "an answer of a")
    federation.kill(STUDY, "runner")
    federation.kill("c", "runner", signal.SIGCONT)
    federation.wait_until(lambda: task in federation.answered("a"), 2 * RESTART_S, "the round that was cut short")
    for site in ("a", "b"):
        assert kinds(federation, site, task) == ["charge", "released", "sent", "sent"]
        first, second = sent_digests(federation, site, task)
        assert first == second
    assert kinds(federation, "c", slow) == ["charge", "released", "sent"]  # too late: sent, and not taken


def test_below_its_smallest_number_of_sites_a_study_pauses_until_a_killed_site_is_back(federation: Federation) -> None:
    """SuperNode of b is killed, and so, in the middle of its training, is the runner of c."""
    federation.kill("b", "runner", signal.SIGSTOP)
    task = halt_in_training(federation, "c")
    if task in charged(federation, "b"):  # b was faster than the signal; of the next round it knows nothing
        federation.kill("c", "runner", signal.SIGCONT)
        task = halt_in_training(federation, "c")
    federation.kill("b", "supernode")
    federation.kill("b", "runner", signal.SIGCONT)
    federation.wait_until(lambda: federation.status().phase == "paused", 2 * DEADLINE_S + 15, "a pause")
    status = federation.status()
    assert status.code == "too_few_sites"
    assert "sites took part, the plan wants 2" in status.message and "c: no_answer" in status.message
    told = federation.told("study", "status", federation.folder(STUDY))
    assert (told["phase"], told["code"], told["running"]) == ("paused", "too_few_sites", True)
    assert kinds(federation, "c", task) == ["charge"]

    federation.kill("c", "runner")  # it is started again, and does the task again under the charge that stands
    federation.wait_until(lambda: task in federation.answered("c"), 120, "the task that was cut short")
    assert kinds(federation, "c", task)[:4] == ["charge", "resumed", "released", "sent"]
    federation.wait_until(lambda: federation.status().phase == "running", 20, "the end of the pause")


def test_a_coordinator_whose_processes_are_killed_is_started_again_and_nothing_is_lost(federation: Federation) -> None:
    """First SuperLink alone, which is started again; then, before it has its nodes back, the supervisor."""
    task = halt_in_training(federation, "c")  # so that the round stays open
    federation.wait_until(lambda: len(sent_digests(federation, "a", task)) == 1, DEADLINE_S, "an answer of a")
    old = federation.kill(STUDY, "superlink")
    left = federation.process(STUDY, "runner").pid
    federation.wait_until(lambda: federation.is_back(STUDY, "superlink", old), 20, "another SuperLink")

    federation.kill(STUDY, "supervisor")  # its processes are left behind; the next start ends them
    federation.start_study()
    federation.wait_until(lambda: federation.is_back(STUDY, "runner", left), RESTART_S, "another study runner")
    federation.kill("c", "runner", signal.SIGCONT)
    federation.wait_until(lambda: task in federation.answered("a"), 2 * RESTART_S, "the round in which it was killed")
    first, *again = sent_digests(federation, "a", task)
    assert again and set(again) == {first}
    # Among them b, whose SuperNode was killed before: SuperLink lets it back in when it has taken it for lost.
    federation.wait_for_answers(federation.sites, 2 * RESTART_S)


def test_a_site_with_a_full_disk_is_left_out_until_there_is_room(federation: Federation) -> None:
    if federation.folder("a") not in federation.mounted:
        pytest.skip("only root can mount a small disk")
    with federation.full_disk("a"):
        federation.wait_until(lambda: federation.status().sites["a"].state == "refused", RESTART_S, "a refusal of a")
        assert federation.status().sites["a"].code in ("disk_full", "ledger_not_written")
        federation.wait_for_round(RESTART_S)
    federation.wait_for_answers(["a"], RESTART_S)


def test_a_coordinator_with_a_full_disk_goes_on_when_there_is_room(federation: Federation) -> None:
    if federation.folder(STUDY) not in federation.mounted:
        pytest.skip("only root can mount a small disk")
    with federation.full_disk(STUDY):
        done = federation.done()
        code = federation.started[STUDY].wait(2 * RESTART_S)
        assert code == 1
        assert federation.done() == done
    federation.start_study()
    federation.wait_for_round(2 * RESTART_S)


def test_the_study_comes_to_its_end(federation: Federation) -> None:
    assert federation.started[STUDY].wait(200) == 0
    rounds = {module: federation.plan.training(module).rounds for module in federation.plan.modules}
    assert {module: federation.done(module) for module in rounds} == rounds
    taken = Counter(each for site in federation.sites for each in federation.answered(site))
    assert set(taken) == {(module, number) for module, count in rounds.items() for number in range(1, count + 1)}
    assert min(taken.values()) >= 2
    for site in federation.sites:
        assert set(federation.answered(site)) <= {(each.module, each.round) for each in federation.sent(site)}
        checked = federation.told("site", "audit", "verify", federation.folder(site))
        assert checked["passed"], checked
