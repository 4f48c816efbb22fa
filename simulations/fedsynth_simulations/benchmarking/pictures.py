"""Pictures of what a recipe draws: numbers hide a grey disc, eyes do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ZOOM = 2


def save_grid(path: Path, pictures: NDArray[np.floating], columns: int) -> None:
    """Write planes (N, H, W) in [0, 1], row by row, `columns` a row, as one grey PNG."""
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[1:]
    canvas = np.zeros((rows * (height + 1), columns * (width + 1)), dtype=np.uint8)
    for i, picture in enumerate(np.clip(pictures.astype(np.float32), 0, 1)):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = np.rint(picture * 255)
    zoomed = canvas.repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1)
    Image.fromarray(zoomed).save(path)


def save_patients_grid(path: Path, images: NDArray[np.floating], masks: NDArray[np.generic], patients: int = 8) -> None:
    """Write the first patients of images (N, C, S, H, W): one row each sequence and the mask, one column each patient.

    The plane is the one in which the patient's mask is largest, or the middle one where it is empty.
    """
    chosen = range(min(patients, len(images)))
    areas = [(masks[i] > 0).sum(axis=(1, 2)) for i in chosen]
    places = [int(area.argmax()) if area.any() else len(area) // 2 for area in areas]
    planes = [images[i, channel, places[i]] for channel in range(images.shape[1]) for i in chosen]
    planes += [(masks[i, places[i]] > 0).astype(np.float32) for i in chosen]
    save_grid(path, np.stack(planes), len(chosen))
