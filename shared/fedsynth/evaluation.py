"""The result of an evaluation as values: what was measured, beside a ceiling and a floor."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Value):
    """One measured number and what it is to be read against; None where it could not be measured (`note` says why).

    Attributes:
        metric: name with its unit, e.g. ``"Dice, tumour"``.
        better: which direction is good.
        synthetic: the release's value, with `interval` (95 %) where one was computed.
        real: the ceiling: the same computed with real training data in place of synthetic data.
        floor: a trivial baseline, named in `note`.
        public_only: the warm-start generator without any private data; None when there is none.
    """

    metric: str
    better: Literal["higher", "lower"]
    synthetic: float | None
    interval: tuple[float, float] | None = None
    real: float | None = None
    floor: float | None = None
    public_only: float | None = None
    note: str = ""


class Section(_Value):
    """Figures that answer one question, which `explanation` puts in plain words, limits included."""

    id: Literal["fidelity", "utility", "radiogenomics", "genes"]
    title: str
    explanation: str
    figures: list[Figure]


class Evaluation(_Value):
    """All sections, and what they were computed on (`data` says whether the real patients are simulated or public)."""

    schema_version: Literal[1] = 1
    data: str
    n_train: int
    n_holdout: int
    n_synthetic: int
    sections: list[Section]
