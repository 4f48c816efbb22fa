"""Drawing the profiles that a selection asks for, and measuring whether their images show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsynth.errors import Refused
from fedsynth.morphology import FEATURES, WHOLE_TUMOUR, denormalise
from fedsynth.morphometry import measure
from fedsynth.plan import StudyPlan
from fedsynth.profiles import ProfileModel
from fedsynth.selection import Measured, Range, Selection
from fedsynth.synthesis import SyntheticProfiles
from fedsynth.synthetic import SyntheticPatient

# Fewer of what the model draws, and a subset is refused: the model has hardly learnt what is so rare, and what it knows of
# it may come from very few patients. Nothing is refused before so many profiles were drawn that chance does not decide.
LEAST_SHARE = 1 / 1000
LEAST_DRAWS = 20_000
_AT_ONCE = 2_000


@dataclass(frozen=True)
class SelectedProfiles:
    """Profiles that fit a selection.

    Attributes:
        profiles: as many as were asked for.
        tried: how many the model drew, of the classes asked for where it can be asked for a class.
        fitting: how many of those fit; at least as many as were asked for.
    """

    profiles: SyntheticProfiles
    tried: int
    fitting: int


def draw_selected(
    model: ProfileModel, plan: StudyPlan, selection: Selection, generator: torch.Generator
) -> SelectedProfiles:
    """Draw the patients that `selection` asks for, before their images.

    Whoever is drawn is distributed as those of all that the model draws who fit. A class is asked of the model where that is
    exact; ranges, and classes where it is not, by rejection: profiles are drawn and the first that fit are kept. At most
    `LEAST_DRAWS` are drawn for a group of patients (those of a class, or all), or one over `LEAST_SHARE` for each of them,
    whichever is more. A class that is asked of the model counts as rare as it is among all patients, so that what is too
    rare does not depend on how a model draws. Where classes were asked for by number their patients are shuffled. Without
    any choice of patients it is ``model.draw``, to the last bit.

    Raises:
        Refused: ``subset_too_rare``: less than `LEAST_SHARE` of what the model draws fits.
    """
    if not selection.chooses_patients:
        profiles = model.draw(selection.patients, generator)
        return SelectedProfiles(profiles, selection.patients, selection.patients)
    classes = plan.label.classes
    numbers = selection.per_class(classes)
    if numbers is None:
        codes = torch.tensor([classes.index(name) for name in selection.only or classes])

        def of_all(count: int) -> SyntheticProfiles:
            drawn = model.draw(count, generator)
            return drawn.take(torch.nonzero(torch.isin(drawn.labels, codes))[:, 0])

        return _first_fitting(of_all, plan, selection.where, selection.patients)
    groups = []
    for name, count in numbers.items():

        def of_class(many: int, code: int = classes.index(name)) -> SyntheticProfiles:
            return model.draw_class(code, many, generator)

        share = model.share_of_class(classes.index(name))
        groups.append(_first_fitting(of_class, plan, selection.where, count, name, share))
    together = _joined([group.profiles for group in groups])
    order = torch.randperm(selection.patients, generator=generator)
    tried, fitting = sum(group.tried for group in groups), sum(group.fitting for group in groups)
    return SelectedProfiles(together.take(order), tried, fitting)


def measured_ranges(
    plan: StudyPlan, patients: Sequence[SyntheticPatient], where: Sequence[Range]
) -> tuple[Measured, ...]:
    """What the drawn masks and images of `patients`, with all sequences of `plan`, have of each range.

    Measured as in real patients (`fedsynth.morphometry`), with a mask that only tells tumour from no tumour, so that shares
    of enhancement and oedema are surrogates. The largest region of a mask counts.
    """
    if not where:
        return ()
    image = plan.image
    spacing = (image.slice_spacing_mm, image.pixel_spacing_mm, image.pixel_spacing_mm)
    found = np.stack(
        [
            measure(
                patient.images, np.where(patient.mask > 0, WHOLE_TUMOUR, 0).astype(np.uint8), image.sequences, spacing
            )
            for patient in patients
        ]
    )
    empty = sum(not patient.mask.any() for patient in patients)
    columns = [feature.name for feature in FEATURES]
    measured = []
    for asked in where:
        values = found[:, columns.index(asked.feature)]
        known = values[np.isfinite(values)]
        measured.append(
            Measured(
                asked=asked,
                patients=len(patients),
                without_tumour=empty,
                measurable=len(known),
                fulfilling=int(asked.holds(known).sum()),
                median=float(np.median(known)) if len(known) else None,
            )
        )
    return tuple(measured)


def _first_fitting(
    draw: Callable[[int], SyntheticProfiles],
    plan: StudyPlan,
    where: Sequence[Range],
    count: int,
    name: str = "",
    share: float = 1.0,
) -> SelectedProfiles:
    """The first `count` patients in the ranges `where`, of those that `draw` keeps when it draws so many.

    Stopping depends on how many fit and not on which, so the kept are distributed as all that fit.

    Args:
        draw: draws patients of the class `name`, or of all where that is empty.
        plan: the study plan.
        where: see `Selection`.
        count: how many are wanted.
        name: see `draw`.
        share: of which share of all patients it draws.

    Raises:
        Refused: ``subset_too_rare``.
    """
    kept: list[SyntheticProfiles] = []
    tried = fitting = 0
    too_rare = unclear = False
    # A few patients of a rare subset may be found early, by chance: nobody is given them before its rarity is clear.
    while fitting < count or too_rare or unclear:
        if too_rare and tried >= LEAST_DRAWS:
            of_class = f" of class {name}" if name else ""
            of_all = f", itself {share:.2g} of all patients," if share < 1 else ","
            raise Refused(
                "subset_too_rare",
                f"Of {tried} synthetic profiles that the model drew{of_class}{of_all} {fitting} fit what was selected: "
                f"fewer than 1 in {round(1 / LEAST_SHARE)} of all.",
                "Ask for wider ranges or a more frequent class: of what is so rare the model has learnt next to nothing.",
            )
        some = draw(_AT_ONCE)
        tried += _AT_ONCE
        kept.append(some.take(torch.from_numpy(np.flatnonzero(_in_ranges(some, plan, where)))))
        fitting += len(kept[-1].labels)
        too_rare = share * fitting < LEAST_SHARE * tried
        unclear = tried < LEAST_DRAWS and fitting < LEAST_SHARE * LEAST_DRAWS
    return SelectedProfiles(_joined(kept).take(torch.arange(count)), tried, fitting)


def _in_ranges(
    profiles: SyntheticProfiles, plan: StudyPlan, where: Sequence[Range]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(N,) who is in every range, by the very numbers that a release states."""
    morphology = denormalise(profiles.morphology.numpy(), plan.morphology.features)
    inside = np.ones(len(morphology), dtype=np.bool_)
    for asked in where:
        inside &= asked.holds(morphology[:, plan.morphology.features.index(asked.feature)])
    return inside


def _joined(parts: Sequence[SyntheticProfiles]) -> SyntheticProfiles:
    return SyntheticProfiles(
        torch.cat([part.genes for part in parts]),
        torch.cat([part.morphology for part in parts]),
        torch.cat([part.labels for part in parts]),
    )
