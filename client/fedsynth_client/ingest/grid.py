"""From volumes as they were acquired to the grid that every patient of a study shares.

The study grid has the directions of the patient's reference sequence, in the axis order and sense nearest to LPS, the
plan's spacing, and its centre in the head's bounding box. Clinical series are tilted towards the same anatomical plane
(AC-PC) rather than the scanner's axes; taking their own directions keeps acquired slices whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedsynth.plan import ImagePlan
from fedsynth_client.ingest.refusals import Reason, Unusable

# Head height from vertex to skull base. A volume that reaches further down shows the neck, which must not pull the
# centre of the head with it.
HEAD_HEIGHT_MM = 160.0
_SUBSAMPLED_EDGE = 96
_NEGATIVE_SHARE = 0.05
_DARK = 0.25


@dataclass(frozen=True)
class Volume:
    """Voxels and where they lie.

    Attributes:
        data: (I, J, K), any axis order.
        affine: (4, 4) maps a voxel's indices to its centre in mm, in the patient's LPS frame (DICOM's; x to the left,
            y to posterior, z to superior).
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> NDArray[np.float64]:
        """(3,) distance in mm between neighbours along each axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @staticmethod
    def from_lps(data: NDArray[Any], spacing_mm: tuple[float, float, float]) -> Volume:
        """A volume (S, H, W) in LPS order with spacing (s, h, w), its first voxel at the origin.

        >>> Volume.from_lps(np.zeros((2, 3, 4)), (5.0, 1.0, 1.0)).affine[:3, 0].tolist()
        [0.0, 0.0, 5.0]
        """
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing_mm, 1.0
        return Volume(data, affine)


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a result lie: `shape` (S, H, W) and `affine` (4, 4) from indices to LPS mm."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]


def to_study_grid(
    volume: Volume, image: ImagePlan, centre_mm: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Resample one volume to the plan's grid, (slices, size, size), centred on its head or on `centre_mm` (LPS)."""
    reference = canonical(volume)
    return resample(reference, study_grid(reference, image, centre_mm))


def canonical(volume: Volume) -> Volume:
    """The same voxels with axes permuted and flipped to the order (S, H, W) nearest to LPS; nothing is interpolated.

    Raises:
        Unusable: ``DEGENERATE_GEOMETRY`` when the affine is singular or not finite.
    """
    linear = volume.affine[:3, :3]
    spacing = volume.spacing
    if not np.isfinite(volume.affine).all() or not (spacing > 1e-6).all():
        raise Unusable(Reason.DEGENERATE_GEOMETRY)
    cosines = linear / spacing
    if abs(np.linalg.det(cosines)) < 1e-3:
        raise Unusable(Reason.DEGENERATE_GEOMETRY)
    left, posterior, superior = _nearest_axes(cosines)
    order = (superior, posterior, left)
    data = np.transpose(volume.data, order)
    affine = volume.affine[:, [*order, 3]].copy()
    for axis, world in enumerate((2, 1, 0)):
        if affine[world, axis] < 0:
            data = np.flip(data, axis)
            affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(data, affine)


def _nearest_axes(cosines: NDArray[np.float64]) -> tuple[int, int, int]:
    """For x, y and z the array axis that runs most along it, each axis used once (largest total |cosine|)."""
    axes = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    best: tuple[int, int, int] = max(
        axes, key=lambda order: sum(abs(cosines[world, order[world]]) for world in range(3))
    )
    return best


def foreground(data: NDArray[Any]) -> NDArray[np.bool_]:
    """Voxels of the head: above half of Otsu's threshold (Otsu 1979) of the values below the 99.5th percentile.

    Otsu alone separates bright from dark tissue once the background is a minority; half of it lies in the gap between
    air and tissue in both cases. The largest connected part is kept, without noise and ghosts beside the head.
    """
    top = float(np.percentile(data, 99.5))
    if not top > 0:
        return np.zeros(data.shape, dtype=bool)
    inside = np.asarray(data > 0.5 * _otsu(np.clip(data, 0.0, top)))
    parts, count = ndimage.label(inside)
    if count <= 1:
        return inside
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())


def _otsu(values: NDArray[Any]) -> float:
    """Otsu's threshold of non-negative `values`, over 128 equal bins."""
    counts, edges = np.histogram(values, bins=128, range=(0.0, float(values.max())))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nan_to_num(between).argmax()])


def head_centre(reference: Volume) -> NDArray[np.float64]:
    """Centre (LPS mm) of the head's bounding box in a canonical volume; the neck of a tall volume is left out.

    Raises:
        Unusable: ``CONSTANT`` when no voxel stands out.
    """
    steps = [max(1, round(edge / _SUBSAMPLED_EDGE)) for edge in reference.data.shape]
    head = foreground(reference.data[tuple(slice(None, None, step) for step in steps)].astype(np.float32))
    if not head.any():
        raise Unusable(Reason.CONSTANT)
    bounds = []
    for axis, step in enumerate(steps):
        # A row of voxels belongs to the box when a hundredth of the fullest row's voxels lie in it: noise does not.
        filled = head.sum(axis=tuple(other for other in range(3) if other != axis))
        rows = np.flatnonzero(filled > 0.01 * filled.max())
        bounds.append((rows[0] * step, rows[-1] * step))
    tallest = HEAD_HEIGHT_MM / float(reference.spacing[0])
    low, high = bounds[0]
    bounds[0] = (max(low, high - tallest), high)
    middle = np.array([(low + high) / 2 for low, high in bounds])
    return np.asarray(reference.affine[:3, :3] @ middle + reference.affine[:3, 3])


def study_grid(reference: Volume, image: ImagePlan, centre_mm: NDArray[np.float64] | None = None) -> Grid:
    """The plan's grid in the directions of a canonical `reference`, centred on its head or on `centre_mm` (LPS)."""
    centre = head_centre(reference) if centre_mm is None else centre_mm
    # The nearest rotation (polar decomposition): a sheared affine must not give a sheared grid.
    u, _, vt = np.linalg.svd(reference.affine[:3, :3] / reference.spacing)
    spacing = np.array([image.slice_spacing_mm, image.pixel_spacing_mm, image.pixel_spacing_mm])
    shape = (image.slices, image.size, image.size)
    affine = np.eye(4)
    affine[:3, :3] = (u @ vt) * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def resample(volume: Volume, grid: Grid) -> NDArray[np.float32]:
    """Values of `volume` on `grid`: linear, each voxel averaged over its own extent where the grid is the coarser one.

    Outside of the volume the value is 0.
    """
    volume = canonical(volume)
    mapping = np.linalg.inv(volume.affine) @ grid.affine
    if _is_separable(mapping, grid.shape):
        # Exact at the grid's centre, so that what is neglected is largest at its edges.
        middle = (np.array(grid.shape) - 1) / 2
        centre = mapping[:3, :3] @ middle + mapping[:3, 3]
        weights = [
            _weights(grid.shape[axis], volume.data.shape[axis], mapping[axis, axis], centre[axis]) for axis in range(3)
        ]
        return _apply(weights, volume.data)
    scale = np.linalg.norm(mapping[:3, :3], axis=1)
    smooth = volume.data.astype(np.float32)
    for axis in range(3):
        # The standard deviation of the box average that the separable path takes.
        sigma = np.sqrt(max(scale[axis] ** 2 - 1.0, 0.0) / 12.0)
        if sigma > 0:
            smooth = ndimage.gaussian_filter1d(smooth, sigma, axis=axis, mode="constant", truncate=3.0)
    return np.asarray(
        ndimage.affine_transform(
            smooth, mapping[:3, :3], mapping[:3, 3], grid.shape, np.float32, order=1, mode="constant"
        )
    )


def resample_labels(volume: Volume, grid: Grid) -> NDArray[np.uint8]:
    """Labels of `volume` (uint8, 0 is background) on `grid`, by majority of the extent that a grid voxel covers.

    Whether a voxel is labelled at all is decided first (half of its extent), then which label has the most of it, so
    that a thin rim between two labels does not become background.
    """
    codes = [code for code in np.flatnonzero(np.bincount(volume.data.ravel())).tolist() if code != 0]
    if not codes:
        return np.zeros(grid.shape, dtype=np.uint8)
    shares = np.stack([resample(Volume(volume.data == code, volume.affine), grid) for code in codes])
    winner = np.array(codes, dtype=np.uint8)[shares.argmax(axis=0)]
    return np.where(shares.sum(axis=0) >= 0.5, winner, 0).astype(np.uint8)


def _is_separable(mapping: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    """Whether treating the axes one by one is wrong by less than a quarter voxel anywhere on the grid."""
    off_axis = np.abs(mapping[:3, :3] - np.diag(np.diag(mapping[:3, :3])))
    return bool((off_axis @ (np.array(shape) / 2.0) < 0.25).all())


def _weights(n_out: int, n_in: int, step: float, centre: float) -> NDArray[np.float32]:
    """(n_out, n_in) weights of linear interpolation, widened to the output's extent where that is larger.

    The middle of the output lies at input coordinate `centre`, its neighbours `step` apart. The kernel is a triangle of
    half width max(1, |step|), the antialiasing form of linear interpolation. Rows within the input's extent add up to
    1; rows beyond fade to 0.
    """
    at = centre + step * (np.arange(n_out) - (n_out - 1) / 2)
    half = max(1.0, abs(step))
    reach = 2 * int(np.ceil(half)) + 1
    inputs = np.arange(-reach, n_in + reach)
    kernel = np.clip(1.0 - np.abs(inputs[None, :] - at[:, None]) / half, 0.0, None)
    covered = (at >= -0.5) & (at <= n_in - 0.5)
    inner = kernel[:, reach : reach + n_in]
    total = np.where(covered, inner.sum(axis=1), kernel.sum(axis=1))[:, None]
    return np.divide(inner, total, out=np.zeros_like(inner), where=total > 0).astype(np.float32)


def _apply(weights: list[NDArray[np.float32]], data: NDArray[Any]) -> NDArray[np.float32]:
    """Contract each axis of `data` (I, J, K) with its weights (n_out, n_in); the fastest reduction first."""
    along_k = np.asarray(data, dtype=np.float32) @ weights[2].T
    along_j = np.matmul(weights[1], along_k)
    return np.asarray(np.tensordot(weights[0], along_j, axes=(1, 0)), dtype=np.float32)


def scale_intensity(data: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scale one volume to [0, 1]: 0 stays 0, the 99.5th percentile of the head becomes 1; values above are clipped.

    One patient's volume alone decides, so that no statistic over patients is needed.

    Raises:
        Unusable: ``NOT_FINITE``, ``CONSTANT`` or ``NEGATIVE_INTENSITIES``.
    """
    check_intensities(data)
    head = foreground(data)
    if not head.any():
        raise Unusable(Reason.CONSTANT)
    top = float(np.percentile(data[head], 99.5))
    return np.clip(data / top, 0.0, 1.0).astype(np.float32)


def check_intensities(data: NDArray[Any]) -> None:
    """Refuse values that no magnitude image has.

    Raises:
        Unusable: ``NOT_FINITE``, ``CONSTANT`` or ``NEGATIVE_INTENSITIES``.
    """
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise Unusable(Reason.NOT_FINITE)
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise Unusable(Reason.CONSTANT)
    # Interpolation leaves faint ringing below zero beside edges; a normalised volume has half of its head there.
    if low < 0 and float(np.mean(data < -_NEGATIVE_SHARE * high)) > 0.01:
        raise Unusable(Reason.NEGATIVE_INTENSITIES)


def check_background(data: NDArray[Any]) -> None:
    """Refuse a canonical volume (S, H, W) whose air is not dark, by the corners of its slices.

    Phase-sensitive inversion recovery shows air in mid-grey; scaled like the others it would teach a grey background.

    Raises:
        Unusable: ``BACKGROUND_NOT_DARK``.
    """
    height, width = (max(1, edge // 20) for edge in data.shape[1:])
    corners = [
        data[:, rows, columns]
        for rows in (slice(height), slice(-height, None))
        for columns in (slice(width), slice(-width, None))
    ]
    # Three corners of four, so that a slice cut close to the head on one side still passes.
    grey = sorted(float(np.median(corner)) for corner in corners)[1]
    if grey > _DARK * float(np.percentile(data, 99.5)):
        raise Unusable(Reason.BACKGROUND_NOT_DARK)
