"""A DICOM segmentation object: three binary segments over the frames that hold tumour (PS3.3 A.51).

Written with pydicom alone: highdicom's writer, which also checks the source images, takes ten times as long. A test reads
the objects with highdicom.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pack_bits
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SegmentationStorage

from fedsynth.morphology import ENHANCING, NECROSIS, OEDEMA
from fedsynth_simulations.cohort.grid import Grid
from fedsynth_simulations.hospitals.dicom import decimals

# Segment number, code of `fedsynth.morphology`, label, coded type.
SEGMENTS: tuple[tuple[int, int, str, tuple[str, str, str]], ...] = (
    (1, NECROSIS, "Necrosis", ("6574001", "SCT", "Necrosis")),
    (2, OEDEMA, "Oedema", ("79654002", "SCT", "Edema")),
    (3, ENHANCING, "Enhancing tumour", ("C113842", "NCIt", "Enhancing Lesion")),
)
_DIMENSION_UID_SUFFIX = ".999"


def write_segmentation(
    path: Path, header: Dataset, number: int, mask: NDArray[np.uint8], grid: Grid, source: int, sources: list[str]
) -> None:
    """Write `mask` (S, H, W), codes of `fedsynth.morphology` with at least one tumour voxel, as one SEG object.

    Args:
        path: of the file.
        header: from `dicom.study_header`; left as it was.
        number: SeriesNumber.
        mask: label map.
        grid: its place.
        source: SeriesNumber of the series that was segmented, whose slices lie where the mask's do.
        sources: SOPInstanceUID of each of its slices.
    """
    frames = [
        (segment, place)
        for segment, code, _, _ in SEGMENTS
        for place in np.flatnonzero((mask == code).any(axis=(1, 2))).tolist()
    ]
    if not frames:
        raise ValueError("expected a mask that marks at least one voxel")
    code_of = {segment: code for segment, code, _, _ in SEGMENTS}
    bits = np.stack([mask[place] == code_of[segment] for segment, place in frames])
    s_mm, h_mm, w_mm = grid.spacing

    ds = Dataset()
    ds.update(header)
    ds.Modality = "SEG"
    ds.SOPClassUID = SegmentationStorage
    ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.{number}"
    ds.SOPInstanceUID = f"{ds.SeriesInstanceUID}.1"
    ds.SeriesNumber = number
    ds.InstanceNumber = 1
    ds.SeriesDescription = "TUMOUR SEGMENTATION"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.ContentLabel = "TUMOUR"
    ds.ContentDescription = "Tumour parts"
    ds.ContentCreatorName = header.OperatorsName
    ds.LossyImageCompression = "00"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = mask.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 1, 0, 0
    ds.NumberOfFrames = len(frames)
    ds.SegmentationType = "BINARY"
    ds.SegmentSequence = Sequence([_segment(segment, label, kind) for segment, _, label, kind in SEGMENTS])
    ds.DimensionOrganizationSequence = Sequence([_dataset(DimensionOrganizationUID=_dimension(ds))])
    ds.DimensionIndexSequence = Sequence([_index(ds, 0x0062000B, 0x0062000A), _index(ds, 0x00200032, 0x00209113)])
    series = f"{ds.StudyInstanceUID}.{source}"
    instances = Sequence([_instance(uid) for uid in sources])
    ds.ReferencedSeriesSequence = Sequence([_dataset(SeriesInstanceUID=series, ReferencedInstanceSequence=instances)])
    measures = _dataset(
        PixelSpacing=decimals([h_mm, w_mm]), SliceThickness=f"{s_mm:.6g}", SpacingBetweenSlices=f"{s_mm:.6g}"
    )
    cosines = decimals([*grid.affine[:3, 2] / w_mm, *grid.affine[:3, 1] / h_mm])
    ds.SharedFunctionalGroupsSequence = Sequence(
        [
            _dataset(
                PixelMeasuresSequence=Sequence([measures]),
                PlaneOrientationSequence=Sequence([_dataset(ImageOrientationPatient=cosines)]),
            )
        ]
    )
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [_frame(segment, place, grid, sources[place]) for segment, place in frames]
    )
    ds.PixelData = pack_bits(bits.astype(np.uint8))
    ds["PixelData"].VR = "OB"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, ds, enforce_file_format=True)


def _dataset(**elements: object) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def _code(value: str, scheme: str, meaning: str) -> Sequence:
    return Sequence([_dataset(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)])


def _segment(number: int, label: str, kind: tuple[str, str, str]) -> Dataset:
    return _dataset(
        SegmentNumber=number,
        SegmentLabel=label,
        SegmentAlgorithmType="MANUAL",
        SegmentedPropertyCategoryCodeSequence=_code("49755003", "SCT", "Morphologically Abnormal Structure"),
        SegmentedPropertyTypeCodeSequence=_code(*kind),
    )


def _dimension(ds: Dataset) -> str:
    return f"{ds.SeriesInstanceUID}{_DIMENSION_UID_SUFFIX}"


def _index(ds: Dataset, pointer: int, group: int) -> Dataset:
    return _dataset(
        DimensionOrganizationUID=_dimension(ds), DimensionIndexPointer=pointer, FunctionalGroupPointer=group
    )


def _instance(uid: str) -> Dataset:
    return _dataset(ReferencedSOPClassUID=MRImageStorage, ReferencedSOPInstanceUID=uid)


def _frame(segment: int, place: int, grid: Grid, source_uid: str) -> Dataset:
    source = _instance(source_uid)
    source.PurposeOfReferenceCodeSequence = _code("121322", "DCM", "Source image for image processing operation")
    derivation = _dataset(
        SourceImageSequence=Sequence([source]), DerivationCodeSequence=_code("113076", "DCM", "Segmentation")
    )
    position = grid.affine[:3, 3] + place * grid.affine[:3, 0]
    return _dataset(
        DerivationImageSequence=Sequence([derivation]),
        FrameContentSequence=Sequence([_dataset(DimensionIndexValues=[segment, place + 1])]),
        PlanePositionSequence=Sequence([_dataset(ImagePositionPatient=decimals(position))]),
        SegmentIdentificationSequence=Sequence([_dataset(ReferencedSegmentNumber=segment)]),
    )
