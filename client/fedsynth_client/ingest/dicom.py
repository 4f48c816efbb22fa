"""DICOM: from any tree of files to patients' series, by the headers' geometry alone.

Headers are read through an allow-list of tags and stay in memory; none is copied. Series are grouped by
SeriesInstanceUID, patients by PatientID. Where a patient was examined more than once, the earliest examination with
every sequence is taken (a tumour before treatment); where an examination repeats a sequence, the series with the most
slices, and among equals the last (a repeat follows a failure).

The geometry of classic single-frame series is worked out here (Image Plane Module, PS3.3 C.7.6.2), because building
each through a general library costs four times as much; enhanced MR and segmentation objects go through highdicom.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder  # type: ignore[attr-defined]
from pydicom.uid import (
    UID,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from fedsynth.progress import track
from fedsynth_client.ingest.found import (
    MASK,
    MASK_VALUES,
    MIN_SLICES,
    Found,
    PatientFiles,
    Source,
    recode_mask,
    relative,
    role,
)
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.refusals import READ_FAILURES, Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import ImageSources, MaskClass

# highdicom's tolerance for slice positions, in mm of deviation from an even step.
SPACING_TOLERANCE_MM = 0.2
_CHUNK = 256

_TAGS = [
    "SOPClassUID",
    "PatientID",
    "StudyInstanceUID",
    "StudyDate",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ImageType",
    "BurnedInAnnotation",
    "DiffusionBValue",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
]
# Supplement 243; newer than the UID dictionary of pydicom.
LabelMapSegmentationStorage = UID("1.2.840.10008.5.1.4.1.1.66.7")
_ENHANCED = {EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage}
_IMAGES = {MRImageStorage} | _ENHANCED
_SEGMENTATIONS = {SegmentationStorage, LabelMapSegmentationStorage}
_SECONDARY_CAPTURES = {
    SecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
}
_FRAMED = _ENHANCED | _SEGMENTATIONS
_DIFFUSION_TYPES = {"DIFFUSION", "ADC", "TRACEW", "FA", "TENSOR"}


@dataclass(frozen=True)
class NativePixels:
    """Where a slice's unsigned little-endian pixels lie in its file, and what makes values of them.

    Reading them from there, once the header was read, spares parsing every file twice.
    """

    offset: int
    bits_allocated: int
    bits_stored: int
    inverted: bool
    slope: float
    intercept: float


@dataclass(frozen=True)
class Header:
    """What grouping and geometry need of one file's header."""

    path: Path
    sop_class: str
    patient: str
    study: str
    study_date: str
    series: str
    series_number: int
    description: str
    image_type: tuple[str, ...]
    burned_in: bool
    b_value: float
    colour: bool
    matrix: tuple[int, int] | None
    spacing: tuple[float, float] | None
    position: tuple[float, float, float] | None
    orientation: tuple[float, ...] | None
    native: NativePixels | None


@dataclass(frozen=True)
class SliceSeries:
    """A classic series: one file a slice."""

    where: str
    headers: tuple[Header, ...]

    def read(self) -> Volume:
        """Sort by geometry, check, decode and rescale; see `Source.read`."""
        ordered, affine = arrange(self.headers)
        return Volume(np.stack([_pixels(header) for header in ordered]), affine)

    def read_mask(self, codes: Mapping[str, MaskClass]) -> Volume:
        """Read the slices as a label map; see `Source.read_mask`."""
        volume = self.read()
        return Volume(recode_mask(volume.data, codes), volume.affine)


@dataclass(frozen=True)
class FramedObject:
    """An object with many frames in one file: enhanced MR, or a segmentation."""

    where: str
    path: Path

    def read(self) -> Volume:
        """Read an enhanced MR image; see `Source.read`."""
        import highdicom

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                volume = highdicom.imread(self.path).get_volume(atol=SPACING_TOLERANCE_MM)
            except READ_FAILURES as error:
                raise Unusable(_decode_reason(self.path, error)) from None
        return Volume(np.asarray(volume.array, dtype=np.float32), np.asarray(volume.affine, dtype=np.float64))

    def read_mask(self, codes: Mapping[str, MaskClass]) -> Volume:
        """Read a segmentation; `codes` name its segments by label or by number; see `Source.read_mask`."""
        import highdicom

        by_name = {code.casefold(): name for code, name in codes.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                segmentation = highdicom.seg.segread(self.path)
                targets = {
                    number: by_name.get(
                        str(segmentation.get_segment_description(number).segment_label).casefold(),
                        by_name.get(str(number)),
                    )
                    for number in segmentation.segment_numbers
                }
                volume = segmentation.get_volume(combine_segments=True, atol=SPACING_TOLERANCE_MM)
            except READ_FAILURES as error:
                # highdicom has no error class of its own for pixels that belong to several segments.
                overlap = "overlap" in str(error).casefold()
                raise Unusable(Reason.SEGMENTS_OVERLAP if overlap else _decode_reason(self.path, error)) from None
        data = np.asarray(volume.array)
        result = np.zeros(data.shape, dtype=np.uint8)
        for number, name in targets.items():
            here = data == number
            if name is None and here.any():
                raise Unusable(Reason.UNKNOWN_MASK_CODE, f"segment {number}")
            if name is not None:
                result[here] = MASK_VALUES[name]
        return Volume(result, np.asarray(volume.affine, dtype=np.float64))


def find(root: Path, base: Path, images: ImageSources, pool: Executor | None = None) -> Found:
    """Scan the tree below `root` and choose each patient's series.

    Args:
        root: folder of the DICOM tree.
        base: folder that places in the report are relative to.
        images: layout and patterns.
        pool: processes to read headers with, for large trees.
    """
    found = Found()
    paths = sorted(
        Path(folder, name) for folder, _, names in os.walk(root) for name in names if not name.startswith(".")
    )
    headers: list[Header] = []
    for header in _scan(paths, pool):
        if isinstance(header, Header):
            headers.append(header)
        else:
            path, reason = header
            found.refused.append(Refusal("file", relative(path, base), reason))
    by_patient: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        if header.patient:
            by_patient[header.patient].append(header)
        else:
            found.refused.append(Refusal("file", relative(header.path, base), Reason.NO_PATIENT_ID))
    for patient, own in sorted(by_patient.items()):
        candidates: list[_Candidate] = []
        for series in _grouped(own):
            where = _where(series, base)
            try:
                candidates.append(_candidate(series, where, images))
            except Unusable as refused:
                found.refused.append(Refusal("series", where, refused.reason, refused.detail))
        volumes, passed_over = _choose(candidates, images)
        found.refused.extend(passed_over)
        found.patients.append(PatientFiles(patient, _where(own, base), volumes))
    return found


def arrange(headers: Sequence[Header]) -> tuple[list[Header], NDArray[np.float64]]:
    """Sort slices along their normal and work out the affine (slice, row, column) to LPS mm.

    Raises:
        Unusable: the slices are not one volume: ``MISSING_GEOMETRY``, ``MIXED_MATRIX``, ``MIXED_ORIENTATION``,
            ``TOO_FEW_SLICES``, ``DUPLICATE_SLICES``, ``MISSING_SLICES`` or ``IRREGULAR_SPACING``.
    """
    first = headers[0]
    if first.orientation is None or first.spacing is None:
        raise Unusable(Reason.MISSING_GEOMETRY)
    if any(
        header.orientation is None or header.spacing is None or header.matrix is None or header.position is None
        for header in headers
    ):
        raise Unusable(Reason.MISSING_GEOMETRY)
    if len({header.matrix for header in headers}) > 1:
        raise Unusable(Reason.MIXED_MATRIX)
    if np.ptp(np.array([header.spacing for header in headers]), axis=0).max() > 1e-3:
        raise Unusable(Reason.MIXED_MATRIX)
    orientations = np.array([header.orientation for header in headers])
    if np.ptp(orientations, axis=0).max() > 1e-3:
        raise Unusable(Reason.MIXED_ORIENTATION)
    if len(headers) < MIN_SLICES:
        raise Unusable(Reason.TOO_FEW_SLICES, f"{len(headers)} of at least {MIN_SLICES}")
    along_row, along_column = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(along_row, along_column)
    positions = np.array([header.position for header in headers])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    step = float(np.median(steps))
    if steps.min() < 0.01:
        raise Unusable(Reason.DUPLICATE_SLICES, f"{int((steps < 0.01).sum())} of {len(headers)}")
    gaps = np.rint(steps / step)
    if (np.abs(steps - gaps * step) > SPACING_TOLERANCE_MM * gaps).any():
        raise Unusable(Reason.IRREGULAR_SPACING)
    if (gaps > 1).any():
        raise Unusable(Reason.MISSING_SLICES, f"{int((gaps - 1)[gaps > 1].sum())} between {len(headers)} present")
    affine = np.eye(4)
    affine[:3, 0] = (positions[order[-1]] - positions[order[0]]) / (len(headers) - 1)
    affine[:3, 1] = along_column * first.spacing[0]
    affine[:3, 2] = along_row * first.spacing[1]
    affine[:3, 3] = positions[order[0]]
    return [headers[int(i)] for i in order], affine


@dataclass(frozen=True)
class _Candidate:
    """A series that may serve as `role`, and what choosing among several needs."""

    role: str
    study: str
    study_date: str
    series_number: int
    slices: int
    source: Source


def _scan(paths: Sequence[Path], pool: Executor | None) -> list[Header | tuple[Path, Reason]]:
    """Headers of all files, in the order of `paths`; a path and reason where there is none."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    results = map(_scan_chunk, chunks) if pool is None else pool.map(_scan_chunk, chunks)
    scanned: list[Header | tuple[Path, Reason]] = []
    for result in track(results, "Reading DICOM headers", len(chunks)):
        scanned.extend(result)
    return scanned


def _scan_chunk(paths: Sequence[Path]) -> list[Header | tuple[Path, Reason]]:
    result: list[Header | tuple[Path, Reason]] = []
    for path in paths:
        try:
            result.append(_header(path))
        except Unusable as refused:
            result.append((path, refused.reason))
    return result


def _header(path: Path) -> Header:
    """Read the allow-listed tags of one file.

    Raises:
        Unusable: the file is no DICOM image or segmentation, or ends within its header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as stream:
                ds = dcmread(stream, stop_before_pixels=True, specific_tags=list(_TAGS))
                return _parse(path, ds, stream)
    except InvalidDicomError:
        raise Unusable(Reason.NOT_DICOM) from None
    except EOFError:
        raise Unusable(Reason.TRUNCATED) from None
    except OSError:
        raise Unusable(Reason.UNREADABLE) from None
    except READ_FAILURES:
        # pydicom's many ways to say that an element is malformed.
        raise Unusable(Reason.UNDECODABLE) from None


def _parse(path: Path, ds: Dataset, stream: BinaryIO) -> Header:
    sop_class = str(ds.get("SOPClassUID", ""))
    if not sop_class:
        # An export that was cut within the file meta information has no SOP class any more; a DICOMDIR never had one.
        storage = str(ds.file_meta.get("MediaStorageSOPClassUID", ""))
        raise Unusable(Reason.TRUNCATED if storage in _IMAGES | _SEGMENTATIONS else Reason.NOT_AN_IMAGE)
    if sop_class in _SECONDARY_CAPTURES:
        raise Unusable(Reason.DERIVED_SECONDARY)
    if sop_class not in _IMAGES and sop_class not in _SEGMENTATIONS:
        raise Unusable(Reason.NOT_AN_IMAGE)
    rows, columns = ds.get("Rows"), ds.get("Columns")
    return Header(
        path=path,
        sop_class=sop_class,
        patient=str(ds.get("PatientID") or "").strip(),
        study=str(ds.get("StudyInstanceUID") or ""),
        study_date=str(ds.get("StudyDate") or ""),
        series=str(ds.get("SeriesInstanceUID") or ""),
        series_number=int(ds.get("SeriesNumber") or 0),
        description=str(ds.get("SeriesDescription") or ""),
        image_type=tuple(str(value).upper() for value in _values(ds, "ImageType")),
        burned_in=str(ds.get("BurnedInAnnotation") or "").upper() == "YES",
        b_value=float(ds.get("DiffusionBValue") or 0.0),
        colour=int(ds.get("SamplesPerPixel") or 1) > 1,
        matrix=(int(rows), int(columns)) if rows and columns else None,
        spacing=_floats(ds, "PixelSpacing", 2),  # type: ignore[arg-type]
        position=_floats(ds, "ImagePositionPatient", 3),  # type: ignore[arg-type]
        orientation=_floats(ds, "ImageOrientationPatient", 6),
        native=None if sop_class in _FRAMED else _native(ds, stream),
    )


def _native(ds: Dataset, stream: BinaryIO) -> NativePixels | None:
    """Where the pixels lie, when they are uncompressed, little-endian, unsigned and grey; None for all other kinds.

    `stream` stands at the pixel data element, where reading the header stopped (PS3.5 7.1.2 and 7.1.3).

    Raises:
        Unusable: ``TRUNCATED`` when the file ends before the pixels do.
    """
    syntax = str(ds.file_meta.get("TransferSyntaxUID", ""))
    rows, columns, allocated = ds.get("Rows"), ds.get("Columns"), ds.get("BitsAllocated")
    if syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian) or not rows or not columns:
        return None
    if allocated not in (8, 16) or ds.get("PixelRepresentation") != 0 or (ds.get("SamplesPerPixel") or 1) != 1:
        return None
    start = stream.tell()
    element = stream.read(12)
    if element[:4] != b"\xe0\x7f\x10\x00":
        if not element:
            raise Unusable(Reason.TRUNCATED)
        return None
    offset = start + (12 if syntax == ExplicitVRLittleEndian else 8)
    if stream.seek(0, os.SEEK_END) < offset + int(rows) * int(columns) * (allocated // 8):
        raise Unusable(Reason.TRUNCATED)
    return NativePixels(
        offset=offset,
        bits_allocated=int(allocated),
        bits_stored=int(ds.get("BitsStored") or allocated),
        inverted=ds.get("PhotometricInterpretation") == "MONOCHROME1",
        slope=float(ds.get("RescaleSlope") or 1.0),
        intercept=float(ds.get("RescaleIntercept") or 0.0),
    )


def _values(ds: Dataset, keyword: str) -> list[object]:
    value = ds.get(keyword)
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _floats(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    values = tuple(float(str(value)) for value in _values(ds, keyword))
    return values if len(values) == count and np.isfinite(values).all() else None


def _grouped(headers: Sequence[Header]) -> list[list[Header]]:
    """Series of one patient; each segmentation object and each enhanced image stands for itself."""
    groups: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in headers:
        groups[header.series, str(header.path) if header.sop_class in _FRAMED else ""].append(header)
    return list(groups.values())


def _candidate(series: Sequence[Header], where: str, images: ImageSources) -> _Candidate:
    """What the series may serve as.

    Raises:
        Unusable: it is of a kind that is never taken, or matches no pattern.
    """
    first = series[0]
    if any(header.burned_in for header in series):
        raise Unusable(Reason.BURNED_IN_ANNOTATION)
    if first.sop_class in _SEGMENTATIONS:
        serves: str | None = MASK
    else:
        serves = role(first.description, images.sequences, images.mask_patterns)
    if serves != MASK:
        _refuse_kind(series)
    if serves is None:
        raise Unusable(Reason.NO_PATTERN_MATCHES)
    source: Source
    if first.sop_class in _FRAMED:
        source = FramedObject(where, first.path)
    else:
        arrange(series)
        source = SliceSeries(where, tuple(series))
    return _Candidate(serves, first.study, first.study_date, first.series_number, len(series), source)


def _refuse_kind(series: Sequence[Header]) -> None:
    types = {word for header in series for word in header.image_type}
    if "LOCALIZER" in types:
        raise Unusable(Reason.LOCALIZER)
    if "MOSAIC" in types:
        raise Unusable(Reason.MOSAIC)
    if types & _DIFFUSION_TYPES or any(header.b_value > 0 for header in series):
        raise Unusable(Reason.DIFFUSION)
    if any(header.image_type[:2] == ("DERIVED", "SECONDARY") for header in series):
        raise Unusable(Reason.DERIVED_SECONDARY)
    if any(header.colour for header in series):
        raise Unusable(Reason.COLOUR)


def _choose(candidates: Sequence[_Candidate], images: ImageSources) -> tuple[dict[str, Source], list[Refusal]]:
    """One examination of the patient and one series a role, by the rules of the module's docstring.

    A mask whose examination is not that of the images is taken only when the images' has none: segmentations are often
    filed in a study of their own.
    """
    refused: list[Refusal] = []
    studies: dict[str, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.role != MASK:
            studies[candidate.study].append(candidate)

    def preference(study: str) -> tuple[int, str, str]:
        own = studies[study]
        return -len({candidate.role for candidate in own}), own[0].study_date, study

    order = sorted(studies, key=preference)
    chosen_study = order[0] if order else None
    masks = [candidate for candidate in candidates if candidate.role == MASK]
    own_masks = [mask for mask in masks if mask.study == chosen_study]
    pool = [*studies.get(chosen_study or "", []), *(own_masks or masks)]
    for study in order[1:]:
        refused += [Refusal("series", c.source.where, Reason.ANOTHER_STUDY) for c in studies[study]]
    volumes: dict[str, Source] = {}
    for serves in [*images.sequences, MASK]:
        ranked = sorted(
            (candidate for candidate in pool if candidate.role == serves), key=lambda c: (c.slices, c.series_number)
        )
        if ranked:
            volumes[serves] = ranked.pop().source
            refused += [Refusal("series", c.source.where, Reason.ANOTHER_WAS_CHOSEN) for c in ranked]
    return volumes, refused


def _pixels(header: Header) -> NDArray[np.float32]:
    """Decode one slice and apply its rescale slope and intercept; MONOCHROME1 is turned so that bright is high.

    Raises:
        Unusable: the pixels cannot be decoded.
    """
    if header.native is None or header.matrix is None:
        return _decoded(header.path)
    native = header.native
    try:
        dtype = np.dtype("<u2" if native.bits_allocated == 16 else "u1")
        stored = np.fromfile(header.path, dtype, header.matrix[0] * header.matrix[1], offset=native.offset)
        stored = stored.reshape(header.matrix) & dtype.type(2**native.bits_stored - 1)
    except READ_FAILURES:
        raise Unusable(Reason.UNREADABLE, header.path.name) from None
    return _values_of(stored, native.inverted, native.bits_stored, native.slope, native.intercept)


def _decoded(path: Path) -> NDArray[np.float32]:
    """The same through pydicom and its codecs, for every other way to store pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = dcmread(path)
            stored = ds.pixel_array
            inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"
            slope, intercept = float(ds.get("RescaleSlope") or 1.0), float(ds.get("RescaleIntercept") or 0.0)
            return _values_of(stored, inverted, int(ds.BitsStored), slope, intercept)
    except READ_FAILURES as error:
        raise Unusable(_decode_reason(path, error), path.name) from None


def _values_of(
    stored: NDArray[np.generic], inverted: bool, bits_stored: int, slope: float, intercept: float
) -> NDArray[np.float32]:
    values = stored.astype(np.float32)
    if inverted:
        values = np.float32(2**bits_stored - 1) - values
    return values if (slope, intercept) == (1.0, 0.0) else values * np.float32(slope) + np.float32(intercept)


def _decode_reason(path: Path, error: Exception) -> Reason:
    """Why decoding failed: no codec, a file cut short, or pixels that are broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            syntax = UID(dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID)
    except READ_FAILURES:
        return Reason.UNDECODABLE
    if syntax.is_compressed and syntax.is_encapsulated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:  # how pydicom says that it knows no decoder of this transfer syntax
            available = False
        return Reason.UNDECODABLE if available else Reason.UNSUPPORTED_TRANSFER_SYNTAX
    short = isinstance(error, EOFError) or "less than" in str(error) or "expected" in str(error).casefold()
    return Reason.TRUNCATED if short else Reason.UNDECODABLE


def _where(headers: Sequence[Header], base: Path) -> str:
    """The place of a series: its file, or the folder that all its files lie in."""
    if len(headers) == 1:
        return relative(headers[0].path, base)
    return relative(Path(os.path.commonpath([header.path.parent for header in headers])), base)
