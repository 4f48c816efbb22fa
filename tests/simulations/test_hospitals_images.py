"""Image files: every layout puts the same anatomy in the same place, and standard readers agree."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from fedsynth.morphology import ENHANCING, NECROSIS, OEDEMA
from fedsynth_simulations.cohort.anatomy import Anatomy
from fedsynth_simulations.cohort.grid import Grid, axial_grid, centred_grid, tilt
from fedsynth_simulations.cohort.patient import Subject, draw_subject, scan
from fedsynth_simulations.hospitals.cases import Case
from fedsynth_simulations.hospitals.dicom import Protocol, Study, study_header, write_series
from fedsynth_simulations.hospitals.identity import Identity, draw_identity
from fedsynth_simulations.hospitals.images import Job, write_east, write_north, write_south
from fedsynth_simulations.hospitals.nifti import write_nifti
from fedsynth_simulations.hospitals.segmentation import write_segmentation
from fedsynth_simulations.hospitals.sites import SITES, SiteName

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CASE = Case(0, None, None, True, True, True, True)
TILTED = centred_grid((5, 6, 8), tilt(11, 0) @ np.eye(3)[:, [2, 1, 0]], (5.0, 2.0, 1.5))


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy.load()


@pytest.fixture(scope="module")
def subject(anatomy: Anatomy) -> Subject:
    """A patient with all three parts of a tumour, off every axis."""
    rngs = (np.random.default_rng(i) for i in range(100))
    subjects = (draw_subject(anatomy, SITES[0].style, rng) for rng in rngs)
    return next(s for s in subjects if s.head.tumour.wish.necrotic > 0.1 and s.head.tumour.wish.volume_ml > 40)


def identity(site: SiteName = "north") -> Identity:
    return draw_identity(site, 0, np.random.default_rng(0), np.random.default_rng(1))


def job(folder: Path, site: SiteName, subject: Subject, seed: int, case: Case = CASE) -> Job:
    return Job(folder, identity(site), case, subject, np.random.default_rng(seed))


def dicom_volume(files: list[Path]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rescaled voxels (S, H, W) and affine of a series, by highdicom."""
    volume = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in files])
    return np.asarray(volume.array, dtype=np.float64), np.asarray(volume.affine)


def middle_mm(inside: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((affine @ [*np.argwhere(inside).mean(axis=0), 1.0])[:3])


def mask_of(folder: Path, site: SiteName) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mask on disk and its affine in LPS."""
    if site == "north":
        files = sorted(folder.glob("images/*/ST1/SE100/*"))
        if pydicom.dcmread(files[0]).Modality != "SEG":
            return dicom_volume(files)
        volume = highdicom.seg.segread(files[0]).get_volume(combine_segments=True)
        return np.asarray(volume.array, dtype=np.float64), np.asarray(volume.affine)
    [path] = folder.rglob("*seg.nii.gz")
    image = nibabel.load(path)
    return np.asarray(image.dataobj, dtype=np.float64), RAS_TO_LPS @ image.affine


@pytest.mark.parametrize("site", get_args(SiteName))
def test_every_layout_shows_the_tumour_in_the_same_place(
    anatomy: Anatomy, subject: Subject, site: SiteName, tmp_path: Path
) -> None:
    grid = axial_grid(60, 96, 2.5, 2.0)
    _, expected = scan(anatomy, subject.head, subject.acquisition, grid, np.random.default_rng(0))
    writer = {"north": write_north, "south": write_south, "east": write_east}[site]
    geometries = set()
    # Seeds enough for every axis order, tilt and mask format that the site knows.
    for seed in range(8):
        folder = tmp_path / str(seed)
        writer(job(folder, site, subject, seed), anatomy)
        mask, affine = mask_of(folder, site)
        geometries.add(tuple(np.abs(affine[:3, :3]).round(1).ravel().tolist()))
        assert middle_mm(mask > 0, affine) == pytest.approx(middle_mm(expected > 0, grid.affine), abs=2.0)
        volume = (mask > 0).sum() * abs(np.linalg.det(affine[:3, :3]))
        assert volume / 1000 == pytest.approx(subject.head.tumour.wish.volume_ml, rel=0.1)
    assert len(geometries) > 1 or site == "east"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_dicom_series_reads_back_as_it_was_written(tmp_path: Path, reverse: bool) -> None:
    image = np.random.default_rng(0).uniform(0, 900, TILTED.shape)
    header = study_header(identity(), Study(1, "20200102", "101112"))
    protocol = Protocol("T1", 9.0, 500.0)
    files = write_series(tmp_path, header, 4, protocol, image, TILTED, slope=0.25, last_slice_first=reverse)
    data, affine = dicom_volume(files)
    if not np.allclose(affine, TILTED.affine, atol=1e-3):
        # highdicom orders slices by the right-hand rule, which may be the other way round.
        data, affine = (
            data[::-1],
            affine @ np.array([[-1, 0, 0, len(data) - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        )
    assert affine == pytest.approx(TILTED.affine, abs=1e-3)
    assert data == pytest.approx(image, abs=0.13)
    first = pydicom.dcmread(files[0])
    assert first.InstanceNumber == (len(image) if reverse else 1)


def test_the_fast_encoder_writes_what_pydicom_writes(tmp_path: Path) -> None:
    header = study_header(identity(), Study(1, "20200102", "101112"))
    image = np.random.default_rng(0).uniform(0, 900, TILTED.shape)
    [path, *_] = write_series(tmp_path, header, 4, Protocol("T1", 9.0, 500.0), image, TILTED, slope=0.25)
    stream = io.BytesIO()
    pydicom.dcmread(path).save_as(stream)
    assert stream.getvalue() == path.read_bytes()


def test_a_segmentation_reads_back_with_its_segments(tmp_path: Path) -> None:
    mask = np.zeros(TILTED.shape, dtype=np.uint8)
    mask[1:4, 1:5, 2:7] = OEDEMA
    mask[2:4, 2:4, 3:6] = ENHANCING
    mask[3, 3, 4] = NECROSIS
    header = study_header(identity(), Study(1, "20200102", "101112"))
    sources = [f"{header.StudyInstanceUID}.2.{place + 1}" for place in range(len(mask))]
    write_segmentation(tmp_path / "seg", header, 100, mask, TILTED, 2, sources)
    segmentation = highdicom.seg.segread(tmp_path / "seg")
    volume = segmentation.get_volume(combine_segments=True)
    for segment, code in ((1, NECROSIS), (2, OEDEMA), (3, ENHANCING)):
        assert (volume.array == segment).sum() == (mask == code).sum()
        place = middle_mm(np.asarray(volume.array) == segment, np.asarray(volume.affine))
        assert place == pytest.approx(middle_mm(mask == code, TILTED.affine), abs=1e-3)
    assert segmentation.get_segment_description(3).segment_label == "Enhancing tumour"


def test_an_empty_segmentation_is_refused(tmp_path: Path) -> None:
    header = study_header(identity(), Study(1, "20200102", "101112"))
    with pytest.raises(ValueError, match="at least one voxel"):
        write_segmentation(tmp_path / "seg", header, 100, np.zeros(TILTED.shape, np.uint8), TILTED, 2, [])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "LAS", "LPI", "SAL"])
def test_nifti_axis_orders_agree_on_places(tmp_path: Path, codes: str) -> None:
    grid: Grid = axial_grid(5, 6, 4.0, 2.0)
    image = np.arange(5 * 6 * 6, dtype=np.float32).reshape(5, 6, 6)
    write_nifti(tmp_path / "x.nii.gz", image, grid, codes)
    loaded = nibabel.load(tmp_path / "x.nii.gz")
    assert "".join(nibabel.aff2axcodes(loaded.affine)) == codes
    data = np.asarray(loaded.dataobj)
    for index in ((0, 0, 0), (1, 2, 3), (4, 5, 0)):
        found = np.argwhere(data == image[index])[0]
        assert (RAS_TO_LPS @ loaded.affine @ [*found, 1]) == pytest.approx(grid.affine @ [*index, 1])


def test_a_file_without_orientation_keeps_its_spacing_alone(tmp_path: Path) -> None:
    write_nifti(
        tmp_path / "x.nii.gz", np.ones((5, 6, 6), np.int16), axial_grid(5, 6, 4.0, 2.0), "RAS", orientation_known=False
    )
    header = nibabel.load(tmp_path / "x.nii.gz").header
    assert int(header["qform_code"]) == int(header["sform_code"]) == 0
    assert header.get_zooms() == pytest.approx((2.0, 2.0, 4.0))


@pytest.mark.parametrize(
    "fault", ["truncated_file", "missing_slice", "burned_in_annotation", "empty_mask", "second_study"]
)
def test_faults_of_dicom_are_on_disk(anatomy: Anatomy, subject: Subject, tmp_path: Path, fault: str) -> None:
    case = Case(0, fault, None, True, True, True, True)
    write_north(job(tmp_path, "north", subject, 0, case), anatomy)
    series = {path.name: sorted(path.iterdir()) for path in tmp_path.glob("images/*/ST1/SE*")}
    sizes = {name: {path.stat().st_size for path in files} for name, files in series.items()}
    assert (min(sizes["SE2"]) < 0.6 * max(sizes["SE2"])) == (fault == "truncated_file")
    numbers = [int(path.name.removeprefix("IM")) for path in series["SE3"]]
    assert (len(numbers) < max(numbers)) == (fault == "missing_slice")
    flags = {pydicom.dcmread(path, stop_before_pixels=True).BurnedInAnnotation for path in series["SE5"]}
    assert flags == {"YES" if fault == "burned_in_annotation" else "NO"}
    mask, _ = mask_of(tmp_path, "north")
    assert mask.any() == (fault != "empty_mask")
    assert bool(list(tmp_path.glob("images/*/ST2"))) == (fault == "second_study")


def test_a_sequence_that_was_not_acquired_is_absent(anatomy: Anatomy, subject: Subject, tmp_path: Path) -> None:
    case = Case(0, None, "T1c", True, True, True, True)
    write_east(job(tmp_path, "east", subject, 0, case), anatomy)
    [folder] = (tmp_path / "images").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["FLAIR.nii.gz", "T1.nii.gz", "seg.nii.gz"]
