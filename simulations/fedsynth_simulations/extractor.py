"""What the feature network of an evaluation learns on the public simulated cohort: to describe the tumour in a slice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsynth.morphology import ENHANCING
from fedsynth_simulations.cohort.public import PublicCohort

_FEWEST_PIXELS = 8
_LARGEST_SHARE = 0.1  # of a slice that a tumour covers


def extractor_task(public: PublicCohort) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Slices (N * S, C, H, W) in [0, 1] and six targets in [0, 1], NaN where there is no tumour to describe.

    The targets: tumour present, its share of the slice, enhancement present, centroid to the left and to posterior, and
    the slice's place between the lowest and the highest.
    """
    n, channels, slices, height, width = public.images.shape
    images = public.images.transpose(0, 2, 1, 3, 4).reshape(n * slices, channels, height, width).astype(np.float32)
    masks = public.masks.reshape(n * slices, height, width)
    tumour = masks > 0
    pixels = tumour.sum(axis=(1, 2))
    present = pixels >= _FEWEST_PIXELS
    rows = tumour.sum(axis=2) @ np.linspace(0, 1, height) / np.maximum(pixels, 1)
    columns = tumour.sum(axis=1) @ np.linspace(0, 1, width) / np.maximum(pixels, 1)
    described = np.stack(
        [
            np.clip(pixels / (_LARGEST_SHARE * height * width), 0, 1),
            ((masks == ENHANCING).sum(axis=(1, 2)) > 0).astype(float),
            columns,
            rows,
        ],
        axis=1,
    )
    described[~present] = np.nan
    place = np.tile(np.linspace(0, 1, slices), n)
    return images, np.concatenate([present[:, None], described, place[:, None]], axis=1).astype(np.float32)
