"""The gene panel of the simulated studies: real HGNC symbols in pathway blocks."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

# Genes that a hospital's table holds and no study asks for.
BYSTANDERS: tuple[str, ...] = (
    "ABL1", "ALK", "ARAF", "BCL2", "BCL6", "BMX", "BRAF", "CDKN2A", "CREB1", "DICER1", "EP300", "FOXO1", "GNAS",
    "HRAS", "IDH1", "IDH2", "IL6", "JAK1", "KDM6A", "LIFR", "MALAT1", "MDM2", "MEN1", "MYB", "NRAS", "PTEN", "RAF1",
    "RB1", "SRC", "TNF",
)  # fmt: skip


@cache
def load_panel() -> tuple[tuple[str, str], ...]:
    """The panel as (gene, pathway) pairs, in the order of the packaged table.

    All symbols occur in the expression tables of the TCGA glioma cohorts too, so one panel serves simulated and real
    data.
    """
    text = files(__package__).joinpath("panel.tsv").read_text(encoding="utf-8")
    header, *rows = text.splitlines()
    if header != "gene\tpathway":
        raise ValueError("panel.tsv must have the columns gene and pathway")
    pairs = [row.split("\t") for row in rows]
    return tuple((gene, pathway) for gene, pathway in pairs)


def pathways() -> tuple[str, ...]:
    """The pathway names, in the order in which the panel first names them."""
    return tuple(dict.fromkeys(pathway for _, pathway in load_panel()))
