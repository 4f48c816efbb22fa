"""One patient's image files, in the layout of each hospital."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphology import ENHANCING, NECROSIS, OEDEMA
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.grid import Grid, axial_grid, centred_grid, tilt
from fedsynth_simulations.cohort.patient import Subject, scan
from fedsynth_simulations.hospitals.cases import Case
from fedsynth_simulations.hospitals.dicom import (
    Protocol,
    Study,
    instance_number,
    instance_uid,
    study_header,
    write_series,
)
from fedsynth_simulations.hospitals.identity import Identity
from fedsynth_simulations.hospitals.nifti import truncate, write_nifti
from fedsynth_simulations.hospitals.segmentation import write_segmentation

_NORTH_PROTOCOLS = {
    "T1": Protocol("AX T1 SE PRE", 9.0, 550.0),
    "T1c": Protocol("AX T1 SE POST GAD", 9.0, 550.0, contrast_agent=True),
    "FLAIR": Protocol("AX FLAIR DARK FLUID", 120.0, 9000.0, inversion_time_ms=2500.0),
}
_NORTH_NUMBERS = {"T1": 2, "T1c": 5, "FLAIR": 3}
_LOCALIZER = Protocol("LOCALIZER 3-PLANE T1 PRE", 4.0, 8.0, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
_RECONSTRUCTION = Protocol("COR T1 SE POST GAD MPR", 9.0, 550.0, image_type=("DERIVED", "SECONDARY", "MPR"))
_MASK_SERIES = Protocol("TUMOUR MASK", 0.0, 0.0, image_type=("DERIVED", "PRIMARY", "LABELMAP"))
_MASK_NUMBER = 100

_SOUTH_SUFFIX = {"T1": "T1w", "T1c": "ce-gadolinium_T1w", "FLAIR": "FLAIR"}
_SOUTH_CODES = ("RAS", "LPS", "PSR")
_EAST_CODES = ("LAS", "RAS", "LPI")


@dataclass(frozen=True)
class Job:
    """What a writer needs to know of one patient.

    Attributes:
        folder: of the hospital.
        identity: planted identifiers.
        case: absences and faults.
        subject: anatomy, tumour and scanner.
        rng: for geometry, for how the examination went, and for noise.
    """

    folder: Path
    identity: Identity
    case: Case
    subject: Subject
    rng: np.random.Generator

    @property
    def sequences(self) -> list[str]:
        """Those that were acquired."""
        return [name for name in self.subject.acquisition.signals if name != self.case.missing_sequence]

    def scan(
        self, anatomy: Anatomy, grid: Grid, *names: str
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
        """Scan the sequences `names` on `grid`: images (S, H, W) and mask (S, H, W), empty where the case wants it so."""
        images, mask = scan(anatomy, self.subject.head, self.subject.acquisition.only(*names), grid, self.rng)
        return images, np.zeros_like(mask) if self.case.fault == "empty_mask" else mask


def write_north(job: Job, anatomy: Anatomy) -> None:
    """DICOM: a folder a patient with a folder a series, some tilted, some sagittal, some with further series."""
    rng, fault = job.rng, job.case.fault
    study = _study(1, rng)
    grid = _north_grid(rng)
    _write_study(job, anatomy, study, grid, job.folder / "images" / f"PAT{job.case.index:05d}" / "ST1")
    if fault == "second_study":
        later = Study(2, f"{int(study.date[:4]) + 1}{study.date[4:]}", study.time)
        _write_study(job, anatomy, later, _north_grid(rng), job.folder / "images" / f"PAT{job.case.index:05d}" / "ST2")


def write_south(job: Job, anatomy: Anatomy) -> None:
    """BIDS: files in three axis orders, sidecars that still name the patient, masks among the derivatives."""
    rng, fault = job.rng, job.case.fault
    grid = axial_grid(24, 72, 6.0, 2.7)
    codes = _SOUTH_CODES[int(rng.integers(len(_SOUTH_CODES)))]
    images, mask = job.scan(anatomy, grid, *job.sequences)
    subject = f"sub-{job.identity.patient_id}"
    anat = job.folder / "images" / subject / "anat"
    for name, image in images.items():
        path = anat / f"{subject}_{_SOUTH_SUFFIX[name]}.nii.gz"
        # Float images on an arbitrary scale; the step is a power of two, which compresses well.
        image = (np.rint(image * 128.0) / 512.0).astype(np.float32)
        if fault == "four_dimensions" and name == "FLAIR":
            image = np.stack([image, image], axis=-1)
        write_nifti(path, image, grid, codes, description=job.identity.family, name=job.identity.accession[:15])
        sidecar = {
            "Modality": "MR",
            "MagneticFieldStrength": 1.5,
            "InstitutionName": job.identity.institution,
            "DeviceSerialNumber": job.identity.device,
            "PatientName": f"{job.identity.family}^{job.identity.given}",
            "PatientID": job.identity.other_id,
            "AccessionNumber": job.identity.accession,
            "ImageComments": job.identity.comment,
        }
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar, indent=1))
        if fault == "corrupt_gzip" and name == "T1c":
            truncate(path)
    # The codes of BraTS: 1 necrosis, 2 oedema, 4 enhancing.
    labels = np.select([mask == NECROSIS, mask == OEDEMA, mask == ENHANCING], [1, 2, 4]).astype(np.uint8)
    if fault == "unknown_mask_code":
        labels[labels == 2] = 7
    derivative = job.folder / "images" / "derivatives" / "segmentation" / subject / "anat"
    write_nifti(derivative / f"{subject}_desc-tumour_dseg.nii.gz", labels, grid, codes)


def write_east(job: Job, anatomy: Anatomy) -> None:
    """Patient folders, named after the patients, with 16-bit files of one axis order each."""
    rng, fault = job.rng, job.case.fault
    folder = job.folder / "images" / job.identity.patient_id
    if fault == "empty_folder":
        folder.mkdir(parents=True)
        return
    grid = axial_grid(20, 68, 7.2, 2.9)
    codes = _EAST_CODES[int(rng.integers(len(_EAST_CODES)))]
    known = job.case.orientation_known
    images, mask = job.scan(anatomy, grid, *job.sequences)
    gain = rng.uniform(300, 900)
    for name, image in images.items():
        stored = np.rint(image * gain).astype(np.int16)
        if fault == "four_dimensions" and name == "FLAIR":
            stored = np.stack([stored, stored], axis=-1)
        path = folder / f"{name}.nii.gz"
        write_nifti(path, stored, grid, codes, description=job.identity.comment[:79], orientation_known=known)
        if fault == "corrupt_gzip" and name == "T1":
            truncate(path)
    labels = np.select([mask == OEDEMA, mask == NECROSIS, mask == ENHANCING], [1, 2, 3]).astype(np.int16)
    write_nifti(folder / "seg.nii.gz", labels, grid, codes, orientation_known=known)


def _study(number: int, rng: np.random.Generator) -> Study:
    date = f"{rng.integers(2008, 2022)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
    return Study(number, date, f"{rng.integers(7, 19):02d}{rng.integers(60):02d}{rng.integers(60):02d}")


def _north_grid(rng: np.random.Generator) -> Grid:
    """Axial slices, a third of them tilted; one patient in twelve was scanned sagittally."""
    kind = rng.random()
    if kind < 1 / 12:
        # From right to left; rows run down, columns to the back.
        directions = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
        return centred_grid((24, 72, 72), directions, (6.2, 2.7, 2.7))
    directions = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    if kind > 2 / 3:
        directions = tilt(rng.uniform(-12, 12), 0) @ tilt(rng.uniform(-4, 4), 1) @ directions
    return centred_grid((22, 72, 72), directions, (6.5, 2.7, 2.7))


def _write_study(job: Job, anatomy: Anatomy, study: Study, grid: Grid, folder: Path) -> None:
    rng, fault = job.rng, job.case.fault
    header = study_header(job.identity, study)
    reverse = bool(rng.random() < 0.3)
    thick = bool(rng.random() < 0.2)  # FLAIR on a coarser grid of its own
    extra = rng.random(2)
    names = job.sequences
    shared = [name for name in names if not (thick and name == "FLAIR")]
    images, mask = job.scan(anatomy, grid, *shared)
    # Receiver gain is set anew for each examination, so that intensities have no unit.
    gain = np.float32(rng.uniform(700, 1600))
    grids = dict.fromkeys(shared, grid)
    if thick and "FLAIR" in names:
        directions = grid.affine[:3, :3] / np.array(grid.spacing)
        grids["FLAIR"] = centred_grid((20, 64, 64), directions, (7.3, 3.1, 3.1))
        images["FLAIR"] = job.scan(anatomy, grids["FLAIR"], "FLAIR")[0]["FLAIR"]
    for name, image in images.items():
        protocol = _NORTH_PROTOCOLS[name]
        if fault == "burned_in_annotation" and name == "T1c":
            protocol = Protocol(protocol.description, 9.0, 550.0, contrast_agent=True, burned_in=True)
            image = _with_writing(image)
        image = image * gain
        number = _NORTH_NUMBERS[name]
        files = write_series(
            folder / f"SE{number}", header, number, protocol, image, grids[name], _step(image), reverse
        )
        if fault == "truncated_file" and name == "T1":
            truncate(files[len(files) // 2])
        if fault == "missing_slice" and name == "FLAIR":
            files[len(files) // 2].unlink()
    if extra[0] < 0.2:
        planes = axial_grid(3, 48, 20.0, 5.0)
        image = job.scan(anatomy, planes, names[0])[0][names[0]] * gain
        write_series(folder / "SE1", header, 1, _LOCALIZER, image, planes, _step(image))
    if extra[1] < 0.1 and "T1c" in names:
        # From anterior to posterior; rows run down, columns to the left.
        directions = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        coronal = centred_grid((10, 48, 48), directions, (12.0, 4.0, 4.0))
        image = job.scan(anatomy, coronal, "T1c")[0]["T1c"] * gain
        write_series(folder / "SE6", header, 6, _RECONSTRUCTION, image, coronal, _step(image))
    source = _NORTH_NUMBERS[shared[0]]
    # Some readers mark tumours in a workstation that exports label maps as plain series.
    if not mask.any() or rng.random() < 0.25:
        codes = np.select([mask == NECROSIS, mask == OEDEMA, mask == ENHANCING], [1.0, 2.0, 3.0])
        write_series(folder / f"SE{_MASK_NUMBER}", header, _MASK_NUMBER, _MASK_SERIES, codes, grid, slope=1.0)
    else:
        places = [instance_number(place, len(mask), reverse) for place in range(len(mask))]
        uids = [instance_uid(header, source, instance) for instance in places]
        path = folder / f"SE{_MASK_NUMBER}" / "IM0001"
        write_segmentation(path, header, _MASK_NUMBER, mask, grid, source, uids)


def _step(image: NDArray[np.float32]) -> float:
    """The stored step by which the brightest voxel becomes 4000."""
    return float(image.max()) / 4000.0


def _with_writing(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bright bars in a corner of every slice, where a scanner prints the patient's name."""
    written = image.copy()
    written[:, 2:8, 2:30:3] = image.max()
    return written
