"""Which synthetic patients lie in a folder, computed from its files: what evidence is tied to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import highdicom
import numpy as np
from pydicom.errors import InvalidDicomError

from fedsynth.errors import Refused
from fedsynth.released import read_release
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_server.release.dicom import SEGMENTATION_FOLDER
from fedsynth_server.release.geometry import Grid
from fedsynth_server.release.opened import Release, read_tsv
from fedsynth_server.release.tables import EXPRESSION, MORPHOLOGY, PARTICIPANTS


def subject_of(release: Release) -> str:
    """`fedsynth.synthetic.subject_digest` of the patients in `release`, be it finished or a candidate.

    Raises:
        Refused: ``release_damaged``, ``table_malformed`` or ``image_unreadable``.
    """
    return subject_digest(read_release(release.folder) if release.has_bids else _without_bids(release))


def _without_bids(release: Release) -> Iterator[SyntheticPatient]:
    """The patients without their intensities, masks from DICOM."""
    plan, folder = release.plan, release.folder
    labels = [row[1] for row in read_tsv(folder / PARTICIPANTS)[1]]
    genes, morphology = _numbers(folder / EXPRESSION), _numbers(folder / MORPHOLOGY)
    unread = np.zeros((len(plan.image.sequences), 0, 0, 0), np.float32)
    for index, name in enumerate(release.participants):
        path = folder / "dicom" / name / SEGMENTATION_FOLDER / "mask.dcm"
        try:
            volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
        except (ValueError, AttributeError, InvalidDicomError, OSError) as error:
            raise Refused("image_unreadable", f"The mask of {name} cannot be read ({type(error).__name__}).") from None
        mask = volume.to_patient_orientation("RAS").array.transpose(2, 1, 0)[:, ::-1, ::-1]  # (S, H, W), LPS
        if mask.shape != Grid.of(plan.image).shape:
            raise Refused("image_unreadable", f"The mask of {name} does not have the plan's shape.")
        yield SyntheticPatient(name, labels[index], genes[index], morphology[index], unread, mask.astype(np.uint8))


def _numbers(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.array([[float(value) for value in row[1:]] for row in read_tsv(path)[1]], dtype=np.float32)
