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
    """Gradients small enough to be written out: biases and the scales and shifts of normalisations.

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


class Factored:
    """Gradients of a weight as products: patient p's is ``right[p] @ left[p]`` in each group.

    The norm comes from the Gram matrices of the positions ("ghost norm") where they are smaller than the gradient, and
    from the gradient itself, which is then kept for the sum, where not.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        shape: torch.Size,
        contract: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Factors of the gradient.

        Args:
            left: (P, G, T, d).
            right: (P, G, p, T).
            shape: of the weight: (p, d), or (G p, d / (h w), h, w) where d runs over (h, w, channel).
            contract: the weighted sum by a faster way than a product of `left` and `right`, if there is one.
        """
        self._left, self._right, self._shape, self._contract = left, right, shape, contract
        _, _, positions, inputs = left.shape
        self._written = positions**2 >= inputs * right.shape[2]
        self._gradients = right @ left if self._written else None

    def norms(self) -> Tensor:
        """Euclidean norms (P,)."""
        if self._gradients is not None:
            return self._gradients.flatten(1).norm(dim=1)
        # The output gradients of a confident network are tiny: unscaled, their squares would underflow to a norm of 0.
        scale = self._right.flatten(1).abs().amax(1)
        right = self._right / torch.where(scale > 0, scale, 1.0)[:, None, None, None]
        inputs = self._left @ self._left.transpose(2, 3)
        outputs = right.transpose(2, 3) @ right
        squared = (inputs * outputs).flatten(1).sum(1)
        diagonal = (inputs.diagonal(dim1=2, dim2=3) * outputs.diagonal(dim1=2, dim2=3)).sqrt()
        largest = diagonal.sum(2).square().sum(1)
        norms = squared.clamp(min=0.0).sqrt() * scale
        cancelled = (squared < _CANCELLED * largest).nonzero().flatten()
        for rows in cancelled.split(_WRITTEN_OUT_AT_ONCE):
            norms[rows] = (right[rows] @ self._left[rows]).flatten(1).norm(dim=1) * scale[rows]
        return norms

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over patients times `weights` (P,), in the weight's shape."""
        if self._gradients is not None:
            return self._to_weight(torch.tensordot(weights, self._gradients, dims=1))
        if self._contract is not None:
            return self._contract(weights)
        right = (self._right * weights[:, None, None, None]).permute(1, 2, 0, 3).flatten(2)
        return self._to_weight(right @ self._left.transpose(0, 1).flatten(1, 2))

    def inner(self, weight: Tensor) -> Tensor:
        """<gradient of patient p, weight> for each patient (P,)."""
        matrix = self._to_matrix(weight)
        if self._gradients is not None:
            return (self._gradients * matrix).flatten(1).sum(1)
        return ((matrix @ self._left.transpose(2, 3)) * self._right).flatten(1).sum(1)

    def _to_weight(self, matrix: Tensor) -> Tensor:
        if len(self._shape) == 2:
            return matrix[0]
        rows, channels, height, width = self._shape
        return matrix.reshape(rows, height, width, channels).permute(0, 3, 1, 2)

    def _to_matrix(self, weight: Tensor) -> Tensor:
        if weight.dim() == 4:
            weight = weight.permute(0, 2, 3, 1)
        return weight.reshape(self._left.shape[1], self._right.shape[2], self._left.shape[3])


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
