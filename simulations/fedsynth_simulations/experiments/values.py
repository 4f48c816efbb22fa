"""The result of an experiment as values: tables and curves beside what a paper reports, and how they came about."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Value):
    """One measured number; None where it could not be measured (`note` says why). `interval` (95 %) or `spread` (standard
    deviation over `runs` repetitions), where one was computed."""

    value: float | None
    interval: tuple[float, float] | None = None
    spread: float | None = None
    runs: int = 1
    note: str = ""


class Row(_Value):
    """One quantity in all columns.

    Attributes:
        what: name with its unit, and which direction is good, e.g. ``"AM score (lower is better)"``.
        cells: by column name of the table; a column may lack one.
        paper: what the paper reports, as it reports it; empty where it reports nothing.
        comparable: whether the paper's number and ours are of the same data and quantity. Nearly never: `note` says why not.
        note: e.g. which network's features, which split.
    """

    what: str
    cells: dict[str, Cell]
    paper: str = ""
    comparable: bool = False
    note: str = ""


class Table(_Value):
    """A table in the paper's layout; `columns` are what was compared, e.g. ``"not private"``, ``"epsilon 10"``."""

    title: str
    columns: list[str]
    rows: list[Row]


class Line(_Value):
    """Points of one line of a plot, `x` and `y` of one length."""

    name: str
    x: list[float]
    y: list[float]


class Curves(_Value):
    """One plot."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    log_y: bool = False


class Picture(_Value):
    """An image file beside the result, made of synthetic images or of public ones."""

    file: str
    caption: str


class Result(_Value):
    """What ``fedsynth experiment run`` writes as ``result.json``.

    Attributes:
        name: of the experiment.
        title: what it shows.
        system: the system of the paper, in a few words.
        paper: citation.
        data: which data, how many patients or slices, what is held out, and what the unit of privacy is.
        not_private: names of columns that were trained without privacy.
        settings: the declared settings that matter, as text by name.
        seed: of everything that is drawn.
        machine: number of cores, or the accelerator; never a machine's name.
        date: ISO 8601.
        seconds: wall-clock time of the whole run.
        notes: findings and limits, in words.
    """

    schema_version: int = 1
    name: str
    title: str
    system: str
    paper: str
    data: str
    not_private: list[str]
    settings: dict[str, str]
    seed: int
    machine: str
    date: str
    seconds: float
    tables: list[Table]
    curves: list[Curves] = []
    pictures: list[Picture] = []
    notes: list[str] = []
