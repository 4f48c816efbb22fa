"""Public phantom slices, for an extractor where no public cohort is at hand: ellipses with and without a lesion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

TARGETS = ("lesion present", "lesion area", "lesion to the left", "lesion to the back", "lesion contrast", "head area")


def phantom_slices(
    n: int, channels: int, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Slices of a textured elliptic head, half of them with a lesion of random place, size and contrast.

    Args:
        n: number of slices.
        channels: image channels; a lesion's contrast differs between them.
        size: height and width in pixels.
        rng: source of all draws.

    Returns:
        Images (N, C, H, W) in [0, 1], and `TARGETS` (N, 6) in [0, 1], NaN for a lesion that is not there.
    """
    y, x = np.meshgrid(*2 * (np.linspace(-1, 1, size),), indexing="ij")
    images = np.zeros((n, channels, size, size), dtype=np.float32)
    targets = np.full((n, len(TARGETS)), np.nan, dtype=np.float32)
    for i in range(n):
        half_x, half_y = rng.uniform(0.2, 0.75), rng.uniform(0.2, 0.9)
        head = np.square(x / half_x) + np.square(y / half_y) < 1
        texture = gaussian_filter(rng.normal(size=(size, size)), size / 24)
        texture /= texture.std()
        matter = np.where(texture > rng.uniform(-0.8, 0.8), rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
        levels = rng.uniform(0.6, 1.2, size=channels)
        picture = head * matter * levels[:, None, None]
        targets[i, 0], targets[i, 5] = 0.0, head.mean()
        if rng.random() < 0.5:
            angle, away = rng.uniform(0, 2 * np.pi), 0.7 * np.sqrt(rng.random())
            centre_x, centre_y = away * half_x * np.cos(angle), away * half_y * np.sin(angle)
            radius, contrast = rng.uniform(0.05, 0.35), rng.uniform(-0.3, 0.3, size=channels)
            lesion = head & (np.square(x - centre_x) + np.square(y - centre_y) < radius**2)
            picture = picture + contrast[:, None, None] * gaussian_filter(lesion.astype(np.float64), size / 128)
            targets[i, :5] = (
                1,
                (radius / 0.35) ** 2,
                (centre_x + 1) / 2,
                (centre_y + 1) / 2,
                contrast.mean() / 0.6 + 0.5,
            )
        noise = rng.normal(0, rng.uniform(0.0, 0.05), size=picture.shape)
        images[i] = np.clip(picture + head * noise, 0, 1)
    return images, targets
