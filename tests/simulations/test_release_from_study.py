"""From a finished study's folder to a release, by the command that a coordinator types."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsynth.errors import Refused
from fedsynth.files import read_json
from fedsynth.plan import StudyPlan
from fedsynth_client.app import app as client_app
from fedsynth_client.site import Site
from fedsynth_server.app import app as server_app
from fedsynth_server.cli import release
from fedsynth_simulations.grid import InProcessGrid, run_in_process

# What nobody tried on patients who are nothing but noise.
UNTESTED = ("audit", "membership-release", "membership-coordinator", "attributes", "copies")


def made(*arguments: str) -> None:
    result = CliRunner().invoke(release, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_a_finished_study_becomes_a_release_that_verifies_and_quotes_the_ledgers(
    tiny_folder: Path, tiny_plan: StudyPlan
) -> None:
    sites = [tiny_folder / site.name for site in tiny_plan.sites]
    study, key, out = tiny_folder / "study", tiny_folder / "release.pem", tiny_folder / "release"
    made("keygen", str(key))
    with pytest.raises(Refused, match="checkpoint"):
        made("make", str(study), "--out", str(out), "--key", str(key))
    grid = InProcessGrid(client_app, dict(enumerate(sites, start=1)))
    run_in_process(server_app, grid, {"study-folder": str(study)})
    answers = ("--statement", "Noise that was trained on noise.", "--responsible", "tester")
    named = [option for check in UNTESTED for option in ("--override", check)]
    with pytest.raises(Refused, match="No audit") as refusal:
        made("make", str(study), "--out", str(out), "--key", str(key), "--patients", "3")
    assert refusal.value.code == "release_gate"
    made("finish", str(tiny_folder / "release-candidate"), "--key", str(key), *named, *answers)
    made("verify", str(out), "--key", str(out / "release.pub.pem"))
    stated = {site["name"]: site for site in read_json(out / "privacy.json")["sites"]}
    for folder in sites:
        ledger = Site(folder).ledger()
        assert stated[folder.name]["epsilon"] == pytest.approx(ledger.epsilon(tiny_plan.privacy.delta))
        assert stated[folder.name]["ledger_head"] == ledger.head
    assert len(list((out / "bids").glob("sub-*"))) == 3

    made("make", str(study), "--out", str(tiny_folder / "next"), "--candidate", "--patients", "2")
    assert not (tiny_folder / "next").exists()
    with pytest.raises(Refused, match="this is a candidate"):
        made("verify", str(tiny_folder / "next-candidate"))

    (out / "participants.tsv").write_bytes(b"altered")
    with pytest.raises(Refused) as caught:
        made("verify", str(out))
    assert caught.value.code == "release_not_verified"
