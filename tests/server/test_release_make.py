"""Making a release: reproducible, whole or absent, and refused with the true cause."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedsynth.errors import FedsynthError, JobFailed, Refused, UsageError
from fedsynth.files import read_json
from fedsynth.plan import Module, StudyPlan, load_plan
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.outcome import ModuleOutcome, Outcome
from fedsynth_server.release import candidate as candidate_module
from fedsynth_server.release import make as make_module
from fedsynth_server.release.facts import ReleaseFacts
from fedsynth_server.release.manifest import files_of
from fedsynth_server.release.preview import Example, ReferenceExamples
from fedsynth_server.release.texts import readme
from fedsynth_server.release.verify import verify

Make = Callable[..., Path]


def drowned(module: Module) -> ModuleOutcome:
    return ModuleOutcome(
        module=module,
        forecast_noise_to_signal=4.0,
        forecast="drowns",
        noise_to_signal=None,
        learnt=0.0,
        verdict="drowned",
        as_forecast=True,
        sentence="Nothing stands out of the noise.",
    )


def test_equal_arguments_give_equal_bytes(made: Path, make: Make, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    assert files_of(again) == files_of(made)
    assert [name for name in files_of(made) if (made / name).read_bytes() != (again / name).read_bytes()] == []


def test_patients_may_come_from_a_generator(
    made: Path, make: Make, tmp_path: Path, release_patients: list[SyntheticPatient]
) -> None:
    streamed = make(tmp_path / "streamed", patients=(patient for patient in release_patients))
    assert (streamed / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()


def test_other_patients_of_the_same_second_share_no_uid(
    made: Path, make: Make, tmp_path: Path, release_patients: list[SyntheticPatient]
) -> None:
    from pydicom import dcmread

    changed = [dataclasses.replace(patient, genes=patient.genes + 1) for patient in release_patients]
    other = make(tmp_path / "other", patients=changed)

    def uids(folder: Path) -> set[str]:
        headers = [dcmread(path, stop_before_pixels=True) for path in folder.rglob("*.dcm")]
        return {
            str(h[key].value) for h in headers for key in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
        }

    assert not uids(made) & uids(other)


def test_plan_and_index_of_a_release_tell_the_study(made: Path, release_plan: StudyPlan) -> None:
    assert load_plan(made / "plan.toml") == release_plan
    index = read_json(made / "release.json")
    assert index["n_patients"] == 3
    assert index["plan_digest"] == release_plan.digest
    assert index["released"] == "2026-11-20T09:30:00Z"


@pytest.mark.parametrize("formats", [{"bids"}, {"dicom"}])
def test_one_format_alone_is_a_release_that_verifies(make: Make, tmp_path: Path, formats: set[str]) -> None:
    out = make(tmp_path / "out", formats=formats)
    assert {name for name in ("bids", "dicom") if (out / name).exists()} == formats
    assert verify(out).ok


def test_reference_examples_become_a_second_sheet(
    make: Make, tmp_path: Path, release_patients: list[SyntheticPatient]
) -> None:
    patient = release_patients[0]
    reference = ReferenceExamples("simulated", (Example("simulated 1", patient.images, patient.mask),))
    out = make(tmp_path / "out", real_examples=reference)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert verify(out).ok


def test_an_existing_folder_is_refused_and_left_alone(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Refused) as refusal:
        make(out)
    assert refusal.value.code == "release_exists"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("where", "what"),
    [(candidate_module, "write_dicom_patient"), (candidate_module, "write_tables"), (make_module, "write_manifest")],
)
def test_a_full_disk_leaves_nothing_behind(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType, what: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, what, full)
    with pytest.raises(JobFailed) as failure:
        make(tmp_path / "out")
    assert failure.value.code == "disk_full"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_module, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _plan_with(plan: StudyPlan, **image: Any) -> StudyPlan:
    return plan.model_copy(update={"image": plan.image.model_copy(update=image)})


def test_a_sequence_without_a_bids_name_is_refused(
    make: Make, tmp_path: Path, release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    plan = _plan_with(release_plan, sequences=["T1", "ADC"])
    statement = release_statement.model_copy(update={"plan_digest": plan.digest})
    with pytest.raises(UsageError, match="'ADC'") as refusal:
        make(tmp_path / "out", plan=plan, statement=statement)
    assert refusal.value.code == "sequence_not_releasable"


def test_a_statement_of_another_plan_is_refused(make: Make, tmp_path: Path, release_plan: StudyPlan) -> None:
    with pytest.raises(UsageError) as refusal:
        make(tmp_path / "out", plan=_plan_with(release_plan, slice_spacing_mm=5.0))
    assert refusal.value.code == "release_plan_mismatch"


def test_an_understated_epsilon_is_not_released(
    make: Make, tmp_path: Path, release_statement: PrivacyStatement
) -> None:
    north, south = release_statement.sites
    flattered = north.model_copy(update={"epsilon": 0.9 * north.epsilon})
    with pytest.raises(Refused, match="more than") as refusal:
        make(tmp_path / "out", statement=release_statement.model_copy(update={"sites": [flattered, south]}))
    assert refusal.value.code == "release_privacy"
    assert list(tmp_path.iterdir()) == []


def test_a_time_without_zone_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        make(tmp_path / "out", released=datetime(2026, 11, 20))
    assert refusal.value.code == "release_time_without_zone"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"participant_id": "../evil"}, "letters and digits"),
        ({"label": "unheard"}, "label 'unheard'"),
        ({"genes": np.zeros(3, np.float32)}, r"genes has shape \(3,\), expected \(5,\)"),
        ({"images": np.full((3, 6, 32, 32), np.nan, np.float32)}, "images holds values that are not finite"),
        ({"mask": np.full((6, 32, 32), 4, np.uint8)}, "other than 0 and 1"),
    ],
)
def test_a_patient_that_does_not_fit_the_plan_is_refused(
    make: Make, tmp_path: Path, release_patients: list[SyntheticPatient], change: dict[str, Any], cause: str
) -> None:
    with pytest.raises(JobFailed, match=cause):
        make(tmp_path / "out", patients=[release_patients[0], dataclasses.replace(release_patients[1], **change)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"patients": []}, "release_empty"),
        ({"formats": {"bids", "minc"}}, "format_unknown"),
        ({"formats": set()}, "format_unknown"),
        ({"curves": {"gan": [{"round": 1, "loss": float("nan")}]}}, "curve_not_finite"),
        ({"key_path": Path("absent.pem")}, "signing_key_missing"),
    ],
)
def test_wrong_arguments_are_named(make: Make, tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(FedsynthError) as refusal:
        make(tmp_path / "out", **changes)
    assert refusal.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_participant_drawn_twice_is_refused(
    make: Make, tmp_path: Path, release_patients: list[SyntheticPatient]
) -> None:
    with pytest.raises(JobFailed, match="twice"):
        make(tmp_path / "out", patients=[release_patients[0], release_patients[0]])


def test_an_outcome_is_released_and_verified(make: Make, tmp_path: Path, release_plan: StudyPlan) -> None:
    found = Outcome(plan_digest=release_plan.digest, modules=[drowned(module) for module in release_plan.modules])
    out = make(tmp_path / "out", outcome=found)
    assert Outcome.model_validate(read_json(out / "outcome.json")) == found
    assert verify(out).status("outcome") == "ok"
    assert "drowned in noise" in (out / "report.html").read_text(encoding="utf-8")


def test_a_release_without_an_outcome_verifies(made: Path) -> None:
    assert not (made / "outcome.json").exists()
    assert verify(made).status("outcome") == "ok"


def test_an_outcome_that_leaves_modules_out_is_refused(make: Make, tmp_path: Path, release_plan: StudyPlan) -> None:
    short = Outcome(plan_digest=release_plan.digest, modules=[drowned("gan")])
    with pytest.raises(Refused, match="one entry for each module"):
        make(tmp_path / "out", outcome=short)


def test_a_printed_guarantee_is_never_stronger_than_the_one_that_holds(
    release_plan: StudyPlan, release_statement: PrivacyStatement
) -> None:
    sites = [site.model_copy(update={"epsilon": 7.9931}) for site in release_statement.sites]
    released = datetime(2026, 11, 20, tzinfo=UTC)
    facts = ReleaseFacts(release_plan, release_statement.model_copy(update={"sites": sites}), released)
    assert "epsilon 8.00 at most at any site" in facts.guarantee
    assert "| north | 8.00 |" in readme(facts, ["bids"], 3, "ab" * 32)
