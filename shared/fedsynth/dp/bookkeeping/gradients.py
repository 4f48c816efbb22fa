"""Per-patient gradients of one parameter, held as factors: their norms and their weighted sum.

Shapes: P patients; T positions (pixels, tokens, times the items of the patient); G convolution groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Below this share of the largest value that the terms of a ghost norm allow, they cancel to so little that rounding
# shows; the few patients concerned get their gradient written out.
_CANCELLED = 1e-3
# Below it, float32 may have lost some of the squares that a (scaled) ghost norm adds up.
_UNDERFLOWN = 1e-30
_WRITTEN_OUT_AT_ONCE = 8


class PatientGradients(Protocol):
    """The gradients of P patients with respect to one parameter."""

    def norms(self) -> Tensor:
        """Euclidean norms (P,)."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,), in the parameter's shape."""


class MatrixFactors(PatientGradients, Protocol):
    """Gradients of a weight, for which the inner product with a fixed tensor is cheap as well."""

    def inner(self, weight: Tensor) -> Tensor:
        """<gradient of patient p, weight> for each patient (P,)."""


@dataclass(frozen=True)
class Written:
    """Gradients that are small enough to be written out.

    Attributes:
        values: (P, *parameter shape).
    """

    values: Tensor

    def norms(self) -> Tensor:
        """Euclidean norms (P,)."""
        return self.values.flatten(1).norm(dim=1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,)."""
        return torch.tensordot(weights, self.values, dims=1)

    def inner(self, weight: Tensor) -> Tensor:
        """<gradient of patient p, weight> for each patient (P,)."""
        return self.values.flatten(1) @ weight.flatten()


def better_written(positions: int, inputs: int, outputs: int) -> bool:
    """Whether an inputs x outputs gradient is smaller than the Gram matrices of its positions."""
    return positions**2 >= inputs * outputs


@dataclass(frozen=True)
class Ghost:
    """Gradients of a weight as products: patient p's is ``right[p] @ left[p]`` in each group.

    Their norms come from the Gram matrices of the positions ("ghost norms"), without the gradients.

    Attributes:
        left: (P, G, T, d).
        right: (P, G, p, T).
        shape: of the weight: (p, d), or (G p, d / (h w), h, w) where d runs over (h, w, channel).
        contract: the weighted sum by a faster way than a product of `left` and `right`, if there is one.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    contract: Callable[[Tensor], Tensor] | None = None

    def norms(self) -> Tensor:
        """Euclidean norms (P,)."""
        # The output gradients of a confident network are tiny: unscaled, their squares would underflow to a norm of 0.
        scale = self.right.flatten(1).abs().amax(1)
        right = self.right / torch.where(scale > 0, scale, 1.0)[:, None, None, None]
        inputs = self.left @ self.left.transpose(2, 3)
        outputs = right.transpose(2, 3) @ right
        squared = (inputs * outputs).flatten(1).sum(1)
        diagonal = (inputs.diagonal(dim1=2, dim2=3) * outputs.diagonal(dim1=2, dim2=3)).sqrt()
        largest = diagonal.sum(2).square().sum(1)
        norms = squared.clamp(min=0.0).sqrt() * scale
        inexact = (squared < (_CANCELLED * largest).clamp(min=_UNDERFLOWN)) & (scale > 0)
        for rows in inexact.nonzero().flatten().split(_WRITTEN_OUT_AT_ONCE):
            written = (right[rows] @ self.left[rows]).double() * scale[rows][:, None, None, None]
            norms[rows] = written.flatten(1).norm(dim=1).to(norms.dtype)
        return norms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,), in the weight's shape."""
        if self.contract is not None:
            return self.contract(weights)
        right = (self.right * weights[:, None, None, None]).permute(1, 2, 0, 3).flatten(2)
        return as_weight(right @ self.left.transpose(0, 1).flatten(1, 2), self.shape)

    def inner(self, weight: Tensor) -> Tensor:
        """<gradient of patient p, weight> for each patient (P,)."""
        if weight.dim() == 4:
            weight = weight.permute(0, 2, 3, 1)
        matrix = weight.reshape(self.left.shape[1], self.right.shape[2], self.left.shape[3])
        return ((matrix @ self.left.transpose(2, 3)) * self.right).flatten(1).sum(1)


def as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """(..., G, p, d) -> (..., *shape): groups in a row, and a convolution's columns (h, w, channel) in torch's order."""
    if len(shape) == 2:
        return matrix.squeeze(-3)
    rows, channels, height, width = shape
    return matrix.reshape(*matrix.shape[:-3], rows, height, width, channels).movedim(-1, -3)


class Looked:
    """Gradients of an embedding: rows of `right` added where `indices` point."""

    def __init__(self, indices: Tensor, right: Tensor, shape: torch.Size) -> None:
        """Factors of the gradient.

        Args:
            indices: (P, T) int64.
            right: (P, T, p), gradients at the looked-up rows; 0 where the row is padding.
            shape: of the table, (entries, p).
        """
        self._indices, self._right, self._shape = indices, right, shape

    def norms(self) -> Tensor:
        """Euclidean norms (P,), with rows that a patient looks up several times summed first."""
        # Each patient's repeated rows are summed in place of a Gram matrix: nothing can cancel unseen.
        patients, positions, width = self._right.shape
        patient = torch.arange(patients, device=self._indices.device)[:, None].expand(-1, positions)
        key, place = torch.unique(patient * self._shape[0] + self._indices, return_inverse=True)
        rows = self._right.new_zeros(len(key), width).index_add_(0, place.flatten(), self._right.flatten(0, 1))
        squared = torch.zeros(patients, dtype=rows.dtype, device=rows.device)
        scale = rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
        squared.index_add_(0, key // self._shape[0], (rows / scale).square().sum(1))
        return squared.sqrt() * scale

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,), in the table's shape."""
        rows = (self._right * weights[:, None, None]).flatten(0, 1)
        return self._right.new_zeros(self._shape).index_add_(0, self._indices.flatten(), rows)


@dataclass(frozen=True)
class SpectrallyNormalised:
    """Gradients of the raw weight behind a spectrally normalised one (Miyato et al. 2018).

    The layer uses W = V / s with s = u^T V v, the power iteration's u and v being constants of the step. A gradient g at
    W is (g - <g, W> u v^T) / s at V.

    Attributes:
        effective: gradients at W.
        weight: W.
        direction: u v^T in W's shape.
        sigma: s, a scalar.
    """

    effective: MatrixFactors
    weight: Tensor
    direction: Tensor
    sigma: Tensor

    def norms(self) -> Tensor:
        """Euclidean norms (P,)."""
        norm, along = self.effective.norms(), self.effective.inner(self.weight)
        cross, length = self.effective.inner(self.direction), self.direction.norm()
        # ||g - w D||^2, split into what is orthogonal to D and what is not, so that squares are added, not subtracted.
        towards = cross / length
        orthogonal = ((norm - towards.abs()) * (norm + towards.abs())).clamp(min=0.0)
        return (orthogonal + (towards - along * length).square()).sqrt() / self.sigma.abs()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,), in the weight's shape."""
        effective = self.effective.weighted_sum(weights)
        return (effective - (effective * self.weight).sum() * self.direction) / self.sigma
