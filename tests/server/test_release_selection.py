"""A release of chosen patients and sequences is whole, says what was chosen, and can be evaluated and attacked as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsynth.attacks.run import attack_release
from fedsynth.attacks.values import RELEASE_ATTACKS, SELECTED, Attacks, Rate
from fedsynth.auditing.values import Audit
from fedsynth.errors import JobFailed, Refused, UsageError
from fedsynth.evaluation import utility as utility_module
from fedsynth.evaluation.evaluate import evaluate
from fedsynth.evaluation.patients import Patients
from fedsynth.limits import Limits, MembershipLimits
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.morphology import denormalise
from fedsynth.plan import StudyPlan
from fedsynth.released import read_release
from fedsynth.selection import Measured, Range, Selected, Selection, selected_in
from fedsynth.statement import PrivacyStatement
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_server.release.make import ReleaseRefused, candidate_path, finish_release, make_candidate
from fedsynth_server.release.opened import open_release
from fedsynth_server.release.preview import TILE, Example, ReferenceExamples
from fedsynth_server.release.subject import subject_of
from fedsynth_server.release.verify import verify

Make = Callable[..., Path]
VOLUME = Range(feature="volume", least=0.5)


def chosen(**parts: Any) -> Selected:
    """T1c of three patients, two of them low, drawn for a volume; two of the masks have it."""
    asked = Selection.model_validate(
        {"patients": 3, "counts": {"low": 1, "high": 2}, "where": (VOLUME,), "sequences": ("T1c",)} | parts
    )
    measured = [
        Measured(asked=each, patients=3, without_tumour=1, measurable=2, fulfilling=2, median=2.5)
        for each in asked.where
    ]
    return Selected(asked=asked, tried=2000, fitting=400, measured=tuple(measured))


def only_t1c(patients: list[SyntheticPatient]) -> list[SyntheticPatient]:
    return [replace(patient, images=patient.images[[1]]) for patient in patients]


@pytest.fixture(scope="module")
def patients(release_patients: list[SyntheticPatient]) -> list[SyntheticPatient]:
    return only_t1c(release_patients)


@pytest.fixture(scope="module")
def part_attacks(release_attacks: Attacks) -> Attacks:
    """Those who fit were attacked by themselves, too, and nothing was found."""
    one = release_attacks.membership[0]
    part = [one.model_copy(update={"id": f"{name}-genes{SELECTED}", "title": name}) for name in RELEASE_ATTACKS]
    return release_attacks.model_copy(update={"membership": [*release_attacks.membership, *part]})


@pytest.fixture(scope="module")
def whole(
    make: Make, patients: list[SyntheticPatient], release_audit: Audit, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A release of T1c alone; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("make", "gate"):
            patch.setattr(f"fedsynth_server.release.{module}.code_digest", lambda: release_audit.code)
        return make(tmp_path_factory.mktemp("selected") / "release", patients=patients, selected=chosen())


def test_a_release_of_one_sequence_is_whole_and_holds_no_other(
    whole: Path, made: Path, patients: list[SyntheticPatient]
) -> None:
    assert verify(whole).ok, verify(whole).checks
    images = {path.name.split("_", 1)[1] for path in (whole / "bids").rglob("*.nii.gz")}
    assert images == {"ce-gadolinium_T1w.nii.gz", "label-tumor_mask.nii.gz"}
    assert {path.name for path in (whole / "dicom" / "SYN0001").iterdir()} == {"T1c", "SEG"}
    (sidecar,) = (whole / "bids/derivatives/seg/sub-SYN0001/anat").glob("*.json")
    assert json.loads(sidecar.read_text())["Sources"] == [
        "bids:raw:sub-SYN0001/anat/sub-SYN0001_ce-gadolinium_T1w.nii.gz"
    ]
    read = read_release(whole)
    assert read.sequences == ("T1c",)
    assert read[1].images.shape == patients[1].images.shape
    assert subject_digest(read) == subject_digest(patients) == subject_of(open_release(whole))
    assert read[:2].selected == read.selected == chosen()
    # What was spent and what was trained on is the same whatever is drawn.
    for name in ("privacy.json", "plan.toml"):
        assert (whole / name).read_bytes() == (made / name).read_bytes()


def test_everything_that_describes_it_says_what_was_chosen(whole: Path, made: Path) -> None:
    described = ("README.md", "DATASHEET.md", "report.html", "croissant.json", "bids/README.md")
    for name in described:
        text = (whole / name).read_text(encoding="utf-8")
        assert "The class mix was chosen, not that of the hospitals (grade: 1 low, 2 high)" in text, name
        assert "the images hold T1c; T1, FLAIR were left out" in text, name
        assert "volume of at least 0.5 mL" in text, name
        assert "chosen" not in (made / name).read_text(encoding="utf-8"), name
    report = (whole / "report.html").read_text(encoding="utf-8")
    first = report[report.index("<h1>") : report.index('class="tiles"')]
    assert "The class mix was chosen" in first
    assert "MRI (T1c)" in first
    quality = report[report.index('<section id="quality">') :]
    assert "Asked for volume of at least 0.5 mL in all 3 patients" in quality
    assert "2 of 3 have it, median 2.5 mL; in 1 it could not be measured." in quality
    assert "Of 2000 profiles that the model drew, 400 were in the ranges." in quality
    assert "MRI (T1c) and a tumour mask" in (whole / "DATASHEET.md").read_text()
    assert "Nothing was selected, sorted" not in (whole / "DATASHEET.md").read_text()
    listed = [entry["name"] for entry in json.loads((whole / "croissant.json").read_text())["distribution"]]
    assert "selection.json" in listed


def test_a_release_of_all_that_the_model_draws_says_nothing_of_a_selection(made: Path) -> None:
    assert not (made / "selection.json").exists()
    assert selected_in(made, open_release(made).plan) is None
    assert "Nothing was selected, sorted or corrected after drawing." in (made / "DATASHEET.md").read_text()


def test_the_gate_refuses_patients_who_are_not_as_selected(
    make: Make, tmp_path: Path, patients: list[SyntheticPatient], release_patients: list[SyntheticPatient]
) -> None:
    lies = {
        "classes": chosen(counts={"low": 2, "high": 1}),
        "volume": chosen(where=(Range(feature="volume", least=20.0),)),
    }
    for name, lie in lies.items():
        with pytest.raises(ReleaseRefused, match=r"selection\.json says") as refusal:
            make(tmp_path / name, patients=patients, selected=lie)
        assert not refusal.value.decision.failed[0].overridable
    with pytest.raises(JobFailed, match=r"images has shape \(3, "):  # more sequences than were said
        make(tmp_path / "more", patients=release_patients, selected=chosen())


def test_the_gate_asks_for_attacks_on_those_alone_who_fit(
    make: Make, tmp_path: Path, patients: list[SyntheticPatient], release_attacks: Attacks, part_attacks: Attacks
) -> None:
    about = {"subject": subject_digest(patients)}

    def refused(attacks: Attacks) -> str:
        with pytest.raises(ReleaseRefused) as refusal:
            out = tmp_path / str(len(list(tmp_path.iterdir())))
            given = attacks.model_copy(update=about)
            make(out, patients=patients, selected=chosen(), attacks=given, formats={"bids"})
        (failed,) = refusal.value.decision.failed
        assert failed.id == "membership-selected"
        assert "volume of at least 0.5 mL" in failed.title
        return failed.finding

    assert "No attack was tried on those alone" in refused(release_attacks)

    def one_changed(**changes: Any) -> Attacks:
        return part_attacks.model_copy(
            update={
                "membership": [
                    each.model_copy(update=changes) if each.id == f"calibrated-genes{SELECTED}" else each
                    for each in part_attacks.membership
                ]
            }
        )

    assert "0.150 above the limit of 0.55" in refused(one_changed(area=Rate(value=0.9, low=0.7, high=0.97)))
    assert "proves an epsilon of at least 90.00" in refused(one_changed(epsilon_bound=90.0))
    few = [each.model_copy(update={"members": 12}) if each.of_selected else each for each in part_attacks.membership]
    assert "the limits ask for 20" in refused(part_attacks.model_copy(update={"membership": few}))
    # Left out with a reason, which whoever gets the release is told.
    spared = Limits(reason="Only few are so ill.", membership=MembershipLimits(selected=False))
    out = tmp_path / "spared"
    given = release_attacks.model_copy(update=about)
    make(out, patients=patients, selected=chosen(), attacks=given, formats={"bids"}, limits=spared)
    result = verify(out, out / "release.pub.pem")
    assert result.ok
    (warning,) = [warning for warning in result.warnings if warning.startswith("Not checked")]
    assert "who fit what was selected" in warning and "Only few are so ill." in warning


def test_a_mix_of_all_classes_is_no_part_that_is_attacked_by_itself(
    make: Make, tmp_path: Path, patients: list[SyntheticPatient], release_attacks: Attacks
) -> None:
    given = release_attacks.model_copy(update={"subject": subject_digest(patients)})
    out = make(tmp_path / "mix", patients=patients, selected=chosen(where=()), attacks=given, formats={"bids"})
    assert "membership-selected" not in (out / "gate.json").read_text()


def test_a_selection_that_somebody_else_wrote_is_found(whole: Path, tmp_path: Path) -> None:
    forged = Path(shutil.copytree(whole, tmp_path / "forged"))
    text = (forged / "selection.json").read_text()
    (forged / "selection.json").write_text(text.replace('"fitting": 400', '"fitting": 1999'))
    assert verify(forged).status("manifest") == "failed"
    with pytest.raises(Refused, match=r"selection\.json is not as"):
        read_release(forged)
    (forged / "selection.json").unlink()
    assert verify(forged).status("manifest") == "failed"


def test_a_candidate_of_a_selection_becomes_its_release(
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    release_key: Path,
    release_audit: Audit,
    part_attacks: Attacks,
    patients: list[SyntheticPatient],
    tmp_path: Path,
) -> None:
    out, released = tmp_path / "out", datetime(2026, 11, 20, tzinfo=UTC)
    candidate = make_candidate(
        out, release_plan, patients, release_statement, {}, released, ["dicom"], selected=chosen()
    )
    assert subject_of(open_release(candidate)) == subject_digest(patients)
    attacks = part_attacks.model_copy(update={"subject": subject_digest(patients)})
    made = finish_release(candidate, out, release_key, audit=release_audit, attacks=attacks)
    assert verify(made).ok
    assert selected_in(made, release_plan) == chosen()
    assert "The class mix was chosen" in (made / "report.html").read_text(encoding="utf-8")
    assert candidate_path(out) == candidate


def test_a_sequence_that_has_no_name_in_bids_can_be_left_out(
    make: Make,
    tmp_path: Path,
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    patients: list[SyntheticPatient],
) -> None:
    image = release_plan.image.model_copy(update={"sequences": ["ADC", "T1c"]})
    plan = release_plan.model_copy(update={"image": image})
    statement = release_statement.model_copy(update={"plan_digest": plan.digest})
    made = make(tmp_path / "out", plan=plan, statement=statement, patients=patients, selected=chosen())
    assert verify(made).ok


def test_originals_are_shown_by_the_same_sequences(
    make: Make, tmp_path: Path, release_patients: list[SyntheticPatient], patients: list[SyntheticPatient]
) -> None:
    shown = ReferenceExamples("simulated", tuple(Example("one", each.images, each.mask) for each in release_patients))
    alone = make(tmp_path / "alone", patients=patients, selected=chosen(), real_examples=shown)
    with Image.open(alone / "comparison.png") as sheet:
        assert sheet.width < 5 * TILE  # a column on either side, not three


def people(plan: StudyPlan, n: int, seed: int) -> Patients:
    """Patients of two sites made of noise, one in three of the second class."""
    rng, image = np.random.default_rng(seed), plan.image
    grid = (image.slices, image.size, image.size)
    everybody = np.ones(n, dtype=bool)
    masks = np.zeros((n, *grid), dtype=np.uint8)
    masks[:, 1:3, 8:20, 8:20] = 1
    return Patients(
        rng.random((n, len(image.sequences), *grid)).astype(np.float16),
        masks,
        rng.normal(size=(n, len(plan.genes.panel))).astype(np.float32),
        rng.random((n, len(plan.morphology.features))).astype(np.float32),
        np.arange(n) % 3 // 2,
        has_images=everybody,
        has_genes=everybody,
        sites=np.arange(n) % 2,
        site_names=("north", "south"),
    )


def drawn(plan: StudyPlan, n: int) -> list[SyntheticPatient]:
    """As many of each class, with T1c alone."""
    of = people(plan, n, 9)
    return [
        SyntheticPatient(
            f"SYN{i:04d}",
            plan.label.classes[i % 2],
            of.genes[i],
            denormalise(of.morphology[i], plan.morphology.features),
            of.images[i, [1]].astype(np.float32),
            of.masks[i],
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def one_channel() -> DomainExtractor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DomainExtractor(1, 2, "nothing: random weights").eval()


def test_an_attack_sees_what_the_release_shows(release_plan: StudyPlan, one_channel: DomainExtractor) -> None:
    train, holdout, made = people(release_plan, 40, 1), people(release_plan, 60, 2), drawn(release_plan, 24)
    selected = chosen(patients=24, counts={}, balance=True, where=())
    found = attack_release(release_plan, train, holdout, made, one_channel, "noise", 1, selected=selected)
    assert found.plan_digest == release_plan.digest
    assert found.subject == subject_digest(made)
    assert {check.of for check in found.copies} == {"images", "genes"}
    # The other sequences of the real patients have no part in it.
    others = replace(train, images=train.images.copy())
    others.images[:, [0, 2]] = 0
    again = attack_release(release_plan, others, holdout, made, one_channel, "noise", 1, selected=selected)
    assert [each.area for each in again.membership] == [each.area for each in found.membership]
    with pytest.raises(UsageError) as refusal:
        attack_release(release_plan, train, holdout, made, one_channel, "noise", 1)
    assert refusal.value.code == "extractor_channels"


def test_an_evaluation_compares_what_there_is_and_says_that_the_mix_was_chosen(
    release_plan: StudyPlan, one_channel: DomainExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, holdout, made = people(release_plan, 12, 1), people(release_plan, 12, 2), drawn(release_plan, 12)
    monkeypatch.setattr(utility_module, "CLASSIFIER_STEPS", 2)
    monkeypatch.setattr(utility_module, "UNET_STEPS", 2)
    arguments = (release_plan, train, holdout, made, None, one_channel, None, "noise", 1)
    found = evaluate(*arguments, selected=chosen(patients=12, counts={}, balance=True, where=()))
    for section in found.sections:
        assert section.explanation.startswith(
            "The class mix was chosen, not that of the hospitals (grade: 6 low, 6 high)."
        )
    figures = {figure.metric: figure for section in found.sections for figure in section.figures}
    assert figures["Image follows morphology: volume"].real is None  # these tumours are all of one size
    assert sum(figure.synthetic is not None for figure in figures.values()) > 20
    assert "0 patients with the feature" in figures["Image follows morphology: flair_ratio"].note
    with pytest.raises(UsageError) as refusal:
        evaluate(*arguments)
    assert refusal.value.code == "extractor_channels"
