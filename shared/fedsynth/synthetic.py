"""Synthetic patients as values, between the generator that draws them and the release that writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SyntheticPatient:
    """One synthetic patient, all parts of which were drawn along one chain: genes -> morphology -> image and mask.

    Attributes:
        participant_id: ``"SYN0001"``, ...: letters and digits only, as BIDS wants.
        label: one of the plan's classes.
        genes: (G,) expression on the plan's normalised scale (within-sample quantile, centred and scaled).
        morphology: (F,) the morphology that conditioned the image, in physical units, in the plan's feature order.
        images: (C, S, H, W) float32 in [0, 1], LPS order: W runs to the left, H to posterior, S to superior.
        mask: (S, H, W) uint8, 1 in the tumour.
    """

    participant_id: str
    label: str
    genes: NDArray[np.float32]
    morphology: NDArray[np.float32]
    images: NDArray[np.float32]
    mask: NDArray[np.uint8]
