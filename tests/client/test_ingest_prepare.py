"""A hospital's folder to a cohort: what load_cohort finds, what is refused, what must never be written."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm

from fedsynth.errors import JobFailed, UsageError
from fedsynth.plan import ImagePlan, StudyPlan
from fedsynth_client.cohort import load_cohort
from fedsynth_client.ingest import prepare as prepare_module
from fedsynth_client.ingest.prepare import NothingUsable, prepare
from fedsynth_client.ingest.refusals import Reason
from fedsynth_client.ingest.report import render

PANEL = [f"GENE{i}" for i in range(60)]
IDS = [f"HOSP-{7000 + i}" for i in range(6)]
TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 2,
    "max_grad_norm": 1.0,
    "learning_rate": 0.1,
    "budget_share": 0.3,
}


def study_plan(measure: str = "abundance") -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "test",
            "purpose": "a study for tests of ingest",
            "image": ImagePlan(
                sequences=["T1", "FLAIR"], size=32, slices=8, pixel_spacing_mm=6.0, slice_spacing_mm=14.0
            ),
            "genes": {
                "panel": PANEL,
                "measure": measure,
                "reference_quantiles": norm.ppf(np.linspace(0.01, 0.99, 51)).tolist(),
                "center": [0.0] * len(PANEL),
                "scale": [1.0] * len(PANEL),
            },
            "privacy": {"epsilon": 8.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": TRAINING,
            "sites": [{"name": "a", "nominal_patients": 10}],
        }
    )


def write_nifti(path: Path, data: np.ndarray, spacing: float = 6.0, code: int = 1) -> None:
    """An LPS volume (x to left, y to posterior, z to superior)."""
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def head(rng: np.random.Generator, size: float = 0.8) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (32, 36, 24)), indexing="ij")
    inside = (z / 0.7) ** 2 + (y / size) ** 2 + (x / size) ** 2 <= 1
    return (inside * rng.integers(300, 400, inside.shape)).astype(np.float32)


def write_images(root: Path, patients: list[str], rng: np.random.Generator) -> None:
    mask = np.zeros((32, 36, 24), dtype=np.uint8)
    mask[12:18, 14:20, 8:14] = 1
    for number, patient in enumerate(patients):
        size = 0.7 + 0.03 * number
        write_nifti(root / patient / "T1.nii.gz", head(rng, size))
        write_nifti(root / patient / "FLAIR.nii.gz", head(rng, size))
        write_nifti(root / patient / "seg.nii.gz", mask)


def write_table(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(header)
        writer.writerows(rows)


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Six patients with everything; returns the path of sources.toml."""
    rng = np.random.default_rng(3)
    write_images(tmp_path / "images", IDS, rng)
    values = rng.gamma(1.0, 100.0, (len(PANEL), len(IDS))).round(3)
    write_table(
        tmp_path / "tpm.tsv", ["gene", *IDS], [[g, *row] for g, row in zip(PANEL, values.tolist(), strict=True)]
    )
    write_table(tmp_path / "clinical.tsv", ["patient_id", "g"], [[p, "1" if i % 2 else "2"] for i, p in enumerate(IDS)])
    sources = tmp_path / "sources.toml"
    sources.write_text(
        """
holdout_fraction = 0.34
[images]
layout = "folders"
sequences = { T1 = ["t1.nii*"], FLAIR = ["flair.nii*"] }
mask_patterns = ["seg.nii*"]
[expression]
path = "tpm.tsv"
orientation = "genes_by_patients"
scale = "tpm"
[clinical]
path = "clinical.tsv"
label_column = "g"
label_codes = { "1" = "low", "2" = "high" }
"""
    )
    return sources


def run(sources: Path, plan: StudyPlan | None = None, **options: object):  # type: ignore[no-untyped-def]
    return prepare(
        plan or study_plan(), sources, sources.parent / "out" / "cohort", np.random.default_rng(1), **options
    )  # type: ignore[arg-type]


def places(report) -> dict[str, list[str]]:  # type: ignore[no-untyped-def]
    result: dict[str, list[str]] = {}
    for refusal in report.refused:
        result.setdefault(refusal.reason.code, []).append(refusal.where)
    return result


def test_a_cohort_is_what_load_cohort_reads(hospital: Path) -> None:
    report = run(hospital)
    assert report.refused == ()
    plan = study_plan()
    cohort = load_cohort(hospital.parent / "out" / "cohort", plan.morphology.features)
    assert cohort.images.shape == (6, 2, 8, 32, 32)
    assert cohort.has_images.all()
    assert cohort.has_genes.all()
    assert sorted(cohort.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    unmeasured = np.isnan(cohort.morphology).all(axis=0)
    needs_t1c = {"enhancing_fraction", "oedema_fraction", "t1c_ratio"}
    assert {name for name, nan in zip(plan.morphology.features, unmeasured, strict=True) if nan} == needs_t1c
    assert set(np.unique(cohort.masks)) == {0, 4}
    assert len(cohort.split("holdout")) == report.taken.holdout == 2
    assert float(cohort.images.max()) == 1.0
    # Genes carry the plan's quantiles, in each patient.
    assert np.allclose(np.sort(cohort.genes, axis=1), np.sort(cohort.genes, axis=1)[0])


def test_no_identifier_or_file_name_is_written_into_the_cohort(hospital: Path) -> None:
    (hospital.parent / "images" / "HOSP-7777").mkdir()
    (hospital.parent / "images" / IDS[0] / "FLAIR.nii.gz").write_bytes(b"nothing")
    run(hospital)
    files = [path for path in (hospital.parent / "out").rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes() + path.name.encode()
        for planted in (b"HOSP", b"nii", b"tpm.tsv", b"clinical.tsv", str(hospital.parent).encode()):
            assert planted not in content, path.name


def test_digests_in_the_manifest_are_those_of_the_files(hospital: Path) -> None:
    from fedsynth.files import sha256_file

    run(hospital)
    out = hospital.parent / "out" / "cohort"
    manifest = json.loads((out / "manifest.json").read_text())
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"manifest.json"}
    assert manifest["sha256"] == {name: sha256_file(out / name) for name in written}


def test_broken_files_are_named_and_the_other_patients_go_on(hospital: Path) -> None:
    images = hospital.parent / "images"
    whole = (images / IDS[0] / "T1.nii.gz").read_bytes()
    (images / IDS[0] / "T1.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / IDS[1] / "FLAIR.nii.gz").unlink()
    write_nifti(images / IDS[2] / "T1.nii.gz", np.ones((32, 36, 24, 3), dtype=np.float32))
    write_nifti(images / IDS[3] / "T1.nii.gz", head(np.random.default_rng(0)), code=0)
    write_nifti(images / IDS[4] / "seg.nii.gz", np.zeros((32, 36, 24), dtype=np.uint8))
    (images / "empty").mkdir()
    report = run(hospital)
    assert places(report) == {
        "truncated": [f"images/{IDS[0]}/T1.nii.gz"],
        "missing_sequence": [f"images/{IDS[1]}"],
        "four_dimensional": [f"images/{IDS[2]}/T1.nii.gz"],
        "orientation_unknown": [f"images/{IDS[3]}/T1.nii.gz"],
        "empty_mask": [f"images/{IDS[4]}"],
        "empty_folder": ["images/empty"],
    }
    assert (report.taken.patients, report.taken.with_images, report.taken.with_genes) == (6, 1, 6)
    for refusal in report.refused:
        assert refusal.reason.sentence
        assert refusal.reason.remedy


def test_what_the_hospital_states_settles_what_a_header_leaves_open(hospital: Path) -> None:
    images = hospital.parent / "images"
    data = head(np.random.default_rng(0))
    data[20:, 20:, 14:] *= 3
    write_nifti(images / IDS[0] / "T1.nii.gz", data)
    write_nifti(images / IDS[1] / "T1.nii.gz", data, code=0)
    write_nifti(images / IDS[2] / "T1.nii.gz", np.stack([data * 0 + 1, data], axis=-1))
    text = hospital.read_text().replace("[expression]", 'assume_orientation = "LPS"\nvolume_index = 1\n[expression]')
    hospital.write_text(text)
    assert run(hospital).taken.with_images == 6
    cohort = load_cohort(hospital.parent / "out" / "cohort", ["volume"])
    bright = [image for image in cohort.images[:, 0] if float(np.median(image[image > 0.05])) < 0.5]
    assert len(bright) == 3
    np.testing.assert_allclose(bright[0].astype(float), bright[1].astype(float), atol=0.02)
    np.testing.assert_allclose(bright[0].astype(float), bright[2].astype(float), atol=0.02)


def test_patients_lacking_a_modality_stay_and_those_lacking_both_go(hospital: Path) -> None:
    root = hospital.parent
    rows = [line.split("\t") for line in (root / "tpm.tsv").read_text().splitlines()]
    (root / "tpm.tsv").write_text("\n".join("\t".join(row[:1] + row[2:]) for row in rows))  # no profile of IDS[0]
    for name in ("T1.nii.gz", "FLAIR.nii.gz", "seg.nii.gz"):
        (root / "images" / IDS[0] / name).rename(root / "images" / IDS[0] / f"old_{name}")
    write_images(root / "images", ["HOSP-IMAGES-ONLY"], np.random.default_rng(5))
    report = run(hospital)
    found = places(report)
    assert found["nothing_usable"] == [f"images/{IDS[0]}"]
    assert found["missing_profile"] == ["images/HOSP-IMAGES-ONLY"]
    assert found["missing_label"] == ["images/HOSP-IMAGES-ONLY"]
    cohort = load_cohort(hospital.parent / "out" / "cohort", study_plan().morphology.features)
    assert len(cohort) == 6
    only = ~cohort.has_genes
    assert only.sum() == 1
    assert np.isnan(cohort.genes[only]).all()
    assert cohort.labels[only].tolist() == [-1]


def test_duplicate_and_unknown_rows_of_the_clinical_table(hospital: Path) -> None:
    write_table(
        hospital.parent / "clinical.tsv",
        ["patient_id", "g"],
        [[IDS[0], "1"], [IDS[0], "2"], [IDS[1], "9"], [IDS[2], "1"], [IDS[3], ""], [IDS[4], "1"], [IDS[5], "2"]],
    )
    report = run(hospital)
    assert places(report) == {
        "duplicate_patient": ["clinical.tsv: row 2", "clinical.tsv: row 3"],
        "unknown_label": ["clinical.tsv: row 4", "clinical.tsv: row 6"],
    }
    assert report.taken.with_label == 3


def test_a_broken_table_leaves_the_images(hospital: Path) -> None:
    text = hospital.read_text()
    hospital.write_text(text.replace("genes_by_patients", "patients_by_genes"))
    report = run(hospital)
    assert [(refusal.what, refusal.reason) for refusal in report.refused] == [("expression", Reason.TRANSPOSED)]
    assert (report.taken.with_images, report.taken.with_genes) == (6, 0)


def test_a_full_disk_leaves_nothing_half_written(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(path: Path, content: bytes) -> str:
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)
        return ""

    monkeypatch.setattr(prepare_module, "_put", full)
    with pytest.raises(JobFailed) as failed:
        run(hospital)
    assert failed.value.code == "disk_full"
    assert list((hospital.parent / "out").iterdir()) == []


def test_an_earlier_cohort_is_replaced_only_when_asked_and_of_the_same_settings(hospital: Path) -> None:
    run(hospital)
    out = hospital.parent / "out"
    with pytest.raises(UsageError) as refused:
        run(hospital)
    assert refused.value.code == "cohort_exists"
    other = study_plan().model_copy(update={"image": ImagePlan(sequences=["T1", "FLAIR"], size=64, slices=8)})
    with pytest.raises(UsageError) as refused:
        run(hospital, other, replace=True)
    assert refused.value.code == "cohort_of_other_settings"
    (hospital.parent / "images" / IDS[0] / "seg.nii.gz").unlink()
    assert run(hospital, replace=True).taken.with_images == 5
    assert [path.name for path in out.iterdir()] == ["cohort"]
    assert sum(load_cohort(out / "cohort", ["volume"]).has_images) == 5


def test_nothing_usable_writes_nothing_and_tells_why(hospital: Path) -> None:
    for path in (hospital.parent / "images").rglob("*.nii.gz"):
        path.unlink()
    (hospital.parent / "tpm.tsv").unlink()
    with pytest.raises(NothingUsable) as refused:
        run(hospital)
    assert refused.value.report.counts()["empty_folder"] == 6
    assert not (hospital.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('FLAIR = ["flair.nii*"]', 'T2 = ["t2*"]', "sources_sequence_missing"),
        ('"2" = "high"', '"2" = "huge"', "sources_label_class_unknown"),
        ('layout = "folders"', 'layout = "folders"\npath = "nowhere"', "sources_path_missing"),
        ('layout = "folders"', 'layout = "folders"\nassume_orientation = "LRS"', "sources_invalid"),
    ],
)
def test_sources_that_cannot_serve_the_plan_are_refused_before_reading(
    hospital: Path, old: str, new: str, code: str
) -> None:
    hospital.write_text(hospital.read_text().replace(old, new))
    with pytest.raises(UsageError) as refused:
        run(hospital)
    assert refused.value.code == code


def test_bids_manifest_and_slices_give_the_cohort_that_folders_give(hospital: Path) -> None:
    from PIL import Image

    root = hospital.parent
    run(hospital)
    reference = load_cohort(root / "out" / "cohort", ["volume"])
    rows = []
    for number, patient in enumerate(IDS):
        source = root / "images" / patient
        raw, derived = (
            root / "bids" / f"sub-{number}" / "anat",
            root / "bids" / "derivatives" / "m" / f"sub-{number}" / "anat",
        )
        raw.mkdir(parents=True)
        derived.mkdir(parents=True)
        (raw / f"sub-{number}_T1w.nii.gz").write_bytes((source / "T1.nii.gz").read_bytes())
        (raw / f"sub-{number}_FLAIR.nii.gz").write_bytes((source / "FLAIR.nii.gz").read_bytes())
        (derived / f"sub-{number}_desc-tumour_mask.nii.gz").write_bytes((source / "seg.nii.gz").read_bytes())
        rows.append([patient, *(f"images/{patient}/{name}.nii.gz" for name in ("T1", "FLAIR", "seg"))])
        stacks = root / "slices" / patient
        stacks.mkdir(parents=True)
        for name in ("T1", "FLAIR", "seg"):
            data = np.asarray(nibabel.load(source / f"{name}.nii.gz").dataobj)
            for z in range(data.shape[2]):
                Image.fromarray(data[:, :, z].T.astype(np.uint16 if name != "seg" else np.uint8)).save(
                    stacks / f"{name}_{z:03d}.png"
                )
    with (root / "list.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["patient_id", "T1", "FLAIR", "mask"], *rows])
    images = '[images]\nsequences = {{ T1 = ["*t1*"], FLAIR = ["*flair*"] }}\n{}\n'
    layouts = {
        "bids": 'layout = "bids"\npath = "bids"',
        "manifest": 'layout = "manifest"\npath = "list.csv"',
        "slices": 'layout = "slices"\npath = "slices"\npixel_spacing_mm = 6.0\nslice_spacing_mm = 6.0',
    }
    for layout, lines in layouts.items():
        sources = root / f"{layout}.toml"
        sources.write_text("holdout_fraction = 0.34\n" + images.format(lines))
        report = prepare(study_plan(), sources, root / "out" / layout, np.random.default_rng(1))
        assert report.refused == (), layout
        cohort = load_cohort(root / "out" / layout, ["volume"])
        order = np.argsort([image.astype(float).sum() for image in cohort.images])
        expected = np.argsort([image.astype(float).sum() for image in reference.images])
        np.testing.assert_allclose(
            cohort.images[order].astype(float), reference.images[expected].astype(float), atol=0.01, err_msg=layout
        )


def test_ambiguous_files_are_refused_with_both_names(hospital: Path) -> None:
    patient = hospital.parent / "images" / IDS[0]
    (patient / "second").mkdir()
    (patient / "second" / "T1.nii.gz").write_bytes((patient / "T1.nii.gz").read_bytes())
    report = run(hospital)
    assert places(report)["several_candidates"] == [
        f"images/{IDS[0]}/T1.nii.gz",
        f"images/{IDS[0]}/second/T1.nii.gz",
    ]


def test_the_table_on_the_terminal_names_reason_place_and_remedy(hospital: Path) -> None:
    (hospital.parent / "images" / IDS[0] / "seg.nii.gz").unlink()
    report = run(hospital)
    console = Console(record=True, width=160)
    render(report, console)
    text = console.export_text()
    assert "missing_mask" in text
    assert f"images/{IDS[0]}" in text
    assert Reason.MISSING_MASK.remedy in text
