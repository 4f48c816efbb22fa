"""What a coordinator is shown, and what is advised; the commands as they are typed."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsynth.deployment.keys import make_node_key
from fedsynth.deployment.supervisor import ChildStatus, SupervisorStatus
from fedsynth.errors import FedsynthError, Refused, UsageError
from fedsynth.plan import StudyPlan, save_plan
from fedsynth_server.cli import study as commands
from fedsynth_server.coordinator import overview as overview_module
from fedsynth_server.coordinator.control import Node
from fedsynth_server.coordinator.doctor import examine
from fedsynth_server.coordinator.overview import Overview, overview, render
from fedsynth_server.coordinator.registry import add_site, read_registry, revoke_site
from fedsynth_server.coordinator.settings import Study
from fedsynth_server.coordinator.setup import init_study
from fedsynth_server.coordinator.watching import watch_study
from fedsynth_server.status import StatusFile


@pytest.fixture
def study(tiny_plan: StudyPlan, tmp_path: Path) -> Study:
    save_plan(tiny_plan, tmp_path / "plan.toml")
    made = init_study(tmp_path / "study", tmp_path / "plan.toml", "127.0.0.1:23981", None)
    path = made.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("18000", "23980").replace("18001", "23982"))
    return Study(made.folder)


def key(folder: Path) -> Path:
    make_node_key(folder)
    return folder / "node.pub"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(commands, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def running(study: Study, monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The study runs, and SuperLink knows these nodes."""
    children = [
        ChildStatus(name=name, state="running", pid=1, restarts=2 if name == "superlink" else 0)
        for name in ("superlink", "gateway", "runner")
    ]
    state = SupervisorStatus(pid=1, since=datetime.now(UTC), state="running", children=children)
    nodes: list[Node] = []
    monkeypatch.setattr(overview_module, "is_running", lambda folder: True)
    monkeypatch.setattr(overview_module, "read_status", lambda folder: state)
    monkeypatch.setattr(
        overview_module, "_asked", lambda study: ({n.public_key.decode().strip(): n for n in nodes}, "running")
    )
    return nodes


def advised(view: Overview, *words: str) -> bool:
    return any(all(word in line for word in words) for line in view.advice)


def test_a_new_study_says_how_to_begin(study: Study) -> None:
    view = overview(study)
    assert view.phase == "not started" and not view.running and view.done == "nothing"
    assert [site.fingerprint for site in view.sites] == [None, None]
    assert advised(view, "fedsynth study start") and advised(view, "add-site", "--name b")


def test_sites_from_added_to_connected_to_revoked(study: Study, running: list[Node]) -> None:
    record = add_site(study, key(study.folder / "a"), "a")
    view = overview(study)
    assert view.sites[0].fingerprint == record.fingerprint and view.sites[0].registered is False
    assert advised(view, "a is added and will be registered")

    seen = datetime.now(UTC) - timedelta(minutes=5)
    running.append(Node(7, "a", record.public_key.encode(), False, seen))
    view = overview(study)
    assert view.sites[0].registered and view.sites[0].online is False and view.sites[0].last_seen == seen
    assert advised(view, "a is not connected", "fedsynth site check")

    running[0] = Node(7, "a", record.public_key.encode(), True, seen)
    assert overview(study).sites[0].online

    revoke_site(study, "a")
    view = overview(study)
    assert view.sites[0].revoked and view.sites[0].fingerprint is None
    assert "revoked" in "\n".join(render(view)) and advised(view, "a's key is revoked")


def test_a_paused_study_says_what_is_missing(study: Study, running: list[Node]) -> None:
    for name in ("a", "b"):
        record = add_site(study, key(study.folder / name), name)
        running.append(Node(len(running) + 1, name, record.public_key.encode(), True, None))
    status = StatusFile(study.folder, study.plan)
    status.round("gan", 2, 2)
    status.site("a", "answered")
    status.site("b", "refused", "plan_not_approved")
    status.phase("paused", "gan round 2: 1 sites took part, the plan wants 2.", "too_few_sites")
    view = overview(study)
    assert (view.phase, view.code, view.module, view.round) == ("paused", "too_few_sites", "gan", 2)
    assert advised(view, "b has not approved this plan", study.plan.digest, "plan_not_approved")
    assert advised(view, "asks again by itself", "2 are connected")
    assert advised(view, "superlink was started again 2 times")
    text = "\n".join(render(view))
    assert "gan round 2 of 2" in text and "the plan wants 2" in text and "refused gan 2 [plan_not_approved]" in text


def test_an_unknown_refusal_points_to_the_sites_log(study: Study, running: list[Node]) -> None:
    record = add_site(study, key(study.folder / "a"), "a")
    running.append(Node(1, "a", record.public_key.encode(), True, None))
    status = StatusFile(study.folder, study.plan)
    status.site("a", "refused", "some_new_code")
    assert advised(overview(study), "a refused [some_new_code]", "its own log")


def test_a_killed_coordinator_is_told_from_a_running_one(study: Study) -> None:
    StatusFile(study.folder, study.plan).phase("running", "gan round 1 of 2.")
    children = [ChildStatus(name="superlink", state="running", pid=2**22 - 1, started=1.0)]
    state = SupervisorStatus(pid=2**22 - 2, since=datetime.now(UTC), state="running", children=children)
    (study.folder / "run").mkdir(exist_ok=True)
    (study.folder / "run" / "supervisor.json").write_text(state.model_dump_json())
    view = overview(study)
    assert view.phase == "stopped" and not view.running
    assert advised(view, "fedsynth study start", "left running: superlink")


def test_watch_prints_a_line_a_change_and_ends_with_the_study(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = StatusFile(study.folder, study.plan)
    status.phase("running")
    monkeypatch.setattr(overview_module, "is_running", lambda folder: True)
    monkeypatch.setattr(overview_module, "_asked", lambda study: (None, ""))
    steps = iter([lambda: status.site("a", "answered"), lambda: None, lambda: status.phase("finished")])
    monkeypatch.setattr("fedsynth_server.coordinator.watching.time.sleep", lambda seconds: next(steps)())
    watch_study(study, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "tiny: running, before the first round",
        "a: unknown",
        "b: unknown",
        "a: answered",
        "tiny: finished, before the first round",
    ]


def test_commands_over_a_folder(study: Study, tmp_path: Path) -> None:
    data = json.loads(run("status", study.folder, "--json"))["data"]
    assert data["study"] == "tiny" and data["digest"] == study.plan.digest and data["running"] is False

    said = run("add-site", study.folder, key(tmp_path / "a"), "--name", "a")
    assert read_registry(study.folder).valid()["a"].fingerprint in said and "as soon as SuperLink runs" in said
    listed = json.loads(run("sites", study.folder, "--json"))["data"]
    assert [(each["name"], each["revoked"]) for each in listed] == [("a", None)]
    assert "does not run" in run("revoke", study.folder, "a", "--yes")
    assert "revoked" in run("sites", study.folder)

    config = run("gateway-config", study.folder, "--keys", "/gateway", "--superlink", "127.0.0.1:18000")
    assert '"/gateway/keys/gateway.crt"' in config and "server 127.0.0.1:18000;" in config


def test_revoking_is_asked_about(study: Study, tmp_path: Path) -> None:
    add_site(study, key(tmp_path / "a"), "a")
    result = CliRunner().invoke(commands, ["revoke", str(study.folder), "a"], input="n\n")
    assert result.exit_code == 1
    assert "a" in read_registry(study.folder).valid()


def test_resume_demands_a_checkpoint(study: Study) -> None:
    with pytest.raises(UsageError) as caught:
        run("resume", study.folder)
    assert caught.value.code == "no_checkpoint"


def test_stop_and_log_say_when_there_is_nothing(study: Study) -> None:
    for command, code in (("stop", "not_running"), ("log", "log_missing")):
        with pytest.raises(FedsynthError) as caught:
            run(command, study.folder)
        assert caught.value.code == code


def test_doctor_names_every_fault_with_its_remedy(study: Study) -> None:
    lines = {line.code: line for line in examine(study) if line.code}
    assert {"key_missing", "sites_not_added", "not_running"} <= set(lines)
    assert all(line.remedy for line in lines.values())
    assert lines["sites_not_added"].state == "warn" and lines["key_missing"].state == "fail"


def test_doctor_asks_for_an_authority_that_was_not_carried_away(study: Study) -> None:
    assert "authority_key_here" not in {line.code for line in examine(study)}
    (study.folder / "ca").mkdir()
    (study.folder / "ca" / "ca-next.key").touch()
    (found,) = [line for line in examine(study) if line.code == "authority_key_here"]
    assert found.state == "warn" and "ca-next.key" in found.what


def test_doctor_without_settings_says_only_that(tmp_path: Path) -> None:
    (line,) = examine(Study(tmp_path))
    assert line.code == "settings_missing" and not line.ok


def test_doctor_command_fails_where_a_check_does(study: Study) -> None:
    result = CliRunner().invoke(commands, ["doctor", str(study.folder), "--json"])
    assert result.exit_code == Refused.exit_code
    found = json.loads(result.stdout)["data"]
    assert {line["state"] for line in found} == {"ok", "warn", "fail"}


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; from fedsynth.cli import build; build();"
        "print([name for name in ('flwr', 'torch', 'httpx', 'numpy', 'pydantic', 'psutil') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"
