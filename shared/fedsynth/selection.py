"""What a release is asked to hold: how many synthetic patients of which class and morphology, and which MR sequences.

A selection acts when patients are drawn, from a generator that is already paid for. It uses the released weights, fresh
noise and what the coordinator typed, and nothing of any patient, so it is post-processing and costs no privacy (Dwork and
Roth 2014, proposition 2.1); `privacy.json` is the same with and without it.

What it does not give:

- New knowledge. Patients of a region are as good as the model is there; where few real patients were, a private model
  knows little more than its public prior, and drawing a thousand of them changes nothing about that.
- The population. A chosen mix of classes, or a subset, is no longer what the hospitals see; prevalences, marginals and
  distances between distributions measured on it say what was chosen, too. So it is said wherever the release is described.
- Less to look at. A subset that few real patients are in gathers what the model knows of those few in one place. Epsilon
  bounds this as before. Real patients who are unlike a subset would hide among themselves how far it gives away those who
  are like it, so membership inference from the release is tried on those alone, too, who fit its classes and ranges
  (`fits`). Guessed attributes are still measured over all real patients. Where a mix takes patients of every class, nobody
  is left out and nothing is tried on one class alone: of a minority drawn more often than it occurs, what leaks stays
  diluted by the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsynth.errors import Refused, UsageError
from fedsynth.morphology import features
from fedsynth.plan import StudyPlan

# The file of a release that says what was selected; a release of all that the model draws has none.
FILE = "selection.json"

_RANGE = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=)\s*([^\s<>=]+)\s*")


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Value):
    """A range of a morphology feature in the feature's unit, its ends included; None for an end that is open."""

    feature: str
    least: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.least is None and self.most is None:
            raise ValueError(f"the range of {self.feature} has neither end")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"the range of {self.feature} is empty")
        return self

    def holds(self, values: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which of the values, in the feature's unit, lie in the range; NaN does not."""
        least = -math.inf if self.least is None else self.least
        most = math.inf if self.most is None else self.most
        wide = np.asarray(values, dtype=np.float64)
        return np.asarray((wide >= least) & (wide <= most), dtype=np.bool_)

    @property
    def words(self) -> str:
        """For people, e.g. ``"volume of at least 20 mL"``."""
        unit = features([self.feature])[0].unit
        suffix = "" if unit == "1" else f" {unit}"
        name = self.feature.replace("_", " ")
        if self.most is None:
            return f"{name} of at least {self.least:g}{suffix}"
        if self.least is None:
            return f"{name} of at most {self.most:g}{suffix}"
        return f"{name} from {self.least:g} to {self.most:g}{suffix}"


class Selection(_Value):
    """What a release is asked to hold.

    Attributes:
        patients: how many synthetic patients.
        counts: patients by class; empty where their numbers were not given. They add up to `patients`.
        balance: equally many patients of each class (of `only`, where that names some), as far as `patients` can be
            divided: the minority is drawn more often than it occurs.
        only: classes that patients may have; empty for all of them.
        where: ranges of morphology, all of which a patient is in.
        sequences: MR sequences of the images, in the plan's order; empty for all of the plan's.
    """

    patients: Annotated[int, Field(ge=1)]
    counts: dict[str, Annotated[int, Field(ge=1)]] = {}
    balance: bool = False
    only: tuple[str, ...] = ()
    where: tuple[Range, ...] = ()
    sequences: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.counts and (self.balance or self.only):
            raise ValueError("numbers of patients by class leave nothing to balance, and say which classes there are")
        if self.counts and sum(self.counts.values()) != self.patients:
            raise ValueError(
                f"{self.patients} patients are not the {sum(self.counts.values())} of all classes together"
            )
        if len(set(self.only)) != len(self.only) or len(set(self.sequences)) != len(self.sequences):
            raise ValueError("a class or a sequence is named twice")
        return self

    @property
    def chooses_patients(self) -> bool:
        """Whether patients are others than the model draws by itself."""
        return bool(self.counts or self.balance or self.only or self.where)

    @property
    def chooses(self) -> bool:
        """Whether anything but the number of patients was chosen."""
        return self.chooses_patients or bool(self.sequences)

    def per_class(self, classes: Sequence[str]) -> dict[str, int] | None:
        """How many patients of which class, where that is fixed; None where it is left to the model.

        >>> Selection(patients=5, balance=True).per_class(["low", "high"])
        {'low': 3, 'high': 2}
        """
        if self.counts:
            return {name: self.counts[name] for name in classes if name in self.counts}
        asked = [name for name in classes if not self.only or name in self.only]
        if self.balance:
            each, over = divmod(self.patients, len(asked))
            return {name: each + (place < over) for place, name in enumerate(asked) if each + (place < over)}
        return {asked[0]: self.patients} if len(asked) == 1 else None

    def classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Those of the plan's `classes` that patients may have.

        >>> Selection(patients=5, only=("high",)).classes(["low", "high"])
        ('high',)
        """
        numbers = self.per_class(classes)
        held = numbers if numbers is not None else self.only or classes
        return tuple(name for name in classes if name in held)


class Measured(_Value):
    """A range that was asked for beside what the drawn masks and images have: the generator may not do what it is told.

    Attributes:
        asked: the range; every patient's conditioning morphology lies in it.
        patients: how many were drawn.
        without_tumour: those whose mask is empty, so that nothing can be measured.
        measurable: those in whom the feature could be measured.
        fulfilling: those whose measured value lies in the range.
        median: of the measured values, in the feature's unit; None without any.
    """

    asked: Range
    patients: Annotated[int, Field(ge=1)]
    without_tumour: Annotated[int, Field(ge=0)]
    measurable: Annotated[int, Field(ge=0)]
    fulfilling: Annotated[int, Field(ge=0)]
    median: float | None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if not self.fulfilling <= self.measurable <= self.patients or self.without_tumour > self.patients:
            raise ValueError("more patients were measured than there are")
        if (self.median is None) is not (self.measurable == 0):
            raise ValueError("a median is of measured values, and of nothing else")
        return self

    @property
    def words(self) -> str:
        """For people: asked for, and measured."""
        unit = features([self.asked.feature])[0].unit
        start = f"Asked for {self.asked.words} in all {self.patients} patients"
        if not self.measurable:
            return f"{start}; it could be measured in none of the images and masks."
        found = f"{start}; measured in the drawn images and masks, {self.fulfilling} of {self.patients} have it"
        median = "" if self.median is None else f", median {self.median:.3g}{'' if unit == '1' else f' {unit}'}"
        lacking = self.patients - self.measurable
        none = f"; in {lacking} it could not be measured" if lacking else ""
        return f"{found}{median}{none}."


class Selected(_Value):
    """What was selected for a release, and what came of it: the content of `FILE`.

    Attributes:
        asked: the selection.
        tried: profiles that the model drew, of the classes asked for where it can be asked for a class.
        fitting: those of them that fit.
        measured: one entry a range of `asked.where`.
    """

    schema_version: Literal[1] = 1
    asked: Selection
    tried: Annotated[int, Field(ge=1)]
    fitting: Annotated[int, Field(ge=1)]
    measured: tuple[Measured, ...] = ()

    @model_validator(mode="after")
    def _is_about_its_ranges(self) -> Self:
        if not self.asked.patients <= self.fitting <= self.tried:
            raise ValueError("patients were kept who do not fit, or who were not drawn")
        if tuple(each.asked for each in self.measured) != self.asked.where or any(
            each.patients != self.asked.patients for each in self.measured
        ):
            raise ValueError("what was found is not about what was asked for")
        return self


def parse_range(text: str) -> Range:
    """``volume>=20`` or ``sphericity<=0.5`` as a range.

    Raises:
        UsageError: ``selection_range``.

    >>> parse_range("volume>=20").least
    20.0
    """
    match = _RANGE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        bound = float(match[3])
        return Range(feature=match[1], least=bound) if match[2] == ">=" else Range(feature=match[1], most=bound)
    except ValueError:
        raise UsageError(
            "selection_range",
            f"--where {text}: a feature, >= or <=, and a number are wanted.",
            'For example: --where "volume>=20" (in mL); repeat it for the other end.',
        ) from None


def parse_counts(given: Sequence[str]) -> dict[str, int]:
    """``high=100`` each as patients by class.

    Raises:
        UsageError: ``selection_count``.
    """
    counts: dict[str, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isascii() or not number.isdigit() or int(number) < 1 or name in counts:
            raise UsageError(
                "selection_count",
                f"--count {text}: a class, '=' and a number from 1 are wanted, each class once.",
                "For example: --count high=100 --count low=50",
            )
        counts[name] = int(number)
    return counts


def make_selection(
    plan: StudyPlan,
    patients: int | None,
    *,
    default_patients: int,
    counts: Mapping[str, int] | None = None,
    balance: bool = False,
    only: Sequence[str] = (),
    where: Sequence[Range] = (),
    sequences: Sequence[str] = (),
) -> Selection:
    """A selection that `plan` can fulfil, its parts in the plan's order and its ranges one a feature.

    Args:
        plan: the study plan.
        patients: how many; None for the sum of `counts`, or `default_patients` without any.
        default_patients: see `patients`.
        counts, balance, only, where, sequences: see `Selection`.

    Raises:
        UsageError: ``selection_disagrees``: its parts do not fit each other; ``selection_unknown``: a class, feature or
            sequence that the plan lacks; ``selection_outside``: a range beyond the bounds of its feature.
    """
    given = dict(counts or {})
    total = patients if patients is not None else sum(given.values()) or default_patients
    _require_known("class", [*given, *only], plan.label.classes)
    _require_known("morphology feature", [each.feature for each in where], plan.morphology.features)
    _require_known("sequence", sequences, plan.image.sequences)
    try:
        selection = Selection(
            patients=total,
            counts={name: given[name] for name in plan.label.classes if name in given},
            balance=balance,
            only=_some(only, plan.label.classes),
            where=_one_a_feature(where, plan.morphology.features),
            sequences=_some(sequences, plan.image.sequences),
        )
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UsageError("selection_disagrees", f"What was selected does not fit together: {fault}.") from None
    for each in selection.where:
        _require_possible(each)
    return selection


def sequences_of(plan: StudyPlan, selected: Selected | None) -> tuple[str, ...]:
    """The sequences of a release's images, in the order of its channels."""
    asked = () if selected is None else selected.asked.sequences
    return tuple(name for name in plan.image.sequences if not asked or name in asked)


def channels_of(plan: StudyPlan, sequences: Sequence[str]) -> list[int]:
    """Their places among the channels of the plan's images."""
    return [plan.image.sequences.index(name) for name in sequences]


def with_sequences(plan: StudyPlan, sequences: Sequence[str]) -> StudyPlan:
    """`plan` as if its images had only `sequences`, to compare images with; its digest is not that of the study."""
    if list(sequences) == plan.image.sequences:
        return plan
    return plan.model_copy(update={"image": plan.image.model_copy(update={"sequences": list(sequences)})})


_PART = "They are a part of what the model draws, not the hospitals’ population."
_CAUTION = (
    "Selecting costs no privacy, since it uses the generator alone, and adds no knowledge: patients of a subset are as good "
    "as the model is there, and where few real patients were it knows little beyond its public prior."
)


def mix_words(asked: Selection, plan: StudyPlan) -> list[str]:
    """What was chosen of the patients, in sentences for people; none where the model's own mix was kept."""
    said = []
    if (numbers := asked.per_class(plan.label.classes)) is not None:
        mix = ", ".join(f"{count} {name}" for name, count in numbers.items())
        said.append(f"The class mix was chosen, not that of the hospitals ({plan.label.name}: {mix}).")
    elif asked.only:
        said.append(f"Only patients of class {' or '.join(asked.only)} were kept ({plan.label.name}). {_PART}")
    if asked.where:
        ranges = "; ".join(each.words for each in asked.where)
        said.append(f"Only patients drawn for this morphology were kept: {ranges}. {_PART}")
    return said


def words(asked: Selection, plan: StudyPlan) -> list[str]:
    """Everything that was chosen, in sentences for people, and what to think of it."""
    said = mix_words(asked, plan)
    if asked.sequences:
        others = [name for name in plan.image.sequences if name not in asked.sequences]
        said.append(
            f"Of the study’s MR sequences the images hold {', '.join(asked.sequences)}; {', '.join(others)} "
            f"{'was' if len(others) == 1 else 'were'} left out."
        )
    return [*said, *([_CAUTION] if asked.chooses_patients else [])]


def told(selected: Selected, plan: StudyPlan) -> list[str]:
    """What was chosen and what came of it, in sentences for people."""
    return [*words(selected.asked, plan), *(each.words for each in selected.measured)]


def subset_words(asked: Selection, plan: StudyPlan) -> str:
    """Which part of all patients was asked for, in words; empty where patients of every class and morphology may be there.

    A mix of all classes, whatever their numbers, is no part: whoever is real fits it.
    """
    held = asked.classes(plan.label.classes)
    classes = [] if len(held) == len(plan.label.classes) else [f"{plan.label.name} {' or '.join(held)}"]
    return "; ".join([*classes, *(each.words for each in asked.where)])


def fits(
    asked: Selection, plan: StudyPlan, labels: NDArray[np.integer], morphology: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """(N,) which real patients are in the part of all that was asked for (`subset_words`).

    Args:
        asked: the selection.
        plan: the study's.
        labels: (N,) class codes; -1 where unknown, which is in no chosen class.
        morphology: (N, F) as measured, in physical units and the plan's order; NaN, which is in no range, where it was not.
    """
    held = asked.classes(plan.label.classes)
    inside = np.ones(len(labels), dtype=np.bool_)
    if len(held) < len(plan.label.classes):
        inside &= np.isin(labels, [plan.label.classes.index(name) for name in held])
    for each in asked.where:
        inside &= each.holds(morphology[:, plan.morphology.features.index(each.feature)])
    return inside


def selection_faults(
    selected: Selected, plan: StudyPlan, labels: Sequence[str], morphology: NDArray[np.floating]
) -> list[str]:
    """How a release differs from what it says was selected; empty when it does not.

    Args:
        selected: what it says.
        plan: its plan.
        labels: the class of each patient.
        morphology: (N, F) what each was drawn for, in physical units and the plan's order.
    """
    asked, faults = selected.asked, []
    if unknown := _unknown(asked, plan):
        return [f"{FILE} names {', '.join(unknown)}, which the plan lacks"]
    if len(labels) != asked.patients:
        faults.append(f"{FILE} says {asked.patients} patients, there are {len(labels)}")
    found = {name: list(labels).count(name) for name in plan.label.classes if name in labels}
    numbers = asked.per_class(plan.label.classes)
    if (numbers is not None and found != numbers) or (asked.only and set(found) - set(asked.only)):
        faults.append(f"the classes of the patients are not those that {FILE} says were asked for")
    for each in asked.where:
        outside = int((~each.holds(morphology[:, plan.morphology.features.index(each.feature)])).sum())
        if outside:
            faults.append(f"{outside} patients were not drawn for {each.words}, as {FILE} says")
    return faults


def _unknown(asked: Selection, plan: StudyPlan) -> list[str]:
    """Classes, features and sequences of `asked` that `plan` lacks."""
    return sorted(
        [
            *({*asked.counts, *asked.only} - set(plan.label.classes)),
            *({each.feature for each in asked.where} - set(plan.morphology.features)),
            *(set(asked.sequences) - set(plan.image.sequences)),
        ]
    )


def read_selected(content: bytes, plan: StudyPlan) -> Selected:
    """The content of `FILE` in a release of `plan`, which has all that it names: whoever reads it was sent it.

    Raises:
        Refused: ``release_unreadable``.
    """
    try:
        selected = Selected.model_validate_json(content)
    except ValidationError as error:
        keys = sorted({".".join(map(str, fault["loc"])) or "file" for fault in error.errors(include_url=False)})
        raise Refused("release_unreadable", f"{FILE} is not valid at {', '.join(keys)}.") from None
    if _unknown(selected.asked, plan):
        raise Refused("release_unreadable", f"{FILE} names a class, a feature or a sequence that the plan lacks.")
    return selected


def selected_in(folder: Path, plan: StudyPlan) -> Selected | None:
    """What was selected for the release of `plan` in `folder`; None where nothing was.

    Raises:
        Refused: ``release_unreadable``.
    """
    path = folder / FILE
    return read_selected(path.read_bytes(), plan) if path.is_file() else None


def _require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(
            "selection_unknown",
            f"The plan has no {what} {', '.join(map(repr, unknown))}.",
            f"It has {', '.join(known)}.",
        )


def _require_possible(asked: Range) -> None:
    """Refuse a range in which the feature's public bounds leave nothing."""
    feature = features([asked.feature])[0]
    if (asked.least is not None and asked.least >= feature.high) or (
        asked.most is not None and asked.most <= feature.low
    ):
        raise UsageError(
            "selection_outside",
            f"No patient has {asked.words}: a study measures {asked.feature} from {feature.low:g} to {feature.high:g} "
            f"({feature.unit}).",
            "Name a range inside.",
        )


def _one_a_feature(where: Sequence[Range], order: Sequence[str]) -> tuple[Range, ...]:
    """The ranges that hold together, in the order of the features."""
    merged = []
    for name in order:
        own = [each for each in where if each.feature == name]
        if own:
            low = [each.least for each in own if each.least is not None]
            high = [each.most for each in own if each.most is not None]
            merged.append(Range(feature=name, least=max(low, default=None), most=min(high, default=None)))
    return tuple(merged)


def _some(named: Sequence[str], all_of_them: Sequence[str]) -> tuple[str, ...]:
    """Those of `all_of_them` that are named, in their order; empty where all are, which is no choice."""
    held = tuple(name for name in all_of_them if name in named)
    return () if list(held) == list(all_of_them) else held
