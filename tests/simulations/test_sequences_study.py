"""One MR sequence or four: from a hospital's files over training to a release, each is a channel of one patient."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from fedsynth.plan import StudyPlan, save_plan
from fedsynth.released import read_release
from fedsynth_client.app import app as client_app
from fedsynth_client.cohort import load_cohort
from fedsynth_client.ingest.prepare import prepare
from fedsynth_client.policy import SitePolicy, save_policy
from fedsynth_client.site import Site
from fedsynth_server.cli import release as commands
from fedsynth_server.release.checks import content_checks
from fedsynth_server.release.opened import open_release
from fedsynth_server.rounds import run_study
from fedsynth_simulations.grid import InProcessGrid

PATIENTS = 14
# How much brighter one half of the head is than the other, so that channels that were mixed up are noticed.
BRIGHTER = {"T1": 2.0, "T1c": 1.0, "T2": 0.5, "FLAIR": 0.25}


def plan_of(tiny_plan: StudyPlan, sequences: list[str]) -> StudyPlan:
    """One round of each module at one site."""
    content = tiny_plan.model_dump()
    for module in ("autoencoder", "radiogenomics", "gan"):
        content[module] |= {"rounds": 1, "steps_per_round": 2, "expected_batch": 4}
    content["image"] |= {"sequences": sequences, "pixel_spacing_mm": 6.0, "slice_spacing_mm": 24.0}
    content["sites"] = [{"name": "a", "nominal_patients": PATIENTS}]
    return StudyPlan.model_validate(content)


def write_hospital(root: Path, plan: StudyPlan) -> Path:
    """Files of patients with a ball for a head, in which a box is the tumour; returns the path of sources.toml."""
    rng, shape = np.random.default_rng(2), (32, 32, 16)
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    affine = np.diag([-6.0, -6.0, 6.0, 1.0])
    ids = [f"P{i}" for i in range(PATIENTS)]
    mask = np.zeros(shape, dtype=np.uint8)
    mask[12:18, 14:20, 5:10] = 1
    for number, patient in enumerate(ids):
        folder = root / "images" / patient
        folder.mkdir(parents=True)
        inside = (places**2).sum(0) <= 0.6 + 0.01 * number
        for name in plan.image.sequences:
            head = (inside * rng.integers(300, 400, shape)).astype(np.float32)
            head[:16] *= BRIGHTER[name]
            nibabel.save(nibabel.Nifti1Image(head, affine), folder / f"{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "seg.nii.gz")
    values = rng.gamma(1.0, 100.0, (len(plan.genes.panel), PATIENTS))
    rows = ["\t".join(["gene", *ids])]
    rows += ["\t".join([gene, *(f"{x:.3f}" for x in row)]) for gene, row in zip(plan.genes.panel, values, strict=True)]
    (root / "tpm.tsv").write_text("\n".join(rows) + "\n")
    (root / "clinical.tsv").write_text("patient_id\tg\n" + "".join(f"{p}\t{i % 2 + 1}\n" for i, p in enumerate(ids)))
    patterns = ", ".join(f'{name} = ["{name}.nii*"]' for name in plan.image.sequences)
    (root / "sources.toml").write_text(
        f"""
[images]
layout = "folders"
sequences = {{ {patterns} }}
mask_patterns = ["seg.nii*"]
[expression]
path = "tpm.tsv"
orientation = "genes_by_patients"
scale = "tpm"
[clinical]
path = "clinical.tsv"
label_column = "g"
label_codes = {{ "1" = "low", "2" = "high" }}
"""
    )
    return root / "sources.toml"


@pytest.mark.parametrize("sequences", [["T2"], ["T2", "T1", "FLAIR", "T1c"]], ids=len)
def test_a_study_of_so_many_sequences_goes_from_files_to_a_release(
    sequences: list[str], tiny_plan: StudyPlan, tmp_path: Path
) -> None:
    plan = plan_of(tiny_plan, sequences)
    site, study = Site(tmp_path / "a"), tmp_path / "study"
    site.folder.mkdir()
    prepare(plan, write_hospital(tmp_path / "hospital", plan), site.cohort_path, np.random.default_rng(1))
    cohort = load_cohort(site.cohort_path, plan.morphology.features)
    assert cohort.images.shape == (PATIENTS, len(sequences), 4, 32, 32)
    halves = cohort.images.astype(np.float32).reshape(PATIENTS, len(sequences), 4, 32, 2, 16).mean(axis=(0, 2, 3, 5))
    assert (
        np.argsort(halves[:, 0] / halves[:, 1]).tolist() == np.argsort([BRIGHTER[name] for name in sequences]).tolist()
    )
    policy = SitePolicy(
        site="a", max_epsilon=10, max_delta=1e-5, min_patients=5, declared_patients=PATIENTS, modules=list(plan.modules)
    )
    save_policy(policy, site.policy_path)
    site.approve(plan)
    study.mkdir()
    save_plan(plan, study / "plan.toml")
    state = run_study(InProcessGrid(client_app, {1: site.folder}), plan, study, None)
    assert not state.missing_rounds(plan)

    for name, options in {
        "whole": ["--patients", "3"],
        "part": ["--count", "low=2", "--count", "high=2", "--where", "volume>=0.6", "--sequences", "T2"],
    }.items():
        done = CliRunner().invoke(
            commands, ["make", str(study), "--out", str(tmp_path / name), "--candidate", *options]
        )
        assert done.exit_code == 0, done.output
    whole, part = tmp_path / "whole-candidate", tmp_path / "part-candidate"
    for candidate, held in ((whole, sequences), (part, ["T2"])):
        release = open_release(candidate)
        assert all(check.status == "ok" for check in content_checks(release)), content_checks(release)
        read = read_release(candidate)
        assert list(read.sequences) == held
        assert read[0].images.shape == (len(held), 4, 32, 32)
        assert {path.name for path in (candidate / "dicom" / "SYN0001").iterdir()} == {*held, "SEG"}
    chosen = read_release(part)
    assert sorted(chosen.labels) == ["high", "high", "low", "low"]
    assert (chosen.morphology[:, plan.morphology.features.index("volume")] >= 0.6).all()
    assert chosen.selected is not None
    assert chosen.selected.measured[0].patients == 4
