"""Radiomics-like features of bodies and textures whose values can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.metrics.radiomics import feature_names, radiomics, sequence_columns

SEQUENCES = ("T1", "FLAIR")


def measured(images: np.ndarray, tumour: np.ndarray, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    values = radiomics(images, tumour, np.arange(images.shape[1]), spacing_mm)
    return dict(zip(feature_names(SEQUENCES[: len(images)]), values.tolist(), strict=True))


def test_a_ball_in_an_even_head() -> None:
    z, y, x = np.meshgrid(*3 * (np.arange(24) - 11.5,), indexing="ij")
    ball = z**2 + y**2 + x**2 < 8**2
    images = np.stack([0.4 + 0.2 * ball, np.full(ball.shape, 0.5)])
    found = measured(images, ball, (1.0, 1.0, 1.0))
    assert found["mask: volume"] == pytest.approx(np.cbrt(4 / 3 * np.pi * 8**3), rel=0.01)
    assert found["mask: sphericity"] > 0.9
    assert found["mask: elongation"] == pytest.approx(1, abs=0.01) == found["mask: flatness"]
    assert found["T1: tumour over head, mean"] == pytest.approx(1.5)
    assert found["FLAIR: tumour over head, mean"] == pytest.approx(1)
    assert found["FLAIR: mean"] == pytest.approx(0.5) and found["FLAIR: sd"] == pytest.approx(0, abs=1e-9)
    assert found["FLAIR: entropy"] == 0 and found["FLAIR: GLCM contrast"] == 0
    assert found["FLAIR: GLCM energy"] == pytest.approx(1) == found["FLAIR: GLCM homogeneity"]
    assert found["T1: GLCM contrast"] > 0


def test_thick_slices_stretch_the_same_voxels() -> None:
    z, y, x = np.meshgrid(*3 * (np.arange(24) - 11.5,), indexing="ij")
    ball = z**2 + y**2 + x**2 < 8**2
    images = np.full((1, *ball.shape), 0.5)
    found = measured(images, ball, (2.0, 1.0, 1.0))
    assert found["mask: elongation"] == pytest.approx(0.5, abs=0.01) == found["mask: flatness"]
    assert found["mask: volume"] == pytest.approx(np.cbrt(2 * 4 / 3 * np.pi * 8**3), rel=0.01)


def test_stripes_have_the_contrast_of_their_grey_levels_and_pairs_outside_the_head_do_not_count() -> None:
    """Columns of levels 4 and 8 in turn: of the four directions one is along the stripes, and the others cross them."""
    images = np.zeros((1, 1, 40, 40))
    images[0, 0, 4:36, 4:36] = np.where(np.arange(32) % 2, 8.5 / 16, 4.5 / 16)
    found = measured(images, np.zeros(images.shape[1:], dtype=bool), (1.0, 1.0, 1.0))
    along, crossing = 31 * 32, 31 * 32 + 2 * 31 * 31
    assert found["T1: GLCM contrast"] == pytest.approx(16 * crossing / (along + crossing))
    assert found["T1: mean"] == pytest.approx(6.5 / 16) and found["T1: entropy"] == pytest.approx(1)
    assert found["T1: skewness"] == pytest.approx(0, abs=1e-9)


def test_what_is_missing_is_zero_and_what_is_broken_is_not_measured() -> None:
    nothing = np.zeros((2, 4, 20, 20))
    values = radiomics(nothing, np.zeros((4, 20, 20), dtype=bool), np.arange(4), (1.0, 1.0, 1.0))
    assert values.shape == (len(feature_names(SEQUENCES)),) and not values.any()
    with pytest.raises(NotMeasurable, match="not finite"):
        radiomics(nothing * np.nan, np.zeros((4, 20, 20), dtype=bool), np.arange(4), (1.0, 1.0, 1.0))


def test_columns_of_a_sequence_are_its_own() -> None:
    names = feature_names(("T1", "T1c"))
    assert {names[c].split(":")[0] for c in sequence_columns(("T1", "T1c"), "T1")} == {"T1"}
    assert len(sequence_columns(("T1", "T1c"), "T1")) == (len(names) - 4) // 2
