"""Facts about DICOM trees: what is taken, and the reason for everything that is not."""

from __future__ import annotations

import gzip
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, JPEGLossless, MRImageStorage, generate_uid

from fedsynth_client.ingest import dicom
from fedsynth_client.ingest.found import MASK, Found
from fedsynth_client.ingest.refusals import Reason, Unusable
from fedsynth_client.ingest.sources import ImageSources

IMAGES = ImageSources(
    layout="dicom",
    path=".",
    sequences={"T1": ["t1*"], "T1c": ["t1*gad*"], "FLAIR": ["*flair*"]},
    mask_codes={"1": "enhancing", "Oedema": "oedema"},
)
STUDY, FRAME = generate_uid(), generate_uid()


def write_series(
    folder: Path,
    description: str,
    count: int = 10,
    patient: str = "P1",
    study: str = STUDY,
    change: Callable[[Dataset, int], None] | None = None,
) -> list[Dataset]:
    """A classic axial MR series of 16 x 12 pixels whose values tell slice, row and column."""
    folder.mkdir(parents=True, exist_ok=True)
    series, written = generate_uid(), []
    for i in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, "PLANTED^NAME", "", ""
        ds.StudyInstanceUID, ds.StudyDate, ds.StudyTime, ds.StudyID = study, "20200101", "", "1"
        ds.AccessionNumber, ds.ReferringPhysicianName, ds.Manufacturer = "", "", ""
        ds.SeriesInstanceUID, ds.SeriesNumber, ds.SeriesDescription = series, 3, description
        ds.InstanceNumber, ds.Modality, ds.ImageType = i + 1, "MR", ["ORIGINAL", "PRIMARY", "M", "ND"]
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = FRAME, ""
        ds.ImagePositionPatient = [-30.0, -40.0, 5.0 * i]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [2.0, 3.0], 5.0
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 16, 12, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        pixels = i * 200 + np.arange(16)[:, None] * 10 + np.arange(12)[None, :]
        ds.PixelData = pixels.astype("<u2").tobytes()
        if change is not None:
            change(ds, i)
        # Names that sort against the geometry.
        ds.save_as(folder / f"{count - i:03d}.dcm", enforce_file_format=True)
        written.append(ds)
    return written


def write_segmentation(path: Path, series: list[Dataset], mask: np.ndarray, labels: list[str]) -> None:
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type="MANUAL",
        )
        for number, label in enumerate(labels, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        highdicom.seg.Segmentation(
            series, mask, "BINARY", segments, generate_uid(), 9, generate_uid(), 1, "maker", "model", "1", "0"
        ).save_as(path)


def find(root: Path, **changes: object) -> Found:
    return dicom.find(root, root, IMAGES.model_copy(update=changes))


def reasons(found: Found) -> Counter[Reason]:
    return Counter(refusal.reason for refusal in found.refused)


def test_a_series_is_sorted_by_geometry_and_placed_by_its_headers(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "t1_tse_tra")
    (patient,) = find(tmp_path).patients
    volume = patient.volumes["T1"].read()
    assert volume.data.shape == (10, 16, 12)
    assert volume.data[7, 4, 5] == 7 * 200 + 45
    np.testing.assert_allclose(volume.affine @ [7, 4, 5, 1], [-30 + 5 * 3, -40 + 4 * 2, 35, 1])


def test_the_more_specific_pattern_wins(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "T1 SE")
    write_series(tmp_path / "b", "T1 SE GAD")
    write_series(tmp_path / "c", "AX FLAIR")
    found = find(tmp_path)
    assert {name: source.where for name, source in found.patients[0].volumes.items()} == {
        "T1": "a",
        "T1c": "b",
        "FLAIR": "c",
    }
    assert not found.refused


def test_rescale_and_inverted_grey_are_applied_slice_by_slice(tmp_path: Path) -> None:
    def change(ds: Dataset, i: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = 2.0 if i == 3 else 1.0, -4.0
        if i == 5:
            ds.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path / "a", "t1", change=change)
    data = find(tmp_path).patients[0].volumes["T1"].read().data
    assert data[3, 0, 1] == 2 * 601 - 4
    assert data[4, 0, 1] == 801 - 4
    assert data[5, 0, 1] == 4095 - 1001 - 4


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"], Reason.LOCALIZER),
        ("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], Reason.MOSAIC),
        ("ImageType", ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], Reason.DIFFUSION),
        ("ImageType", ["DERIVED", "SECONDARY", "MPR"], Reason.DERIVED_SECONDARY),
        ("DiffusionBValue", 1000.0, Reason.DIFFUSION),
        ("BurnedInAnnotation", "YES", Reason.BURNED_IN_ANNOTATION),
        ("SeriesDescription", "dti", Reason.NO_PATTERN_MATCHES),
        ("PixelSpacing", None, Reason.MISSING_GEOMETRY),
    ],
)
def test_series_of_a_kind_that_is_never_taken(tmp_path: Path, keyword: str, value: object, reason: Reason) -> None:
    def change(ds: Dataset, _: int) -> None:
        setattr(ds, keyword, value)

    write_series(tmp_path / "bad", "t1", change=change)
    write_series(tmp_path / "good", "flair")
    found = find(tmp_path)
    assert [(refusal.where, refusal.reason) for refusal in found.refused] == [("bad", reason)]
    assert set(found.patients[0].volumes) == {"FLAIR"}


def _move_one(ds: Dataset, i: int) -> None:
    if i == 4:
        ds.ImagePositionPatient = [-30.0, -40.0, 17.0]


def _repeat_one(ds: Dataset, i: int) -> None:
    if i == 4:
        ds.ImagePositionPatient = [-30.0, -40.0, 15.0]


def _turn_one(ds: Dataset, i: int) -> None:
    if i == 4:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def _widen_one(ds: Dataset, i: int) -> None:
    if i == 4:
        ds.PixelSpacing = [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_move_one, Reason.IRREGULAR_SPACING),
        (_repeat_one, Reason.DUPLICATE_SLICES),
        (_turn_one, Reason.MIXED_ORIENTATION),
        (_widen_one, Reason.MIXED_MATRIX),
    ],
)
def test_series_that_are_no_single_volume(
    tmp_path: Path, change: Callable[[Dataset, int], None], reason: Reason
) -> None:
    write_series(tmp_path, "t1", change=change)
    found = find(tmp_path)
    assert reasons(found) == {reason: 1}
    assert found.patients[0].volumes == {}


def test_missing_and_too_few_slices(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", "t1", count=12)
    (tmp_path / "gap" / "006.dcm").unlink()
    write_series(tmp_path / "few", "flair", count=4)
    found = find(tmp_path)
    assert {refusal.where: refusal.reason for refusal in found.refused} == {
        "gap": Reason.MISSING_SLICES,
        "few": Reason.TOO_FEW_SLICES,
    }


def test_broken_files_are_named_and_stop_nothing(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "t1")
    cut = tmp_path / "a" / "005.dcm"
    cut.write_bytes(cut.read_bytes()[:-20])
    write_series(tmp_path / "b", "flair", patient="P2")
    write_series(tmp_path / "c", "t1", patient="", count=8)
    (tmp_path / "notes.txt").write_text("a letter")
    (tmp_path / "empty.dcm").write_bytes(b"")
    found = find(tmp_path)
    by_place = {refusal.where: refusal.reason for refusal in found.refused}
    assert by_place["a/005.dcm"] is Reason.TRUNCATED
    assert by_place["a"] is Reason.MISSING_SLICES
    assert by_place["notes.txt"] is Reason.NOT_DICOM
    assert by_place["empty.dcm"] in (Reason.NOT_DICOM, Reason.TRUNCATED)
    assert reasons(found)[Reason.NO_PATIENT_ID] == 8
    assert {patient.patient_id: set(patient.volumes) for patient in found.patients} == {"P1": set(), "P2": {"FLAIR"}}


def test_the_earliest_complete_examination_and_the_last_repeat_are_taken(tmp_path: Path) -> None:
    def dated(date: str, number: int = 3) -> Callable[[Dataset, int], None]:
        def change(ds: Dataset, _: int) -> None:
            ds.StudyDate, ds.SeriesNumber = date, number

        return change

    first, second, third = generate_uid(), generate_uid(), generate_uid()
    write_series(tmp_path / "incomplete", "t1", study=first, change=dated("20190101"))
    write_series(tmp_path / "early_t1", "t1", study=second, change=dated("20200101"))
    write_series(tmp_path / "early_t1_again", "t1", study=second, change=dated("20200101", 8))
    write_series(tmp_path / "early_flair", "flair", study=second, change=dated("20200101"))
    write_series(tmp_path / "late_t1", "t1", study=third, change=dated("20210101"))
    write_series(tmp_path / "late_flair", "flair", study=third, change=dated("20210101"))
    found = find(tmp_path)
    volumes = found.patients[0].volumes
    assert (volumes["T1"].where, volumes["FLAIR"].where) == ("early_t1_again", "early_flair")
    assert reasons(found) == {Reason.ANOTHER_STUDY: 3, Reason.ANOTHER_WAS_CHOSEN: 1}


def test_segmentations_are_read_by_label_or_number_and_lie_on_their_images(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", "t1")
    mask = np.zeros((10, 16, 12), dtype=np.uint8)
    mask[3:6, 4:8, 2:6] = 2
    mask[4, 5, 3] = 1
    write_segmentation(tmp_path / "seg.dcm", series, mask, ["ring", "oedema"])
    (patient,) = find(tmp_path).patients
    read = patient.volumes[MASK].read_mask(IMAGES.mask_codes)
    index = np.argwhere(read.data == 3)[0]
    np.testing.assert_allclose(read.affine @ [*index, 1], [-30 + 3 * 3, -40 + 5 * 2, 20, 1], atol=1e-6)
    assert (read.data == 2).sum() == (mask == 2).sum()
    with pytest.raises(Unusable) as refused:
        patient.volumes[MASK].read_mask({"7": "tumour"})
    assert refused.value.reason is Reason.UNKNOWN_MASK_CODE


def test_label_map_series_are_read_as_masks(tmp_path: Path) -> None:
    def change(ds: Dataset, i: int) -> None:
        ds.ImageType = ["DERIVED", "SECONDARY"]
        ds.PixelData = np.full((16, 12), int(i == 2), dtype="<u2").tobytes()

    write_series(tmp_path / "m", "tumour mask", change=change)
    (patient,) = find(tmp_path).patients
    data = patient.volumes[MASK].read_mask({"1": "tumour"}).data
    assert [int(row.max()) for row in data[:4]] == [0, 0, 4, 0]


def test_compressed_series_decode_and_unknown_codecs_are_named(tmp_path: Path) -> None:
    reference = dcmread(str(get_testdata_file("MR_small.dcm")))
    for name, tail in (("rle", "RLE"), ("j2k", "jp2klossless"), ("big", "bigendian"), ("jls", "jpeg_ls_lossless")):
        target = tmp_path / name
        target.mkdir()
        for i in range(8):
            ds = dcmread(str(get_testdata_file(f"MR_small_{tail}.dcm")))
            ds.SeriesDescription, ds.ImagePositionPatient, ds.PatientID = "t1", [0, 0, 5.0 * i], name
            ds.ImageOrientationPatient, ds.SOPInstanceUID = [1, 0, 0, 0, 1, 0], generate_uid()
            ds.ImageType = ["ORIGINAL", "PRIMARY"]
            ds.save_as(target / f"{i}.dcm")
    found = find(tmp_path)
    assert len(found.patients) == 4
    for patient in found.patients:
        np.testing.assert_array_equal(patient.volumes["T1"].read().data[0], reference.pixel_array.astype(np.float32))

    def change(ds: Dataset, _: int) -> None:
        ds.file_meta.TransferSyntaxUID = JPEGLossless
        ds.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x04\x00\x00\x00\xff\xd8\xff\xd9"
        ds["PixelData"].is_undefined_length = True

    write_series(tmp_path / "odd", "flair", patient="odd", change=change)
    patient = next(patient for patient in find(tmp_path).patients if patient.patient_id == "odd")
    with pytest.raises(Unusable) as refused:
        patient.volumes["FLAIR"].read()
    assert refused.value.reason in (Reason.UNSUPPORTED_TRANSFER_SYNTAX, Reason.UNDECODABLE)


def test_enhanced_mr_and_mosaic_from_real_scanners(tmp_path: Path) -> None:
    import nibabel

    data = Path(nibabel.__file__).parent / "nicom" / "tests" / "data"
    if not (data / "philips_mprage.dcm.gz").is_file():
        pytest.skip("this nibabel was installed without its test files")
    with gzip.open(data / "philips_mprage.dcm.gz") as stream:
        (tmp_path / "enhanced.dcm").write_bytes(stream.read())
    shutil.copy(data / "0.dcm", tmp_path / "mosaic.dcm")
    found = find(tmp_path, sequences={"T1": ["*"]})
    assert reasons(found)[Reason.MOSAIC] + reasons(found)[Reason.DIFFUSION] == 1
    volumes = [source for patient in found.patients for source in patient.volumes.values()]
    (enhanced,) = volumes
    assert min(enhanced.read().data.shape) >= 8


def test_real_localizers_are_refused(tmp_path: Path) -> None:
    root = Path(str(get_testdata_file("DICOMDIR"))).parent / "98892003"
    found = dicom.find(root, root, IMAGES.model_copy(update={"sequences": {"T1": ["*"]}}))
    assert all(patient.volumes == {} for patient in found.patients)
    assert reasons(found)


def test_reading_in_processes_gives_the_same(tmp_path: Path) -> None:
    write_series(tmp_path / "a", "t1")
    write_series(tmp_path / "b", "flair", patient="P2")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert dicom.find(tmp_path, tmp_path, IMAGES, pool) == find(tmp_path)
