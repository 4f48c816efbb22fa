"""A small study over real processes, undisturbed: three sites, a gateway and a SuperLink, under TLS and registered keys."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation import STUDY, Federation

from fedsynth.budget import planned_epsilon
from fedsynth.limits import AttributeLimits, CopyLimits, Limits, MembershipLimits, limits_toml
from fedsynth.plan import StudyPlan
from fedsynth_client.app import app as client_app
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.checkpoint import StudyState, load_state
from fedsynth_simulations.grid import InProcessGrid, run_in_process

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def finished(clean_study: Federation) -> Iterator[Federation]:
    """The study after its processes ended by themselves; its sites still run."""
    clean_study.wait_until(lambda: clean_study.started[STUDY].poll() is not None, 240, "the end of the study")
    yield clean_study
    clean_study.close()


@pytest.fixture(scope="module")
def simulated(finished: Federation, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """The same plan, policies and cohorts over the in-process grid."""
    twin = Federation(tmp_path_factory.mktemp("simulated"), finished.plan)
    for name in finished.sites:
        for part in ("policy.toml", "plans", "cohort"):
            source, copy = finished.folder(name) / part, twin.folder(name) / part
            copy.parent.mkdir(exist_ok=True)
            shutil.copytree(source, copy) if source.is_dir() else shutil.copyfile(source, copy)
    twin.folder(STUDY).mkdir()
    shutil.copyfile(finished.folder(STUDY) / "plan.toml", twin.folder(STUDY) / "plan.toml")
    grid = InProcessGrid(client_app, {node: twin.folder(name) for node, name in enumerate(twin.sites, start=1)})
    run_in_process(server_app, grid, {"study-folder": str(twin.folder(STUDY))})
    return twin


def state_of(federation: Federation) -> StudyState:
    state = load_state(federation.folder(STUDY), federation.plan)
    assert state is not None
    return state


def rounds_of(plan: StudyPlan) -> list[tuple[str, int]]:
    return [(module, number) for module in plan.modules for number in range(1, plan.training(module).rounds + 1)]


def test_a_study_ends_by_itself_and_everybody_says_so(finished: Federation) -> None:
    assert finished.started[STUDY].poll() == 0
    told = finished.told("study", "status", finished.folder(STUDY))
    assert (told["phase"], told["running"], told["code"]) == ("finished", False, "")
    assert {site["name"]: site["state"] for site in told["sites"]} == dict.fromkeys(finished.sites, "answered")
    again = finished.command("study", "start", finished.folder(STUDY))
    assert again.returncode == 0
    assert "nothing is left to do" in again.stderr

    told = finished.told("site", "status", finished.folder("a"), "--offline")
    module, number = rounds_of(finished.plan)[-1]
    assert told["running"]
    assert (told["last_sent"]["module"], told["last_sent"]["round"]) == (module, number)
    assert {child["name"]: child["state"] for child in told["supervisor"]["children"]} == {
        "supernode": "running",
        "runner": "running",
    }


def test_every_round_is_charged_once_and_stays_within_the_plan(finished: Federation) -> None:
    for name in finished.sites:
        charges = [(entry.body["module"], entry.body["round"]) for entry in finished.entries(name, "charge")]
        assert charges == rounds_of(finished.plan)
        spent = Site(finished.folder(name)).ledger().epsilon(finished.plan.privacy.delta)
        assert spent == pytest.approx(planned_epsilon(finished.plan, name))
        assert spent <= finished.plan.privacy.epsilon


def test_what_the_sites_sent_is_what_the_coordinator_has_receipts_of(finished: Federation) -> None:
    receipts = finished.receipts()
    assert set(receipts) == set(finished.sites)
    for name in finished.sites:
        log, entries = finished.sent(name), {entry.sequence: entry for entry in finished.entries(name)}
        assert [(each.module, each.round) for each in log] == rounds_of(finished.plan)
        assert set(finished.answered(name)) == {(each.module, each.round) for each in log}
        assert not any(each.again for each in log)
        for module, receipt in receipts[name].items():
            last = [each for each in log if each.module == module][-1]
            assert receipt.head == entries[last.entry].digest  # the receipt covers the entry of its own sending
            assert receipt.private


def test_a_deployment_does_what_the_simulation_does(finished: Federation, simulated: Federation) -> None:
    deployed, twin = state_of(finished), state_of(simulated)
    assert deployed.rounds == twin.rounds
    for module, rows in deployed.curves.items():
        assert [(row["round"], row["site"], set(row)) for row in rows] == [
            (row["round"], row["site"], set(row)) for row in twin.curves[module]
        ]
    for name, by_module in deployed.receipts.items():
        for module, receipt in by_module.items():
            other = twin.receipts[name][module]
            assert (receipt.steps, receipt.private, receipt.order) == (other.steps, other.private, other.order)
            assert receipt.epsilon == pytest.approx(other.epsilon)
            assert receipt.epsilon_lifetime == pytest.approx(other.epsilon_lifetime)
    assert {n: {k: (t.shape, t.dtype) for k, t in s.items()} for n, s in deployed.weights.items()} == {
        n: {k: (t.shape, t.dtype) for k, t in s.items()} for n, s in twin.weights.items()
    }
    for name in finished.sites:
        assert [entry.kind for entry in finished.entries(name)] == [entry.kind for entry in simulated.entries(name)]
        charged = [entry.body for entry in finished.entries(name, "charge")]
        assert charged == [entry.body for entry in simulated.entries(name, "charge")]
        assert [each.records for each in finished.sent(name)] == [each.records for each in simulated.sent(name)]


def test_a_release_of_it_verifies(finished: Federation, tmp_path: Path) -> None:
    key, out = tmp_path / "release.pem", tmp_path / "release"
    audit, limits = tmp_path / "audit.json", tmp_path / "limits.toml"
    finished.type("release", "keygen", key)
    finished.type("evaluate", "audit", finished.folder(STUDY) / "plan.toml", "--out", audit)
    # A deployed coordinator has no real patients; here the sites have not said anything either.
    reason = "The patients are made up, so nobody attacked anything."
    asks_for_nothing = Limits(
        reason=reason,
        membership=MembershipLimits(views=[]),
        attributes=AttributeLimits(asked=False),
        copies=CopyLimits(asked=False),
    )
    limits.write_text(limits_toml(asks_for_nothing), encoding="utf-8")
    given = ("--key", key, "--patients", "3", "--audit", audit, "--limits", limits)
    finished.type("release", "make", finished.folder(STUDY), "--out", out, *given)
    verified = finished.command("release", "verify", out, "--key", out / "release.pub.pem")
    assert verified.returncode == 0, verified.stderr


def test_keys_state_and_logs_are_for_their_owners_eyes(finished: Federation) -> None:
    def modes(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    study = finished.folder(STUDY)
    secrets = [study / "keys" / name for name in ("gateway.key", "superlink.key", "superexec.secret")]
    for name in finished.sites:
        keys = finished.folder(name) / "keys"
        secrets += [keys / file for file in ("node.key", "runtime.key", "superexec.secret")]
    assert {path: oct(modes(path)) for path in secrets} == dict.fromkeys(secrets, "0o600")
    folders = [study, *(finished.folder(name) for name in finished.sites)]
    assert {path: oct(modes(path)) for path in folders} == dict.fromkeys(folders, "0o700")
    written = [study / "superlink" / "state.sqlite", *(study / "logs").glob("[!s]*.log")]
    written += [path for name in finished.sites for path in (finished.folder(name) / "logs").glob("runner.log")]
    assert len(written) >= 6
    assert not [path for path in written if modes(path) & 0o077]


def test_a_site_stops_cleanly(finished: Federation) -> None:
    assert finished.stop("b") == 0
    told = finished.told("site", "status", finished.folder("b"), "--offline")
    assert not told["running"]
    assert {child["state"] for child in told["supervisor"]["children"]} == {"stopped"}
