"""Anatomy, tumours and scans, and that the link from genes to the tumour can be learnt."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict

from fedsynth.expression import to_panel_scale
from fedsynth.morphology import BACKGROUND, ENHANCING, NECROSIS, OEDEMA
from fedsynth.plan import GenePlan
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.expression import (
    draw_batch_effect,
    draw_tpm,
    public_expression_reference,
    reference_quantiles,
)
from fedsynth_simulations.cohort.grid import Grid, axial_grid, centred_grid, tilt
from fedsynth_simulations.cohort.latents import DRIVERS, draw_latents
from fedsynth_simulations.cohort.panel import load_panel
from fedsynth_simulations.cohort.patient import SimulatedPatient, draw_head, draw_patient, scan
from fedsynth_simulations.cohort.style import PUBLIC_STYLE
from fedsynth_simulations.cohort.tumour import wish_for

GRID = axial_grid(22, 72, 6.5, 2.7)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.load()


@pytest.fixture(scope="module")
def patients(anatomy: Anatomy) -> list[SimulatedPatient]:
    return [draw_patient(anatomy, PUBLIC_STYLE, np.random.default_rng(i), GRID) for i in range(12)]


def test_the_same_stream_draws_the_same_patient(anatomy: Anatomy) -> None:
    first, again = (draw_patient(anatomy, PUBLIC_STYLE, np.random.default_rng(3), GRID) for _ in range(2))
    other = draw_patient(anatomy, PUBLIC_STYLE, np.random.default_rng(4), GRID)
    assert all(np.array_equal(first.images[name], again.images[name]) for name in first.images)
    assert np.array_equal(first.mask, again.mask)
    assert np.array_equal(first.subject.tpm, again.subject.tpm)
    assert not np.array_equal(first.images["T1"], other.images["T1"])


def test_images_are_finite_magnitudes_of_the_grid(patients: list[SimulatedPatient]) -> None:
    for patient in patients:
        assert list(patient.images) == ["T1", "T1c", "FLAIR"]
        for image in patient.images.values():
            assert image.shape == GRID.shape and image.dtype == np.float32
            assert np.isfinite(image).all() and (image >= 0).all()


def test_masks_hold_the_parts_in_the_volumes_that_were_asked_for(patients: list[SimulatedPatient]) -> None:
    for patient in patients:
        wish = patient.subject.head.tumour.wish
        mask = patient.mask
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {BACKGROUND, NECROSIS, OEDEMA, ENHANCING}
        tumour = (mask > 0).sum()
        assert tumour * GRID.voxel_ml == pytest.approx(wish.volume_ml, rel=0.15)
        assert (mask == ENHANCING).sum() / tumour == pytest.approx(wish.enhancing, abs=0.06)
        assert (mask == NECROSIS).sum() / tumour == pytest.approx(wish.necrotic, abs=0.06)


def test_tumours_lie_inside_the_brain(patients: list[SimulatedPatient]) -> None:
    for patient in patients:
        noise = patient.subject.acquisition.noise
        brain = patient.images["T1"] > 4 * noise
        assert brain[patient.mask > 0].mean() > 0.98


def test_sequences_show_the_tumour_as_radiologists_know_it(patients: list[SimulatedPatient]) -> None:
    t1_ratios = []
    for patient in patients:
        images, mask = patient.images, patient.mask
        tissue = (images["T1"] > 0.5) & (mask == 0)
        oedema = mask == OEDEMA
        assert images["FLAIR"][oedema].mean() > 1.2 * images["FLAIR"][tissue].mean()
        t1_ratios.append(images["T1"][oedema].mean() / images["T1"][tissue].mean())
        ring, core = mask == ENHANCING, mask == NECROSIS
        if ring.sum() > 30 and core.sum() > 30:
            assert images["T1c"][ring].mean() > 1.1 * images["T1c"][tissue].mean()
            assert images["T1c"][core].mean() < 0.8 * images["T1c"][ring].mean()
    assert np.mean(t1_ratios) < 0.92


def test_two_grids_show_the_same_head_in_the_same_place(anatomy: Anatomy, patients: list[SimulatedPatient]) -> None:
    subject = patients[0].subject
    directions = tilt(14, 0) @ np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    sagittal = centred_grid((40, 60, 60), directions, (4.0, 3.5, 3.5))
    _, mask = scan(anatomy, subject.head, subject.acquisition, sagittal, np.random.default_rng(0))
    assert middle_mm(mask, sagittal) == pytest.approx(middle_mm(patients[0].mask, GRID), abs=1.5)
    assert (mask > 0).sum() * sagittal.voxel_ml == pytest.approx((patients[0].mask > 0).sum() * GRID.voxel_ml, rel=0.1)


def middle_mm(mask: NDArray[np.uint8], grid: Grid) -> NDArray[np.float64]:
    """Middle of the tumour in LPS mm."""
    index = np.argwhere(mask > 0).mean(axis=0)
    return np.asarray((grid.affine @ [*index, 1.0])[:3])


def test_grid_points_are_the_affine_of_their_indices() -> None:
    grid = centred_grid((3, 4, 5), tilt(20, 2) @ np.eye(3)[:, [2, 1, 0]], (5.0, 2.0, 1.0))
    points = grid.points_mm().reshape(3, 4, 5, 3)
    assert points[2, 1, 3] == pytest.approx((grid.affine @ [2, 1, 3, 1])[:3], abs=1e-4)
    assert points.reshape(-1, 3).mean(axis=0) == pytest.approx([0, 0, 0], abs=1e-4)
    assert grid.spacing == pytest.approx((5.0, 2.0, 1.0))
    assert grid.voxel_ml == pytest.approx(0.01)


@pytest.mark.parametrize("extreme", [-4.0, 4.0])
def test_extreme_drivers_still_give_a_tumour_inside_the_brain(anatomy: Anatomy, extreme: float) -> None:
    drivers = dict.fromkeys(DRIVERS, extreme)
    head = draw_head(anatomy, PUBLIC_STYLE, drivers, np.random.default_rng(0))
    acquisition = draw_patient(anatomy, PUBLIC_STYLE, np.random.default_rng(0), GRID).subject.acquisition
    _, mask = scan(anatomy, head, acquisition, GRID, np.random.default_rng(0))
    wish = head.tumour.wish
    assert (mask > 0).sum() * GRID.voxel_ml == pytest.approx(wish.volume_ml, rel=0.3)
    assert 0 <= wish.enhancing + wish.necrotic < 1


def test_a_linear_model_learns_the_link_from_normalised_genes(anatomy: Anatomy) -> None:
    """Cross-validated R2 of ridge regression at 500 patients: a signal worth learning, with room above it."""
    panel = [gene for gene, _ in load_panel()]
    center, scale = public_expression_reference(panel, 500, np.random.default_rng(0))
    plan = GenePlan(
        panel=panel, reference_quantiles=reference_quantiles(), center=center.tolist(), scale=scale.tolist()
    )
    batches = [draw_batch_effect(np.random.default_rng(10 + site)) for site in range(3)]
    genes, tumours = [], []
    for i in range(500):
        rng = np.random.default_rng([1, i])
        latents = draw_latents(rng)
        genes.append(to_panel_scale(draw_tpm(latents.pathways, batches[i % 3], rng)[: len(panel)], plan))
        wish = wish_for(latents.drivers, anatomy, rng)
        tumours.append([np.log(wish.volume_ml), wish.enhancing, *wish.middle_mm, wish.irregularity])
    volume, enhancement, left, posterior, superior, irregularity = (
        explained(np.stack(genes), target) for target in np.array(tumours).T
    )
    assert 0.4 < volume < 0.75
    assert 0.4 < enhancement < 0.75
    assert all(0.1 < place < min(volume, enhancement) for place in (left, posterior, superior))
    assert irregularity < 0.05


def explained(genes: NDArray[np.float32], target: NDArray[np.float64]) -> float:
    """Cross-validated R2."""
    predicted = cross_val_predict(RidgeCV(np.logspace(0, 4, 9)), genes, target, cv=5)
    return float(1 - np.mean((target - predicted) ** 2) / target.var())
