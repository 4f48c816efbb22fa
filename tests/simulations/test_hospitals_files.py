"""The hospital folders as a whole: what they hold, reproducibly, and what must never leave them."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsynth.errors import UsageError
from fedsynth_client.ingest.sources import load_sources
from fedsynth_simulations.cohort.panel import load_panel
from fedsynth_simulations.hospitals import write_hospitals
from fedsynth_simulations.hospitals.cases import draw_cases
from fedsynth_simulations.hospitals.sites import SITES

NAMES = [site.name for site in SITES]
PATIENTS = 20  # the fewest at which every fault occurs


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "hospitals"
    write_hospitals(folder, PATIENTS, seed=11, workers=1)
    return folder


def truth(hospitals: Path, site: str) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = json.loads((hospitals / "truth" / f"{site}.json").read_text())
    return values


def contents(folder: Path) -> bytes:
    """Names and unzipped bytes of all files below `folder`; what a broken gzip file holds is left out."""
    parts = []
    for path in sorted(folder.rglob("*")):
        parts.append(str(path.relative_to(folder)).encode())
        if path.is_file():
            raw = path.read_bytes()
            try:
                parts.append(gzip.decompress(raw) if path.suffix == ".gz" else raw)
            except EOFError:
                continue
    return b"\n".join(parts)


def test_hospitals_are_north_south_and_east(hospitals: Path) -> None:
    assert sorted(path.name for path in hospitals.iterdir()) == ["east", "north", "south", "truth"]


@pytest.mark.parametrize("site", NAMES)
def test_sources_load_and_name_what_is_there(hospitals: Path, site: str) -> None:
    folder = hospitals / site
    sources = load_sources(folder / "sources.toml")
    assert sources.images and sources.expression and sources.clinical
    assert (folder / sources.images.path).is_dir()
    assert set(sources.clinical.label_codes.values()) == {"low", "high"}
    separator = "\t" if ".tsv" in sources.clinical.path else ","
    clinical = pd.read_csv(folder / sources.clinical.path, sep=separator, keep_default_na=False)
    assert set(clinical[sources.clinical.label_column]) <= {*sources.clinical.label_codes, ""}
    listed = clinical[sources.clinical.patient_column].str.removeprefix("sub-")
    assert set(listed) == set(truth(hospitals, site))


@pytest.mark.parametrize("site", NAMES)
def test_expression_tables_are_on_the_stated_scale_and_lack_a_few_genes(hospitals: Path, site: str) -> None:
    sources = load_sources(hospitals / site / "sources.toml").expression
    assert sources
    separator = "\t" if ".tsv" in sources.path else ","
    table = pd.read_csv(hospitals / site / sources.path, sep=separator, index_col=0)
    if sources.orientation == "patients_by_genes":
        table = table.T
    panel = {gene for gene, _ in load_panel()}
    assert 0.95 < len(panel & set(table.index)) / len(panel) < 1
    assert (table.to_numpy() >= 0).all()
    whole = np.array_equal(table.to_numpy(), np.rint(table.to_numpy()))
    assert whole == (sources.scale == "counts")
    if sources.scale == "log2tpm1":
        assert table.to_numpy().max() < 20
    holders = [patient for patient, facts in truth(hospitals, site).items() if facts["has_expression"]]
    assert {str(column).removeprefix("sub-").removesuffix(".1") for column in table.columns} == set(holders)


@pytest.mark.parametrize("site", SITES, ids=NAMES)
def test_every_fault_occurs_once_and_alone(hospitals: Path, site: Any) -> None:
    facts = truth(hospitals, site.name).values()
    faulty = [patient for patient in facts if patient["fault"]]
    assert sorted(patient["fault"] for patient in faulty) == sorted(site.faults)
    assert all(patient["has_images"] and patient["missing_sequence"] is None for patient in faulty)


def test_absences_have_about_the_stated_frequencies() -> None:
    cases = draw_cases(SITES[2], 4000, np.random.default_rng(0))
    assert 0.04 < np.mean([not case.has_images for case in cases]) < 0.06
    assert 0.065 < np.mean([not case.has_expression for case in cases]) < 0.095
    assert 0.035 < np.mean([case.missing_sequence is not None for case in cases]) < 0.06
    assert 0.03 < np.mean([not case.orientation_known for case in cases]) < 0.05
    assert all(case.has_images or case.has_expression for case in cases)


@pytest.mark.parametrize("site", NAMES)
def test_planted_identifiers_are_really_in_the_files(hospitals: Path, site: str) -> None:
    planted = json.loads((hospitals / "truth" / "planted_identifiers.json").read_text())
    held = contents(hospitals / site)
    for patient, facts in truth(hospitals, site).items():
        # A patient without image files is named in the tables alone.
        filed = facts["has_images"] and facts["fault"] != "empty_folder"
        strings = facts["planted"] if filed else [patient]
        assert [text for text in strings if text.encode() not in held] == []
        assert set(facts["planted"]) <= set(planted["by_site"][site])
    assert len(planted["by_site"][site]) >= 4 * PATIENTS
    assert set(planted["by_site"][site]) <= set(planted["strings"])
    assert all(len(text) >= 8 for text in planted["strings"])
    others = [name for name in NAMES if name != site]
    assert not any(text.encode() in held for other in others for text in planted["by_site"][other])


def test_sources_say_nothing_of_a_patient(hospitals: Path) -> None:
    planted = json.loads((hospitals / "truth" / "planted_identifiers.json").read_text())["strings"]
    for site in NAMES:
        text = (hospitals / site / "sources.toml").read_text()
        assert not any(identifier in text for identifier in planted)


def test_the_link_is_kept_for_evaluation(hospitals: Path) -> None:
    link = json.loads((hospitals / "truth" / "link.json").read_text())
    assert link["volume"]["cell_cycle"] > 0.3 and not any(link["irregularity"].values())
    patient = next(iter(truth(hospitals, "north").values()))
    assert set(patient["drivers"]) == set(link)
    assert set(patient["pathways"]) == set(link["volume"])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_hospitals(tmp_path / name, 2, seed, workers=1)
        digests.append(hashlib.sha256(contents(tmp_path / name)).hexdigest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    for workers in (1, 2):
        write_hospitals(tmp_path / str(workers), 4, seed=5, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError) as refusal:
        write_hospitals(tmp_path, 2, seed=0)
    assert refusal.value.code == "hospitals_exist"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_hospital_without_patients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        write_hospitals(tmp_path / "new", 0, seed=0)
    assert refusal.value.code == "too_few_patients"
