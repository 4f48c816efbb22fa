"""What the images of a release must be, read back by nibabel, pydicom and highdicom: the image checks of `verify`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path

import highdicom
import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from pydicom import dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import MRImageStorage, SegmentationStorage

from fedsynth.errors import Refused
from fedsynth.files import read_json
from fedsynth.sequences import mr_sequences
from fedsynth_server.release.bids import DATASET_FILES, NIFTI_DESCRIPTION, image_path, mask_path
from fedsynth_server.release.dicom import MR_ATTRIBUTES, SEGMENTATION_FOLDER, patient_name
from fedsynth_server.release.geometry import Grid
from fedsynth_server.release.opened import Release

# So many patients, spread over the release, have their voxels compared between NIfTI and DICOM.
_COMPARED = 4
# A round trip through decimal strings and a float32 affine.
_TOLERANCE_MM = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def file_faults(release: Release) -> list[str]:
    """Every participant has each of its images, and nobody else has."""
    faults = []
    if release.has_bids:
        faults += _bids_file_faults(release)
    if release.has_dicom:
        faults += _dicom_file_faults(release)
    return faults


def geometry_faults(release: Release) -> list[str]:
    """Every NIfTI image has the plan's grid; for some patients, DICOM holds the same voxels at the same places."""
    grid = Grid.of(release.plan.image)
    faults = []
    if release.has_bids:
        for path in _nifti_files(release):
            image = _nifti(path)
            if image.shape != grid.shape[::-1] or not np.allclose(image.affine, grid.ras_affine, atol=_TOLERANCE_MM):
                faults.append(f"{path.relative_to(release.folder).as_posix()} is not on the grid of the plan")
    if release.has_dicom:
        step = max(1, len(release.participants) // _COMPARED)
        for participant in release.participants[::step]:
            faults += _series_faults(release, participant, grid)
    return faults


def synthetic_faults(release: Release) -> list[str]:
    """Every DICOM object and every sidecar says that it is synthetic."""
    faults = []
    for path, header in _headers(release):
        if header.get("SyntheticData") != "YES":
            faults.append(f"{path} does not say that it is synthetic")
        expected = SegmentationStorage if f"/{SEGMENTATION_FOLDER}/" in path else MRImageStorage
        if header.get("SOPClassUID") != expected:
            faults.append(f"{path} is no {expected.name}")
    if release.has_bids:
        for image in _nifti_files(release):
            sidecar = image.with_name(image.name.removesuffix(".nii.gz") + ".json")
            if not sidecar.is_file() or read_json(sidecar).get("SyntheticData") is not True:
                faults.append(f"{sidecar.relative_to(release.folder).as_posix()} does not say that it is synthetic")
    return faults


def identifier_faults(release: Release) -> list[str]:
    """No header has room for a person: no private tags, names, dates or free text other than the release's own."""
    faults = []
    day = f"{release.index.released.astimezone(UTC):%Y%m%d}"
    for path, header in _headers(release):
        participant = path.split("/")[1]
        if header.get("PatientID") != participant:
            faults.append(f"{path} has another PatientID than its folder")
        faults += [f"{path} {fault}" for fault in _header_faults(header, patient_name(participant), day)]
        if header.get("SOPClassUID") == MRImageStorage:
            extra = {keyword_for_tag(tag) or str(tag) for tag in header.keys()} - MR_ATTRIBUTES  # noqa: SIM118
            faults += [f"{path} has the attribute {name}, which no release writes" for name in sorted(extra)]
    if release.has_bids:
        for image in _nifti_files(release):
            faults += [f"{image.relative_to(release.folder).as_posix()} {fault}" for fault in _nifti_text_faults(image)]
    return faults


def _bids_file_faults(release: Release) -> list[str]:
    sequences = mr_sequences(release.sequences)
    expected = {mask_path(participant) for participant in release.participants}
    expected |= {image_path(participant, sequence) for participant in release.participants for sequence in sequences}
    present = {path.relative_to(release.folder / "bids").as_posix() for path in _nifti_files(release)}
    beside = {name.removesuffix(".nii.gz") + ".json" for name in expected} | DATASET_FILES
    root = release.folder / "bids"
    others = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - present
    return _set_faults("bids", expected, present) + _set_faults("bids", set(), others - beside)


def _dicom_file_faults(release: Release) -> list[str]:
    image = release.plan.image
    expected = {f"{participant}/{SEGMENTATION_FOLDER}/mask.dcm" for participant in release.participants}
    expected |= {
        f"{participant}/{sequence}/{index:04d}.dcm"
        for participant in release.participants
        for sequence in release.sequences
        for index in range(1, image.slices + 1)
    }
    root = release.folder / "dicom"
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return _set_faults("dicom", expected, present)


def _set_faults(tree: str, expected: set[str], present: set[str]) -> list[str]:
    faults = [f"missing: {tree}/{name}" for name in sorted(expected - present)]
    return faults + [f"unexpected: {tree}/{name}" for name in sorted(present - expected)]


def _series_faults(release: Release, participant: str, grid: Grid) -> list[str]:
    """Compare one patient's series and segmentation with the grid, and with NIfTI where there is a BIDS tree."""
    home = release.folder / "dicom" / participant
    faults = []
    for sequence in mr_sequences(release.sequences):
        try:
            slices = [_dicom(path) for path in sorted((home / sequence.name).glob("*.dcm"))]
            volume = highdicom.get_volume_from_series(slices)
        except (ValueError, AttributeError) as error:
            faults.append(f"dicom/{participant}/{sequence.name} is no volume: {error}")
            continue
        path = release.folder / "bids" / image_path(participant, sequence) if release.has_bids else None
        faults += _volume_faults(f"dicom/{participant}/{sequence.name}", volume, grid, path)
    try:
        mask = highdicom.seg.segread(home / SEGMENTATION_FOLDER / "mask.dcm").get_volume(combine_segments=True)
    except (ValueError, AttributeError, InvalidDicomError) as error:
        return [*faults, f"dicom/{participant}/{SEGMENTATION_FOLDER} is no volume: {error}"]
    path = release.folder / "bids" / mask_path(participant) if release.has_bids else None
    return faults + _volume_faults(f"dicom/{participant}/{SEGMENTATION_FOLDER}", mask, grid, path)


def _volume_faults(name: str, volume: highdicom.Volume, grid: Grid, nifti: Path | None) -> list[str]:
    turned = volume.to_patient_orientation("RAS")
    affine = _LPS_TO_RAS @ turned.affine
    if turned.array.shape != grid.shape[::-1] or not np.allclose(affine, grid.ras_affine, atol=_TOLERANCE_MM):
        return [f"{name} is not on the grid of the plan"]
    if nifti is not None and not np.array_equal(turned.array, _nifti(nifti).get_fdata()):
        return [f"{name} holds other values than {nifti.name}"]
    return []


def _nifti_files(release: Release) -> list[Path]:
    return sorted((release.folder / "bids").rglob("*.nii.gz"))


def _nifti(path: Path) -> nibabel.Nifti1Image:
    try:
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    except (ImageFileError, HeaderDataError, zlib.error, EOFError, OSError) as error:
        raise Refused("image_unreadable", f"{path.name} cannot be read: {error}.") from None
    return image


def _nifti_text_faults(path: Path) -> list[str]:
    """Free text in the headers of NIfTI and gzip (RFC 1952: flags are byte 3, modification time bytes 4 to 7)."""
    header = _nifti(path).header
    texts = {bytes(header[name].tobytes()).rstrip(b"\0") for name in ("descrip", "aux_file", "db_name", "intent_name")}
    faults = []
    if not texts <= {b"", NIFTI_DESCRIPTION.encode()} or header.extensions:
        faults.append("has text in its header that no release writes")
    with path.open("rb") as stream:
        start = stream.read(8)
    if start[3] != 0 or start[4:8] != bytes(4):
        faults.append("has a file name or a time in its gzip header")
    return faults


def _headers(release: Release) -> Iterator[tuple[str, Dataset]]:
    """Path and header of every DICOM file; pixels are not read."""
    root = release.folder / "dicom"
    for path in sorted(root.rglob("*.dcm")):
        yield path.relative_to(release.folder).as_posix(), _dicom(path, stop_before_pixels=True)


def _dicom(path: Path, stop_before_pixels: bool = False) -> Dataset:
    try:
        return dcmread(path, stop_before_pixels=stop_before_pixels)
    except (InvalidDicomError, EOFError, OSError) as error:
        raise Refused("image_unreadable", f"{path.name} cannot be read: {error}.") from None


def _header_faults(dataset: Dataset, name: str, day: str) -> Iterator[str]:
    """Private tags, person names and dates, at any depth."""
    for tag in dataset.keys():  # noqa: SIM118 - iterating the data set itself would decode every element.
        if tag.is_private:
            yield f"has the private tag {tag}"
            continue
        vr = dataset.get_item(tag).VR
        if vr == "SQ":
            for item in dataset[tag].value:
                yield from _header_faults(item, name, day)
        elif vr == "PN" and str(dataset[tag].value) not in ("", name):
            yield f"has a name in {keyword_for_tag(tag)}"
        elif vr in ("DA", "DT") and not str(dataset[tag].value or day).startswith(day):
            yield f"has another date than the release in {keyword_for_tag(tag)}"
