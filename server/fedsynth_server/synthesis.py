"""Drawing a synthetic cohort from a finished study."""

from __future__ import annotations

import torch

from fedsynth.errors import Refused
from fedsynth.models.images import make_generator
from fedsynth.plan import StudyPlan
from fedsynth.profiles import profile_model
from fedsynth.synthesis import draw_patients
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.checkpoint import StudyState


def synthesise(plan: StudyPlan, state: StudyState, count: int, generator: torch.Generator) -> list[SyntheticPatient]:
    """Draw `count` synthetic patients from the study's profile model and generator.

    Raises:
        Refused: ``study_not_finished``: rounds are missing.
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
    profiles = profile_model(plan, state.weights).draw(count, generator)
    return draw_patients(plan, model, profiles, generator)
