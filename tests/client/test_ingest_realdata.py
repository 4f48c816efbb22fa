"""Three real hospitals' files, and awkward real volumes, through the whole of ingest."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from fedsynth.plan import ImagePlan, StudyPlan
from fedsynth_client.cohort import load_cohort
from fedsynth_client.ingest.grid import canonical, scale_intensity, to_study_grid
from fedsynth_client.ingest.nifti import NiftiFile
from fedsynth_client.ingest.prepare import prepare

REAL = Path(os.environ.get("FEDSYNTH_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (REAL / "tcga_lgg").is_dir(), reason="no real data: set FEDSYNTH_REAL_DATA to their folder"),
]
TRAINING = {
    "rounds": 1,
    "steps_per_round": 1,
    "expected_batch": 2,
    "max_grad_norm": 1.0,
    "learning_rate": 0.1,
    "budget_share": 0.3,
}


def real_plan(panel: list[str]) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "real",
            "purpose": "ingest of three real hospitals",
            "genes": {
                "panel": panel,
                "measure": "zscore",
                "reference_quantiles": norm.ppf(np.linspace(0.005, 0.995, 101)).tolist(),
                "center": [0.0] * len(panel),
                "scale": [1.0] * len(panel),
            },
            "privacy": {"epsilon": 8.0},
            "autoencoder": TRAINING,
            "radiogenomics": TRAINING,
            "gan": TRAINING,
            "sites": [{"name": "cs", "nominal_patients": 10}],
        }
    )


@pytest.mark.parametrize(("site", "patients", "least_images"), [("CS", 16, 16), ("FG", 14, 7), ("HT", 34, 26)])
def test_a_real_hospital(tmp_path: Path, site: str, patients: int, least_images: int) -> None:
    (tmp_path / "site").symlink_to(REAL / "tcga_lgg" / site)
    (tmp_path / "sources.toml").write_text(
        """
[images]
layout = "folders"
path = "site/images"
sequences = { T1 = ["T1.nii*"], T1c = ["T1c.nii*"], FLAIR = ["FLAIR.nii*"] }
mask_patterns = ["seg.nii*"]
[expression]
path = "site/expression.tsv.gz"
orientation = "genes_by_patients"
scale = "zscore"
[clinical]
path = "site/clinical.tsv"
label_column = "grade_code"
label_codes = { "1.0" = "low", "2.0" = "high" }
"""
    )
    genes = pd.read_csv(REAL / "tcga_lgg" / "CS" / "expression.tsv.gz", sep="\t", index_col=0).index[:200].tolist()
    plan = real_plan(genes)
    report = prepare(plan, tmp_path / "sources.toml", tmp_path / "cohort", np.random.default_rng(0))
    assert report.found == patients
    assert report.taken.with_images >= least_images
    assert set(report.counts()) <= {
        "missing_sequence",
        "missing_profile",
        "unknown_label",
        "tumour_outside_grid",
        "background_not_dark",
        "nothing_usable",
    }
    cohort = load_cohort(tmp_path / "cohort", plan.morphology.features)
    usable = cohort.rows(cohort.has_images)
    volumes = pd.read_parquet(tmp_path / "cohort" / "clinical.parquet")["volume"].dropna()
    assert volumes.between(0.5, 450).all()
    # FLAIR hyperintensity is how these tumours were drawn: nearly all are brighter than the rest of the head.
    flair = pd.read_parquet(tmp_path / "cohort" / "clinical.parquet")["flair_ratio"].dropna()
    assert (flair > 1.2).mean() > 0.9
    # Upright: towards the vertex the head gets smaller. Dark: no patient's air is grey.
    head = (usable.images[:, 0] > 0.1).mean(axis=(2, 3))
    assert (head[:, -1] < head[:, 8]).mean() > 0.85
    assert np.median(usable.images[:, 0, :, :3, :3].astype(float)) < 0.1


def test_awkward_real_volumes_come_out_upright_and_scaled() -> None:
    files = sorted((REAL / "nifti_samples" / "ixi_2mm" / "t1").glob("*.nii.gz"))
    if not files:
        pytest.skip("no IXI volumes in the real data")
    for path in files:
        volume = NiftiFile(path.name, path, None, None).read()
        assert (np.diag(canonical(volume).affine[[2, 1, 0], :3]) > 0).all()
        prepared = scale_intensity(to_study_grid(volume, ImagePlan()))
        assert prepared.shape == (16, 64, 64)
        left, right = prepared[:, :, 32:], prepared[:, :, 31::-1]
        assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.75  # centred: a head is nearly symmetric
