"""The result of an evaluation as values: what was measured, beside a ceiling and a floor."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SectionId = Literal["fidelity", "detection", "utility", "radiogenomics", "genes"]

# Stands in `data` of what was computed, without privacy, on patients who are neither simulated nor public: what carries it
# stays where it was computed, and no release takes it.
NOT_PUBLIC = "not public: computed without privacy, to stay where it was computed"


def may_be_shared(data: str) -> bool:
    """Whether what was found on patients described by `data` may leave the place where it was computed."""
    return NOT_PUBLIC not in data


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Group(_Value):
    """A figure's value on a part of what it is about: one class, sequence, site or morphology feature.

    By ``"baseline"`` it is the figure's value for another generator that was fitted to the same real patients, in the place
    of `synthetic`; `name` says which.
    """

    by: Literal["class", "sequence", "site", "feature", "baseline"]
    name: str
    n: int
    synthetic: float | None
    interval: tuple[float, float] | None = None
    real: float | None = None
    note: str = ""


class Figure(_Value):
    """One measured number and what it is to be read against; None where it could not be measured (`note` says why).

    Attributes:
        metric: name with its unit, e.g. ``"Dice, tumour"``.
        better: which direction is good; ``"none"`` for a quantity that is only to be compared with `real`.
        synthetic: the release's value, with `interval` (95 %) where one was computed.
        real: the ceiling: the same computed with real training data in place of synthetic data.
        floor: a trivial baseline, named in `note`.
        public_only: the warm-start generator without any private data; None when there is none.
        extractor: the name of the network whose features were compared, with the digest of its weights; empty where a
            figure needs none. Figures of different extractors cannot be compared.
        groups: the same by class, sequence or site.
    """

    metric: str
    better: Literal["higher", "lower", "none"]
    synthetic: float | None
    interval: tuple[float, float] | None = None
    real: float | None = None
    floor: float | None = None
    public_only: float | None = None
    note: str = ""
    extractor: str = ""
    groups: list[Group] = []


class Line(_Value):
    """A line of a chart: its name in the legend, and its points (x, y)."""

    name: str
    points: list[tuple[float, float]]


class Curve(_Value):
    """A chart: what it shows, its axes with units, and its lines."""

    title: str
    x: str
    y: str
    lines: list[Line]
    explanation: str


class Section(_Value):
    """Figures that answer one question, which `explanation` puts in plain words, limits included."""

    id: SectionId
    title: str
    explanation: str
    figures: list[Figure]
    curves: list[Curve] = []


class Evaluation(_Value):
    """All sections, and what they were computed on (`data` says whether the real patients are simulated or public).

    Attributes:
        subject: which synthetic patients were measured (`fedsynth.synthetic.subject_digest`), so that an evaluation of
            others cannot be put beside a release.
    """

    schema_version: Literal[2] = 2
    subject: str
    data: str
    n_train: int
    n_holdout: int
    n_synthetic: int
    sections: list[Section]
