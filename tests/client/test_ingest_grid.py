"""Facts about resampling to the study grid: place, orientation, intensity and labels survive it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.plan import ImagePlan
from fedsynth_client.ingest.grid import (
    Grid,
    Volume,
    canonical,
    check_background,
    foreground,
    head_centre,
    resample,
    resample_labels,
    scale_intensity,
    study_grid,
    to_study_grid,
)
from fedsynth_client.ingest.patient import on_study_grid
from fedsynth_client.ingest.refusals import Reason, Unusable

PLAN = ImagePlan(sequences=["T1"], size=32, slices=12, pixel_spacing_mm=6.0, slice_spacing_mm=10.0)


def blob(points: np.ndarray) -> np.ndarray:
    """A smooth asymmetric head as a function of LPS mm (..., 3): an ellipsoid with a bright spot left-posterior-superior."""
    body = 100.0 / (1.0 + np.exp((np.linalg.norm(points / np.array([70.0, 85.0, 65.0]), axis=-1) - 1.0) * 25.0))
    spot = 60.0 * np.exp(-np.sum((points - np.array([30.0, 35.0, 20.0])) ** 2, axis=-1) / (2 * 14.0**2))
    return body + spot


def sampled(affine: np.ndarray, shape: tuple[int, int, int]) -> Volume:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return Volume(blob(index @ affine[:3, :3].T + affine[:3, 3]), affine)


def centred(spacing: tuple[float, ...], shape: tuple[int, int, int], directions: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


LPS = np.eye(3)[:, [2, 1, 0]]
GRID = Grid((12, 32, 32), centred((10.0, 6.0, 6.0), (12, 32, 32), LPS))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1), (-1, -1, -1)])
def test_the_orientation_of_the_file_does_not_matter(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    directions = np.eye(3)[:, list(order)] * np.array(flips)
    shape = (60, 60, 60)
    volume = sampled(centred((4.0, 4.0, 4.0), shape, directions), shape)
    reference = resample(sampled(centred((4.0, 4.0, 4.0), shape, LPS), shape), GRID)
    np.testing.assert_allclose(resample(volume, GRID), reference, atol=1e-3)
    superior = canonical(volume)
    assert (np.diag(superior.affine[[2, 1, 0], :3]) > 0).all()


@pytest.mark.parametrize("spacing", [(3.0, 1.5, 1.5), (6.0, 2.0, 1.0), (4.0, 4.0, 4.0)])
def test_the_spacing_of_the_file_does_not_matter(spacing: tuple[float, float, float]) -> None:
    shape = tuple(round(240 / step) for step in spacing)
    result = resample(sampled(centred(spacing, shape, LPS), shape), GRID)  # type: ignore[arg-type]
    index = np.stack(np.meshgrid(*map(np.arange, GRID.shape), indexing="ij"), axis=-1)
    truth = blob(index @ GRID.affine[:3, :3].T + GRID.affine[:3, 3])
    assert np.abs(result - truth).mean() < 2.0
    assert np.corrcoef(result.ravel(), truth.ravel())[0, 1] > 0.99


def test_a_tilted_series_lies_where_its_affine_says() -> None:
    angle = np.deg2rad(18.0)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    shape = (80, 100, 100)
    result = resample(sampled(centred((3.0, 2.4, 2.4), shape, tilt @ LPS), shape), GRID)
    truth = resample(sampled(centred((3.0, 2.4, 2.4), shape, LPS), shape), GRID)
    assert np.abs(result - truth).mean() < 2.0


def test_a_constant_stays_constant_to_the_edge_of_the_volume_and_is_zero_outside() -> None:
    volume = Volume.from_lps(np.full((10, 50, 50), 7.0), (10.0, 3.0, 3.0))
    grid = Grid((10, 40, 40), centred((10.0, 6.0, 6.0), (10, 40, 40), LPS))
    grid.affine[:3, 3] += np.array([73.5, 73.5, 45.0])
    result = resample(volume, grid)
    assert result[:, 10:30, 10:30] == pytest.approx(7.0, abs=1e-4)
    assert (result[:, :6] == 0).all()


def test_the_grid_is_centred_on_the_head_wherever_the_scanner_put_it() -> None:
    shape = (60, 60, 60)
    affine = centred((4.0, 4.0, 4.0), shape, LPS)
    affine[:3, 3] += np.array([18.0, -27.0, 11.0])
    volume = canonical(Volume(sampled(centred((4.0, 4.0, 4.0), shape, LPS), shape).data, affine))
    np.testing.assert_allclose(head_centre(volume), [18.0, -27.0, 11.0], atol=3.0)
    assert to_study_grid(volume, PLAN).shape == (12, 32, 32)


def test_a_neck_does_not_pull_the_centre_down() -> None:
    data = np.zeros((80, 50, 50), dtype=np.float32)
    data[:, 15:35, 15:35] = 100.0  # neck and head, 320 mm
    top = Volume.from_lps(data, (4.0, 4.0, 4.0))
    assert head_centre(top)[2] == pytest.approx(79 * 4 - 80, abs=4.0)


def test_labels_go_by_majority_and_none_is_invented() -> None:
    data = np.zeros((24, 64, 64), dtype=np.uint8)
    data[8:16, 20:40, 20:40] = 2
    data[10:14, 26:34, 26:34] = 3
    volume = Volume.from_lps(data, (5.0, 3.0, 3.0))
    grid = study_grid(volume, PLAN, np.array([94.5, 94.5, 57.5]))
    labels = resample_labels(volume, grid)
    assert set(np.unique(labels)) == {0, 2, 3}
    volume_mm3 = {code: (data == code).sum() * 45.0 for code in (2, 3)}
    assert (labels == 2).sum() * 360.0 == pytest.approx(volume_mm3[2], rel=0.25)
    assert (labels == 3).sum() * 360.0 == pytest.approx(volume_mm3[3], rel=0.35)


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.01, 1000.0))
def test_scaling_does_not_depend_on_the_scanner_s_gain(gain: float) -> None:
    shape = (20, 32, 32)
    data = sampled(centred((10.0, 6.0, 6.0), shape, LPS), shape).data
    one, other = scale_intensity(data), scale_intensity(data * gain)
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert one.min() >= 0
    assert one.max() == 1
    assert one[0, 0, 0] < 1e-3


def test_noise_around_the_head_is_not_head() -> None:
    rng = np.random.default_rng(0)
    shape = (24, 48, 48)
    clean = sampled(centred((8.0, 5.0, 5.0), shape, LPS), shape).data
    noisy = np.hypot(clean + rng.normal(0, 4, shape), rng.normal(0, 4, shape))
    head = foreground(noisy)
    assert head[clean > 50].mean() > 0.99
    assert head[clean < 1].mean() < 0.01


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.zeros((10, 10, 10)), Reason.CONSTANT),
        (np.random.default_rng(0).normal(size=(10, 10, 10)), Reason.NEGATIVE_INTENSITIES),
        (np.where(np.arange(1000).reshape(10, 10, 10) == 5, np.nan, 1.0), Reason.NOT_FINITE),
    ],
)
def test_values_that_no_scanner_writes_are_refused(data: np.ndarray, reason: Reason) -> None:
    with pytest.raises(Unusable) as refused:
        scale_intensity(data)
    assert refused.value.reason is reason


def test_a_singular_affine_is_refused() -> None:
    affine = np.eye(4)
    affine[:, 1] = affine[:, 0]
    with pytest.raises(Unusable) as refused:
        canonical(Volume(np.ones((9, 9, 9)), affine))
    assert refused.value.reason is Reason.DEGENERATE_GEOMETRY


def test_tumours_that_the_grid_cannot_hold_are_refused() -> None:
    shape = (60, 60, 60)
    volume = sampled(centred((4.0, 4.0, 4.0), shape, LPS), shape)
    mask = np.zeros(shape, dtype=np.uint8)
    for place, reason in ((None, Reason.EMPTY_MASK), (slice(0, 4), Reason.TUMOUR_OUTSIDE_GRID)):
        if place is not None:
            mask[place, place, place] = 4
        with pytest.raises(Unusable) as refused:
            on_study_grid([volume], Volume(mask, volume.affine), PLAN)
        assert refused.value.reason is reason
    mask[:] = 0
    mask[28:36, 28:36, 28:36] = 4
    prepared = on_study_grid([volume], Volume(mask, volume.affine), PLAN)
    assert prepared.images.dtype == np.float16
    assert prepared.morphology[0] == pytest.approx(32.768, rel=0.2)


def test_a_sequence_taken_elsewhere_is_refused() -> None:
    shape = (60, 60, 60)
    volume = sampled(centred((4.0, 4.0, 4.0), shape, LPS), shape)
    moved = volume.affine.copy()
    moved[0, 3] += 200.0
    plan = PLAN.model_copy(update={"sequences": ["T1", "FLAIR"]})
    mask = np.zeros(shape, dtype=np.uint8)
    mask[28:36, 28:36, 28:36] = 4
    with pytest.raises(Unusable) as refused:
        on_study_grid([volume, Volume(volume.data, moved)], Volume(mask, volume.affine), plan)
    assert refused.value.reason is Reason.OUTSIDE_REFERENCE


def test_grey_air_is_refused_and_a_head_cut_on_one_side_is_not() -> None:
    data = np.full((10, 40, 40), 2.0)
    data[:, 8:32, 8:32] = 100.0
    check_background(data)
    data[:, :, 30:] = 100.0
    data[:, :8] = 2.0
    check_background(data)
    with pytest.raises(Unusable) as refused:
        check_background(np.where(data == 2.0, 50.0, data))
    assert refused.value.reason is Reason.BACKGROUND_NOT_DARK
