"""Facts about measured morphology: known shapes have known features, whatever the grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsynth.morphology import ENHANCING, FEATURES, NECROSIS, OEDEMA, WHOLE_TUMOUR
from fedsynth.morphometry import largest_region, measure, sphericity

NAMES = [feature.name for feature in FEATURES]
SPACING = (7.0, 3.0, 3.0)


def ball(radius_mm: float, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return z**2 + y**2 + x**2 <= radius_mm**2


def measured(images: np.ndarray, mask: np.ndarray, sequences: list[str]) -> dict[str, float]:
    return dict(zip(NAMES, measure(images, mask, sequences, SPACING).tolist(), strict=True))


def head() -> np.ndarray:
    """A grey box for a head, 3 channels: T1, T1c, FLAIR."""
    images = np.zeros((3, 16, 64, 64), dtype=np.float32)
    images[:, 2:14, 8:56, 12:52] = 0.4
    return images


def test_a_ball_is_more_spherical_than_a_rod_and_never_above_one() -> None:
    round_one = sphericity(ball(15.0, (1.0, 1.0, 1.0), (40, 40, 40)), (1.0, 1.0, 1.0))
    rod = np.zeros((40, 8, 8), dtype=bool)
    rod[2:38, 3:5, 3:5] = True
    assert 0.9 < round_one <= 1.0  # the mesh of a voxelised ball is a little rough
    assert sphericity(rod, (1.0, 1.0, 1.0)) < 0.7


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 1, 1), (1, 1, 9)])
def test_a_region_of_one_slice_or_voxel_has_a_sphericity(shape: tuple[int, int, int]) -> None:
    value = sphericity(np.ones(shape, dtype=bool), SPACING)
    assert 0.0 < value <= 1.0


def test_sphericity_does_not_depend_on_where_the_region_lies() -> None:
    region = np.zeros((20, 30, 30), dtype=bool)
    region[0:6, 0:5, 0:7] = True
    assert sphericity(region, SPACING) == pytest.approx(sphericity(np.roll(region, (9, 11, 13), (0, 1, 2)), SPACING))


def test_labelled_parts_are_counted() -> None:
    mask = np.zeros((16, 64, 64), dtype=np.uint8)
    mask[6:10, 20:30, 20:30] = OEDEMA
    mask[6:8, 20:30, 20:30] = ENHANCING
    mask[6, 20:30, 20:30] = NECROSIS
    values = measured(head(), mask, ["T1", "T1c", "FLAIR"])
    assert values["volume"] == pytest.approx(400 * 63 / 1000)
    assert values["enhancing_fraction"] == pytest.approx(0.25)
    assert values["oedema_fraction"] == pytest.approx(0.5)


def test_an_unlabelled_tumour_gets_its_fractions_from_the_intensities() -> None:
    images = head()
    mask = np.zeros((16, 64, 64), dtype=np.uint8)
    mask[6:10, 20:30, 20:30] = WHOLE_TUMOUR
    images[1, 6, 20:30, 20:30] = 0.9
    images[2, 7:9, 20:30, 20:30] = 0.9
    values = measured(images, mask, ["T1", "T1c", "FLAIR"])
    assert values["enhancing_fraction"] == pytest.approx(0.25)
    assert values["oedema_fraction"] == pytest.approx(0.5)
    assert values["t1c_ratio"] == pytest.approx((0.9 + 3 * 0.4) / 4 / 0.4, rel=1e-3)
    assert values["flair_ratio"] == pytest.approx((2 * 0.9 + 2 * 0.4) / 4 / 0.4, rel=1e-3)


def test_position_runs_to_left_posterior_and_superior() -> None:
    corner = np.zeros((16, 64, 64), dtype=np.uint8)
    corner[12:14, 52:56, 48:52] = WHOLE_TUMOUR
    values = measured(head(), corner, ["T1", "T1c", "FLAIR"])
    assert min(values[f"position_{axis}"] for axis in ("left", "posterior", "superior")) > 0.9
    opposite = corner[::-1, ::-1, ::-1]
    values = measured(head()[:, ::-1, ::-1, ::-1], opposite, ["T1", "T1c", "FLAIR"])
    assert max(values[f"position_{axis}"] for axis in ("left", "posterior", "superior")) < 0.1


def test_what_cannot_be_measured_is_nan() -> None:
    mask = np.zeros((16, 64, 64), dtype=np.uint8)
    assert np.isnan(measure(head(), mask, ["T1", "T1c", "FLAIR"], SPACING)).all()
    mask[6:10, 20:30, 20:30] = WHOLE_TUMOUR
    values = measured(head()[:1], mask, ["T1"])
    missing = {name for name, value in values.items() if np.isnan(value)}
    assert missing == {"enhancing_fraction", "oedema_fraction", "t1c_ratio", "flair_ratio"}


def test_only_the_largest_region_is_kept_with_its_labels() -> None:
    mask = np.zeros((8, 16, 16), dtype=np.uint8)
    mask[1:4, 2:6, 2:6] = OEDEMA
    mask[2, 3, 3] = ENHANCING
    mask[6, 12, 12] = ENHANCING
    kept = largest_region(mask)
    assert kept[6, 12, 12] == 0
    assert (kept[1:4, 2:6, 2:6] == mask[1:4, 2:6, 2:6]).all()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.3, 0.9), seed=st.integers(0, 100))
def test_ratios_and_fractions_do_not_depend_on_the_brightness_of_a_scan(scale: float, seed: int) -> None:
    images = head()
    images[:, 6:10, 20:30, 20:30] += np.random.default_rng(seed).uniform(0, 0.5, (3, 4, 10, 10)).astype(np.float32)
    mask = np.zeros((16, 64, 64), dtype=np.uint8)
    mask[6:10, 20:30, 20:30] = WHOLE_TUMOUR
    bright = measure(images, mask, ["T1", "T1c", "FLAIR"], SPACING)
    dim = measure(images * scale, mask, ["T1", "T1c", "FLAIR"], SPACING)
    # A voxel may lie on a threshold to the last bit.
    np.testing.assert_allclose(bright, dim, atol=0.01)
