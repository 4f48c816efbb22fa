"""The tables of a release, their descriptions, and the preview sheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fedsynth.files import read_json, sha256_file
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.release.preview import (
    TILE,
    Example,
    ReferenceExamples,
    comparison_sheet,
    example_of,
    preview_sheet,
)


def test_tables_give_back_every_float32_exactly(
    made: Path, release_plan: StudyPlan, release_patients: list[SyntheticPatient]
) -> None:
    genes = np.stack([patient.genes for patient in release_patients])
    ids = [patient.participant_id for patient in release_patients]
    text = pd.read_csv(made / "genes/expression.tsv", sep="\t", index_col="participant_id")
    binary = pd.read_parquet(made / "genes/expression.parquet").set_index("participant_id")
    for table in (text, binary):
        assert list(table.index) == ids
        assert list(table.columns) == release_plan.genes.panel
        np.testing.assert_array_equal(table.to_numpy(np.float32), genes)
    morphology = pd.read_csv(made / "morphology.tsv", sep="\t", index_col="participant_id")
    assert list(morphology.columns) == release_plan.morphology.features
    np.testing.assert_array_equal(
        morphology.to_numpy(np.float32), np.stack([patient.morphology for patient in release_patients])
    )


def test_bids_describes_every_column_with_its_unit(made: Path) -> None:
    for name in ("participants", "phenotype/expression", "phenotype/morphology"):
        with (made / "bids" / f"{name}.tsv").open(newline="") as stream:
            header = next(csv.reader(stream, delimiter="\t"))
        described = read_json(made / "bids" / f"{name}.json")
        assert header[0] == "participant_id"
        assert header[1:] == sorted(described, key=header.index)
        assert all(described[column]["Description"] for column in header[1:])
    assert read_json(made / "bids/phenotype/morphology.json")["volume"]["Units"] == "mL"
    assert list(read_json(made / "bids/participants.json")["grade"]["Levels"]) == ["high", "low"]


def test_the_data_package_describes_the_files_that_are_there(made: Path) -> None:
    package = read_json(made / "datapackage.json")
    assert [resource["name"] for resource in package["resources"]] == ["participants", "morphology", "expression"]
    for resource in package["resources"]:
        path = made / resource["path"]
        assert resource["hash"] == f"sha256:{sha256_file(path)}"
        assert resource["bytes"] == path.stat().st_size
        header = path.read_text().splitlines()[0].split("\t")
        assert [field["name"] for field in resource["schema"]["fields"]] == header


def test_croissant_refers_only_to_what_it_describes(made: Path) -> None:
    croissant = read_json(made / "croissant.json")
    files = {entry["@id"]: entry for entry in croissant["distribution"] if entry["@type"] == "cr:FileObject"}
    for path, entry in files.items():
        assert entry["sha256"] == sha256_file(made / path)
    fields = {field["@id"] for records in croissant["recordSet"] for field in records["field"]}
    for records in croissant["recordSet"]:
        assert records["key"]["@id"] in fields
        for field in records["field"]:
            assert field["source"]["fileObject"]["@id"] in files
            assert field.get("references", {"field": {"@id": field["@id"]}})["field"]["@id"] in fields
    for entry in croissant["distribution"]:
        if entry["@type"] == "cr:FileSet":
            assert list(made.glob(entry["includes"])), entry["includes"]
    assert "epsilon" in croissant["rai:personalSensitiveInformation"][0]


def _pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.info == {}, "a PNG of a release carries no text, time or profile"
    return np.asarray(image.convert("RGB")).astype(int)


def _contour_pixels(pixels: np.ndarray) -> int:
    return int(((pixels[..., 0] == 255) & (pixels[..., 1] == 196) & (pixels[..., 2] == 0)).sum())


def test_preview_has_a_row_for_each_patient_and_outlines_tumours_only(
    release_plan: StudyPlan, release_patients: list[SyntheticPatient]
) -> None:
    sequences = release_plan.image.sequences
    with_tumour, without = (preview_sheet([example_of(release_patients[i])], sequences, "title") for i in (0, 1))
    assert _contour_pixels(_pixels(with_tumour)) > 50
    assert _contour_pixels(_pixels(without)) == 0
    both = preview_sheet([example_of(patient) for patient in release_patients[:2]], sequences, "title")
    assert _pixels(both).shape[0] - _pixels(without).shape[0] > TILE


def test_contour_lies_on_the_edge_of_the_mask() -> None:
    image = np.zeros((1, 1, 32, 32), np.float32)
    mask = np.zeros((1, 32, 32), np.uint8)
    mask[0, 8:16, 20:28] = 1
    pixels = _pixels(preview_sheet([Example("", image, mask)], ["T1"], ""))
    rows, columns = np.nonzero((pixels == (255, 196, 0)).all(axis=-1))
    first = columns < 132 + TILE
    scale = TILE / 32
    assert abs(rows.min() - (58 + 8 * scale)) <= scale
    assert abs(rows[first].max() - (58 + 16 * scale)) <= scale
    assert abs(columns[first].min() - (132 + 20 * scale)) <= scale
    assert abs(columns[first].max() - (132 + 28 * scale)) <= scale


def test_comparison_shows_reference_left_and_synthetic_right() -> None:
    mask = np.zeros((1, 32, 32), np.uint8)
    dark, bright = (Example("", np.full((1, 1, 32, 32), level, np.float32), mask) for level in (0.0, 1.0))
    pixels = _pixels(comparison_sheet(ReferenceExamples("public", (dark,)), [bright], ["T1"], "title"))
    row = pixels[58 + TILE // 2]
    assert row[132 + TILE // 2].tolist() == [0, 0, 0]
    assert row[132 + TILE + 4 + TILE // 2].tolist() == [255, 255, 255]
