"""A release of a part of all patients: what it gives away of those who are in that part is looked for among them alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsynth.attacks.run import attack_release
from fedsynth.attacks.values import RELEASE_ATTACKS, Attacks
from fedsynth.evaluation.patients import Patients
from fedsynth.judging import judge_membership, judge_selected
from fedsynth.limits import Limits, MembershipLimits, limits_toml
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.morphology import denormalise
from fedsynth.plan import StudyPlan
from fedsynth.selection import Range, Selected, Selection, fits, subset_words
from fedsynth.synthetic import SyntheticPatient

SITES = ("a", "b")
EACH, CHOSEN, GENES = 240, 40, 60
CLAIMED = {"a": 10.0, "b": 10.0}


@pytest.fixture(scope="module")
def plan(tiny_plan: StudyPlan) -> StudyPlan:
    """With genes enough to tell people apart by."""
    panel = [f"G{number:03d}" for number in range(GENES)]
    return tiny_plan.model_copy(update={"genes": tiny_plan.genes.model_copy(update={"panel": panel})})


@pytest.fixture(scope="module")
def extractor() -> DomainExtractor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DomainExtractor(3, 2, "nothing: random weights").eval()


def people(plan: StudyPlan, seed: int, chosen: int = CHOSEN) -> Patients:
    """Patients with genes of their own and images of nobody; one in six is of the second class and has a large tumour."""
    rng, image = np.random.default_rng(seed), plan.image
    grid = (image.slices, image.size, image.size)
    morphology = rng.uniform(0.1, 0.5, (EACH, len(plan.morphology.features))).astype(np.float32)
    morphology[:chosen, plan.morphology.features.index("volume")] = 0.95
    everybody = np.ones(EACH, dtype=bool)
    return Patients(
        np.full((EACH, len(image.sequences), *grid), 0.5, dtype=np.float16),
        np.ones((EACH, *grid), dtype=np.uint8),
        rng.normal(size=(EACH, GENES)).astype(np.float32),
        morphology,
        (np.arange(EACH) < chosen).astype(np.int64),
        has_images=np.arange(EACH) < 2,  # attacked by their genes: images are what takes time
        has_genes=everybody,
        sites=np.arange(EACH) % 2,
        site_names=SITES,
    )


def softly(plan: StudyPlan, patients: Patients, alike: float) -> list[SyntheticPatient]:
    """Synthetic patients of the second class whose genes correlate by `alike` with those of one real patient each."""
    rng = np.random.default_rng(8)
    made = []
    for row in range(CHOSEN):
        genes = alike * patients.genes[row] + np.sqrt(1 - alike**2) * rng.normal(size=GENES)
        made.append(
            SyntheticPatient(
                f"SYN{row:04d}",
                plan.label.classes[1],
                genes.astype(np.float32),
                denormalise(patients.morphology[row], plan.morphology.features),
                patients.images[row].astype(np.float32),
                patients.masks[row],
            )
        )
    return made


def asks(**parts: object) -> Selection:
    return Selection.model_validate({"patients": CHOSEN, **parts})


def selected(asked: Selection) -> Selected:
    return Selected(asked=asked, tried=1000, fitting=CHOSEN)


def of_the_second_class(plan: StudyPlan) -> Selected:
    return selected(asks(only=(plan.label.classes[1],)))


def attacked(
    plan: StudyPlan,
    extractor: DomainExtractor,
    made: list[SyntheticPatient],
    asked: Selected | None,
    chosen: int = CHOSEN,
) -> Attacks:
    train, holdout = people(plan, 1), people(plan, 2, chosen)
    return attack_release(plan, train, holdout, made, extractor, "invented patients", 4, selected=asked)


@pytest.fixture(scope="module")
def leaking(plan: StudyPlan, extractor: DomainExtractor) -> Attacks:
    """A release of patients of the second class who are each a little like one who was trained on."""
    return attacked(plan, extractor, softly(plan, people(plan, 1), 0.4), of_the_second_class(plan))


def test_a_soft_copy_of_a_part_hides_among_everybody_and_is_caught_within_the_part(leaking: Attacks) -> None:
    assert judge_membership(leaking, Limits(), "release", CLAIMED).status == "ok"
    judged = judge_selected(leaking, Limits(), CLAIMED)
    assert judged.status == "failed"
    assert "against those patients alone who fit what was selected (grade high): area 0." in judged.finding
    found = {attack.id: attack for attack in leaking.membership}
    part, whole = found["nearest-neighbour-genes-selected"], found["nearest-neighbour-genes"]
    assert (part.members, part.non_members) == (CHOSEN, CHOSEN)
    assert (whole.members, whole.non_members) == (EACH, EACH)
    assert part.area.low > 0.6 > whole.area.value


def test_a_release_of_other_people_of_the_part_is_not_accused(plan: StudyPlan, extractor: DomainExtractor) -> None:
    honest = attacked(plan, extractor, softly(plan, people(plan, 5), 0.4), of_the_second_class(plan))
    assert {attack.id.removesuffix("-genes-selected") for attack in honest.membership if attack.of_selected} == set(
        RELEASE_ATTACKS
    )
    assert judge_selected(honest, Limits(), CLAIMED).status == "ok"


def test_bounds_of_epsilon_hold_together_with_those_of_the_part(
    leaking: Attacks, plan: StudyPlan, extractor: DomainExtractor
) -> None:
    """More attacks, so each may prove less: what a perfect one would prove of everybody falls."""
    alone = attacked(plan, extractor, softly(plan, people(plan, 1), 0.4), None)
    tried = {attack.id: attack.largest_bound or 0.0 for attack in leaking.membership}
    assert 0 < tried["nearest-neighbour-genes"] < (alone.membership[0].largest_bound or 0.0)


def test_without_a_part_nothing_is_attacked_but_everybody(plan: StudyPlan, extractor: DomainExtractor) -> None:
    made = softly(plan, people(plan, 1), 0.4)
    alone = attacked(plan, extractor, made, None)
    mixed = attacked(plan, extractor, made, selected(asks(balance=True)))
    assert mixed.model_copy(update={"seconds": alone.seconds}) == alone
    assert not any(attack.of_selected for attack in alone.membership)


def test_too_few_who_fit_are_said_without_how_few(plan: StudyPlan, extractor: DomainExtractor) -> None:
    made = softly(plan, people(plan, 1), 0.4)
    found = attacked(plan, extractor, made, of_the_second_class(plan), chosen=7)
    assert not any(attack.of_selected for attack in found.membership)
    (reason,) = [reason for reason in found.not_done if "selected" in reason]
    assert reason == (
        "The release against those patients alone who fit what was selected (grade high): fewer than 10 of those who were "
        "held out fit and have what is compared."
    )
    assert judge_membership(found, Limits(), "release", CLAIMED).status == "ok"
    judged = judge_selected(found, Limits(), CLAIMED)
    assert judged.status == "failed"
    assert "membership.selected" in judged.remedy
    # With a few more there is an attack, on too few for the limits.
    found = attacked(plan, extractor, made, of_the_second_class(plan), chosen=15)
    assert any(attack.of_selected for attack in found.membership)
    judged = judge_selected(found, Limits(), CLAIMED)
    assert judged.status == "failed"
    assert "the limits ask for 20 of each" in judged.finding


def test_not_asking_for_the_part_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Limits(membership=MembershipLimits(selected=False))
    spared = Limits(reason="Few are so ill.", membership=MembershipLimits(selected=False))
    assert "selected = false" in limits_toml(spared)
    # A release of all that the model draws has the file that it always had.
    assert "selected" not in limits_toml(Limits())


def test_every_way_of_attacking_the_part_must_have_been_tried(leaking: Attacks) -> None:
    kept = [attack for attack in leaking.membership if attack.id != "density-ratio-genes-selected"]
    judged = judge_selected(leaking.model_copy(update={"membership": kept}), Limits(), CLAIMED)
    assert judged.finding == "Nobody tried density-ratio on those alone who fit what was selected."
    # Nor do attacks on the part stand for those on everybody.
    part = [attack for attack in leaking.membership if attack.of_selected]
    judged = judge_membership(leaking.model_copy(update={"membership": part}), Limits(), "release", CLAIMED)
    assert judged.status == "failed"


def test_who_fits_is_told_by_the_real_label_and_the_measured_morphology(plan: StudyPlan) -> None:
    everybody = people(plan, 1)
    low, high = plan.label.classes
    names = plan.morphology.features
    everybody.labels[1] = -1
    everybody.morphology[2, names.index("volume")] = np.nan
    physical = denormalise(everybody.morphology, names)
    large = Range(feature="volume", least=float(physical[:, names.index("volume")][CHOSEN:].max()) * 1.01)

    def who(**parts: object) -> list[int]:
        return np.flatnonzero(fits(asks(**parts), plan, everybody.labels, physical)).tolist()

    assert who(only=(high,)) == who(counts={high: CHOSEN}) == [0, *range(2, CHOSEN)]
    assert who(where=(large,)) == [0, 1, *range(3, CHOSEN)]
    assert who(only=(high,), where=(large,)) == [0, *range(3, CHOSEN)]
    assert who(balance=True) == who() == list(range(EACH))
    assert subset_words(asks(only=(high,), where=(large,)), plan).startswith(
        f"{plan.label.name} {high}; volume of at least"
    )
    assert subset_words(asks(counts={low: 1, high: CHOSEN - 1}), plan) == ""
