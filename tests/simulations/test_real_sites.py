"""The same study over three real hospitals' folders (TCGA-LGG)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedsynth.evaluation.values import Evaluation
from fedsynth.plan import Module, StudyPlan
from fedsynth.synthetic import subject_digest
from fedsynth_client.account import account
from fedsynth_client.site import Site
from fedsynth_server.release.verify import verify
from fedsynth_simulations import study
from fedsynth_simulations.plans import study_plan
from fedsynth_simulations.study import Settings, run

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEDSYNTH_REAL_DATA", ROOT.parent / "shared" / "data")) / "tcga_lgg"


def short_plan(*arguments: object, **more: object) -> StudyPlan:
    plan = study_plan(*arguments, **more)  # type: ignore[arg-type]
    short = {module: plan.training(module).model_copy(update={"rounds": 1, "steps_per_round": 3}) for module in TRAINED}
    return StudyPlan.model_validate(plan.model_copy(update=short).model_dump())


def nothing_measured(plan: StudyPlan, state: object, drawn: study._Drawn, settings: Settings) -> Evaluation:
    """An evaluation of the drawn patients without any figure."""
    return Evaluation(
        subject=subject_digest(drawn.synthetic),
        data="public research patients",
        n_train=len(drawn.train),
        n_holdout=len(drawn.holdout),
        n_synthetic=len(drawn.synthetic),
        sections=[],
    )


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason="the three TCGA-LGG folders are not beside the checkout")
def test_three_real_hospitals_end_in_a_verified_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "study_plan", short_plan)
    monkeypatch.setattr(study, "_evaluation", nothing_measured)
    monkeypatch.setattr(study, "_PUBLIC_PATIENTS", 20)  # who train the feature network
    release = run(
        tmp_path / "out",
        Settings(
            patients=20,
            seed=1,
            epsilon=10.0,
            synthetic=3,
            site_folders=tuple(str(DATA / name) for name in ("CS", "FG", "HT")),
            sources=str(ROOT / "simulations" / "sources" / "tcga-lgg.toml"),
        ),
    )
    assert verify(release).ok
    codes = {
        name: json.dumps(json.loads((tmp_path / "out" / "sites" / name / "cohort-report.json").read_text()))
        for name in ("cs", "fg", "ht")
    }
    assert "missing_sequence" in codes["fg"] and "missing_sequence" in codes["ht"]
    assert "missing_profile" in codes["cs"] + codes["fg"] + codes["ht"]
    # A site whose usable patients are too few this time sits out a module; it never spends more than its budget.
    spent = {name: account(Site(tmp_path / "out" / "sites" / name)).epsilon for name in ("cs", "fg", "ht")}
    assert all(value <= 10.0 for value in spent.values())
    assert sum(value > 0 for value in spent.values()) >= 2
