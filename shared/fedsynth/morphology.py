"""Tumour morphology: the features that link gene expression to the image.

Every feature is measured from one patient alone and normalised by *public* bounds, so no statistic over patients is
needed. Shape definitions follow the Image Biomarker Standardisation Initiative (IBSI, Zwanenburg et al., Radiology 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Label values of a prepared mask (as in BraTS, but consecutive). A mask that only tells tumour from no tumour uses
# WHOLE_TUMOUR throughout.
BACKGROUND, NECROSIS, OEDEMA, ENHANCING, WHOLE_TUMOUR = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Feature:
    """A morphology feature: its name, unit, public bounds, and the scale on which it is normalised to [0, 1]."""

    name: str
    unit: str
    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    meaning: str = ""


FEATURES: tuple[Feature, ...] = (
    Feature("volume", "mL", 0.5, 300.0, "log", "volume of the whole tumour"),
    Feature("enhancing_fraction", "1", 0.0, 1.0, meaning="share of the tumour that enhances on T1c"),
    Feature("oedema_fraction", "1", 0.0, 1.0, meaning="share of the tumour that is oedema"),
    Feature("sphericity", "1", 0.0, 1.0, meaning="surface of the ball of equal volume over the surface (IBSI QCFX)"),
    Feature("position_left", "1", 0.0, 1.0, meaning="centroid, right to left, in the bounding box of the head"),
    Feature("position_posterior", "1", 0.0, 1.0, meaning="centroid, anterior to posterior, in the bounding box"),
    Feature("position_superior", "1", 0.0, 1.0, meaning="centroid, inferior to superior, in the bounding box"),
    Feature("t1c_ratio", "1", 0.25, 4.0, "log", "mean T1c in the tumour over mean T1c in the rest of the head"),
    Feature("flair_ratio", "1", 0.25, 4.0, "log", "mean FLAIR in the tumour over mean FLAIR in the rest of the head"),
)


def features(names: Sequence[str]) -> tuple[Feature, ...]:
    """The features called `names`, in that order; KeyError for an unknown name."""
    by_name = {feature.name: feature for feature in FEATURES}
    return tuple(by_name[name] for name in names)


def normalise(values: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.float32]:
    """Map physical values (..., F) to [0, 1] by the public bounds of the features `names`; NaN stays NaN."""
    low, high, log = _bounds(names)
    values = np.clip(np.asarray(values, dtype=np.float64), low, high)
    values = np.where(log, np.log(np.where(log, values, 1.0)), values)
    low, high = np.where(log, np.log(np.where(log, low, 1.0)), low), np.where(log, np.log(high), high)
    return ((values - low) / (high - low)).astype(np.float32)


def denormalise(unit: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.float32]:
    """Inverse of `normalise` on [0, 1]; values outside are clipped to the bounds."""
    low, high, log = _bounds(names)
    unit = np.clip(np.asarray(unit, dtype=np.float64), 0.0, 1.0)
    linear = low + unit * (high - low)
    geometric = np.where(log, low, 1.0) * np.where(log, high / np.where(log, low, 1.0), 1.0) ** unit
    return np.where(log, geometric, linear).astype(np.float32)


def _bounds(names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    chosen = features(names)
    return (
        np.array([feature.low for feature in chosen]),
        np.array([feature.high for feature in chosen]),
        np.array([feature.scale == "log" for feature in chosen]),
    )
