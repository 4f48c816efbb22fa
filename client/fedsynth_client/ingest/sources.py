"""Where a hospital's files are and what they mean: `sources.toml`, written by the hospital.

Nothing that changes the meaning of a number is guessed: the scale of the expression table, its orientation and the
codes of labels and masks are stated here, and ingest checks them against the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedsynth.plan import Section
from fedsynth.toml import load_toml

Patterns = Annotated[list[str], Field(min_length=1)]
MaskClass = Literal["necrosis", "oedema", "enhancing", "tumour"]


class ImageSources(Section):
    """Images of one of five layouts below `path` (relative to the file's folder).

    - ``dicom``: any tree of DICOM files; series are grouped by UID, patients by PatientID. Patterns match
      SeriesDescription. Masks are SEG objects, or series whose description matches `mask_patterns`.
    - ``bids``: a BIDS tree; patterns match file names; masks may lie in ``derivatives/``.
    - ``folders``: one folder a patient holding NIfTI files; patterns match file names.
    - ``manifest``: a CSV at `path` with columns ``patient_id``, one a sequence, and ``mask``, holding file paths.
    - ``slices``: one folder a patient holding PNG/JPEG files ``<sequence>_<index>``; patterns match file names.
    """

    layout: Literal["dicom", "bids", "folders", "manifest", "slices"]
    path: str = "images"
    sequences: dict[str, Patterns] = Field(description="study sequence -> fnmatch patterns, case-insensitive")
    mask_patterns: Patterns = Field(default=["*seg*", "*mask*"])
    mask_codes: dict[str, MaskClass] = Field(default={"1": "tumour"})
    assume_orientation: str | None = Field(
        default=None,
        pattern=r"^[LRAPSI]{3}$",
        description="for NIfTI headers that give none: where the three indices grow to, e.g. LPS",
    )
    volume_index: int | None = Field(default=None, description="which volume of a 4D NIfTI file to take")
    pixel_spacing_mm: float | None = Field(default=None, gt=0, description="for slices, whose files hold no geometry")
    slice_spacing_mm: float | None = Field(default=None, gt=0, description="for slices, whose files hold no geometry")

    @model_validator(mode="after")
    def _slices_need_geometry(self) -> Self:
        if self.layout == "slices" and (self.pixel_spacing_mm is None or self.slice_spacing_mm is None):
            raise ValueError(
                "layout 'slices' needs pixel_spacing_mm and slice_spacing_mm: PNG and JPEG hold no geometry"
            )
        return self

    @model_validator(mode="after")
    def _orientation_has_three_axes(self) -> Self:
        axes = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}
        if self.assume_orientation is not None and len({axes[letter] for letter in self.assume_orientation}) != 3:
            raise ValueError("assume_orientation needs one letter each of L or R, A or P, S or I")
        return self


class ExpressionSources(Section):
    """A table of expression values (TSV or CSV, may be gzipped), genes by HGNC symbol or Ensembl id."""

    path: str
    orientation: Literal["genes_by_patients", "patients_by_genes"]
    scale: Literal["counts", "tpm", "log2tpm1", "zscore"]
    duplicate_genes: Literal["refuse", "mean", "max"] = "refuse"


class ClinicalSources(Section):
    """A table with one row a patient: which column names the patient, which the label, what its codes mean."""

    path: str
    patient_column: str = "patient_id"
    label_column: str
    label_codes: dict[str, str] = Field(description="value in the table -> class of the plan's label")


class Sources(Section):
    """The whole of `sources.toml`. A hospital without images, or without expression, leaves that table out."""

    schema_version: Literal[1] = 1
    holdout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    images: ImageSources | None = None
    expression: ExpressionSources | None = None
    clinical: ClinicalSources | None = None


def load_sources(path: Path) -> Sources:
    """Read and validate `sources.toml`.

    Raises:
        UsageError: ``sources_missing``, ``sources_not_toml`` or ``sources_invalid``.
    """
    return load_toml(path, Sources, "sources")
