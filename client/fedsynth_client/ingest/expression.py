"""The expression table: checked against what the hospital says of it, then mapped to the study's panel and scale."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedsynth.expression import coverage, to_panel_scale
from fedsynth.plan import GenePlan
from fedsynth_client.ingest.refusals import Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import ExpressionSources
from fedsynth_client.ingest.tables import read_table

# Columns beside the values in the exports of GDC, cBioPortal and GEO.
_ANNOTATIONS = {
    "chromosome",
    "cytoband",
    "description",
    "ensembl_id",
    "entrez_gene_id",
    "gene",
    "gene_id",
    "gene_name",
    "gene_symbol",
    "gene_type",
    "hugo_symbol",
    "symbol",
}
_ENSEMBL = re.compile(r"^(ENSG\d{11})(\.\d+)?$")
_MONTHS = "jan|feb|mar|mär|mrz|apr|may|mai|jun|jul|aug|sep|sept|oct|okt|nov|dec|dez"
# What a spreadsheet makes of MARCHF1 (MARCH1), SEPTIN2 (SEPT2), DELEC1 (DEC1), POU5F1 (OCT4), ...
_EXCEL_DATE = re.compile(
    rf"^(\d{{1,2}}[-. ]+({_MONTHS})\.?(-\d{{2,4}})?|({_MONTHS})[- ]\d{{1,4}}"
    r"|\d{4}-\d{2}-\d{2}( 00:00:00)?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4})$",
    re.IGNORECASE,
)
_LARGEST_LOG2 = 25.0  # log2 of a million transcripts is 20
_LARGEST_TYPICAL_Z = 5.0


@dataclass
class Profiles:
    """Expression by patient id on the plan's normalised scale, each column's or row's place, and what was refused."""

    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    panel_coverage: float = 0.0


def read_expression(sources: ExpressionSources, base: Path, genes: GenePlan) -> Profiles:
    """Read, check and map every profile of the table.

    Raises:
        Unusable: the table as a whole cannot be used.
    """
    if (sources.scale == "zscore") != (genes.measure == "zscore"):
        raise Unusable(Reason.WRONG_MEASURE, f"the plan takes {genes.measure}, the table holds {sources.scale}")
    panel, names, places = _panel_values(sources, base, genes)
    _check_scale(panel, sources.scale)
    repeated = {name for name, count in Counter(names).items() if count > 1}
    profiles = Profiles(panel_coverage=float(np.isfinite(panel).any(axis=1).mean()))
    for column, (name, place) in enumerate(zip(names, places, strict=True)):
        where = f"{sources.path}: {place}"
        if not name:
            continue
        profiles.where.setdefault(name, where)
        values = panel[:, column]
        share = coverage(values)
        if name in repeated:
            profiles.refused.append(Refusal("genes", where, Reason.DUPLICATE_PATIENT))
        elif share < genes.min_coverage:
            detail = f"{share:.0%} of at least {genes.min_coverage:.0%}"
            profiles.refused.append(Refusal("genes", where, Reason.PANEL_COVERAGE, detail))
        elif np.nanmin(values) == np.nanmax(values):
            profiles.refused.append(Refusal("genes", where, Reason.CONSTANT_PROFILE))
        else:
            profiles.values[name] = to_panel_scale(values, genes)
    return profiles


def strip_version(gene: str) -> str:
    """An Ensembl gene id without its version; any other name unchanged.

    >>> strip_version("ENSG00000141510.18"), strip_version("TP53"), strip_version("AC004.1")
    ('ENSG00000141510', 'TP53', 'AC004.1')
    """
    match = _ENSEMBL.match(gene)
    return match.group(1) if match else gene


def _panel_values(
    sources: ExpressionSources, base: Path, genes: GenePlan
) -> tuple[NDArray[np.float64], list[str], list[str]]:
    """Values (G, N) in the panel's order, NaN where missing; the N patients' ids; and each one's place in the table."""
    table = read_table(base / sources.path, as_text=False)
    across = table.columns[1:]
    down = [str(name).strip() for name in table.cells[0].fillna("")]
    if sources.orientation == "genes_by_patients":
        beside = [i for i, name in enumerate(table.columns) if i > 0 and name.casefold() in _ANNOTATIONS]
        ids = [down, *([str(name).strip() for name in table.cells[i].fillna("")] for i in beside)]
        rows = max(ids, key=lambda names: len(_hits(names, genes)))
        _check_gene_names(rows, across, genes, "first column", "header row")
        kept = [i for i in range(1, len(table.columns)) if i not in beside]
        cells = table.cells[kept]
        names, places = [table.columns[i] for i in kept], [f"column {i + 1}" for i in kept]
        gene_names = rows
    else:
        _check_gene_names(across, down, genes, "header row", "first column")
        gene_names = across
        cells = table.cells[list(range(1, len(table.columns)))].T
        names, places = down, [f"row {table.first_row + i}" for i in range(len(down))]
    wanted = {gene: place for place, gene in enumerate(map(strip_version, genes.panel))}
    stripped = [strip_version(name) for name in gene_names]
    chosen = [i for i, name in enumerate(stripped) if name in wanted]
    frame = _numeric(cells.iloc[chosen])
    repeated = [name for name, count in Counter(stripped[i] for i in chosen).items() if count > 1]
    if repeated and sources.duplicate_genes == "refuse":
        raise Unusable(Reason.DUPLICATE_GENES, f"{len(repeated)} genes, {repeated[0]} among them")
    grouped = pd.DataFrame(frame, index=[wanted[stripped[i]] for i in chosen]).groupby(level=0)
    merged = grouped.max() if sources.duplicate_genes == "max" else grouped.mean()
    return merged.reindex(range(len(genes.panel))).to_numpy(dtype=np.float64), names, places


def _hits(names: list[str], genes: GenePlan) -> set[str]:
    return set(map(strip_version, names)) & set(map(strip_version, genes.panel))


def _check_gene_names(names: list[str], other: list[str], genes: GenePlan, here: str, there: str) -> None:
    """Refuse a table whose stated gene axis does not hold the panel, with the most telling reason."""
    dates = sum(bool(_EXCEL_DATE.match(name)) for name in names)
    if dates:
        raise Unusable(Reason.EXCEL_DATES, f"{dates} in the {here}")
    found, elsewhere, panel = len(_hits(names, genes)), len(_hits(other, genes)), len(genes.panel)
    if found >= genes.min_coverage * panel:
        return
    if elsewhere > found:
        raise Unusable(Reason.TRANSPOSED, f"{found} of {panel} panel genes in the {here}, {elsewhere} in the {there}")
    ensembl = [np.mean([bool(_ENSEMBL.match(name)) for name in some]) > 0.5 for some in (names, genes.panel)]
    if ensembl[0] != ensembl[1]:
        raise Unusable(
            Reason.GENE_IDS_DIFFER, "the table has Ensembl ids" if ensembl[0] else "the panel has Ensembl ids"
        )
    raise Unusable(Reason.PANEL_COVERAGE, f"{found} of {panel} panel genes in the {here}")


def _numeric(cells: pd.DataFrame) -> NDArray[np.float64]:
    """Cells as numbers, empty ones NaN.

    Raises:
        Unusable: ``NOT_NUMERIC`` when a cell holds other text, or an infinite number.
    """
    numbers = cells.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = (np.isnan(numbers) & cells.notna().to_numpy()) | np.isinf(numbers)
    if wrong.any():
        raise Unusable(Reason.NOT_NUMERIC, f"{int(wrong.sum())} cells")
    return numbers


def _check_scale(values: NDArray[np.float64], scale: str) -> None:
    """Refuse values that cannot be of the stated `scale`. What can be told apart is checked; what cannot is not guessed."""
    present = values[np.isfinite(values)]
    if present.size == 0:
        raise Unusable(Reason.PANEL_COVERAGE, "no value at all")
    low, high = float(present.min()), float(present.max())
    if scale == "zscore":
        if low >= 0:
            raise Unusable(Reason.WRONG_SCALE, "z-scores, but none is negative")
        if float(np.median(np.abs(present))) > _LARGEST_TYPICAL_Z:
            raise Unusable(Reason.WRONG_SCALE, f"z-scores, but half of them are beyond ±{_LARGEST_TYPICAL_Z:g}")
        return
    if low < 0:
        raise Unusable(Reason.WRONG_SCALE, f"{scale}, but {int((present < 0).sum())} values are negative")
    if scale == "log2tpm1" and high > _LARGEST_LOG2:
        raise Unusable(Reason.WRONG_SCALE, f"log2(TPM + 1), but values reach beyond {_LARGEST_LOG2:g}")
    if scale == "counts" and (present != np.rint(present)).any():
        raise Unusable(Reason.WRONG_SCALE, "counts, but values are not whole numbers")
    if scale == "tpm" and values.shape[0] >= 50 and high < _LARGEST_LOG2:
        raise Unusable(Reason.WRONG_SCALE, f"TPM, but no value reaches {_LARGEST_LOG2:g}: they look logarithmic")
