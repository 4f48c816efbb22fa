"""Facts about expression tables: what is read alike, and the reason for each kind of wrong table."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsynth.plan import GenePlan
from fedsynth_client.ingest.expression import read_expression
from fedsynth_client.ingest.refusals import Reason, Unusable
from fedsynth_client.ingest.sources import ExpressionSources

PANEL = [f"GENE{i}" for i in range(60)]
PATIENTS = [f"P{i}" for i in range(5)]
GENES = GenePlan(
    panel=PANEL,
    reference_quantiles=np.linspace(-2, 2, 41).tolist(),
    center=[0.0] * 60,
    scale=[1.0] * 60,
    min_coverage=0.8,
)
ZSCORES = GENES.model_copy(update={"measure": "zscore"})


def table() -> pd.DataFrame:
    values = np.random.default_rng(0).gamma(1.0, 100.0, (60, 5)).round(4)
    return pd.DataFrame(values, index=pd.Index(PANEL, name="gene"), columns=PATIENTS)


def sources(**changes: str) -> ExpressionSources:
    values = {"path": "t.tsv", "orientation": "genes_by_patients", "scale": "tpm", **changes}
    return ExpressionSources.model_validate(values)


def refused(tmp_path: Path, frame: pd.DataFrame, genes: GenePlan = GENES, **changes: str) -> Reason:
    frame.to_csv(tmp_path / "t.tsv", sep="\t")
    with pytest.raises(Unusable) as error:
        read_expression(sources(**changes), tmp_path, genes)
    assert isinstance(error.value.reason, Reason)
    return error.value.reason


def test_both_ways_round_and_both_separators_and_gzip_are_read_alike(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "t.tsv", sep="\t")
    reference = read_expression(sources(), tmp_path, GENES).values
    assert set(reference) == set(PATIENTS)
    table().T.to_csv(tmp_path / "t.csv")
    turned = read_expression(sources(path="t.csv", orientation="patients_by_genes"), tmp_path, GENES).values
    with gzip.open(tmp_path / "t.gz", "wt") as stream:
        stream.write("# version 1\n" + table().to_csv(sep="\t"))
    zipped = read_expression(sources(path="t.gz"), tmp_path, GENES).values
    shuffled = table().sample(frac=1, random_state=1)
    shuffled.insert(0, "Entrez_Gene_Id", [f"x{i}" for i in range(60)])
    shuffled.loc["N_unmapped"] = ["", 1, 2, 3, 4, 5]
    shuffled.to_csv(tmp_path / "s.tsv", sep="\t")
    annotated = read_expression(sources(path="s.tsv"), tmp_path, GENES).values
    for other in (turned, zipped, annotated):
        assert set(other) == set(PATIENTS)
        for patient in PATIENTS:
            np.testing.assert_array_equal(other[patient], reference[patient])


def test_ensembl_versions_are_stripped(tmp_path: Path) -> None:
    panel = [f"ENSG{i:011d}" for i in range(60)]
    frame = table().set_axis([f"{gene}.{i % 20}" for i, gene in enumerate(panel)])
    frame.to_csv(tmp_path / "t.tsv", sep="\t")
    genes = GENES.model_copy(update={"panel": panel})
    assert read_expression(sources(), tmp_path, genes).panel_coverage == 1.0
    assert refused(tmp_path, frame) is Reason.GENE_IDS_DIFFER


@pytest.mark.parametrize("scale", ["tpm", "zscore"])
def test_a_transposed_table_names_the_axis(tmp_path: Path, scale: str) -> None:
    table().T.to_csv(tmp_path / "t.tsv", sep="\t")
    with pytest.raises(Unusable) as error:
        read_expression(sources(scale=scale), tmp_path, GENES if scale == "tpm" else ZSCORES)
    assert error.value.reason is Reason.TRANSPOSED
    assert "60 in the header row" in error.value.detail


@pytest.mark.parametrize(
    "date", ["1-Mar", "2-Sep", "1-Dec", "Mar-01", "2024-03-01", "01.03.2024", "3/1/2024", "1. Mrz"]
)
def test_excel_dates_are_recognised(tmp_path: Path, date: str) -> None:
    frame = table().rename(index={"GENE7": date})
    assert refused(tmp_path, frame) is Reason.EXCEL_DATES


@pytest.mark.parametrize("name", ["MARCHF1", "SEPTIN2", "DEC1", "SEP15", "HLA-DRA", "MT-ND1", "OCT4"])
def test_real_gene_names_are_no_dates(tmp_path: Path, name: str) -> None:
    table().rename(index={"GENE7": name}).to_csv(tmp_path / "t.tsv", sep="\t")
    assert len(read_expression(sources(), tmp_path, GENES).values) == 5


@pytest.mark.parametrize(
    ("frame", "scale", "genes", "reason"),
    [
        (table() - 200, "tpm", GENES, Reason.WRONG_SCALE),
        (np.log2(table() + 1), "tpm", GENES, Reason.WRONG_SCALE),
        (table(), "log2tpm1", GENES, Reason.WRONG_SCALE),
        (table(), "counts", GENES, Reason.WRONG_SCALE),
        (table(), "zscore", ZSCORES, Reason.WRONG_SCALE),
        (table() - 50, "zscore", ZSCORES, Reason.WRONG_SCALE),
        (table() / 100 - 1, "zscore", GENES, Reason.WRONG_MEASURE),
        (table(), "tpm", ZSCORES, Reason.WRONG_MEASURE),
        (table().iloc[:40], "tpm", GENES, Reason.PANEL_COVERAGE),
        (pd.concat([table(), table().iloc[:1]]), "tpm", GENES, Reason.DUPLICATE_GENES),
        (table().astype(object).replace({table().iloc[3, 2]: "12,5"}), "tpm", GENES, Reason.NOT_NUMERIC),
    ],
)
def test_tables_that_are_not_what_they_are_said_to_be(
    tmp_path: Path, frame: pd.DataFrame, scale: str, genes: GenePlan, reason: Reason
) -> None:
    assert refused(tmp_path, frame, genes, scale=scale) is reason


def test_scales_that_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    for frame, scale, genes in (
        (np.log2(table() + 1), "log2tpm1", GENES),
        (table().round(), "counts", GENES),
        (table() / 100 - 1, "zscore", ZSCORES),
    ):
        frame.to_csv(tmp_path / "t.tsv", sep="\t")
        assert len(read_expression(sources(scale=scale), tmp_path, genes).values) == 5


def test_a_rule_for_duplicates_is_followed(tmp_path: Path) -> None:
    frame = pd.concat([table(), table().iloc[:1] + 1e6])
    frame.to_csv(tmp_path / "t.tsv", sep="\t")
    values = read_expression(sources(duplicate_genes="max"), tmp_path, GENES).values
    assert all(profile[0] == profile.max() for profile in values.values())


def test_single_profiles_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    frame = table()
    frame.iloc[:30, 0] = np.nan
    frame.iloc[:, 1] = 3.0
    frame.iloc[:5, 2] = np.nan
    frame.columns = [*PATIENTS[:3], "P3", "P3"]
    frame.to_csv(tmp_path / "t.tsv", sep="\t")
    profiles = read_expression(sources(), tmp_path, GENES)
    assert set(profiles.values) == {"P2"}
    assert (profiles.values["P2"][:5] == 0).all()
    assert [(refusal.where, refusal.reason) for refusal in profiles.refused] == [
        ("t.tsv: column 2", Reason.PANEL_COVERAGE),
        ("t.tsv: column 3", Reason.CONSTANT_PROFILE),
        ("t.tsv: column 5", Reason.DUPLICATE_PATIENT),
        ("t.tsv: column 6", Reason.DUPLICATE_PATIENT),
    ]


@pytest.mark.parametrize(
    "content", [b"", b"gene\tP1\n", b"gene\tP1\nA\t1\t2\t3\t4\n", b"\xff\xfe\x00bad", b"\x1f\x8bbroken"]
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(Unusable) as error:
        read_expression(sources(), tmp_path, GENES)
    assert error.value.reason is Reason.TABLE_UNREADABLE
    with pytest.raises(Unusable) as error:
        read_expression(sources(path="absent.tsv"), tmp_path, GENES)
    assert error.value.reason is Reason.TABLE_MISSING
