"""Which synthetic patients lie in a folder, computed from its files: what evidence is tied to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from fedsynth.errors import Refused
from fedsynth.released import read_release
from fedsynth.sequences import mr_sequences
from fedsynth.synthetic import STORED_MAXIMUM, SyntheticPatient, subject_digest
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
    """The patients with images and masks from DICOM."""
    plan, folder = release.plan, release.folder
    labels = [row[1] for row in read_tsv(folder / PARTICIPANTS)[1]]
    genes, morphology = _numbers(folder / EXPRESSION), _numbers(folder / MORPHOLOGY)
    for index, name in enumerate(release.participants):
        home = folder / "dicom" / name
        try:
            mask = highdicom.seg.segread(home / SEGMENTATION_FOLDER / "mask.dcm").get_volume(combine_segments=True)
            series = [
                highdicom.get_volume_from_series(
                    [dcmread(path) for path in sorted((home / sequence.name).glob("*.dcm"))]
                )
                for sequence in mr_sequences(release.sequences)
            ]
        except (ValueError, AttributeError, InvalidDicomError, OSError) as error:
            raise Refused(
                "image_unreadable", f"The images of {name} cannot be read ({type(error).__name__})."
            ) from None
        volumes = [_lps(volume) for volume in (mask, *series)]
        if any(volume.shape != Grid.of(plan.image).shape for volume in volumes):
            raise Refused("image_unreadable", f"The images of {name} do not have the plan's shape.")
        images = np.stack(volumes[1:]).astype(np.float32) / np.float32(STORED_MAXIMUM)
        yield SyntheticPatient(
            name, labels[index], genes[index], morphology[index], images, volumes[0].astype(np.uint8)
        )


def _lps(volume: highdicom.Volume) -> NDArray[Any]:
    """Its values as (S, H, W) in LPS order."""
    return np.asarray(volume.to_patient_orientation("RAS").array).transpose(2, 1, 0)[:, ::-1, ::-1]


def _numbers(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.array([[float(value) for value in row[1:]] for row in read_tsv(path)[1]], dtype=np.float32)
