"""NIfTI: BIDS trees, one folder a patient, or a CSV manifest."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fedsynth_client.ingest.found import MASK, MIN_SLICES, Found, PatientFiles, Source, recode_mask, relative, role
from fedsynth_client.ingest.grid import Volume
from fedsynth_client.ingest.refusals import READ_FAILURES, Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import ImageSources, MaskClass

# nibabel's frame is RAS, ours is LPS.
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_AXES = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class NiftiFile:
    """One NIfTI file."""

    where: str
    path: Path
    volume_index: int | None
    assume_orientation: str | None

    def read(self) -> Volume:
        """Read the volume; see `Source.read`."""
        data, affine = self._load()
        if min(data.shape) < MIN_SLICES:
            raise Unusable(Reason.TOO_FEW_SLICES, f"{min(data.shape)} of at least {MIN_SLICES}")
        return Volume(data.astype(np.float32, copy=False), affine)

    def read_mask(self, codes: Mapping[str, MaskClass]) -> Volume:
        """Read the volume as a label map; see `Source.read_mask`."""
        data, affine = self._load()
        return Volume(recode_mask(data, codes), affine)

    def _load(self) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
        if not self.path.is_file():
            raise Unusable(Reason.UNREADABLE)
        try:
            image = nibabel.nifti1.load(self.path)
            index = self._index(image.shape)
            if image.get_data_dtype().names is not None:
                raise Unusable(Reason.COLOUR)
            data = np.asarray(image.dataobj[index])
        except (ImageFileError, HeaderDataError):
            raise Unusable(Reason.UNREADABLE) from None
        except EOFError:
            raise Unusable(Reason.TRUNCATED) from None
        except READ_FAILURES as error:
            short = "bytes" in str(error) or "end-of-stream" in str(error)
            raise Unusable(Reason.TRUNCATED if short else Reason.UNREADABLE) from None
        return data, self._affine(image)

    def _index(self, shape: tuple[int, ...]) -> tuple[slice | int, ...]:
        """What to take of an image of `shape` to get three dimensions."""
        if len(shape) < 3 or min(shape) < 1:
            raise Unusable(Reason.NOT_THREE_DIMENSIONAL)
        whole = (slice(None), slice(None), slice(None))
        further = shape[3:]
        if all(length == 1 for length in further):
            return (*whole, *(0 for _ in further))
        if len(further) > 1 and any(length > 1 for length in further[1:]):
            raise Unusable(Reason.NOT_THREE_DIMENSIONAL)
        if self.volume_index is None or not 0 <= self.volume_index < further[0]:
            raise Unusable(Reason.FOUR_DIMENSIONAL, f"{further[0]} volumes")
        return (*whole, self.volume_index, *(0 for _ in further[1:]))

    def _affine(self, image: nibabel.Nifti1Image) -> NDArray[np.float64]:
        header = image.header
        unit = _MM_PER_UNIT[header.get_xyzt_units()[0]]
        if int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0:
            affine = _RAS_TO_LPS @ np.asarray(image.affine, dtype=np.float64)
        elif self.assume_orientation is not None:
            affine = np.eye(4)
            affine[:3, :3] = 0.0
            for axis, letter in enumerate(self.assume_orientation):
                world, sign = _AXES[letter]
                affine[world, axis] = sign * float(header.get_zooms()[axis])
        else:
            raise Unusable(Reason.ORIENTATION_UNKNOWN)
        affine[:3] *= unit
        return affine


def find_bids(root: Path, base: Path, images: ImageSources) -> Found:
    """Patients of a BIDS tree: ``sub-*`` below `root` (images), and below ``derivatives/`` (masks).

    Where a patient has several sessions, the one with most sequences is taken, and among equals the first by name.
    """
    found = Found()
    subjects = [folder for folder in _folders(root) if folder.name.startswith("sub-")]
    derivatives: dict[str, list[Path]] = defaultdict(list)
    for folder, _, names in os.walk(root / "derivatives"):
        owner = next((part for part in Path(folder).relative_to(root).parts if part.startswith("sub-")), None)
        if owner is not None:
            derivatives[owner] += [Path(folder, name) for name in names if _is_nifti(name)]
    for subject in subjects:
        raw = _nifti_below(subject)
        sessions: dict[str, list[Path]] = defaultdict(list)
        for path in raw:
            sessions[_session(path)].append(path)
        roles = {session: _assigned(paths, base, images, Found()) for session, paths in sessions.items()}
        order = sorted(sessions, key=lambda session: (-len(set(roles[session]) - {MASK}), session))
        if not order:
            found.refused.append(Refusal("patient", relative(subject, base), Reason.EMPTY_FOLDER))
            continue
        chosen = order[0]
        for session in order[1:]:
            found.refused.append(Refusal("series", relative(subject / session, base), Reason.ANOTHER_STUDY))
        masks = [path for path in derivatives[subject.name] if _session(path) == chosen]
        masks = [path for path in masks if _role_or_none(path, images) == MASK]
        volumes = _assigned([*sessions[chosen], *masks], base, images, found)
        found.patients.append(PatientFiles(subject.name.removeprefix("sub-"), relative(subject, base), volumes))
    return found


def find_folders(root: Path, base: Path, images: ImageSources) -> Found:
    """Patients of a folder that holds one folder a patient; the folder's name is the patient's id."""
    found = Found()
    for folder in _folders(root):
        paths = _nifti_below(folder)
        if not paths:
            found.refused.append(Refusal("patient", relative(folder, base), Reason.EMPTY_FOLDER))
            continue
        volumes = _assigned(paths, base, images, found)
        found.patients.append(PatientFiles(folder.name, relative(folder, base), volumes))
    return found


def find_manifest(path: Path, base: Path, images: ImageSources) -> Found:
    """Patients of a CSV with the columns ``patient_id``, one a sequence, and ``mask``; paths are relative to the CSV.

    Raises:
        Unusable: ``TABLE_MISSING``, ``TABLE_UNREADABLE`` or ``COLUMN_MISSING`` when there is no such CSV.
    """
    found = Found()
    if not path.is_file():
        raise Unusable(Reason.TABLE_MISSING)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (csv.Error, UnicodeDecodeError):
        raise Unusable(Reason.TABLE_UNREADABLE) from None
    if "patient_id" not in columns:
        raise Unusable(Reason.COLUMN_MISSING, "patient_id")
    ids = [(row["patient_id"] or "").strip() for row in rows]
    for number, (patient, row) in enumerate(zip(ids, rows, strict=True), start=2):
        where = f"{relative(path, base)}: row {number}"
        if not patient:
            found.refused.append(Refusal("patient", where, Reason.MANIFEST_ROW_INVALID))
            continue
        if ids.count(patient) > 1:
            found.refused.append(Refusal("patient", where, Reason.DUPLICATE_PATIENT))
            continue
        volumes: dict[str, Source] = {}
        for name in [*images.sequences, MASK]:
            if entry := (row.get(name) or "").strip():
                volumes[name] = _file(path.parent / entry, base, images)
        found.patients.append(PatientFiles(patient, where, volumes))
    return found


def _assigned(paths: Iterable[Path], base: Path, images: ImageSources, found: Found) -> dict[str, Source]:
    """One file a role; what is ambiguous is refused into `found` and left out."""
    by_role: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(paths):
        try:
            serves = role(path.name, images.sequences, images.mask_patterns)
        except Unusable as refused:
            found.refused.append(Refusal("file", relative(path, base), refused.reason, refused.detail))
            continue
        if serves is not None:
            by_role[serves].append(path)
    volumes: dict[str, Source] = {}
    for serves, candidates in by_role.items():
        if len(candidates) == 1:
            volumes[serves] = _file(candidates[0], base, images)
        else:
            found.refused += [
                Refusal("file", relative(path, base), Reason.SEVERAL_CANDIDATES, serves) for path in candidates
            ]
    return volumes


def _role_or_none(path: Path, images: ImageSources) -> str | None:
    try:
        return role(path.name, images.sequences, images.mask_patterns)
    except Unusable:
        return None


def _file(path: Path, base: Path, images: ImageSources) -> NiftiFile:
    return NiftiFile(relative(path, base), path, images.volume_index, images.assume_orientation)


def _session(path: Path) -> str:
    return next((part for part in path.parts if part.startswith("ses-")), "")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nifti_below(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names if _is_nifti(name))


def _is_nifti(name: str) -> bool:
    return name.lower().endswith((".nii", ".nii.gz")) and not name.startswith(".")
