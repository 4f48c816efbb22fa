"""A small release of random textures, made once and copied by the tests that break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsynth.attacks.values import (
    RELEASE_ATTACKS,
    SELECTED,
    Attacks,
    AttributeAttack,
    CopyCheck,
    MembershipAttack,
    OperatingPoint,
    Rate,
    View,
)
from fedsynth.auditing.values import Audit, AuditedModule, MechanismCheck
from fedsynth.dp.accounting import Mechanism as Charged
from fedsynth.dp.accounting import epsilon
from fedsynth.plan import (
    AutoencoderPlan,
    GanPlan,
    GenePlan,
    ImagePlan,
    Module,
    PrivacyPlan,
    RadiogenomicsPlan,
    SitePlan,
    StudyPlan,
)
from fedsynth.statement import Mechanism, PrivacyStatement, SiteStatement
from fedsynth.synthetic import SyntheticPatient, subject_digest
from fedsynth_server.release.make import make_release
from fedsynth_server.release.manifest import generate_key

# The trained modules of the plan that these tests run.
TRAINED: tuple[Module, ...] = ("autoencoder", "radiogenomics", "gan")

RELEASED = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
NOISE, STEPS, BATCH = 2.5, 60, 20
CODE = "c0de" * 16
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


@contextmanager
def one_code() -> Iterator[None]:
    """Sources that are edited while the tests run must not make the audit stale."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("make", "gate"):
            patch.setattr(f"fedsynth_server.release.{module}.code_digest", lambda: CODE)
        yield


@pytest.fixture(autouse=True)
def _one_code() -> Iterator[None]:
    with one_code():
        yield


@pytest.fixture(scope="session")
def release_audit(release_plan: StudyPlan) -> Audit:
    """An audit of the plan by this code that refutes nothing."""
    return Audit(
        plan_digest=release_plan.digest,
        code=CODE,
        software="fedsynth",
        modules=[
            AuditedModule(
                module=module,
                site="north",
                claimed_epsilon=3.0,
                delta=1e-5,
                sample_rate=0.2,
                noise_multiplier=NOISE,
                steps=STEPS,
                canaries=1000,
                guesses=200,
                correct=110,
                confidence=0.95,
                epsilon_bound=0.3,
                reachable=4.0,
                model="a small model",
                seconds=1.0,
            )
            for module in TRAINED
        ],
        checks=[
            MechanismCheck(
                id="noise-scale",
                title="Noise has the scale of the plan",
                module="gan",
                ok=True,
                finding="2.50 of 2.50.",
            )
        ],
        seconds=3.0,
    )


def membership(view: View, **changes: Any) -> MembershipAttack:
    """An attack at chance, with any value changed."""
    values: dict[str, Any] = {
        "id": "nearest-neighbour",
        "title": "Nearest neighbour",
        "view": view,
        "knows": "the patient",
        "source": "Chen et al., 2020",
        "members": 150,
        "non_members": 60,
        "area": Rate(value=0.51, low=0.44, high=0.58),
        "points": [
            OperatingPoint(
                asked=asked,
                reached=Rate(value=0.0, low=0.0, high=0.06),
                true_positive_rate=Rate(value=0.013, low=0.002, high=0.047),
            )
            for asked in (0.001, 0.01)
        ],
        "epsilon_bound": 0.1,
    }
    return MembershipAttack(**(values | changes))


def with_part(attacks: Attacks) -> Attacks:
    """The same, as if those who fit what was selected had been attacked by themselves, too."""
    part = [membership("release", id=f"{name}-genes{SELECTED}", title=f"{name}, part") for name in RELEASE_ATTACKS]
    return attacks.model_copy(update={"membership": [*attacks.membership, *part]})


@pytest.fixture(scope="session")
def release_attacks(release_plan: StudyPlan, release_patients: list[SyntheticPatient]) -> Attacks:
    """Attacks on the patients of the release that find nothing."""
    copies: list[CopyCheck] = [
        CopyCheck(
            of=of,
            how="Correlation.",
            threshold=0.9,
            compared=len(release_patients),
            found=0,
            found_holdout=0,
            participants=[],
            most_similar=(0.5, 0.6),
        )
        for of in ("images", "genes")
    ]
    return Attacks(
        plan_digest=release_plan.digest,
        subject=subject_digest(release_patients),
        data="simulated patients",
        n_synthetic=len(release_patients),
        sites=[site.name for site in release_plan.sites],
        membership=[
            membership("release"),
            membership("coordinator", id="matched-filter-moments", title="Matched filter"),
            *(membership("release", id=f"{name}-images", title=name) for name in RELEASE_ATTACKS[1:]),
        ],
        attributes=[
            AttributeAttack(
                id="genes-from-image",
                title="Genes from the image",
                knows="the image",
                guesses="genes",
                metric="R²",
                members=0.21,
                non_members=0.2,
                gap=Rate(value=0.01, low=-0.05, high=0.07),
            )
        ],
        copies=copies,
        distances=[],
    )


@pytest.fixture(scope="session")
def make(
    release_plan: StudyPlan,
    release_statement: PrivacyStatement,
    release_patients: list[SyntheticPatient],
    release_key: Path,
    release_audit: Audit,
    release_attacks: Attacks,
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
            "audit": release_audit,
            "attacks": release_attacks,
        }
        plan, patients = changes.get("plan", release_plan), changes.get("patients")
        if plan is not release_plan:  # evidence about another plan would be refused
            arguments["audit"] = release_audit.model_copy(update={"plan_digest": plan.digest})
            arguments["attacks"] = release_attacks.model_copy(update={"plan_digest": plan.digest})
        if isinstance(patients, list) and patients:
            about = {"subject": subject_digest(patients), "n_synthetic": len(patients)}
            arguments["attacks"] = arguments["attacks"].model_copy(update=about)
        if changes.get("selected") is not None:
            arguments["attacks"] = with_part(arguments["attacks"])
        return make_release(out, **(arguments | changes))

    return make_changed


@pytest.fixture(scope="session")
def made(make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release; not to be changed."""
    with one_code():
        return make(tmp_path_factory.mktemp("releases") / "made")
