"""One patient's volumes to arrays on the study grid, a mask, and measured morphology."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphometry import largest_region, measure
from fedsynth.plan import ImagePlan
from fedsynth_client.ingest.found import MASK, PatientFiles
from fedsynth_client.ingest.grid import (
    Volume,
    canonical,
    check_background,
    check_intensities,
    foreground,
    resample,
    resample_labels,
    scale_intensity,
    study_grid,
)
from fedsynth_client.ingest.refusals import Reason, Refusal, Unusable
from fedsynth_client.ingest.sources import MaskClass

# A sequence that covers less of the reference's head than this was not taken of the same place.
_MIN_OVERLAP = 0.5
# A tumour of which less than this lies on the grid cannot be measured there.
_MIN_TUMOUR_KEPT = 0.5


@dataclass(frozen=True)
class PatientImages:
    """A patient's images on the study grid.

    Attributes:
        images: (C, S, H, W) float16 in [0, 1], the plan's sequences in order.
        mask: (S, H, W) uint8, the largest contiguous tumour region.
        morphology: (F,) every feature of `fedsynth.morphology.FEATURES` in physical units; NaN where not measurable.
    """

    images: NDArray[np.float16]
    mask: NDArray[np.uint8]
    morphology: NDArray[np.float64]


@dataclass(frozen=True)
class Built:
    """What became of one patient's files: images, or why there are none."""

    patient_id: str
    images: PatientImages | None
    refused: tuple[Refusal, ...]


def build(patient: PatientFiles, image: ImagePlan, mask_codes: dict[str, MaskClass]) -> Built:
    """Read and prepare one patient. Every volume is tried, so that one run names all that is wrong."""
    refused: list[Refusal] = []
    volumes: dict[str, Volume] = {}
    for name in [*image.sequences, MASK]:
        source = patient.volumes.get(name)
        if source is None:
            missing = (Reason.MISSING_MASK, "") if name == MASK else (Reason.MISSING_SEQUENCE, name)
            refused.append(Refusal("images", patient.where, *missing))
            continue
        try:
            volume = canonical(source.read_mask(mask_codes) if name == MASK else source.read())
            if name != MASK:
                check_intensities(volume.data)
                check_background(volume.data)
            volumes[name] = volume
        except Unusable as error:
            refused.append(Refusal("volume", source.where, error.reason, error.detail))
    if refused:
        return Built(patient.patient_id, None, tuple(refused))
    try:
        images = on_study_grid([volumes[name] for name in image.sequences], volumes[MASK], image)
    except Unusable as error:
        return Built(patient.patient_id, None, (Refusal("images", patient.where, error.reason, error.detail),))
    return Built(patient.patient_id, images, ())


def on_study_grid(volumes: list[Volume], mask: Volume, image: ImagePlan) -> PatientImages:
    """Bring a patient's sequences (in the plan's order) and mask to the plan's grid, scale, and measure.

    The first sequence is the reference: the grid takes its directions and the centre of its head. Volumes may differ in
    matrix, spacing and orientation; their affines place them. Simulated hospitals' public data go through here too.

    Raises:
        Unusable: ``EMPTY_MASK``, ``TUMOUR_OUTSIDE_GRID``, ``OUTSIDE_REFERENCE``, or one of `scale_intensity`'s.
    """
    reference = canonical(volumes[0])
    grid = study_grid(reference, image)
    channels = []
    head: NDArray[np.bool_] | None = None
    for name, volume in zip(image.sequences, volumes, strict=True):
        data = resample(volume, grid)
        if head is None:
            head = foreground(data)
        elif np.mean(data[head] > 0) < _MIN_OVERLAP:
            raise Unusable(Reason.OUTSIDE_REFERENCE, name)
        channels.append(scale_intensity(data))
    if not mask.data.any():
        raise Unusable(Reason.EMPTY_MASK)
    labels = resample_labels(mask, grid)
    spacing = (image.slice_spacing_mm, image.pixel_spacing_mm, image.pixel_spacing_mm)
    kept = np.count_nonzero(labels) * np.prod(spacing)
    if kept < _MIN_TUMOUR_KEPT * np.count_nonzero(mask.data) * abs(np.linalg.det(mask.affine[:3, :3])):
        raise Unusable(Reason.TUMOUR_OUTSIDE_GRID)
    labels = largest_region(labels)
    images = np.stack(channels).astype(np.float16)
    return PatientImages(images, labels, measure(images, labels, image.sequences, spacing))
