"""What a forward and backward pass leaves at a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


class UnsupportedLayerError(ValueError):
    """A model, or the way in which it is used, has no exact per-patient gradient by book-keeping."""


@dataclass(frozen=True)
class Pass:
    """One pass at one layer.

    Attributes:
        layer: the layer.
        inputs: its input, dimension 0 being items.
        outputs: gradients of the loss at its output, dimension 0 being items; float32 or float64.
        patients: P; the number of items is a multiple of it.
    """

    layer: nn.Module
    inputs: Tensor
    outputs: Tensor
    patients: int

    def by_patient(self, items: Tensor) -> Tensor:
        """(items, ...) -> (P, items a patient, ...)."""
        return items.reshape(self.patients, -1, *items.shape[1:])
