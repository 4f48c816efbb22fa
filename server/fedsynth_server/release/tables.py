"""The tables of a release (participants, morphology, gene expression), and their description as a Data Package.

Numbers are written with nine significant digits, which give back every float32 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsynth.files import sha256_file
from fedsynth.morphology import features
from fedsynth.plan import StudyPlan
from fedsynth_server.release.facts import ReleaseFacts
from fedsynth_server.release.jsonfile import dump
from fedsynth_server.release.patients import Row

PARTICIPANTS = "participants.tsv"
MORPHOLOGY = "morphology.tsv"
EXPRESSION = "genes/expression.tsv"
EXPRESSION_PARQUET = "genes/expression.parquet"
KEY = "participant_id"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        units: unit of a number, ``"1"`` for none; empty for text.
        levels: the values that text may take.
    """

    name: str
    description: str
    units: str = ""
    bounds: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()

    @property
    def bids(self) -> dict[str, Any]:
        """Entry of a BIDS data dictionary."""
        entry: dict[str, Any] = {"Description": self.description}
        if self.units:
            entry["Units"] = self.units
        if self.levels:
            entry["Levels"] = {level: f"Class {code} of the study plan" for code, level in enumerate(self.levels)}
        return entry

    @property
    def frictionless(self) -> dict[str, Any]:
        """Field of a Frictionless table schema."""
        constraints: dict[str, Any] = {"required": True}
        if self.levels:
            constraints["enum"] = list(self.levels)
        if self.bounds:
            constraints["minimum"], constraints["maximum"] = self.bounds
        field: dict[str, Any] = {"name": self.name, "description": self.description, "constraints": constraints}
        return field | ({"type": "number", "unit": self.units} if self.units else {"type": "string"})


def label_column(plan: StudyPlan) -> Column:
    """The column of the patient label."""
    return Column(plan.label.name, "Label that the patient was drawn for", levels=tuple(plan.label.classes))


def morphology_columns(plan: StudyPlan) -> list[Column]:
    """One column a morphology feature, in the plan's order, physical units."""
    return [
        Column(feature.name, f"Tumour: {feature.meaning}", feature.unit, (feature.low, feature.high))
        for feature in features(plan.morphology.features)
    ]


def expression_columns(plan: StudyPlan) -> list[Column]:
    """One column a gene, in the order of the panel."""
    scale = "centred and scaled by the public constants of the study plan"
    return [Column(gene, f"Expression of {gene}, {scale}", "1") for gene in plan.genes.panel]


def write_tables(root: Path, rows: Sequence[Row], facts: ReleaseFacts) -> None:
    """Write participants, morphology and expression (TSV and Parquet) of `rows`, and `datapackage.json`."""
    identifiers = [row.participant_id for row in rows]
    tables: dict[str, tuple[list[Column], Sequence[Any]]] = {
        PARTICIPANTS: ([label_column(facts.plan)], [[row.label] for row in rows]),
        MORPHOLOGY: (morphology_columns(facts.plan), [row.morphology for row in rows]),
        EXPRESSION: (expression_columns(facts.plan), [row.genes for row in rows]),
    }
    (root / EXPRESSION).parent.mkdir()
    for path, (columns, values) in tables.items():
        write_tsv(root / path, columns, identifiers, values)
    _write_expression_parquet(root / EXPRESSION_PARQUET, rows, facts.plan)
    resources = [_resource(root, path, columns) for path, (columns, _) in tables.items()]
    dump(root / "datapackage.json", _datapackage(resources, facts))


def write_tsv(path: Path, columns: Sequence[Column], identifiers: Sequence[str], values: Sequence[Any]) -> None:
    """Write a tab-separated table: participant_id, then `columns`.

    Args:
        values: one sequence of numbers or text a row, in the order of `columns`.
    """
    lines = ["\t".join([KEY, *(column.name for column in columns)])]
    for identifier, row in zip(identifiers, values, strict=True):
        lines.append("\t".join([identifier, *(value if isinstance(value, str) else f"{value:.9g}" for value in row)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_expression_parquet(path: Path, rows: Sequence[Row], plan: StudyPlan) -> None:
    import pyarrow
    from pyarrow import parquet

    genes = np.stack([row.genes for row in rows]).astype(np.float32)
    columns = {KEY: pyarrow.array([row.participant_id for row in rows], pyarrow.string())}
    columns |= {gene: pyarrow.array(genes[:, index]) for index, gene in enumerate(plan.genes.panel)}
    parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def _resource(root: Path, path: str, columns: Sequence[Column]) -> dict[str, Any]:
    key = Column(KEY, "Synthetic participant")
    schema: dict[str, Any] = {"fields": [column.frictionless for column in (key, *columns)], "primaryKey": [KEY]}
    if path != PARTICIPANTS:
        reference = {"resource": Path(PARTICIPANTS).stem, "fields": [KEY]}
        schema["foreignKeys"] = [{"fields": [KEY], "reference": reference}]
    return {
        "name": Path(path).stem,
        "path": path,
        "profile": "tabular-data-resource",
        "format": "tsv",
        "mediatype": "text/tab-separated-values",
        "encoding": "utf-8",
        "dialect": {"delimiter": "\t"},
        "bytes": (root / path).stat().st_size,
        "hash": f"sha256:{sha256_file(root / path)}",
        "schema": schema,
    }


def _datapackage(resources: list[dict[str, Any]], facts: ReleaseFacts) -> dict[str, Any]:
    """Frictionless Data Package 1.0 (https://specs.frictionlessdata.io/data-package)."""
    licence = facts.publication.licence
    return {
        "profile": "tabular-data-package",
        "name": facts.identifier.lower(),
        "title": f"Synthetic patients of study {facts.plan.name}",
        "description": facts.guarantee,
        "version": facts.version,
        "created": facts.released.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "licenses": [{"name": licence.spdx, "title": licence.name, "path": licence.url}],
        "resources": resources,
    }
