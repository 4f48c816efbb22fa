"""The chain that links a synthetic patient: genes -> morphology and label -> image and mask.

Everything here uses released weights and fresh noise only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsynth.domains import sequence_channels
from fedsynth.models.condition import condition, slice_positions
from fedsynth.models.gene_autoencoder import GeneAutoencoder, generate_expression
from fedsynth.models.interfaces import ImageGenerator
from fedsynth.models.radiogenomic_dnn import RadiogenomicDNN
from fedsynth.morphology import denormalise
from fedsynth.plan import StudyPlan
from fedsynth.synthetic import SyntheticPatient

_SPREAD_SAMPLE = 2048


@dataclass(frozen=True)
class SyntheticProfiles:
    """Synthetic patients before their images: genes (N, G), morphology (N, F) in [0, 1], labels (N,) class codes."""

    genes: Tensor
    morphology: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> SyntheticProfiles:
        """The patients of the row numbers `rows`."""
        return SyntheticProfiles(self.genes[rows], self.morphology[rows], self.labels[rows])


def draw_profiles(
    autoencoder: GeneAutoencoder,
    dnn: RadiogenomicDNN,
    count: int,
    generator: torch.Generator,
    clip: float,
    reference_sd: Sequence[float] = (),
) -> SyntheticProfiles:
    """Draw genes from the autoencoder, morphology around the DNN's prediction, and labels from its class probabilities.

    A prediction is a conditional mean, so predictions spread less than patients do. `reference_sd` (F,), a public standard
    deviation of each feature, says by how much: what is lacking is added as independent noise. It uses the DNN and public
    constants only, so it costs no privacy.
    """
    autoencoder.eval()
    dnn.eval()
    with torch.no_grad():
        genes = generate_expression(autoencoder, count, generator, clip)
        morphology, logits = dnn(genes)
        labels = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
        if len(reference_sd):
            predicted, _ = dnn(generate_expression(autoencoder, _SPREAD_SAMPLE, generator, clip))
            lacking = (torch.tensor(reference_sd) ** 2 - predicted.var(0)).clamp(min=0.0).sqrt()
            noise = torch.randn(morphology.shape, generator=generator) * lacking
            morphology = (morphology + noise).clamp(0.0, 1.0)
    return SyntheticProfiles(genes, morphology, labels)


def draw_patients(
    plan: StudyPlan,
    generator_model: ImageGenerator,
    profiles: SyntheticProfiles,
    generator: torch.Generator,
    translator: nn.Module | None = None,
) -> list[SyntheticPatient]:
    """Draw a volume for each profile: one z a patient, every slice position of the plan.

    With a `translator`, from the plan's source sequence to its target (B, 1, H, W), a patient's target sequence is the
    translation of the source sequence that was drawn: both show one anatomy.

    Returns:
        One patient a profile, ``SYN0001`` onwards, images in [0, 1], mask 1 where the mask channel is above its middle.
    """
    generator_model.eval()
    positions = slice_positions(plan.image.slices)
    patients = []
    for i in range(len(profiles.labels)):
        z = torch.randn(1, plan.gan.latent_dim, generator=generator).expand(len(positions), -1)
        code = condition(
            profiles.labels[i].expand(len(positions)),
            profiles.morphology[i].expand(len(positions), -1),
            positions,
            len(plan.label.classes),
        )
        with torch.no_grad():
            volume = generator_model(z, code).transpose(0, 1)
            if translator is not None:
                source, target = sequence_channels(plan)
                volume[target] = translator.eval()(volume[source][:, None])[:, 0]
        patients.append(
            SyntheticPatient(
                participant_id=f"SYN{i + 1:04d}",
                label=plan.label.classes[int(profiles.labels[i])],
                genes=profiles.genes[i].numpy(),
                morphology=denormalise(profiles.morphology[i].numpy(), plan.morphology.features),
                images=((volume[:-1] + 1) / 2).numpy(),
                mask=(volume[-1] > 0).to(torch.uint8).numpy(),
            )
        )
    return patients
