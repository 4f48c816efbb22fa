"""Drawing a synthetic cohort from a finished study."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fedsynth.errors import Refused
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan
from fedsynth.profiles import profile_model
from fedsynth.selected_draw import draw_selected, measured_ranges
from fedsynth.selection import Selected, Selection, channels_of, sequences_of
from fedsynth.synthesis import draw_patients
from fedsynth.synthetic import SyntheticPatient
from fedsynth.translation import make_translator
from fedsynth_server.checkpoint import StudyState


@dataclass(frozen=True)
class Drawn:
    """Synthetic patients, and what was selected of all that the study can draw; None where nothing was."""

    patients: list[SyntheticPatient]
    selected: Selected | None


def synthesise(plan: StudyPlan, state: StudyState, count: int, generator: torch.Generator) -> list[SyntheticPatient]:
    """Draw `count` synthetic patients from the study's profile model and generator.

    Raises:
        Refused: ``study_not_finished``: rounds are missing.
    """
    return synthesise_selected(plan, state, Selection(patients=count), generator).patients


def synthesise_selected(plan: StudyPlan, state: StudyState, selection: Selection, generator: torch.Generator) -> Drawn:
    """Draw the synthetic patients that `selection` asks for (`fedsynth.selection`).

    What was asked of morphology is measured again in the drawn masks and images, with all sequences, before those that the
    release does not hold are left out.

    Raises:
        Refused: ``study_not_finished``: rounds are missing; ``subset_too_rare``.
    """
    missing = state.missing_rounds(plan)
    if missing:
        raise Refused(
            "study_not_finished",
            "Rounds are missing: " + ", ".join(f"{module} {count}" for module, count in missing.items()) + ".",
            "Run the study to its end first.",
        )
    model = make_generator(plan)
    model.load_state_dict(state.weights["generator_ema"])
    drawn = draw_selected(profile_model(plan, state.weights), plan, selection, generator)
    patients = draw_patients(plan, model, drawn.profiles, generator, _translator(plan, state))
    if not selection.chooses:
        return Drawn(patients, None)
    selected = Selected(
        asked=selection,
        tried=drawn.tried,
        fitting=drawn.fitting,
        measured=measured_ranges(plan, patients, selection.where),
    )
    channels = channels_of(plan, sequences_of(plan, selected))
    return Drawn([replace(patient, images=patient.images[channels]) for patient in patients], selected)


def _translator(plan: StudyPlan, state: StudyState) -> nn.Module | None:
    """What makes a synthetic patient's second sequence from the first; None in a plan that translates no sequences.

    Between slices without and with tumour nothing is translated here: mask, morphology and genes of a patient would no
    longer be those of the image.
    """
    if plan.translation is None or "translation" not in plan.modules or plan.translation.domains != "sequences":
        return None
    return make_translator(plan, state.weights["translation"])
