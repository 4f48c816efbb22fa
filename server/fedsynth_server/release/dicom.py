"""A synthetic patient as DICOM: one classic MR series a sequence, one file a slice, and the mask as a Segmentation.

Every object says in its header that it is synthetic (Synthetic Data, 0008,001C; PS3.3 C.12.1) and which equipment made
it (Contributing Equipment, PS3.3 C.12.1.1.5). UIDs derive from the patient's content, times from the release.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import DSfloat

from fedsynth import __version__
from fedsynth.sequences import MrSequence, mr_sequences
from fedsynth.synthetic import STORED_MAXIMUM, SyntheticPatient, to_stored
from fedsynth_server.release.facts import MODEL, NOT_A_PATIENT, NOT_FOR_DIAGNOSIS, SOFTWARE, ReleaseFacts
from fedsynth_server.release.geometry import IMAGE_ORIENTATION_PATIENT, Grid
from fedsynth_server.release.patients import patient_key

SEGMENTATION_FOLDER = "SEG"
_DEIDENTIFICATION = "Synthetic: holds no acquired patient data"
# highdicom cannot be told the time or this UID; both would differ between two otherwise equal releases.
_TIMES = {"DA": "%Y%m%d", "TM": "%H%M%S", "DT": "%Y%m%d%H%M%S+0000"}
_DIMENSION_ORGANIZATION_UID = "DimensionOrganizationUID"

# Every attribute that an image of a release may carry; `verify` refuses any other.
_MR_KEYWORDS = """
    SpecificCharacterSet ImageType InstanceCreationDate InstanceCreationTime SOPClassUID SOPInstanceUID
    SyntheticData StudyDate SeriesDate ContentDate StudyTime SeriesTime ContentTime AccessionNumber Modality
    Manufacturer ReferringPhysicianName StudyDescription SeriesDescription ManufacturerModelName
    DerivationDescription PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientIdentityRemoved
    DeidentificationMethod BodyPartExamined ScanningSequence SequenceVariant ScanOptions MRAcquisitionType
    SliceThickness RepetitionTime EchoTime MagneticFieldStrength SpacingBetweenSlices EchoTrainLength
    DeviceSerialNumber SoftwareVersions PatientPosition ContributingEquipmentSequence StudyInstanceUID
    SeriesInstanceUID StudyID SeriesNumber AcquisitionNumber InstanceNumber ImagePositionPatient
    ImageOrientationPatient FrameOfReferenceUID PositionReferenceIndicator SliceLocation ImageComments
    SamplesPerPixel PhotometricInterpretation Rows Columns PixelSpacing BitsAllocated BitsStored HighBit
    PixelRepresentation QualityControlImage BurnedInAnnotation RecognizableVisualFeatures WindowCenter WindowWidth
    LossyImageCompression PixelData
"""
MR_ATTRIBUTES = frozenset(_MR_KEYWORDS.split())


def patient_name(participant_id: str) -> str:
    """PatientName of a synthetic patient."""
    return f"SYNTHETIC^{participant_id}"


def write_dicom_patient(folder: Path, patient: SyntheticPatient, facts: ReleaseFacts) -> None:
    """Write ``<folder>/<participant>/<sequence>/0001.dcm`` ... and ``<folder>/<participant>/SEG/mask.dcm``."""
    sequences = mr_sequences(facts.sequences)
    grid = Grid.of(facts.plan.image)
    key = patient_key(patient, facts)
    home = folder / patient.participant_id
    series: list[list[FileDataset]] = []
    for number, (sequence, image) in enumerate(zip(sequences, patient.images, strict=True), start=1):
        template, stored = _series(number, sequence, patient.participant_id, key, facts), to_stored(image)
        instances = [_uid(key, "image", sequence.name, str(index)) for index in range(grid.slices)]
        series.append([_slice(template, stored, index, uid, grid) for index, uid in enumerate(instances)])
        place = home / sequence.name
        place.mkdir(parents=True)
        for index, dataset in enumerate(series[-1], start=1):
            save_dataset(dataset, place / f"{index:04d}.dcm")
    place = home / SEGMENTATION_FOLDER
    place.mkdir()
    mask = _segmentation(series[0], patient.mask, len(sequences) + 1, key, facts)
    save_dataset(mask, place / "mask.dcm")


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write a DICOM file.

    Encoded first and written after: pydicom wraps an error of the disk in one that has lost its number, and a full disk
    could then not be told from a fault.

    Raises:
        OSError: as the operating system gave it.
    """
    encoded = io.BytesIO()
    dataset.save_as(encoded, enforce_file_format=True)
    path.write_bytes(encoded.getvalue())


def _uid(key: str, *what: str) -> UID:
    return generate_uid(entropy_srcs=[key, *what])


def _slice(template: Dataset, stored: NDArray[np.uint16], index: int, instance: UID, grid: Grid) -> FileDataset:
    """Slice `index` of the volume `stored`: the elements that all slices share, and its own."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    shared: MutableMapping[BaseTag, DataElement | RawDataElement] = {element.tag: element for element in template}
    dataset = FileDataset("", shared, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPInstanceUID = instance
    dataset.InstanceNumber = index + 1
    position = grid.position(index)
    dataset.ImagePositionPatient = _decimals(*position)
    dataset.SliceLocation = _decimals(position[2])
    dataset.PixelData = stored[index].astype("<u2").tobytes()
    return dataset


def _series(number: int, sequence: MrSequence, participant_id: str, key: str, facts: ReleaseFacts) -> Dataset:
    """What all slices of the series `number` share, as MR Image Storage (PS3.3 A.4)."""
    dataset = Dataset()
    date, time = facts.released.strftime(_TIMES["DA"]), facts.released.strftime(_TIMES["TM"])

    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = MRImageStorage
    dataset.SyntheticData = "YES"
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.ContributingEquipmentSequence = [_synthesizer(facts)]

    dataset.PatientName = patient_name(participant_id)
    dataset.PatientID = participant_id
    dataset.IssuerOfPatientID = SOFTWARE
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    _say_deidentified(dataset)

    dataset.StudyInstanceUID = _uid(key, "study")
    dataset.StudyDate, dataset.StudyTime = date, time
    dataset.StudyID = "1"
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = NOT_A_PATIENT

    dataset.Modality = "MR"
    dataset.SeriesInstanceUID = _uid(key, "series", sequence.name)
    dataset.SeriesNumber = number
    dataset.SeriesDate, dataset.SeriesTime = date, time
    dataset.SeriesDescription = f"Synthetic {sequence.meaning}"
    dataset.BodyPartExamined = "BRAIN"
    dataset.PatientPosition = "HFS"

    dataset.Manufacturer = SOFTWARE
    dataset.ManufacturerModelName = MODEL
    dataset.DeviceSerialNumber = "0"
    dataset.SoftwareVersions = __version__

    # Nothing was acquired: acquisition parameters that the standard asks for are present and empty.
    dataset.ScanningSequence = "RM"
    dataset.SequenceVariant = "NONE"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "3D"
    dataset.EchoTime = None
    dataset.EchoTrainLength = None
    dataset.RepetitionTime = None
    dataset.MagneticFieldStrength = None

    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.AcquisitionNumber = number
    dataset.ContentDate, dataset.ContentTime = date, time
    dataset.DerivationDescription = "Image synthesised by a generative model"
    dataset.ImageComments = NOT_FOR_DIAGNOSIS
    dataset.BurnedInAnnotation = "NO"
    dataset.RecognizableVisualFeatures = "NO"
    dataset.QualityControlImage = "NO"
    dataset.LossyImageCompression = "00"

    grid = Grid.of(facts.plan.image)
    dataset.FrameOfReferenceUID = _uid(key, "frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.ImageOrientationPatient = list(IMAGE_ORIENTATION_PATIENT)
    dataset.PixelSpacing = _decimals(grid.pixel_spacing, grid.pixel_spacing)
    dataset.SliceThickness = _decimals(grid.slice_spacing)
    dataset.SpacingBetweenSlices = _decimals(grid.slice_spacing)

    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = grid.rows, grid.columns
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = STORED_MAXIMUM // 2, STORED_MAXIMUM
    return dataset


def _decimals(*values: float) -> list[DSfloat]:
    """Decimal strings, rounded to the 16 characters that the standard allows."""
    return [DSfloat(value, auto_format=True) for value in values]


def _say_deidentified(dataset: Dataset) -> None:
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = _DEIDENTIFICATION


def _synthesizer(facts: ReleaseFacts) -> highdicom.ContributingEquipment:
    """The item of the Contributing Equipment Sequence that names the generator and its guarantee."""
    return highdicom.ContributingEquipment(
        manufacturer=SOFTWARE,
        purpose_of_reference=codes.DCM.SynthesizingEquipment,
        manufacturer_model_name=MODEL,
        software_versions=__version__,
        contribution_datetime=facts.released.strftime(_TIMES["DT"]),
        contribution_description=f"Release {facts.identifier}. {facts.guarantee}",
    )


def _segmentation(
    source: list[FileDataset], mask: NDArray[np.uint8], number: int, key: str, facts: ReleaseFacts
) -> highdicom.seg.Segmentation:
    """The tumour mask as a binary Segmentation (PS3.3 A.51) over the slices of `source`, one frame a slice."""
    tumour = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Tumour",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=SOFTWARE, version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydicom warns of the empty acquisition parameters of `source`.
        dataset = highdicom.seg.Segmentation(
            source_images=source,
            pixel_array=mask.astype(bool),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[tumour],
            series_instance_uid=_uid(key, "mask series"),
            series_number=number,
            sop_instance_uid=_uid(key, "mask"),
            instance_number=1,
            manufacturer=SOFTWARE,
            manufacturer_model_name=MODEL,
            software_versions=__version__,
            device_serial_number="0",
            content_label="TUMOUR",
            content_description=NOT_A_PATIENT,
            series_description="Synthetic tumour mask",
            # Frames of empty slices are kept: the mask then has the geometry of the images, even without a tumour.
            omit_empty_frames=False,
            contributing_equipment=[_synthesizer(facts)],
        )
    dataset.SyntheticData = "YES"
    dataset.IssuerOfPatientID = SOFTWARE
    _say_deidentified(dataset)
    # highdicom takes the equipment of the source images for a scanner that acquired them; here there was none.
    equipment = dataset.ContributingEquipmentSequence
    dataset.ContributingEquipmentSequence = [item for item in equipment if not _is_acquisition(item)]
    for item in _with_nested(dataset):
        for element in item:
            if element.VR in _TIMES and element.value:
                element.value = facts.released.strftime(_TIMES[element.VR])
            elif element.keyword == _DIMENSION_ORGANIZATION_UID:
                element.value = _uid(key, "dimensions")
    return dataset


def _is_acquisition(equipment: Dataset) -> bool:
    return any(
        code.CodeValue == codes.DCM.AcquisitionEquipment.value for code in equipment.PurposeOfReferenceCodeSequence
    )


def _with_nested(dataset: Dataset) -> Iterator[Dataset]:
    """`dataset` and every item of its sequences, at any depth."""
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _with_nested(item)
