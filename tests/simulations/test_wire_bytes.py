"""Nothing of a patient leaves a hospital: every byte of a small study is searched for what was planted.

The study is the real one, from DICOM headers to the signed release. Searched are all messages in both directions, the
coordinator's folder and the release, its compressed parts unpacked. The same search must find everything in the
hospitals' own files, or it would prove nothing.
"""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fedsynth.evaluation.values import Evaluation
from fedsynth.plan import TRAINED, Activity, Section, StudyPlan, load_plan
from fedsynth.records import PROGRESS, PUBLIC, RECEIPT, WEIGHTS, State
from fedsynth.synthetic import subject_digest
from fedsynth_client.site import Site
from fedsynth_server.checkpoint import first_state
from fedsynth_server.fitting.fit import statistic_template
from fedsynth_server.site_evaluation import evaluation_template
from fedsynth_simulations import study
from fedsynth_simulations.plans import study_plan
from fedsynth_simulations.study import Settings, run
from fedsynth_simulations.weights import PACKAGED

SITES = ("east", "north", "south")


@dataclass(frozen=True)
class Watched:
    """A finished study and everything that was on the wire."""

    out: Path
    to_sites: list[bytes] = field(default_factory=list)
    to_coordinator: list[tuple[int, bytes]] = field(default_factory=list)

    def tap(self, direction: str, node: int, content: bytes) -> None:
        if direction == "to site":
            self.to_sites.append(content)
        else:
            self.to_coordinator.append((node, content))


def small_plan(*arguments: object, **more: object) -> StudyPlan:
    """The plan of a simulation with fewer rounds and steps: what travels is of the same kinds."""
    plan = study_plan(*arguments, **more)  # type: ignore[arg-type]
    trained = [module for module in plan.modules if module in TRAINED]
    short: dict[str, Section] = {
        module: plan.training(module).model_copy(update={"rounds": 1, "steps_per_round": 2}) for module in trained
    }
    if plan.embedding is not None:
        short["embedding"] = plan.embedding.model_copy(update={"fit_steps": 2})
    if "gan" in short:
        narrow = {"generator_width": 8, "discriminator_width": 4, "generator_batch": 8}
        short["gan"] = short["gan"].model_copy(update=narrow)
    return StudyPlan.model_validate(plan.model_copy(update=short).model_dump())


def nothing_measured(plan: StudyPlan, state: object, drawn: study._Drawn, settings: Settings) -> Evaluation:
    """An evaluation of the drawn patients without any figure."""
    return Evaluation(
        subject=subject_digest(drawn.synthetic),
        data="simulated patients",
        n_train=len(drawn.train),
        n_holdout=len(drawn.holdout),
        n_synthetic=len(drawn.synthetic),
        sections=[],
    )


@pytest.fixture(scope="module", params=["", PACKAGED], ids=["networks", "statistics"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Without public weights all networks are trained; with them both statistics are released."""
    seen = Watched(tmp_path_factory.mktemp("planted") / "Watched-Study")
    settings = Settings(patients=20, seed=7, epsilon=10.0, synthetic=4, warm_start=request.param)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "study_plan", small_plan)
        # Evaluating takes minutes and reads no message; its figures have tests of their own.
        patched.setattr(study, "_evaluation", nothing_measured)
        patched.setattr(study, "_PUBLIC_PATIENTS", 20)  # who train the feature network
        run(seen.out, settings, seen.tap)
    yield seen


@pytest.fixture(scope="module")
def secrets(watched: Watched) -> dict[str, list[bytes]]:
    """What must not be found outside, by kind."""
    truth = watched.out / "hospitals" / "truth"
    planted = json.loads((truth / "planted_identifiers.json").read_text())["strings"]
    patients = [patient for site in SITES for patient in json.loads((truth / f"{site}.json").read_text())]
    keys = [
        row["key"]
        for site in SITES
        for row in json.loads((watched.out / "sites" / site / "cohort" / "manifest.json").read_text())["patients"]
    ]
    return {
        "planted": [text.encode() for text in planted],
        "patients": [patient.encode() for patient in patients],
        "keys": [key.encode() for key in keys],
        "paths": [str(watched.out).encode(), b"hospitals/", b"Watched-Study"],
    }


def unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes and, where they are compressed, what is inside."""
    data = path.read_bytes()
    yield path.name, data
    if data[:2] == b"\x1f\x8b":
        yield f"{path.name} (unpacked)", inflated(data)
    elif data[:4] == b"PAR1":
        frame = pd.read_parquet(path)
        yield f"{path.name} (values)", frame.reset_index().to_csv().encode()
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(BytesIO(data)) as archive:
            for name in archive.namelist():
                yield f"{path.name}:{name}", archive.read(name)


def inflated(data: bytes) -> bytes:
    """The content of a gzip file, as far as it goes: some of the hospitals' files are cut off on purpose."""
    content = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        content += member.decompress(data)
        data = member.unused_data if member.eof else b""
    return content


def files_below(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            yield f"name of {path.name}", str(path.relative_to(folder.parent)).encode()
            if path.is_file():
                for name, data in unpacked(path):
                    yield f"{path.relative_to(folder.parent).parent / name}", data


def found(pieces: Iterator[tuple[str, bytes]], needles: list[bytes]) -> dict[bytes, str]:
    """needle -> where it was seen first; as it is written, and as 16-bit text."""
    forms = {needle: (needle, needle.decode().encode("utf-16-le")) for needle in needles}
    hits: dict[bytes, str] = {}
    for where, data in pieces:
        for needle, written in forms.items():
            if needle not in hits and any(form in data for form in written):
                hits[needle] = where
    return hits


@pytest.mark.slow
def test_the_search_finds_what_was_planted_where_it_belongs(watched: Watched, secrets: dict[str, list[bytes]]) -> None:
    for site in SITES:
        truth = json.loads((watched.out / "hospitals" / "truth" / f"{site}.json").read_text())
        # A patient without images, or whose files were broken on purpose, has left fewer traces.
        whole = {patient: row for patient, row in truth.items() if row["has_images"] and row["fault"] is None}
        assert len(whole) > 10
        written = sorted({text.encode() for patient, row in whole.items() for text in (patient, *row["planted"])})
        assert set(written) <= {*secrets["planted"], *secrets["patients"]}
        assert found(files_below(watched.out / "hospitals" / site), written).keys() == set(written)
    cohorts = [watched.out / "sites" / site / "cohort" for site in SITES]
    assert set(secrets["keys"]) <= found(files_below(*cohorts), secrets["keys"]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "patients", "keys", "paths"])
def test_no_message_holds_anything_of_a_patient(watched: Watched, secrets: dict[str, list[bytes]], kind: str) -> None:
    messages = [("to coordinator", data) for _, data in watched.to_coordinator]
    messages += [("to site", data) for data in watched.to_sites]
    activities = load_plan(watched.out / "study" / "plan.toml").activities
    assert len(watched.to_coordinator) == len(watched.to_sites) == len(SITES) * (1 + len(activities))
    assert found(iter(messages), secrets[kind]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "patients", "keys", "paths"])
def test_neither_the_coordinator_nor_the_release_holds_anything_of_a_patient(
    watched: Watched, secrets: dict[str, list[bytes]], kind: str
) -> None:
    assert (watched.out / "study" / "checkpoint.safetensors").is_file()
    assert (watched.out / "release" / "privacy.json").is_file()
    assert found(files_below(watched.out / "study", watched.out / "release"), secrets[kind]) == {}


def expected(plan: StudyPlan, module: Activity) -> State:
    """What a site may send of a module or an evaluation, by name and shape."""
    if module == "evaluation":
        return evaluation_template()
    return statistic_template(plan, module) if module in PUBLIC else first_state(plan, None).weights[WEIGHTS[module]]


@pytest.mark.slow
def test_every_message_to_the_coordinator_is_of_the_closed_list(watched: Watched) -> None:
    plan = load_plan(watched.out / "study" / "plan.toml")
    seen: dict[str, int] = dict.fromkeys(["site", *plan.activities], 0)
    for _, data in watched.to_coordinator:
        content: RecordDict = recorddict_from_proto(RecordDictProto.FromString(data))
        if set(content) == {"site"}:
            assert set(content.config_records["site"]) == {"name"}
            assert content.config_records["site"]["name"] in SITES
            seen["site"] += 1
            continue
        (module,) = [each for each in plan.activities if set(content) == {WEIGHTS[each], "progress", "receipt"}]
        arrays = content.array_records[WEIGHTS[module]]
        assert {name: tuple(array.shape) for name, array in arrays.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected(plan, module).items()
        }
        assert set(content.metric_records["progress"]) == PROGRESS[module]
        assert set(content.config_records["receipt"]) == RECEIPT
        seen[module] += 1
    assert seen == dict.fromkeys(["site", *plan.activities], len(SITES))


@pytest.mark.slow
def test_a_message_is_no_larger_than_what_the_site_logged(watched: Watched) -> None:
    for site in SITES:
        sent = [e.body for e in Site(watched.out / "sites" / site).ledger().entries() if e.kind == "sent"]
        assert [entry["module"] for entry in sent] == list(load_plan(watched.out / "study" / "plan.toml").activities)
        assert all(entry["to"].startswith("node ") for entry in sent)


@pytest.mark.slow
def test_exact_counts_are_in_no_receipt_and_no_number_of_a_reply(watched: Watched) -> None:
    """A site's true number of training patients is a secret; its declared number is in the plan."""
    plan = load_plan(watched.out / "study" / "plan.toml")
    for node, data in watched.to_coordinator:
        content = recorddict_from_proto(RecordDictProto.FromString(data))
        if "receipt" not in content:
            continue
        site = Site(watched.out / "sites" / SITES[node - 1])
        manifest = json.loads((site.cohort_path / "manifest.json").read_text())
        splits = [row["split"] for row in manifest["patients"]]
        counts = {len(splits), splits.count("train"), splits.count("holdout")}
        receipt = content.config_records["receipt"]
        assert receipt["steps"] in {1, *(plan.training(module).steps for module in plan.modules)}
        assert not counts & set(content.metric_records["progress"].values())
        assert not counts & {receipt["epsilon"], receipt["epsilon_lifetime"]}


@pytest.mark.slow
def test_released_people_are_invented(watched: Watched) -> None:
    table = next((watched.out / "release").rglob("participants.tsv"))
    with table.open(encoding="utf-8") as stream:
        names = [row["participant_id"].removeprefix("sub-") for row in csv.DictReader(stream, delimiter="\t")]
    assert names == [f"SYN{i:04d}" for i in range(1, 5)]
