"""The image trees of a release, judged by readers and validators that nobody here wrote."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread

from fedsynth.plan import ImagePlan, StudyPlan
from fedsynth.synthetic import SyntheticPatient, to_stored
from fedsynth_server.release.dicom import MR_ATTRIBUTES, save_dataset
from fedsynth_server.release.geometry import Grid, to_ras

BIDS_VALIDATOR = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent)) or shutil.which(
    "bids-validator-deno"
)
BIDS_NAMES = {"T1": "T1w", "T1c": "ce-gadolinium_T1w", "FLAIR": "FLAIR"}


def _series(release: Path, participant: str, sequence: str) -> list[Dataset]:
    return [dcmread(path) for path in sorted((release / "dicom" / participant / sequence).glob("*.dcm"))]


def _nifti(release: Path, participant: str, name: str, tree: str = "") -> nibabel.Nifti1Image:
    return nibabel.load(release / "bids" / tree / f"sub-{participant}/anat/sub-{participant}_{name}.nii.gz")


def test_nifti_and_dicom_put_the_same_voxel_at_the_same_place(
    made: Path, release_patients: list[SyntheticPatient], release_plan: StudyPlan
) -> None:
    """A marked voxel of the array is found left, posterior and superior of the centre by both readers."""
    patient = release_patients[0]
    for number, (sequence, bids) in enumerate(BIDS_NAMES.items()):
        volume = highdicom.get_volume_from_series(_series(made, patient.participant_id, sequence))
        image = _nifti(made, patient.participant_id, bids)
        s, h, w = 5, 30, 3
        lps = (np.array([w, h, s]) - (np.array([32, 32, 6]) - 1) / 2) * [2.75, 2.75, 7.3]
        expected = round(float(patient.images[number, s, h, w]) * 1000)

        index = np.rint(np.linalg.inv(image.affine) @ [-lps[0], -lps[1], lps[2], 1])[:3].astype(int)
        assert image.get_fdata()[tuple(index)] == expected
        index = np.rint(np.linalg.inv(volume.affine) @ [*lps, 1])[:3].astype(int)
        assert volume.array[tuple(index)] == expected

        turned = volume.to_patient_orientation("RAS")
        np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ turned.affine, image.affine, atol=1e-4)
        np.testing.assert_array_equal(turned.array, image.get_fdata())


def test_nifti_is_canonical_and_in_millimetres(made: Path) -> None:
    image = _nifti(made, "SYN0001", "T1w")
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert image.get_data_dtype() == np.int16


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_agree_even_without_a_tumour(made: Path, release_patients: list[SyntheticPatient], number: int) -> None:
    patient = release_patients[number]
    segmentation = highdicom.seg.segread(made / "dicom" / patient.participant_id / "SEG/mask.dcm")
    volume = segmentation.get_volume(combine_segments=True).to_patient_orientation("RAS")
    image = _nifti(made, patient.participant_id, "label-tumor_mask", "derivatives/seg")
    np.testing.assert_array_equal(volume.array, image.get_fdata())
    np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ volume.affine, image.affine, atol=1e-4)
    assert image.get_fdata().sum() == patient.mask.sum()


def test_every_dicom_object_says_that_it_is_synthetic_and_how(made: Path) -> None:
    paths = sorted((made / "dicom").rglob("*.dcm"))
    assert len(paths) == 3 * (3 * 6 + 1)
    for path in paths:
        dataset = dcmread(path, stop_before_pixels=True)
        participant = path.relative_to(made / "dicom").parts[0]
        assert dataset.SyntheticData == "YES"
        assert (dataset.PatientID, dataset.IssuerOfPatientID) == (participant, "fedsynth")
        assert dataset.PatientIdentityRemoved == "YES"
        purposes = [item.PurposeOfReferenceCodeSequence[0] for item in dataset.ContributingEquipmentSequence]
        assert "109100" in [purpose.CodeValue for purpose in purposes]
        assert "109101" not in [purpose.CodeValue for purpose in purposes]
        assert dataset.ContentDate == "20261120"
        assert dataset.ContentTime == "093000"


def test_images_carry_the_attributes_of_the_profile_and_no_other(made: Path) -> None:
    dataset = dcmread(made / "dicom/SYN0001/T1/0001.dcm")
    assert {element.keyword for element in dataset} == MR_ATTRIBUTES


def test_uids_are_one_study_one_frame_of_reference_and_unique_instances(made: Path) -> None:
    headers = [dcmread(path, stop_before_pixels=True) for path in (made / "dicom/SYN0001").rglob("*.dcm")]
    assert len({header.StudyInstanceUID for header in headers}) == 1
    assert len({header.FrameOfReferenceUID for header in headers}) == 1
    assert len({header.SeriesInstanceUID for header in headers}) == 4
    everything = [dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in (made / "dicom").rglob("*.dcm")]
    assert len(set(everything)) == len(everything)


@pytest.mark.skipif(BIDS_VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_bids_validator_finds_no_error(made: Path, tmp_path: Path) -> None:
    """Warnings ask for parameters of an acquisition that never was, and for things that there are none of."""
    leaks = ["GZIP_HEADER_MTIME", "GZIP_HEADER_FILENAME"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"error": [{"code": code} for code in leaks]}))
    command = [str(BIDS_VALIDATOR), str(made / "bids"), "-r", "--format", "json", "--config", str(config)]
    run = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(run.stdout)
    issues = [*report["issues"]["issues"]]
    for derivative in report["derivativesSummary"].values():
        issues += derivative["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert set(Counter(issue["code"] for issue in issues)) <= {
        "TOO_FEW_AUTHORS",
        "JSON_KEY_RECOMMENDED",
        "SIDECAR_KEY_RECOMMENDED",
    }
    assert run.returncode == 0


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("name", ["T1/0001.dcm", "T1c/0006.dcm", "FLAIR/0003.dcm", "SEG/mask.dcm"])
def test_dciodvfy_finds_no_error_but_the_tag_it_does_not_know(made: Path, name: str) -> None:
    run = subprocess.run(["dciodvfy", "-new", str(made / "dicom/SYN0002" / name)], capture_output=True, text=True)
    printed = (run.stdout + run.stderr).splitlines()
    assert any("0008,001c" in line for line in printed), "dciodvfy did not look at the file"
    assert [line for line in printed if line.startswith("Error") and "0008,001c" not in line] == []


@pytest.mark.skipif(shutil.which("dcentvfy") is None, reason="dcentvfy (dicom3tools) is not installed")
def test_dcentvfy_finds_one_consistent_patient(made: Path) -> None:
    paths = [str(path) for path in (made / "dicom/SYN0001").rglob("*.dcm")]
    run = subprocess.run(["dcentvfy", *paths], capture_output=True, text=True)
    assert [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")] == []


@given(
    slices=st.integers(1, 40),
    size=st.sampled_from([32, 64, 128]),
    pixel=st.floats(0.3, 6.0),
    step=st.floats(0.5, 12.0),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_both_conventions_give_a_voxel_the_same_place(
    slices: int, size: int, pixel: float, step: float, corner: tuple[float, float, float]
) -> None:
    grid = Grid.of(ImagePlan.model_construct(slices=slices, size=size, pixel_spacing_mm=pixel, slice_spacing_mm=step))
    s, h, w = (round(part * (n - 1)) for part, n in zip(corner, grid.shape, strict=True))
    marked = np.zeros(grid.shape, np.uint8)
    marked[s, h, w] = 1
    index = np.argwhere(to_ras(marked))[0]
    x, y, z = grid.position(s)
    ras = grid.ras_affine @ [*index, 1]
    np.testing.assert_allclose(ras[:3], [-(x + w * pixel), -(y + h * pixel), z], atol=1e-9)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_keeps_its_error_number(made: Path) -> None:
    dataset = dcmread(made / "dicom/SYN0001/T1/0001.dcm")
    with pytest.raises(OSError, match="space") as failure:
        save_dataset(dataset, Path("/dev/full"))
    assert failure.value.errno == errno.ENOSPC


def test_intensities_are_clipped_and_rounded() -> None:
    assert to_stored(np.array([-0.2, 0.0, 0.0004, 0.0006, 1.0, 1.7])).tolist() == [0, 0, 0, 1, 1000, 1000]


def test_awkward_spacings_fit_the_decimal_strings_of_dicom(
    make: Callable[..., Path],
    tmp_path: Path,
    release_plan: StudyPlan,
    release_statement: object,
    release_patients: list[SyntheticPatient],
) -> None:
    from fedsynth_server.release.verify import verify

    image = release_plan.image.model_copy(update={"pixel_spacing_mm": 240 / 257, "slice_spacing_mm": 10 / 3})
    plan = release_plan.model_copy(update={"image": image})
    statement = release_statement.model_copy(update={"plan_digest": plan.digest})  # type: ignore[attr-defined]
    out = make(tmp_path / "out", plan=plan, statement=statement, patients=release_patients[:1])
    assert verify(out).ok
