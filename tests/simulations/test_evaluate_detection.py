"""Recognisability: what a detector must see, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.detection import detection, power_spectrum
from fedsynth.evaluation.samples import Volumes


def volumes(n: int, seed: int, spoil: float = 0.0) -> Volumes:
    """Smooth random blobs; `spoil` lays a checkerboard of that height over them, as upsampling does."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32]
    centre, size = rng.uniform(10, 22, size=(n, 2, 4, 1, 1)), rng.uniform(4, 8, size=(n, 2, 4, 1, 1))
    blobs = np.exp(-(((y - centre) / size) ** 2 + ((x - centre[:, ::-1]) / size) ** 2))
    noise = 0.02 * rng.normal(size=blobs.shape)
    images = np.clip(blobs + noise + spoil * ((x + y) % 2), 0, 1).astype(np.float16)
    unknown = np.full(n, -1)
    return Volumes(images, images[:, 0] > 0.5, unknown, unknown)


@pytest.fixture(scope="module")
def real() -> tuple[Volumes, Volumes]:
    return volumes(60, 1), volumes(30, 2)


def test_a_good_copy_of_the_distribution_is_not_recognised(real: tuple[Volumes, Volumes]) -> None:
    section = detection(Columns(volumes(60, 3), real[0]), real[1], np.random.default_rng(0))
    for figure in section.figures:
        assert figure.interval is not None and figure.synthetic is not None and figure.real is not None
        assert figure.interval[0] < 0.6 and 0.3 < figure.synthetic < 0.7 and 0.25 < figure.real < 0.75


def test_traces_of_upsampling_are_seen_by_both_detectors(real: tuple[Volumes, Volumes]) -> None:
    section = detection(Columns(volumes(60, 3, spoil=0.06), real[0]), real[1], np.random.default_rng(0))
    for figure in section.figures:
        assert figure.synthetic is not None and figure.synthetic > 0.95
        assert figure.real is not None and figure.real < 0.75


def test_too_few_patients_are_said_and_not_measured(real: tuple[Volumes, Volumes]) -> None:
    section = detection(Columns(volumes(10, 3), real[0]), real[1], np.random.default_rng(0))
    for figure in section.figures:
        assert figure.synthetic is None and figure.interval is None
        assert "5 synthetic patients to learn from" in figure.note and figure.real is not None


def test_the_spectrum_peaks_at_the_frequency_of_a_wave() -> None:
    wave: NDArray[np.float64] = 0.5 + 0.5 * np.sin(2 * np.pi * 8 * np.arange(32) / 32)
    spectrum = power_spectrum(np.broadcast_to(wave, (1, 1, 32, 32)))
    assert spectrum.shape == (1, 16)
    assert spectrum[0, 4:].argmax() + 4 == 8


def test_an_area_of_1_claims_no_certainty(real: tuple[Volumes, Volumes]) -> None:
    """However patients are drawn anew it stays 1, which says nothing of how sure that is."""
    section = detection(Columns(volumes(60, 3, spoil=0.3), real[0]), real[1], np.random.default_rng(0))
    perfect = [figure for figure in section.figures if figure.synthetic == 1.0]
    assert perfect
    assert all(figure.interval is None for figure in perfect)
