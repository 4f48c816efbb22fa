"""What synthetic genes, morphology and labels are drawn from: one interface over the profile engines of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsynth.models.gene_autoencoder import GeneAutoencoder, make_autoencoder
from fedsynth.models.linear_gaussian import LinearGaussianProfiles, linear_gaussian_template
from fedsynth.models.radiogenomic_dnn import RadiogenomicDNN, make_radiogenomic_dnn
from fedsynth.plan import StudyPlan
from fedsynth.records import PROFILES, State
from fedsynth.synthesis import SyntheticProfiles, draw_profiles


class ProfileModel(Protocol):
    """Draws synthetic profiles and predicts morphology and label from genes; released weights and fresh noise only."""

    def draw(self, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """`count` synthetic patients before their images."""

    def draw_class(self, code: int, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """Synthetic patients of the class `code` alone, distributed as those of `draw` who are of it.

        A model that cannot be asked for a class draws `count` patients and keeps those of it: at most `count`, and perhaps
        nobody.
        """

    def share_of_class(self, code: int) -> float:
        """Of which share of all patients `draw_class` draws: the class's, or 1 where it draws all and keeps some."""

    def predict(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """genes (B, G) -> expected morphology (B, F) in [0, 1], label logits (B, K)."""


@dataclass(frozen=True)
class NetworkProfiles:
    """Genes from the autoencoder's prior, morphology and label from the radiogenomic DNN."""

    autoencoder: GeneAutoencoder
    dnn: RadiogenomicDNN
    clip: float
    reference_sd: list[float]

    def draw(self, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """See `fedsynth.synthesis.draw_profiles`."""
        return draw_profiles(self.autoencoder, self.dnn, count, generator, self.clip, self.reference_sd)

    def draw_class(self, code: int, count: int, generator: torch.Generator) -> SyntheticProfiles:
        """Those of `count` draws who are of the class: a label follows from genes, which cannot be asked for backwards."""
        drawn = self.draw(count, generator)
        return drawn.take(torch.nonzero(drawn.labels == code)[:, 0])

    def share_of_class(self, code: int) -> float:
        """See `ProfileModel`: all patients are drawn, whatever the class."""
        return 1.0

    def predict(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """See `ProfileModel`."""
        self.dnn.eval()
        with torch.no_grad():
            morphology, logits = self.dnn(genes)
        return morphology, logits


def profile_template(plan: StudyPlan) -> dict[str, State]:
    """Names, shapes and types of the weights that `profile_model` takes; the values mean nothing."""
    if plan.profile_engine == "moments":
        return {PROFILES: linear_gaussian_template(plan)}
    return {
        "autoencoder": make_autoencoder(plan).state_dict(),
        "radiogenomics": make_radiogenomic_dnn(plan).state_dict(),
    }


def profile_model(plan: StudyPlan, weights: Mapping[str, State]) -> ProfileModel:
    """The profile model of `plan` with those of `weights` (state dicts by name) that it needs."""
    if plan.profile_engine == "moments":
        return LinearGaussianProfiles(weights[PROFILES], plan.genes.clip)
    autoencoder, dnn = make_autoencoder(plan), make_radiogenomic_dnn(plan)
    autoencoder.load_state_dict(weights["autoencoder"])
    dnn.load_state_dict(weights["radiogenomics"])
    return NetworkProfiles(autoencoder.eval(), dnn.eval(), plan.genes.clip, plan.morphology.reference_sd)
