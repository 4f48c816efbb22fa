"""Classic MR series as a scanner exports them, identity and all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from fedsynth_simulations.cohort.grid import Grid
from fedsynth_simulations.hospitals.encode import SliceEncoder
from fedsynth_simulations.hospitals.identity import Identity

_PRIVATE_GROUP, _PRIVATE_CREATOR = 0x0029, "SIMULATED SCANNER HEADER"


@dataclass(frozen=True)
class Protocol:
    """What a series' header says of its acquisition."""

    description: str
    echo_time_ms: float
    repetition_time_ms: float
    inversion_time_ms: float | None = None
    contrast_agent: bool = False
    image_type: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "M", "ND")
    burned_in: bool = False


@dataclass(frozen=True)
class Study:
    """One examination: number within the patient, and when."""

    number: int
    date: str
    time: str


def study_header(identity: Identity, study: Study) -> Dataset:
    """The elements that all objects of an examination share; most of them identify someone."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = study.date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = study.time
    ds.AccessionNumber = identity.accession
    ds.Modality = "MR"
    ds.Manufacturer = "Simulated Scanners"
    ds.InstitutionName = identity.institution
    ds.InstitutionAddress = f"1 {identity.institution} Road"
    ds.ReferringPhysicianName = f"{identity.physician}^Dr"
    ds.OperatorsName = ds.PhysiciansOfRecord = f"{identity.physician}^"
    ds.StationName = identity.device[:16]
    ds.StudyDescription = f"MR BRAIN {identity.other_id}"
    ds.ManufacturerModelName = "Simulator 3T"
    ds.PatientName = f"{identity.family}^{identity.given}"
    ds.PatientID = identity.patient_id
    ds.PatientBirthDate = identity.birth_date
    ds.PatientSex = "O"
    ds.OtherPatientIDs = identity.other_id
    ds.PatientAge = f"{int(study.date[:4]) - int(identity.birth_date[:4]):03d}Y"
    ds.PatientWeight = "71"
    ds.PatientAddress = identity.address
    ds.PatientComments = identity.comment
    ds.DeviceSerialNumber = identity.device
    ds.SoftwareVersions = "1"
    ds.StudyInstanceUID = f"{identity.uid_root}.{study.number}"
    ds.StudyID = identity.accession[:16]
    ds.PositionReferenceIndicator = ""
    ds.FrameOfReferenceUID = f"{identity.uid_root}.{study.number}.0"
    private = ds.private_block(_PRIVATE_GROUP, _PRIVATE_CREATOR, create=True)
    private.add_new(0x01, "LO", f"{identity.family} {identity.given}")
    private.add_new(0x02, "UN", _even(identity.comment.encode()))
    return ds


def write_series(
    folder: Path,
    header: Dataset,
    number: int,
    protocol: Protocol,
    image: NDArray[np.floating],
    grid: Grid,
    slope: float,
    last_slice_first: bool = False,
) -> list[Path]:
    """Write one MR Image Storage object a slice.

    Args:
        folder: made if need be; files are called ``IM0001``, ... as scanners call them.
        header: from `study_header`; left as it was.
        number: SeriesNumber, from which the UIDs follow.
        protocol: of the series.
        image: (S, H, W), not negative.
        grid: its place.
        slope: image value of one stored step; the largest stored value must stay below 4096.
        last_slice_first: whether file 1 holds the last slice.

    Returns:
        The files, in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ds = Dataset()
    ds.update(header)
    s_mm, h_mm, w_mm = grid.spacing
    # DS holds at most 16 characters, so the slope is what can be written, not what was computed.
    slope_text = f"{slope:.8g}"
    stored = np.rint(image / float(slope_text)).astype("<u2")
    series_uid = f"{ds.StudyInstanceUID}.{number}"
    ds.SOPClassUID = MRImageStorage
    ds.SeriesInstanceUID = series_uid
    ds.SeriesNumber = number
    ds.SeriesDescription = protocol.description
    ds.ProtocolName = protocol.description
    ds.ImageType = list(protocol.image_type)
    ds.BodyPartExamined = "BRAIN"
    ds.ScanningSequence = "SE" if protocol.inversion_time_ms is None else ["SE", "IR"]
    ds.SequenceVariant = "SK"
    ds.ScanOptions = "FS"
    ds.MRAcquisitionType = "2D"
    ds.SliceThickness = f"{0.85 * s_mm:.4g}"
    ds.SpacingBetweenSlices = f"{s_mm:.6g}"
    ds.RepetitionTime = f"{protocol.repetition_time_ms:.6g}"
    ds.EchoTime = f"{protocol.echo_time_ms:.4g}"
    if protocol.inversion_time_ms is not None:
        ds.InversionTime = f"{protocol.inversion_time_ms:.6g}"
    if protocol.contrast_agent:
        ds.ContrastBolusAgent = "Gd"
    ds.EchoTrainLength = "1"
    ds.MagneticFieldStrength = "3"
    ds.FlipAngle = "90"
    ds.PatientPosition = "HFS"
    ds.BurnedInAnnotation = "YES" if protocol.burned_in else "NO"
    ds.ImageOrientationPatient = decimals(
        [*grid.affine[:3, 2] / w_mm, *grid.affine[:3, 1] / h_mm]
    )  # along a row, then along a column
    ds.PixelSpacing = decimals([h_mm, w_mm])
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", slope_text, "US"
    ds.WindowCenter, ds.WindowWidth = "2000", "4000"
    encoder = SliceEncoder(ds)
    count = len(stored)
    normal = np.cross(grid.affine[:3, 2], grid.affine[:3, 1]) / (w_mm * h_mm)
    files = []
    for place, pixels in enumerate(stored):
        instance = instance_number(place, count, last_slice_first)
        position = grid.affine[:3, 3] + place * grid.affine[:3, 0]
        uid = instance_uid(ds, number, instance)
        location = decimals([float(position @ normal)])[0]
        path = folder / f"IM{instance:04d}"
        path.write_bytes(encoder.file(uid, instance, decimals(position), location, pixels.tobytes()))
        files.append(path)
    return files


def _even(value: bytes) -> bytes:
    """Padded as PS3.5, 6.2.2 wants unknown values; pydicom leaves them as they are."""
    return value + b"\0" * (len(value) % 2)


def instance_number(place: int, count: int, last_slice_first: bool) -> int:
    """InstanceNumber of the slice at `place` among `count`."""
    return count - place if last_slice_first else place + 1


def instance_uid(header: Dataset, series: int, instance: int) -> str:
    """SOPInstanceUID of an image of an examination."""
    return f"{header.StudyInstanceUID}.{series}.{instance}"


def decimals(values: NDArray[np.floating] | list[float]) -> list[str]:
    """Numbers as decimal strings of at most 16 characters."""
    return [f"{value:.10g}"[:16] if abs(value) >= 1e-6 else "0" for value in map(float, values)]
