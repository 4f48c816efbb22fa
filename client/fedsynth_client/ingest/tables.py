"""Reading a hospital's tables as they are: no header is renamed, no value interpreted."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedsynth_client.ingest.refusals import Reason, Unusable


@dataclass(frozen=True)
class Table:
    """A table with one header row.

    Attributes:
        columns: header, as written: repeated names stay repeated.
        cells: one column a header entry, named 0, 1, ...
        first_row: line number of the first row of cells, for messages.
    """

    columns: list[str]
    cells: pd.DataFrame
    first_row: int

    def column(self, name: str) -> pd.Series[str]:
        """The column called `name` as stripped text.

        Raises:
            Unusable: ``COLUMN_MISSING`` when there is none, or more than one.
        """
        if self.columns.count(name) != 1:
            raise Unusable(Reason.COLUMN_MISSING, name)
        return self.cells[self.columns.index(name)].fillna("").astype(str).str.strip()


def read_table(path: Path, as_text: bool) -> Table:
    """Read a TSV or CSV, gzipped or not. Lines that start with ``#`` or ``!`` before the header are comments.

    Args:
        path: the table; a header with a tab in it makes it a TSV.
        as_text: whether cells stay text (clinical tables) or become numbers where a whole column is one.

    Raises:
        Unusable: ``TABLE_MISSING`` or ``TABLE_UNREADABLE``.
    """
    if not path.is_file():
        raise Unusable(Reason.TABLE_MISSING)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise Unusable(Reason.TABLE_UNREADABLE) from None
    start = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in "#!"), None)
    if start is None or start + 1 >= len(lines):
        raise Unusable(Reason.TABLE_UNREADABLE, "no rows")
    separator = "\t" if "\t" in lines[start] else ","
    header, first = (
        next(csv.reader([lines[start]], delimiter=separator)),
        next(csv.reader([lines[start + 1]], delimiter=separator)),
    )
    if len(first) == len(header) + 1:
        # R's write.table leaves the corner cell out.
        header = ["", *header]
    try:
        with warnings.catch_warnings():
            # pandas drops the surplus of a first row that is longer than the header, and only warns.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            cells = pd.read_csv(
                io.StringIO("\n".join(line for line in lines[start + 1 :] if not line.startswith("!"))),
                sep=separator,
                header=None,
                names=range(len(header)),
                index_col=False,
                dtype=str if as_text else None,
                keep_default_na=not as_text,
                low_memory=False,
                on_bad_lines="error",
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, ValueError):
        raise Unusable(Reason.TABLE_UNREADABLE, "rows of different length") from None
    return Table([name.strip() for name in header], cells, start + 2)
