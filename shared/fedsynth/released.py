"""A release read back: the synthetic patients as they were drawn, one at a time.

What a recipient has is a folder with ``plan.toml``, three tables and a BIDS tree (`fedsynth_server.release` writes them).
Labels, genes, morphology and masks come back to the last bit, intensities as they were stored, in steps of 0.001;
`fedsynth.synthetic.subject_digest` is the same as before the release.

Where the folder lists its files (``SHA256SUMS``, or ``CONTENT.SHA256SUMS`` in a release's candidate), every file is compared
with the list before it is used. That shows damage, not who made the release: for the signature there is ``fedsynth release
verify``.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from fedsynth.errors import Refused, UsageError
from fedsynth.plan import StudyPlan, load_plan
from fedsynth.selection import FILE as SELECTION
from fedsynth.selection import Selected, read_selected, sequences_of
from fedsynth.sequences import mr_sequences
from fedsynth.sums import CONTENT, SUMS, read_sums
from fedsynth.synthetic import STORED_MAXIMUM, SyntheticPatient

_PARTICIPANTS, _MORPHOLOGY, _EXPRESSION = "participants.tsv", "morphology.tsv", "genes/expression.tsv"
_KEY = "participant_id"
_PARTICIPANT_ID = re.compile(r"[A-Za-z0-9]{1,32}")
_SPACING_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class Files:
    """A folder whose files are compared with a list before they are used.

    Attributes:
        folder: the folder.
        listed_in: the list; empty where the folder has none.
        sums: SHA-256 (hex) by path, as the list says.
    """

    folder: Path
    listed_in: str
    sums: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Files:
        """With the list that there is: of a release, or of its candidate, which is not finished yet.

        Raises:
            Refused: ``manifest_malformed``.
        """
        for name in (SUMS, CONTENT):
            if (folder / name).is_file():
                return cls(folder, name, read_sums(folder, name))
        return cls(folder, "", {})

    def read(self, path: str) -> bytes:
        """The bytes of a file, which are those of the list where there is one.

        Raises:
            Refused: ``release_damaged``.
        """
        try:
            content = (self.folder / path).read_bytes()
        except FileNotFoundError:
            raise _damaged(f"{path} is missing") from None
        if self.listed_in and self.sums.get(path) != hashlib.sha256(content).hexdigest():
            raise _damaged(f"{path} is not as {self.listed_in} lists it")
        return content


@dataclass(frozen=True)
class ReleasedPatients(Sequence[SyntheticPatient]):
    """The patients of a release in the order of its participants table; images are read when a patient is asked for.

    Only tables stay in memory. A patient that is asked for twice is read, and compared with the list of files, twice.

    Attributes:
        files: the release's folder and list.
        plan: its study plan.
        participants: their ids.
        labels: one of the plan's classes each.
        genes: (N, G) float32 on the plan's normalised scale.
        morphology: (N, F) float32 in physical units.
        selected: what was selected of all that its study can draw; None where nothing was.
    """

    files: Files
    plan: StudyPlan
    participants: tuple[str, ...]
    labels: tuple[str, ...]
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    selected: Selected | None = None

    @property
    def sequences(self) -> tuple[str, ...]:
        """The MR sequences of the images, in the order of their channels."""
        return sequences_of(self.plan, self.selected)

    def __len__(self) -> int:
        return len(self.participants)

    @overload
    def __getitem__(self, index: int) -> SyntheticPatient: ...
    @overload
    def __getitem__(self, index: slice) -> ReleasedPatients: ...
    def __getitem__(self, index: int | slice) -> SyntheticPatient | ReleasedPatients:
        """One patient with its images, or a stretch of patients, still unread.

        Raises:
            Refused: ``release_damaged``.
        """
        if isinstance(index, slice):
            return ReleasedPatients(
                self.files,
                self.plan,
                self.participants[index],
                self.labels[index],
                self.genes[index],
                self.morphology[index],
                self.selected,
            )
        name = self.participants[index]
        stem = f"sub-{name}/anat/sub-{name}"
        images = [
            self._volume(f"bids/{stem}_{sequence.bids}.nii.gz", 0, STORED_MAXIMUM)
            for sequence in mr_sequences(self.sequences)
        ]
        mask = self._volume(f"bids/derivatives/seg/{stem}_label-tumor_mask.nii.gz", 0, 1)
        return SyntheticPatient(
            participant_id=name,
            label=self.labels[index],
            genes=self.genes[index],
            morphology=self.morphology[index],
            images=np.stack(images).astype(np.float32) / np.float32(STORED_MAXIMUM),
            mask=mask.astype(np.uint8),
        )

    def __iter__(self) -> Iterator[SyntheticPatient]:
        return (self[index] for index in range(len(self)))

    def _volume(self, path: str, low: int, high: int) -> NDArray[np.integer[Any]]:
        """The integers (S, H, W) of an image in LPS order."""
        content = self.files.read(path)
        try:
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
            stored = np.asarray(image.dataobj)
        except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError):
            raise _damaged(f"{path} is no NIfTI image") from None
        plan = self.plan.image
        if stored.shape != (plan.size, plan.size, plan.slices):
            raise _damaged(f"{path} has shape {stored.shape}, not the plan's")
        spacing = (plan.pixel_spacing_mm, plan.pixel_spacing_mm, plan.slice_spacing_mm)
        if aff2axcodes(image.affine) != ("R", "A", "S") or not np.allclose(
            image.header.get_zooms(), spacing, atol=_SPACING_TOLERANCE_MM
        ):
            raise _damaged(f"{path} does not lie on the plan's grid")
        if not np.issubdtype(stored.dtype, np.integer) or stored.min() < low or stored.max() > high:
            raise _damaged(f"{path} holds values other than whole numbers from {low} to {high}")
        return stored.transpose(2, 1, 0)[:, ::-1, ::-1]  # from right, anterior, superior to (S, H, W)


def read_release(folder: Path) -> ReleasedPatients:
    """Open the release in `folder`: its plan and tables are read and checked, its images when they are asked for.

    Raises:
        UsageError: ``release_missing`` when `folder` is no release; the errors of `load_plan`.
        Refused: ``release_damaged``: a file is missing, differs from the list, or does not fit the plan;
            ``manifest_malformed``: the list itself; ``release_without_bids``: it holds no NIfTI images;
            ``release_unreadable``: what it says was selected.
    """
    if not (folder / "plan.toml").is_file() or not (folder / _PARTICIPANTS).is_file():
        raise UsageError("release_missing", f"{folder} is not a release: it has no plan.toml or no {_PARTICIPANTS}.")
    if not (folder / "bids").is_dir():
        raise Refused("release_without_bids", f"{folder} holds no BIDS tree.", "Ask for the release with its images.")
    files = Files.of(folder)
    files.read("plan.toml")
    plan = load_plan(folder / "plan.toml")
    participants, labels = _table(files, _PARTICIPANTS, [plan.label.name])
    if not participants or len(set(participants)) != len(participants):
        raise _damaged(f"{_PARTICIPANTS} lists nobody, or somebody twice")
    if not all(_PARTICIPANT_ID.fullmatch(name) for name in participants):
        raise _damaged(f"{_PARTICIPANTS} holds an id that is not 1 to 32 letters and digits")
    if {row[0] for row in labels} - set(plan.label.classes):
        raise _damaged(f"{_PARTICIPANTS} holds a label that the plan lacks")
    return ReleasedPatients(
        files,
        plan,
        tuple(participants),
        tuple(row[0] for row in labels),
        _numbers(files, _EXPRESSION, plan.genes.panel, participants),
        _numbers(files, _MORPHOLOGY, plan.morphology.features, participants),
        read_selected(files.read(SELECTION), plan) if (folder / SELECTION).exists() else None,
    )


def _damaged(what: str) -> Refused:
    return Refused("release_damaged", f"The release is damaged: {what}.", "Fetch it again and verify it.")


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(f"{name} is not UTF-8 text") from None


def _table(files: Files, path: str, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Ids and the values of `columns`, one row each."""
    rows = [line.split("\t") for line in _text(files.read(path), path).removesuffix("\n").split("\n")]
    if rows[0] != [_KEY, *columns] or any(len(row) != len(rows[0]) for row in rows):
        raise _damaged(f"{path} does not have the columns of the plan")
    return [row[0] for row in rows[1:]], [row[1:] for row in rows[1:]]


def _numbers(files: Files, path: str, columns: Sequence[str], participants: Sequence[str]) -> NDArray[np.float32]:
    """(N, columns) of a table with one row for each of `participants`; nine digits give back every float32 exactly."""
    named, rows = _table(files, path, columns)
    if named != list(participants):
        raise _damaged(f"{path} does not have one row for each participant")
    try:
        values = [[float(value) for value in row] for row in rows]
    except ValueError:
        raise _damaged(f"{path} holds a value that is no number") from None
    if not all(math.isfinite(value) for row in values for value in row):
        raise _damaged(f"{path} holds a value that is not finite")
    return np.array(values, dtype=np.float32)
