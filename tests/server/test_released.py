"""A release that is read back is what was written, and damage is called damage."""

from __future__ import annotations

import gzip
import shutil
import tracemalloc
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fedsynth.errors import Refused, UsageError
from fedsynth.plan import StudyPlan
from fedsynth.released import read_release
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_server.release.make import make_candidate

MASK = "bids/derivatives/seg/sub-SYN0001/anat/sub-SYN0001_label-tumor_mask.nii.gz"
IMAGE = "bids/sub-SYN0001/anat/sub-SYN0001_T1w.nii.gz"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


@pytest.fixture
def candidate(
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    release_patients: list[SyntheticPatient],
    tmp_path: Path,
) -> Callable[..., Path]:
    """A release before the gate saw it, of any patients."""

    def make(patients: Iterable[SyntheticPatient] = release_patients, formats: Collection[str] = ("bids",)) -> Path:
        released = datetime(2026, 11, 20, tzinfo=UTC)
        return make_candidate(tmp_path / "out", release_plan, patients, release_statement, {}, released, formats)

    return make


def unlisted(folder: Path) -> Path:
    """The same release from somebody who left the list of files away."""
    (folder / "SHA256SUMS").unlink()
    (folder / "CONTENT.SHA256SUMS").unlink()
    return folder


def test_what_is_read_is_what_was_written(made: Path, release_patients: list[SyntheticPatient]) -> None:
    read = read_release(made)
    assert subject_digest(read) == subject_digest(release_patients)
    brighter = replace(release_patients[0], images=release_patients[0].images * np.float32(0.9))
    assert subject_digest([brighter, *release_patients[1:]]) != subject_digest(release_patients)
    for was, now in zip(release_patients, read, strict=True):
        assert (now.participant_id, now.label) == (was.participant_id, was.label)
        np.testing.assert_array_equal(now.genes, was.genes)
        np.testing.assert_array_equal(now.morphology, was.morphology)
        np.testing.assert_array_equal(now.mask, was.mask)
        np.testing.assert_allclose(now.images, was.images, atol=0.0005001)
        assert (now.genes.dtype, now.images.dtype, now.mask.dtype) == (np.float32, np.float32, np.uint8)


def test_awkward_float32_come_back_to_the_last_bit(
    candidate: Callable[..., Path], release_patients: list[SyntheticPatient]
) -> None:
    awkward = np.array([1 / 3, 1e-7, -16777217.0, np.nextafter(np.float32(1), 2), 0.1], dtype=np.float32)
    patients = [replace(release_patients[0], genes=awkward)]
    assert subject_digest(read_release(candidate(patients))) == subject_digest(patients)


def test_the_digest_changes_with_the_patients(made: Path, release_patients: list[SyntheticPatient]) -> None:
    assert subject_digest(read_release(made)[:2]) == subject_digest(release_patients[:2])
    assert subject_digest(read_release(made)[:2]) != subject_digest(release_patients)


def test_images_are_held_one_patient_at_a_time(
    candidate: Callable[..., Path], release_patients: list[SyntheticPatient]
) -> None:
    first = release_patients[0]
    many = (replace(first, participant_id=f"P{number}") for number in range(60))
    read = read_release(candidate(many))
    sum(1 for _ in read[:2])  # what is loaded once, e.g. codecs
    tracemalloc.start()
    assert sum(len(patient.mask) for patient in read) == 60 * len(first.mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * first.images.nbytes


@pytest.mark.parametrize(
    "name", [IMAGE, MASK, "participants.tsv", "morphology.tsv", "genes/expression.tsv", "plan.toml"]
)
def test_a_file_that_differs_from_the_list_is_refused(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(Refused, match="not as SHA256SUMS lists it"):
        list(read_release(copied))


def test_a_candidate_is_compared_with_the_list_of_its_content(candidate: Callable[..., Path]) -> None:
    folder = candidate()
    assert len(list(read_release(folder))) == 3
    (folder / "morphology.tsv").write_text((folder / "morphology.tsv").read_text().replace("\t0.", "\t1.", 1))
    with pytest.raises(Refused, match=r"not as CONTENT\.SHA256SUMS lists it"):
        read_release(folder)


def test_a_list_that_is_no_list_is_refused(copied: Path) -> None:
    (copied / "SHA256SUMS").write_text("nothing\n")
    with pytest.raises(Refused, match="manifest_malformed"):
        read_release(copied)


@pytest.mark.parametrize("name", [IMAGE, MASK, "morphology.tsv"])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(Refused, match=f"{name} is missing"):
        list(read_release(copied))


def test_without_a_list_the_content_itself_is_checked(copied: Path) -> None:
    unlisted(copied)
    assert len(list(read_release(copied))) == 3
    (copied / MASK).write_bytes((copied / IMAGE).read_bytes())
    with pytest.raises(Refused, match="whole numbers from 0 to 1"):
        list(read_release(copied))


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"no NIfTI"), gzip.compress(b"\0" * 1000)])
def test_what_is_no_image_is_refused(copied: Path, content: bytes) -> None:
    (unlisted(copied) / IMAGE).write_bytes(content)
    with pytest.raises(Refused, match="no NIfTI image"):
        list(read_release(copied))


def test_a_truncated_image_is_refused(copied: Path) -> None:
    path = unlisted(copied) / IMAGE
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    with pytest.raises(Refused, match="no NIfTI image"):
        list(read_release(copied))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("genes/expression.tsv", "EGFR", "EGFX", "columns of the plan"),
        ("genes/expression.tsv", "SYN0003", "SYN0004", "one row for each participant"),
        ("morphology.tsv", "\t0.", "\tx.", "no number"),
        ("morphology.tsv", "\t0.", "\tnan\t0.", "columns of the plan"),
        ("participants.tsv", "SYN0003", "../SYN3", "letters and digits"),
        ("participants.tsv", "SYN0003", "SYN0001", "somebody twice"),
        ("participants.tsv", "\thigh", "\thuge", "label that the plan lacks"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(copied: Path, name: str, old: str, new: str, said: str) -> None:
    path = unlisted(copied) / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(Refused, match=said):
        list(read_release(copied))


def test_a_folder_that_is_no_release_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="release_missing"):
        read_release(tmp_path)


def test_a_release_without_nifti_says_so(candidate: Callable[..., Path]) -> None:
    with pytest.raises(Refused, match="release_without_bids"):
        read_release(candidate(formats=["dicom"]))
