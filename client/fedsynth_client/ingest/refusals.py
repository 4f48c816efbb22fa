"""Why something of a hospital's was not taken: a closed list of reasons, each with a sentence and a remedy.

Codes are stable vocabulary: they appear in the report, in the cohort's manifest and in documentation. A `Refusal` says
where on the site's own disk the thing lies; that place is for the person at the site and goes into the report alone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Literal
from zlib import error as zlib_error

# What reading a broken file raises, over all the libraries that read for us: none has one class for "this file is bad".
# An error beyond these is a fault of the program and is not hidden.
READ_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib_error,
)

What = Literal["file", "series", "volume", "images", "expression", "genes", "clinical", "label", "patient"]


class Reason(Enum):
    """A reason code (the lower-case name), a sentence on what is wrong, and what to do about it."""

    # Files
    NOT_DICOM = ("The file is not DICOM.", "Move it out of the folder, or export it again.")
    NOT_AN_IMAGE = ("The DICOM object holds no MR image or segmentation.", "Nothing to do unless it should.")
    TRUNCATED = ("The file ends before its data does.", "Copy or export the file again.")
    UNDECODABLE = ("The pixels cannot be decoded.", "Export the file again, uncompressed if possible.")
    UNSUPPORTED_TRANSFER_SYNTAX = (
        "No installed codec reads this DICOM transfer syntax.",
        "Install the extra `codecs`, or export uncompressed (Explicit VR Little Endian).",
    )
    UNREADABLE = ("The file cannot be read.", "Check that it exists, is whole, and that its permissions allow reading.")
    NO_PATIENT_ID = ("The DICOM header names no patient.", "Export with PatientID (a pseudonym will do).")
    MISSING_GEOMETRY = (
        "The header lacks position, orientation, spacing or matrix.",
        "Export the original image rather than a screen capture.",
    )
    EMPTY_FOLDER = ("The folder holds no file that a pattern matches.", "Check the folder and the patterns.")
    MANIFEST_ROW_INVALID = ("The row of the manifest names no patient.", "Fill in the column patient_id.")

    # DICOM series
    LOCALIZER = ("The series is a localizer.", "Nothing to do.")
    DERIVED_SECONDARY = ("The series is a derived or secondary capture.", "Offer the original acquisition.")
    MOSAIC = ("The series is a mosaic (many slices tiled in one image).", "Offer the sequence as single slices.")
    DIFFUSION = ("The series is diffusion-weighted or a diffusion map.", "Narrow the pattern if it was meant to match.")
    BURNED_IN_ANNOTATION = (
        "The header says that text is burned into the pixels, which may identify a patient.",
        "Offer a series without burned-in annotation.",
    )
    COLOUR = ("The pixels are in colour.", "Offer the greyscale original.")
    NO_PATTERN_MATCHES = ("No pattern of sources.toml matches the series.", "Add a pattern if it should be taken.")
    ANOTHER_WAS_CHOSEN = ("Another series of the same sequence was taken.", "Narrow the pattern to choose yourself.")
    ANOTHER_STUDY = ("Another examination was taken: the earliest with the most sequences.", "Nothing to do.")
    TOO_FEW_SLICES = ("The series has too few slices to be a volume.", "Offer a series that covers the brain.")
    MISSING_SLICES = ("Slices are missing between the first and the last.", "Export the whole series again.")
    DUPLICATE_SLICES = ("Two slices lie at the same place.", "Export one volume a series (one echo, one time point).")
    IRREGULAR_SPACING = ("The slices are not evenly spaced.", "Offer a series with regular spacing.")
    MIXED_ORIENTATION = ("The slices of the series are not parallel.", "Export one orientation a series.")
    MIXED_MATRIX = ("The slices of the series differ in matrix or pixel spacing.", "Export one matrix a series.")
    SEGMENTS_OVERLAP = ("Segments of the segmentation overlap.", "Export segments that do not overlap.")

    # Volumes
    FOUR_DIMENSIONAL = ("The file holds several volumes.", "Set images.volume_index to the one to take.")
    NOT_THREE_DIMENSIONAL = ("The file holds no volume of three dimensions.", "Offer a three-dimensional volume.")
    ORIENTATION_UNKNOWN = (
        "The header does not say how the volume lies in the patient (qform_code = sform_code = 0).",
        'Convert again with orientation, or state images.assume_orientation, e.g. "LPS", if it is known.',
    )
    DEGENERATE_GEOMETRY = (
        "The header's geometry cannot be true (zero or infinite spacing).",
        "Convert the file again.",
    )
    NOT_FINITE = ("The volume holds values that are not finite.", "Export the file again.")
    CONSTANT = ("The volume holds one value only.", "Export the file again.")
    NEGATIVE_INTENSITIES = (
        "The volume holds many negative values: it was normalised before, so that its background is unknown.",
        "Offer the magnitude image as the scanner wrote it.",
    )
    BACKGROUND_NOT_DARK = (
        "The air around the head is not dark (a real-valued reconstruction, or an added offset).",
        "Offer the magnitude image.",
    )
    SEVERAL_CANDIDATES = ("Several files match the same sequence.", "Narrow the patterns until one file remains.")
    SEVERAL_SEQUENCES = ("The file matches patterns of several sequences equally well.", "Narrow the patterns.")
    UNKNOWN_MASK_CODE = ("The mask holds a code that images.mask_codes does not name.", "Add the code to mask_codes.")
    OUTSIDE_REFERENCE = (
        "The volume does not overlap the reference sequence in space.",
        "Check that the patient's volumes share one frame of reference.",
    )
    INDEX_GAP = ("The slice numbers of the folder are not consecutive.", "Offer all slices of the stack.")

    # Images of a patient
    MISSING_SEQUENCE = ("A sequence of the plan is missing.", "Offer the sequence if the hospital has it.")
    MISSING_IMAGES = ("No images were found for the patient.", "Offer the images if the hospital has them.")
    MISSING_MASK = ("There is no tumour mask.", "Offer a segmentation of the tumour.")
    EMPTY_MASK = ("The mask marks no tumour.", "Check the segmentation.")
    TUMOUR_OUTSIDE_GRID = (
        "Most of the tumour lies outside the study's field of view, or is too small for its voxels.",
        "Check the volume's slice spacing; otherwise nothing to do (see the plan's table image).",
    )

    # Tables
    TABLE_MISSING = ("The table does not exist.", "Correct the path in sources.toml.")
    TABLE_UNREADABLE = ("The table is no TSV or CSV of one header row and equal rows.", "Save it as TSV again.")
    TRANSPOSED = ("The panel's genes lie on the other axis than stated.", "Correct expression.orientation.")
    GENE_IDS_DIFFER = (
        "The table names genes by another kind of id than the plan's panel.",
        "Translate the table's ids to the panel's (HGNC symbols or Ensembl ids).",
    )
    EXCEL_DATES = (
        "Gene names were turned into dates by a spreadsheet program.",
        "Export the table again without opening it in a spreadsheet.",
    )
    NOT_NUMERIC = ("The table holds text where a value should be.", "Export values as plain numbers.")
    WRONG_SCALE = ("The values cannot be of the stated scale.", "Correct expression.scale.")
    WRONG_MEASURE = (
        "The plan takes another measure than the table holds (abundances against z-scores).",
        "Offer a table of the plan's measure.",
    )
    DUPLICATE_GENES = ("Genes of the panel occur more than once.", "Set expression.duplicate_genes to mean or max.")
    PANEL_COVERAGE = (
        "Too few genes of the plan's panel have a value.",
        "Offer a fuller table; see genes.min_coverage.",
    )
    CONSTANT_PROFILE = ("All genes of the profile have one value.", "Check the export of this profile.")
    MISSING_PROFILE = ("There is no expression profile.", "Offer the profile if the hospital has it.")
    COLUMN_MISSING = ("The table lacks the column that sources.toml names.", "Correct the column's name.")
    DUPLICATE_PATIENT = ("The patient occurs more than once.", "Leave one row (or column) a patient.")
    UNKNOWN_LABEL = ("The label is empty or no key of clinical.label_codes.", "Add the code, or leave it unknown.")
    MISSING_LABEL = ("The clinical table has no row for the patient.", "Add the row, or leave the label unknown.")

    # Patients
    NOTHING_USABLE = ("Neither images nor an expression profile is usable.", "See the patient's other lines.")

    def __init__(self, sentence: str, remedy: str) -> None:
        self.sentence = sentence
        self.remedy = remedy

    @property
    def code(self) -> str:
        """The stable code, e.g. ``"missing_slices"``."""
        return self.name.lower()


@dataclass(frozen=True)
class Refusal:
    """One thing that was not taken.

    Attributes:
        what: the kind of thing.
        where: its place relative to the folder of `sources.toml`; for the person at the site only.
        reason: why.
        detail: what exactly, e.g. the name of the missing sequence or a count; no header value.
    """

    what: What
    where: str
    reason: Reason
    detail: str = ""


class Unusable(Exception):
    """Raised where one thing cannot be used; the caller turns it into a `Refusal` and goes on with the next thing."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
