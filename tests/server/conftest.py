"""A small release of random textures, made once and copied by the tests that break it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsynth.dp.accounting import Mechanism as Charged
from fedsynth.dp.accounting import epsilon
from fedsynth.plan import (
    TRAINED,
    AutoencoderPlan,
    GanPlan,
    GenePlan,
    ImagePlan,
    PrivacyPlan,
    RadiogenomicsPlan,
    SitePlan,
    StudyPlan,
)
from fedsynth.statement import Mechanism, PrivacyStatement, SiteStatement
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.release.make import make_release
from fedsynth_server.release.manifest import generate_key

RELEASED = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
NOISE, STEPS, BATCH = 2.5, 60, 20
GENES = ["EGFR", "IDH1", "PTEN", "TP53", "HLA-A"]


@pytest.fixture(scope="session")
def release_plan() -> StudyPlan:
    training: dict[str, Any] = {
        "rounds": 3,
        "steps_per_round": STEPS // 3,
        "expected_batch": BATCH,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
    }
    return StudyPlan(
        name="texture-study",
        purpose="Random textures that show whether a release is written as it should be",
        image=ImagePlan(size=32, slices=6, pixel_spacing_mm=2.75, slice_spacing_mm=7.3),
        genes=GenePlan(panel=GENES, reference_quantiles=[0.0, 1.0, 5.0], center=[1.0] * 5, scale=[0.5] * 5),
        privacy=PrivacyPlan(epsilon=8.0),
        autoencoder=AutoencoderPlan(**training, budget_share=0.3),
        radiogenomics=RadiogenomicsPlan(**training, budget_share=0.2),
        gan=GanPlan(**training, budget_share=0.5),
        sites=[SitePlan(name="north", nominal_patients=100), SitePlan(name="south", nominal_patients=120)],
    )


@pytest.fixture(scope="session")
def release_statement(release_plan: StudyPlan) -> PrivacyStatement:
    def site(name: str, n: int) -> SiteStatement:
        rate = BATCH / n
        alone = epsilon([Charged(rate, NOISE, STEPS)], 1e-5)
        total = epsilon([Charged(rate, NOISE, STEPS * len(TRAINED))], 1e-5)
        mechanisms = [
            Mechanism(
                module=module,
                sample_rate=rate,
                noise_multiplier=NOISE,
                max_grad_norm=1.0,
                steps=STEPS,
                steps_planned=STEPS,
                epsilon_alone=alone,
            )
            for module in TRAINED
        ]
        return SiteStatement(
            name=name,
            nominal_patients=n,
            epsilon=total,
            epsilon_lifetime=total,
            ledger_head="ab" * 32,
            mechanisms=mechanisms,
        )

    return PrivacyStatement(
        study=release_plan.name,
        plan_digest=release_plan.digest,
        private=True,
        epsilon_budget=8.0,
        delta=1e-5,
        accountant="rdp",
        accountant_version="opacus",
        noise_source="operating system",
        sites=[site("north", 100), site("south", 120)],
        trust_model="Noise is added at the site; the coordinator is not trusted with patients' data.",
        composition="One ledger a site composes all studies.",
        not_covered=["the choice of the gene panel"],
        intended_use="Development of methods.",
        forbidden_use="Attempts to find out who took part.",
    )


@pytest.fixture(scope="session")
def release_patients(release_plan: StudyPlan) -> list[SyntheticPatient]:
    """Three patients; the second has no tumour."""
    rng = np.random.default_rng(7)
    image = release_plan.image
    patients = []
    for number in range(1, 4):
        mask = np.zeros((image.slices, image.size, image.size), dtype=np.uint8)
        if number != 2:
            mask[2:4, 5 : 9 + number, 12:20] = 1
        patients.append(
            SyntheticPatient(
                participant_id=f"SYN{number:04d}",
                label=release_plan.label.classes[number % 2],
                genes=rng.normal(size=len(GENES)).astype(np.float32),
                morphology=rng.uniform(0.5, 0.9, len(release_plan.morphology.features)).astype(np.float32),
                images=rng.random((len(image.sequences), *mask.shape), dtype=np.float32),
                mask=mask,
            )
        )
    return patients


@pytest.fixture(scope="session")
def release_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "release.pem"
    generate_key(path)
    return path


@pytest.fixture(scope="session")
def make(
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    release_patients: list[SyntheticPatient],
    release_key: Path,
) -> Callable[..., Path]:
    """`make_release` to a folder, with any argument changed."""

    def make_changed(out: Path, **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "plan": release_plan,
            "patients": release_patients,
            "statement": release_statement,
            "evaluation": None,
            "curves": {"gan": [{"round": 1, "site": "north", "loss": 0.7}, {"round": 2, "site": "north", "loss": 0.5}]},
            "key_path": release_key,
            "released": RELEASED,
        }
        return make_release(out, **(arguments | changes))

    return make_changed


@pytest.fixture(scope="session")
def made(make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release; not to be changed."""
    return make(tmp_path_factory.mktemp("releases") / "made")
