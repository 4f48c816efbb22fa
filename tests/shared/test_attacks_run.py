"""All attacks on a release together: a release of training patients is exposed, one of other people is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fedsynth.attacks.run import attack_release
from fedsynth.attacks.scored import Scored, measured
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.values import Attacks, MembershipAttack
from fedsynth.errors import UsageError
from fedsynth.evaluation.patients import Patients
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.morphology import denormalise
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient, subject_digest

SITES = ("a", "b")


def people(plan: StudyPlan, n: int, seed: int) -> Patients:
    """Patients of two sites, each with a pattern of its own in images and genes; one lacks images, another genes."""
    rng, image = np.random.default_rng(seed), plan.image
    shape = (n, len(image.sequences), image.slices, image.size, image.size)
    images = np.clip(0.5 + gaussian_filter(rng.normal(size=shape), (0, 0, 0, 2, 2)), 0, 1).astype(np.float16)
    masks = (gaussian_filter(rng.normal(size=(n, *shape[2:])), (0, 0, 3, 3)) > 0.1).astype(np.uint8)
    has_images, has_genes = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    has_images[0] = has_genes[1] = False
    images[0], masks[0] = 0, 0
    genes = rng.normal(size=(n, len(plan.genes.panel))).astype(np.float32)
    genes[1] = np.nan
    return Patients(
        images,
        masks,
        genes,
        rng.random((n, len(plan.morphology.features))).astype(np.float32),
        rng.integers(0, 2, n),
        has_images=has_images,
        has_genes=has_genes,
        sites=np.arange(n) % 2,
        site_names=SITES,
    )


def released(plan: StudyPlan, patients: Patients) -> list[SyntheticPatient]:
    """Those of the patients who have everything, as a release."""
    return [
        SyntheticPatient(
            f"SYN{row:04d}",
            plan.label.classes[patients.labels[row]],
            patients.genes[row],
            denormalise(patients.morphology[row], plan.morphology.features),
            patients.images[row].astype(np.float32),
            patients.masks[row],
        )
        for row in np.flatnonzero(patients.has_images & patients.has_genes)
    ]


@pytest.fixture(scope="module")
def extractor() -> DomainExtractor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DomainExtractor(3, 2, "nothing: random weights").eval()


@pytest.fixture(scope="module")
def groups(tiny_plan: StudyPlan) -> tuple[Patients, Patients]:
    return people(tiny_plan, 60, 1), people(tiny_plan, 90, 2)


@pytest.fixture(scope="module")
def overfitted(tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor) -> Attacks:
    made = released(tiny_plan, groups[0])
    return attack_release(tiny_plan, *groups, made, extractor, "invented patients", 4)


@pytest.fixture(scope="module")
def honest(tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor) -> Attacks:
    made = released(tiny_plan, people(tiny_plan, 80, 5))
    return attack_release(tiny_plan, *groups, made, extractor, "invented patients", 4)


def by_id(attacks: Attacks) -> dict[str, MembershipAttack]:
    return {attack.id: attack for attack in attacks.membership}


def test_a_release_that_repeats_training_patients_is_exposed_by_every_attack(overfitted: Attacks) -> None:
    found = by_id(overfitted)
    assert len(found) == 12
    for name, attack in found.items():
        exact = name.startswith(("nearest-neighbour", "monte-carlo", "calibrated"))
        assert attack.area.value > (0.95 if exact else 0.6), name
    nearest = found["nearest-neighbour-both"]
    assert nearest.points[1].true_positive_rate.low > 0.9
    assert nearest.epsilon_bound > 1.5
    assert nearest.largest_bound is not None
    assert nearest.epsilon_bound <= nearest.largest_bound


def test_its_copies_are_found_and_named(overfitted: Attacks, tiny_plan: StudyPlan) -> None:
    assert {check.of for check in overfitted.copies} == {"images", "genes"}
    images = next(check for check in overfitted.copies if check.of == "images")
    assert images.found == overfitted.n_synthetic == len(images.participants)
    assert images.found_holdout == 0
    assert all(distances.nearer.value == 1.0 for distances in overfitted.distances)


def test_a_release_of_other_people_is_not_accused(honest: Attacks) -> None:
    for attack in honest.membership:
        assert attack.area.low < 0.55 < 0.45 + attack.area.high, attack.id
        assert attack.epsilon_bound == 0.0, attack.id
    assert all(check.found == 0 for check in honest.copies)
    assert all(guess.gap.low < 0.1 for guess in honest.attributes)


def test_every_attack_says_who_was_scored_and_what_was_not_done(honest: Attacks) -> None:
    counts = {name: (attack.members, attack.non_members) for name, attack in by_id(honest).items()}
    assert counts["nearest-neighbour-images"] == (59, 89)
    assert counts["nearest-neighbour-both"] == (58, 88)
    # Half of the held-out patients are the population's sample.
    assert counts["density-ratio-genes"][1] in (45, 46)
    assert [attack.view for attack in honest.membership] == ["release"] * 12
    assert any("coordinator's view" in reason for reason in honest.not_done)


def test_the_result_is_tied_to_these_very_patients_and_survives_the_file(honest: Attacks, tiny_plan: StudyPlan) -> None:
    assert honest.subject == subject_digest(released(tiny_plan, people(tiny_plan, 80, 5)))
    assert honest.plan_digest == tiny_plan.digest
    assert Attacks.model_validate_json(honest.model_dump_json()) == honest


def test_the_same_seed_gives_the_same_numbers(
    honest: Attacks, tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor
) -> None:
    made = released(tiny_plan, people(tiny_plan, 80, 5))
    again = attack_release(tiny_plan, *groups, made, extractor, "invented patients", 4)
    assert again.model_copy(update={"seconds": honest.seconds}) == honest


def test_a_public_generator_stands_in_for_the_calibration_s_reference(
    tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor
) -> None:
    public, made = (released(tiny_plan, people(tiny_plan, 60, seed)) for seed in (6, 7))
    found = by_id(attack_release(tiny_plan, *groups, made, extractor, "invented patients", 4, public_only=public))
    assert "public generator" in found["calibrated-images"].knows
    assert found["calibrated-images"].non_members == 89


def test_with_a_handful_of_held_out_patients_nothing_is_made_up(
    tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor
) -> None:
    few = groups[1].rows(np.arange(8))
    found = attack_release(tiny_plan, groups[0], few, released(tiny_plan, groups[0]), extractor, "invented", 4)
    assert not found.membership
    assert not found.copies
    assert any("non-members" in reason for reason in found.not_done)
    assert any(reason.startswith("Copies among images") for reason in found.not_done)


def test_patients_of_other_sites_are_no_non_members(
    tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor
) -> None:
    from dataclasses import replace

    elsewhere = replace(groups[1], site_names=("a", "c"))
    with pytest.raises(UsageError, match="sites_differ"):
        attack_release(tiny_plan, groups[0], elsewhere, released(tiny_plan, groups[0]), extractor, "invented", 4)


def test_an_empty_transcript_is_said_to_be_empty(
    tiny_plan: StudyPlan, groups: tuple[Patients, Patients], extractor: DomainExtractor, tmp_path: Path
) -> None:
    made = released(tiny_plan, people(tiny_plan, 30, 8))
    found = attack_release(tiny_plan, *groups, made, extractor, "invented", 4, transcript=Transcript(tmp_path))
    assert "The coordinator's view: the transcript holds no reply." in found.not_done
    Transcript(tmp_path).write_reply("autoencoder", 1, "elsewhere", {"weight": torch.zeros(1)})
    found = attack_release(tiny_plan, *groups, made, extractor, "invented", 4, transcript=Transcript(tmp_path))
    assert any("replies of elsewhere" in reason for reason in found.not_done)


def test_who_knows_the_rest_proves_nothing_of_epsilon() -> None:
    """Scores that were made knowing who else is a member: even perfect ones give no bound that the gate could judge."""
    scores = Scored("id", "title", "coordinator", "all others", "source", np.ones(200), np.zeros(200), proves=False)
    found = measured(scores, 1e-5, np.random.default_rng(1), 1)
    assert (found.area.value, found.epsilon_bound, found.largest_bound) == (1.0, 0.0, None)
    assert measured(replace(scores, proves=True), 1e-5, np.random.default_rng(1), 1).epsilon_bound > 2
