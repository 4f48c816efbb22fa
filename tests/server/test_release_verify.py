"""What a recipient is told of a release that was tampered with, signed by a stranger, or is not what it says it is."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread

from fedsynth.errors import Refused, UsageError
from fedsynth.files import read_json, write_json
from fedsynth.plan import StudyPlan
from fedsynth.statement import PrivacyStatement
from fedsynth_server.release.command import verify_command
from fedsynth_server.release.decision import OverrideRequest
from fedsynth_server.release.manifest import (
    fingerprint,
    generate_key,
    load_key,
    load_public_key,
    public_pem,
    write_manifest,
)
from fedsynth_server.release.verify import verify

IMAGE = "dicom/SYN0001/T1/0001.dcm"


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(made, tmp_path / "release"))


@pytest.fixture
def trusted(release_key: Path, tmp_path: Path) -> Path:
    """The coordinator's public key, as the recipient got it."""
    path = tmp_path / "coordinator.pem"
    path.write_bytes(public_pem(load_key(release_key).public_key()))
    return path


def test_a_release_verifies_and_says_what_the_signature_proves(made: Path, trusted: Path) -> None:
    alone = verify(made)
    assert alone.ok
    assert alone.signer_is_trusted is None
    assert "not who that is" in alone.warnings[0]
    assert alone.fingerprint in alone.warnings[0]
    known = verify(made, trusted)
    assert known.ok
    assert known.signer_is_trusted is True
    assert known.warnings == []
    assert verify(made, trusted_fingerprint=alone.fingerprint.upper()).signer_is_trusted is True


def _alter(release: Path) -> None:
    content = bytearray((release / IMAGE).read_bytes())
    content[-1] ^= 1
    (release / IMAGE).write_bytes(content)


def _add(release: Path) -> None:
    (release / "dicom" / "extra.txt").write_text("extra")


def _remove(release: Path) -> None:
    (release / "genes/expression.tsv").unlink()


def _link(release: Path) -> None:
    (release / IMAGE).unlink()
    (release / IMAGE).symlink_to("0002.dcm")


@pytest.mark.parametrize("tamper", [_alter, _add, _remove, _link])
def test_a_changed_file_fails_the_manifest_and_nothing_is_opened(
    release: Path, trusted: Path, tamper: Callable[[Path], None]
) -> None:
    tamper(release)
    result = verify(release, trusted)
    assert not result.ok
    assert result.status("manifest") == "failed"
    assert result.status("signature") == "ok"
    assert {check.status for check in result.checks[2:]} == {"skipped"}


def test_a_change_that_is_listed_anew_fails_the_signature(release: Path) -> None:
    _alter(release)
    sums = (release / "SHA256SUMS").read_text().splitlines()
    from fedsynth.files import sha256_file

    rewritten = [f"{sha256_file(release / line[66:])}  {line[66:]}" for line in sums]
    (release / "SHA256SUMS").write_text("\n".join(rewritten) + "\n")
    result = verify(release)
    assert result.status("manifest") == "ok"
    assert result.status("signature") == "failed"


def test_a_signature_of_other_sums_fails(release: Path, release_key: Path) -> None:
    (release / "SHA256SUMS.sig").write_bytes(load_key(release_key).sign(b"something else"))
    assert verify(release).status("signature") == "failed"


def test_a_stranger_who_signs_anew_is_found_out_only_with_a_trusted_key(
    release: Path, trusted: Path, tmp_path: Path
) -> None:
    generate_key(tmp_path / "stranger.pem")
    write_manifest(release, load_key(tmp_path / "stranger.pem"))
    assert verify(release).ok
    result = verify(release, trusted)
    assert not result.ok
    assert result.status("signature") == "failed"
    assert result.signer_is_trusted is False


def test_trusted_key_and_fingerprint_must_agree(made: Path, trusted: Path) -> None:
    with pytest.raises(UsageError):
        verify(made, trusted, "0" * 64)


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        verify(tmp_path / "absent")
    assert refusal.value.code == "release_missing"


def _unmark(release: Path) -> None:
    dataset = dcmread(release / IMAGE)
    del dataset.SyntheticData
    dataset.save_as(release / IMAGE)


def _unmark_sidecar(release: Path) -> None:
    path = release / "bids/sub-SYN0001/anat/sub-SYN0001_T1w.json"
    write_json(path, read_json(path) | {"SyntheticData": False})


def _private_tag(release: Path) -> None:
    dataset = dcmread(release / "dicom/SYN0002/SEG/mask.dcm")
    dataset.SegmentSequence[0].private_block(0x0011, "SCANNER", create=True).add_new(1, "LO", "Bay 3")
    dataset.save_as(release / "dicom/SYN0002/SEG/mask.dcm")


def _other_patient(release: Path) -> None:
    dataset = dcmread(release / IMAGE)
    dataset.PatientID = "4711"
    dataset.save_as(release / IMAGE)


def _person(release: Path) -> None:
    dataset = dcmread(release / "dicom/SYN0002/SEG/mask.dcm")
    dataset.ContentCreatorName = "Surname^Given"
    dataset.save_as(release / "dicom/SYN0002/SEG/mask.dcm")


def _institution(release: Path) -> None:
    dataset = dcmread(release / IMAGE)
    dataset.InstitutionName = "A hospital"
    dataset.save_as(release / IMAGE)


def _date(release: Path) -> None:
    dataset = dcmread(release / IMAGE)
    dataset.StudyDate = "20190101"
    dataset.save_as(release / IMAGE)


def _gzip_name(release: Path) -> None:
    path = release / "bids/sub-SYN0001/anat/sub-SYN0001_T1w.nii.gz"
    content = gzip.decompress(path.read_bytes())
    with path.open("wb") as stream, gzip.GzipFile("/home/somebody/p1.nii", "wb", fileobj=stream) as packed:
        packed.write(content)


def _nifti_text(release: Path) -> None:
    path = release / "bids/sub-SYN0001/anat/sub-SYN0001_T1w.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[228:236] = b"p1 sc1  "  # aux_file
    path.write_bytes(gzip.compress(bytes(content), mtime=0))


def _missing_slice(release: Path) -> None:
    (release / IMAGE).unlink()


def _missing_mask(release: Path) -> None:
    (release / "bids/derivatives/seg/sub-SYN0003/anat/sub-SYN0003_label-tumor_mask.nii.gz").unlink()


def _missing_row(release: Path) -> None:
    path = release / "morphology.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _other_genes(release: Path) -> None:
    for path in (release / "genes/expression.tsv", release / "bids/phenotype/expression.tsv"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1].rsplit("\t", 1)[0] + "\t9", *lines[2:]]) + "\n")


def _shifted(release: Path) -> None:
    for path in sorted((release / "dicom/SYN0001/T1").glob("*.dcm")):
        dataset = dcmread(path)
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x + 2, y, z]
        dataset.save_as(path)


def _other_voxels(release: Path) -> None:
    dataset = dcmread(release / IMAGE)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(release / IMAGE)


def _no_report(release: Path) -> None:
    (release / "report.html").unlink()


def _overspent(release: Path) -> None:
    statement = read_json(release / "privacy.json")
    statement["sites"][0]["epsilon"] = statement["sites"][0]["epsilon_lifetime"] = 8.5
    write_json(release / "privacy.json", statement)


def _understated(release: Path) -> None:
    statement = read_json(release / "privacy.json")
    for mechanism in statement["sites"][1]["mechanisms"]:
        mechanism["noise_multiplier"] /= 2
    write_json(release / "privacy.json", statement)


def _other_plan(release: Path) -> None:
    path = release / "plan.toml"
    path.write_text(path.read_text().replace("delta = 1e-05", "delta = 1e-06"))


def _invalid_statement(release: Path) -> None:
    write_json(release / "privacy.json", read_json(release / "privacy.json") | {"anonymous": True})


@pytest.mark.parametrize(
    ("breakage", "check", "reason"),
    [
        (_unmark, "synthetic", "0001.dcm does not say"),
        (_unmark_sidecar, "synthetic", "T1w.json does not say"),
        (_private_tag, "identifiers", "private tag"),
        (_other_patient, "identifiers", "another PatientID"),
        (_person, "identifiers", "ContentCreatorName"),
        (_institution, "identifiers", "InstitutionName"),
        (_date, "identifiers", "StudyDate"),
        (_gzip_name, "identifiers", "gzip header"),
        (_nifti_text, "identifiers", "text in its header"),
        (_missing_slice, "participants", f"missing: {IMAGE}"),
        (_missing_mask, "participants", "missing: bids/derivatives/seg/sub-SYN0003"),
        (_missing_row, "participants", "morphology.tsv does not have one row"),
        (_other_genes, "participants", "disagree on values"),
        (_shifted, "geometry", "not on the grid"),
        (_other_voxels, "geometry", "other values"),
        (_no_report, "structure", "missing: report.html"),
        (_overspent, "privacy", "epsilon 8.5 is not within 8"),
        (_understated, "privacy", "more than the"),
        (_other_plan, "privacy", "not of the same plan"),
        (_invalid_statement, "structure", "privacy.json is not valid at anonymous"),
    ],
)
def test_content_that_is_signed_but_wrong_fails_its_check(
    release: Path, release_key: Path, breakage: Callable[[Path], None], check: str, reason: str
) -> None:
    breakage(release)
    write_manifest(release, load_key(release_key))
    result = verify(release)
    assert result.status("manifest") == result.status("signature") == "ok"
    failed = {found.name: found.reason for found in result.checks if found.status == "failed"}
    assert check in failed
    assert reason in failed[check]


def test_malformed_content_is_a_failed_check_and_no_crash(release: Path, release_key: Path) -> None:
    (release / "genes/expression.parquet").write_bytes(b"no parquet")
    write_manifest(release, load_key(release_key))
    assert verify(release).status("participants") == "failed"


def test_reproducible_noise_is_said_loudly(
    make: Callable[..., Path], tmp_path: Path, release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    privacy = release_plan.privacy.model_copy(update={"reproducible_seed": 3})
    plan = release_plan.model_copy(update={"privacy": privacy})
    with pytest.raises(Refused, match="says private"):
        make(tmp_path / "out", plan=plan, statement=release_statement.model_copy(update={"plan_digest": plan.digest}))
    honest = release_statement.model_copy(update={"plan_digest": plan.digest, "private": False})
    with pytest.raises(Refused, match="reproducible"):
        make(tmp_path / "refused", plan=plan, statement=honest)
    answered = OverrideRequest("Simulated patients, to be repeated.", "maintainer", ("private",))
    out = make(tmp_path / "out", plan=plan, statement=honest, override=answered)
    result = verify(out)
    assert result.ok
    assert any(warning.startswith("NOT PRIVATE") for warning in result.warnings)
    assert "NOT PRIVATE" in (out / "README.md").read_text()
    assert "NOT PRIVATE" in dcmread(out / IMAGE).ContributingEquipmentSequence[0].ContributionDescription


def test_the_command_prints_one_envelope(made: Path, trusted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_command(made, str(trusted), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "ok"
    assert printed["data"]["signer_is_trusted"] is True
    assert {check["status"] for check in printed["data"]["checks"]} == {"ok"}


def test_the_command_takes_a_fingerprint_and_names_the_failed_check(
    release: Path, trusted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _alter(release)
    with pytest.raises(Refused, match=f"altered: {IMAGE}") as refusal:
        verify_command(release, fingerprint(load_public_key(trusted)), as_json=False)
    assert refusal.value.code == "release_not_verified"
    printed = capsys.readouterr().out
    assert "manifest" in printed
    assert "skipped" in printed
