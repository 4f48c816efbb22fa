"""A result as a table that people read, as charts, and grids of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsynth_simulations.benchmarking.pictures import save_grid
from fedsynth_simulations.experiments.values import Cell, Curves, Picture, Result, Table

NOT_PRIVATE = "not private"


def write_table(path: Path, result: Result) -> None:
    """Write `table_text` to `path`."""
    path.write_text(table_text(result), encoding="utf-8")


def table_text(result: Result) -> str:
    """The whole result in Markdown: tables with the paper's column beside ours, pictures, notes, and how it was made."""
    lines = [f"# {result.title}", "", f"{result.system}. {result.paper}", "", f"**Data.** {result.data}", ""]
    if result.not_private:
        lines += [
            f"Columns marked *{NOT_PRIVATE}* were trained without privacy: {', '.join(result.not_private)}.",
            "",
        ]
    for table in result.tables:
        lines += [*_table(table, result.not_private), ""]
    for picture in result.pictures:
        lines += [f"![{picture.caption}]({picture.file})", "", f"*{picture.caption}*", ""]
    if result.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in result.notes), ""]
    lines += ["## How it was made", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| {_cell_safe(key)} | {_cell_safe(value)} |" for key, value in result.settings.items()]
    lines += [f"| seed | {result.seed} |", f"| machine | {result.machine} |", f"| date | {result.date} |"]
    lines += [f"| time | {result.seconds:.0f} s |", ""]
    return "\n".join(lines)


def _table(table: Table, not_private: Sequence[str]) -> list[str]:
    heads = [column + _marked(column, not_private) for column in table.columns]
    lines = [f"## {table.title}", "", "| | " + " | ".join([*heads, "paper", "comparable"]) + " |"]
    lines.append("| --- " * (len(heads) + 3) + "|")
    remarks: list[str] = []
    for row in table.rows:
        mark = ""
        said = [row.note, *(f"{name}: {cell.note}" for name, cell in row.cells.items() if cell.note)]
        if any(said):
            remarks.append(". ".join(part.rstrip(".") for part in said if part) + ".")
            mark = f" [{len(remarks)}]"
        cells = [cell_text(row.cells.get(column)) for column in table.columns]
        comparable = ("yes" if row.comparable else "no") if row.paper else ""
        lines.append("| " + " | ".join([row.what + mark, *cells, row.paper, comparable]) + " |")
    return [*lines, "", *(f"{number}. {remark}" for number, remark in enumerate(remarks, start=1))]


def _is_marked(column: str, not_private: Sequence[str]) -> bool:
    # A table may have columns that no plan trained, e.g. real data; and a column may already be called so.
    return column in not_private and NOT_PRIVATE not in column


def cell_text(cell: Cell | None) -> str:
    """A number with its interval or its spread; a dash where there is none."""
    if cell is None or cell.value is None:
        return "-"
    text = number(cell.value)
    if cell.interval is not None:
        text += f" ({number(cell.interval[0])} to {number(cell.interval[1])})"
    elif cell.spread is not None:
        text += f" ± {number(cell.spread)} ({cell.runs} runs)"
    return text


def number(value: float) -> str:
    """Three significant digits, without an exponent where that can be read.

    >>> [number(x) for x in (0.0, 0.12345, 12.345, 12345.6, 0.00012345)]
    ['0', '0.123', '12.3', '12346', '0.000123']
    """
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}"


def _cell_safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def overview_text(results: Sequence[Result]) -> str:
    """One row an experiment: its first figure in every column, the paper's, and where it was computed."""
    lines = [
        "| experiment | system | headline | ours | paper | comparable | machine, time, date |",
        "| --- " * 7 + "|",
    ]
    for result in results:
        row, columns = result.tables[0].rows[0], result.tables[0].columns
        ours = "; ".join(
            f"{column}{_marked(column, result.not_private)}: {cell_text(row.cells[column])}"
            for column in columns
            if column in row.cells
        )
        comparable = ("yes" if row.comparable else "no") if row.paper else "the paper has no such figure"
        where = f"{result.machine}; {result.seconds:.0f} s; {result.date}"
        cells = [
            f"[{result.name}](experiments/{result.name}/table.md)",
            result.system,
            row.what,
            ours,
            row.paper or "-",
        ]
        lines.append("| " + " | ".join(_cell_safe(cell) for cell in [*cells, comparable, where]) + " |")
    return "\n".join([*lines, ""])


def _marked(column: str, not_private: Sequence[str]) -> str:
    return f" ({NOT_PRIVATE})" if _is_marked(column, not_private) else ""


def write_charts(folder: Path, curves: Sequence[Curves]) -> list[Picture]:
    """Draw each plot into `folder`, as small PNGs."""
    if not curves:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = []
    for plot in curves:
        figure, axes = pyplot.subplots(figsize=(5.4, 3.2), layout="constrained")
        for line in plot.lines:
            axes.plot(line.x, line.y, marker="o" if len(line.x) < 20 else None, markersize=3, label=line.name)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.set_title(plot.title, fontsize=10)
        if plot.log_y:
            axes.set_yscale("log")
        if len(plot.lines) > 1:
            axes.legend(fontsize=7, frameon=False)
        name = f"chart-{re.sub(r'[^a-z0-9]+', '-', plot.title.lower()).strip('-')}.png"
        figure.savefig(folder / name, dpi=90)
        pyplot.close(figure)
        pictures.append(Picture(file=name, caption=plot.title))
    return pictures


def write_grid(path: Path, planes: NDArray[np.floating], columns: int) -> None:
    """Write planes (N, H, W) in [0, 1], synthetic ones only, `columns` in a row."""
    save_grid(path, planes, columns)
