"""`attack_release`: all attacks on a release, and on the messages of its training where they are at hand.

Only whoever holds the real patients can run this. Attacks are scored on training patients without any noise: at a
hospital, what they find stays inside and is for the people who decide on the release.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsynth.attacks import attributes, release
from fedsynth.attacks.coordinator import coordinator_attacks
from fedsynth.attacks.copies import Volume, gene_copies, image_copies, stack
from fedsynth.attacks.descriptions import (
    SPACES,
    Described,
    Scale,
    Space,
    describe_real,
    describe_synthetic,
    points,
    scale_of,
)
from fedsynth.attacks.distances import sanity_distances
from fedsynth.attacks.rates import MIN_PATIENTS
from fedsynth.attacks.scored import Attempt, Scored, done, measured, parted
from fedsynth.attacks.transcript import Transcript
from fedsynth.attacks.values import SELECTED, Attacks, AttributeAttack, CopyCheck, Distances
from fedsynth.errors import UsageError
from fedsynth.evaluation.evaluate import phantom_extractor
from fedsynth.evaluation.patients import Patients, seen
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.metrics.measurable import NotMeasurable
from fedsynth.morphology import denormalise
from fedsynth.plan import StudyPlan
from fedsynth.progress import say
from fedsynth.selection import Selected, Selection, fits, sequences_of, subset_words, with_sequences
from fedsynth.synthetic import SyntheticPatient, subject_digest

_NAMES: dict[Space, str] = {"images": "images", "genes": "genes", "both": "images and genes"}
_SAMPLE = (
    "the release and a sample of the population (held-out patients of the sites who are not among the non-members)"
)


@dataclass(frozen=True)
class _Sides:
    """Everybody, described.

    Attributes:
        judged, reference: rows of two halves of the held-out patients: non-members, and the sample of the population that
            some attackers have. Attacks without a sample have all held-out patients for non-members.
        scale: of distances.
    """

    train: Described
    holdout: Described
    synthetic: Described
    public_only: Described | None
    judged: NDArray[np.int64]
    reference: NDArray[np.int64]
    scale: Scale

    @property
    def usual(self) -> Described:
        """The patients whose mean stands in for what was not measured."""
        return self.holdout.take(self.reference) if self.public_only is None else self.public_only

    def points(self, described: Described, space: Space) -> NDArray[np.float32]:
        """Those of the patients who have what `space` compares, as points."""
        return points(described.take(described.has(space)), space, self.scale, self.usual)


def attack_release(
    plan: StudyPlan,
    train: Patients,
    holdout: Patients,
    synthetic: Sequence[SyntheticPatient],
    extractor: DomainExtractor | None,
    data: str,
    seed: int,
    public_only: Sequence[SyntheticPatient] | None = None,
    transcript: Transcript | None = None,
    selected: Selected | None = None,
) -> Attacks:
    """Attack the patients of a release.

    Args:
        plan: the study plan.
        train: real patients of all sites that were trained on: the members.
        holdout: held-out patients of the same sites: the non-members. A random half of them serves as the reference
            sample of attackers who have one.
        synthetic: the release.
        extractor: the named feature network, trained on public data; None trains one on phantoms.
        data: what the real patients are, for the reader.
        seed: of every random draw.
        public_only: patients of a generator that saw no private data: the reference of the calibrated attack.
        transcript: the messages of training; without it nothing is attacked from the coordinator's view.
        selected: what was selected for the release. Where it holds fewer sequences than the plan, who has the release
            compares by these alone, and so must `public_only` patients and `extractor` be of these; the coordinator's view
            is that of training, with all sequences. Where it is a part of all patients, by class or morphology, the release
            is attacked once more with those members and non-members alone who are in that part.

    Raises:
        UsageError: ``sites_differ``: training and held-out patients are not of the same sites;
            ``extractor_channels``; ``synthetic_label_unknown``; ``transcript_unreadable``.
    """
    started = time.monotonic()
    if train.site_names != holdout.site_names:
        raise UsageError("sites_differ", "Training and held-out patients are not of the same sites.")
    sequences = sequences_of(plan, selected)
    if extractor is not None and extractor.channels != len(sequences):
        raise UsageError("extractor_channels", f"The extractor takes {extractor.channels} channels, not the images'.")
    draws = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(6)]
    if extractor is None:
        extractor = phantom_extractor(len(sequences), draws[0])
    judged, reference = _halves(holdout, draws[1])
    say("Describing patients for the attacks")
    shown = with_sequences(plan, sequences)
    seen_train, seen_holdout = seen(train, plan, sequences), seen(holdout, plan, sequences)
    described = [describe_real(seen_train, extractor), describe_real(seen_holdout, extractor)]
    made = describe_synthetic(shown, synthetic, extractor)
    public = describe_synthetic(shown, public_only, extractor) if public_only else None
    scale = scale_of(described[1].take(reference) if public is None else public)
    sides = _Sides(described[0], described[1], made, public, judged, reference, scale)

    names: list[str] = []
    subject = subject_digest(_noted(synthetic, names))
    not_done: list[str] = []
    say("Attacking the release")
    scored = done(_release_attacks(sides, _everybody(sides)), not_done)
    if selected is not None and (part := subset_words(selected.asked, plan)):
        scored += done(_part_attacks(sides, _fitting(sides, selected.asked, plan, part)), not_done)
    if transcript is None:
        not_done.append("The coordinator's view: the messages of training are not at hand.")
    else:
        say("Attacking the messages of training")
        whole, network = (sides.train, sides.holdout), extractor
        if shown is not plan:  # patients as they were trained on, not as the release shows its own
            network = phantom_extractor(len(plan.image.sequences), draws[0])
            whole = describe_real(train, network), describe_real(holdout, network)
        attempts = coordinator_attacks(plan, transcript, train, holdout, whole, reference, network, draws[2])
        scored += done(attempts, not_done)
    proving = sum(each.proves for each in scored)
    rates = [
        (
            f"{each.title} ({each.site})" if each.site else each.title,
            lambda each=each: [measured(each, plan.privacy.delta, draws[3], max(proving, 1))],
        )
        for each in scored
    ]
    membership = done(rates, not_done)
    say("Guessing attributes and looking for copies")
    return Attacks(
        plan_digest=plan.digest,
        subject=subject,
        data=data,
        sites=list(train.site_names),
        n_synthetic=len(synthetic),
        membership=membership,
        attributes=done(_attribute_attacks(plan, sides, draws[4]), not_done),
        copies=done(_copy_checks(seen_train, seen_holdout, synthetic, names, sides), not_done),
        distances=done(_sanity(sides, draws[5]), not_done),
        not_done=not_done,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Attacked:
    """Who is scored by the release; the sample that some attackers have is of all patients, whoever is scored.

    Attributes:
        members: were trained on.
        others, judged: non-members of attackers without a sample, and of those with one.
        part: which part of all patients these are, in words; empty for everybody.
    """

    members: Described
    others: Described
    judged: Described
    part: str = ""


def _everybody(sides: _Sides) -> _Attacked:
    return _Attacked(sides.train, sides.holdout, sides.holdout.take(sides.judged))


def _fitting(sides: _Sides, asked: Selection, plan: StudyPlan, part: str) -> _Attacked:
    """Those who are in the `part` of all patients that was asked for, by their real label and measured morphology."""

    def inside(patients: Described) -> Described:
        physical = denormalise(patients.morphology, plan.morphology.features)
        return patients.take(fits(asked, plan, patients.labels, physical))

    everybody = _everybody(sides)
    return _Attacked(inside(everybody.members), inside(everybody.others), inside(everybody.judged), part)


def _part_attacks(sides: _Sides, attacked: _Attacked) -> Iterator[Attempt[Scored]]:
    """The attacks on a part of all patients; where it is too small for any, the reason once for all of them."""
    sizes = len(attacked.members), len(attacked.others)

    def enough() -> list[Scored]:
        _require_enough(*sizes)
        return []

    yield f"The release against {_only(attacked.part)}", enough
    if min(sizes) >= MIN_PATIENTS:
        yield from _release_attacks(sides, attacked)


def _only(part: str) -> str:
    return f"those patients alone who fit what was selected ({part})"


def _require_enough(members: int, others: int) -> None:
    """Refuse to attack a part of the patients that is too small, in words that do not say how small it is.

    Raises:
        NotMeasurable: fewer than `MIN_PATIENTS` on either side.
    """
    sides = (("were trained on", members), ("were held out", others))
    if few := [side for side, number in sides if number < MIN_PATIENTS]:
        raise NotMeasurable(
            f"fewer than {MIN_PATIENTS} of those who {' and of those who '.join(few)} fit and have what is compared"
        )


def _noted(patients: Iterable[SyntheticPatient], names: list[str]) -> Iterator[SyntheticPatient]:
    """The patients; their names go to `names` on the way, since patients of a release are read from disk each time."""
    for patient in patients:
        names.append(patient.participant_id)
        yield patient


def _halves(holdout: Patients, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of two random halves, of every site."""
    order = rng.permutation(len(holdout))
    place = np.zeros(len(holdout), dtype=np.int64)
    for code in range(len(holdout.site_names)):
        of_site = order[holdout.sites[order] == code]
        place[of_site] = np.arange(len(of_site))
    return np.flatnonzero(place % 2 == 0), np.flatnonzero(place % 2 == 1)


@dataclass(frozen=True)
class _Method:
    """A way of scoring patients by a release: of whom the non-members are, and what sample of others it is given."""

    id: str
    title: str
    knows: str
    source: str
    judged: Described
    reference: Described
    score: Callable[[release.Points, release.Points, release.Points], NDArray[np.float64]]


def _release_attacks(sides: _Sides, attacked: _Attacked) -> Iterator[Attempt[Scored]]:
    everybody, judged, public = attacked.others, attacked.judged, sides.public_only
    sample = sides.holdout.take(sides.reference)
    methods = (
        _Method(
            "nearest-neighbour",
            "Nearest synthetic neighbour",
            "the release",
            "Chen et al. 2020 (GAN-Leaks, full black-box)",
            everybody,
            sample,
            lambda at, made, _: release.nearest_neighbour(at, made),
        ),
        _Method(
            "monte-carlo",
            "Synthetic patients around",
            "the release",
            "Hilprecht et al. 2019 (Monte Carlo)",
            everybody,
            sample,
            lambda at, made, _: release.monte_carlo(at, made),
        ),
        _Method(
            "calibrated",
            "Nearest synthetic neighbour against nearest reference",
            _SAMPLE if public is None else "the release, and what the public generator draws",
            "Chen et al. 2020 (GAN-Leaks, calibrated)",
            judged if public is None else everybody,
            sample if public is None else public,
            release.calibrated,
        ),
        _Method(
            "density-ratio",
            "Density of synthetic over that of reference patients",
            _SAMPLE,
            "van Breugel et al. 2023 (DOMIAS)",
            judged,
            sample,
            release.density_ratio,
        ),
    )
    for method in methods:
        for space in SPACES:
            yield _title(method, space, attacked), partial(_scored, sides, attacked, method, space)


def _title(method: _Method, space: Space, attacked: _Attacked) -> str:
    title = f"{method.title}, {_NAMES[space]}"
    return f"{title}, against {_only(attacked.part)}" if attacked.part else title


def _scored(sides: _Sides, attacked: _Attacked, method: _Method, space: Space) -> list[Scored]:
    inside, outside = sides.points(attacked.members, space), sides.points(method.judged, space)
    if attacked.part:
        _require_enough(len(inside), len(outside))
    made, others = sides.points(sides.synthetic, space), sides.points(method.reference, space)
    members, non_members = parted(method.score(np.concatenate([inside, outside]), made, others), len(inside))
    return [
        Scored(
            f"{method.id}-{space}{SELECTED if attacked.part else ''}",
            _title(method, space, attacked),
            "release",
            method.knows,
            method.source,
            members,
            non_members,
        )
    ]


def _attribute_attacks(plan: StudyPlan, sides: _Sides, rng: np.random.Generator) -> Iterator[Attempt[AttributeAttack]]:
    # The reference sample is taken from the held-out patients, so those who are judged are the other half.
    groups = sides.train, sides.holdout.take(sides.judged), sides.synthetic, sides.holdout.take(sides.reference)
    classes = len(plan.label.classes)
    yield "Genes guessed from images", lambda: [attributes.genes_from_images(*groups, rng)]
    yield "Morphology guessed from genes", lambda: [attributes.morphology_from_genes(*groups, rng)]
    yield "Label guessed from genes", lambda: [attributes.label_from_genes(*groups, classes, rng)]


def _copy_checks(
    train: Patients, holdout: Patients, synthetic: Sequence[SyntheticPatient], names: list[str], sides: _Sides
) -> Iterator[Attempt[CopyCheck]]:
    def of_images() -> list[CopyCheck]:
        training, held_out = stack(_volumes(train)), stack(_volumes(holdout))
        made = ((patient.images, patient.mask) for patient in synthetic)
        return [image_copies(training, held_out, _volumes(holdout), made, names)]

    def of_genes() -> list[CopyCheck]:
        training, held_out, made = (d.genes[d.has("genes")] for d in (sides.train, sides.holdout, sides.synthetic))
        return [gene_copies(training, held_out, made, names)]

    yield "Copies among images", of_images
    yield "Copies among genes", of_genes


def _volumes(patients: Patients) -> Iterator[Volume]:
    for row in np.flatnonzero(patients.has_images):
        yield patients.images[row], patients.masks[row]


def _sanity(sides: _Sides, rng: np.random.Generator) -> Iterator[Attempt[Distances]]:
    def of(space: Literal["images", "genes"]) -> list[Distances]:
        training, held_out, made = (sides.points(d, space) for d in (sides.train, sides.holdout, sides.synthetic))
        return [sanity_distances(space, training, held_out, made, rng)]

    yield "Nearest-neighbour distances of images", lambda: of("images")
    yield "Nearest-neighbour distances of genes", lambda: of("genes")
