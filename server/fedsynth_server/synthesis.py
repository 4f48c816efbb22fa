"""Drawing a synthetic cohort from a finished study."""

from __future__ import annotations

import torch

from fedsynth.errors import Refused
from fedsynth.models.dcgan import make_generator
from fedsynth.models.gene_autoencoder import make_autoencoder
from fedsynth.models.radiogenomic_dnn import make_radiogenomic_dnn
from fedsynth.plan import MODULES, StudyPlan
from fedsynth.synthesis import draw_patients, draw_profiles
from fedsynth.synthetic import SyntheticPatient
from fedsynth_server.checkpoint import StudyState


def synthesise(plan: StudyPlan, state: StudyState, count: int, generator: torch.Generator) -> list[SyntheticPatient]:
    """Draw `count` synthetic patients from the averaged generator, autoencoder and DNN.

    Raises:
        Refused: ``study_not_finished``: rounds are missing.
    """
    missing = {
        module: plan.training(module).rounds - state.rounds[module]
        for module in MODULES
        if state.rounds[module] < plan.training(module).rounds
    }
    if missing:
        raise Refused(
            "study_not_finished",
            "Rounds are missing: " + ", ".join(f"{module} {count}" for module, count in missing.items()) + ".",
            "Run the study to its end first.",
        )
    autoencoder, dnn, model = make_autoencoder(plan), make_radiogenomic_dnn(plan), make_generator(plan)
    autoencoder.load_state_dict(state.weights["autoencoder"])
    dnn.load_state_dict(state.weights["radiogenomics"])
    model.load_state_dict(state.weights["generator_ema"])
    profiles = draw_profiles(autoencoder, dnn, count, generator, plan.genes.clip, plan.morphology.reference_sd)
    return draw_patients(plan, model, profiles, generator)
