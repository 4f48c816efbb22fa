"""Radiogenomic DNN: gene expression -> tumour morphology and label (hidden layers 128, 64, 32)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fedsynth.models.gene_autoencoder import _ACTIVATIONS, GeneAutoencoder
from fedsynth.plan import RadiogenomicsPlan, StudyPlan

# A patient's gradient is clipped as one, so the label, whose loss is the steeper, must not use up the whole clip. Tried on
# simulated cohorts: with equal weights the label is learnt and the morphology is not.
_MORPHOLOGY_WEIGHT, _LABEL_WEIGHT = 20.0, 0.2


class RadiogenomicDNN(nn.Module):
    """G genes -> F morphology features in (0, 1) and K label logits."""

    def __init__(
        self, genes: int, features: int, classes: int, *, hidden: list[int], dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([genes, *hidden]))
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.morphology = nn.Linear(hidden[-1], features)
        self.label = nn.Linear(hidden[-1], classes)

    def forward(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """genes (B, G) -> morphology (B, F) in (0, 1), label logits (B, K)."""
        x = genes
        for layer in self.hidden:
            x = self.dropout(self.activation(layer(x)))
        return torch.sigmoid(self.morphology(x)), self.label(x)


def radiogenomic_losses(model: nn.Module, genes: Tensor, morphology: Tensor, labels: Tensor) -> Tensor:
    """Per-patient loss (B,): squared error over the measured features plus cross-entropy where the label is known.

    Args:
        model: a `RadiogenomicDNN`.
        genes: (B, G).
        morphology: (B, F) in [0, 1], NaN where not measured.
        labels: (B,) class codes, -1 where unknown.
    """
    predicted, logits = model(genes)
    measured = ~morphology.isnan()
    squared = torch.where(measured, predicted - morphology.nan_to_num(), 0.0) ** 2
    known = (labels >= 0).to(logits.dtype)
    labelling = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    return _MORPHOLOGY_WEIGHT * squared.sum(1) / measured.sum(1).clamp(min=1) + _LABEL_WEIGHT * known * labelling


def make_radiogenomic_dnn(plan: StudyPlan) -> RadiogenomicDNN:
    """The DNN that `plan` names, with fresh weights."""
    return RadiogenomicDNN(
        len(plan.genes.panel),
        len(plan.morphology.features),
        len(plan.label.classes),
        hidden=plan.radiogenomics.hidden,
        dropout=plan.radiogenomics.dropout,
        activation=plan.autoencoder.activation,
    )


def start_from_encoder(dnn: RadiogenomicDNN, autoencoder: GeneAutoencoder) -> int:
    """Copy the encoder's layers into the leading layers of `dnn` that have their shape; returns how many were copied."""
    encoder_layers = [layer for layer in autoencoder.encoder if isinstance(layer, nn.Linear)]
    copied = 0
    for target, source in zip(dnn.hidden, encoder_layers, strict=False):
        if not isinstance(target, nn.Linear) or target.weight.shape != source.weight.shape:
            break
        target.load_state_dict(source.state_dict())
        copied += 1
    return copied


def project_nonnegative_output(dnn: RadiogenomicDNN) -> None:
    """Set negative weights of the morphology layer to zero: a projection after the step, hence post-processing."""
    with torch.no_grad():
        dnn.morphology.weight.clamp_(min=0.0)


def project_nonnegative_weights(dnn: RadiogenomicDNN) -> None:
    """Set negative weights of every layer to zero, biases excepted; also post-processing.

    So the radiogenomic literature words it. No gene can then lower what another raises, which ruins the fit wherever
    expression is centred: `project_nonnegative_output` constrains what the wording was after.
    """
    with torch.no_grad():
        for layer in (*dnn.hidden, dnn.morphology, dnn.label):
            layer.weight.clamp_(min=0.0)


def project_nonnegative(dnn: RadiogenomicDNN, plan: RadiogenomicsPlan) -> None:
    """Project onto the weights that `plan` allows: all of them, where it asks for none that are non-negative."""
    if plan.nonnegative_weights:
        project_nonnegative_weights(dnn)
    elif plan.nonnegative_output:
        project_nonnegative_output(dnn)
