"""One rule a layer type: from a layer's input and its output gradients to the gradients of its parameters by patient.

Inputs and output gradients have one row an item in dimension 0; the k items of a patient are neighbours and are one unit:
they enter a patient's gradient as more positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fedsynth.dp.bookkeeping.gradients import (
    Factored,
    Looked,
    MatrixFactors,
    PatientGradients,
    SpectrallyNormalised,
    Written,
)


class UnsupportedLayerError(ValueError):
    """A model, or the way in which it is used, has no exact per-patient gradient by book-keeping."""


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass left at a layer.

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


# Gradients of the parameters "weight" and "bias" of a layer, as far as it has them.
Rule = Callable[[Pass], Mapping[str, PatientGradients]]


def _linear(x: Pass) -> dict[str, PatientGradients]:
    left, right = (
        x.by_patient(t).reshape(x.patients, -1, t.shape[-1]) for t in (x.inputs.to(x.outputs.dtype), x.outputs)
    )
    assert isinstance(x.layer, nn.Linear)
    return {
        "weight": Factored(left[:, None], right.transpose(1, 2)[:, None], x.layer.weight.shape),
        "bias": Written(right.sum(1)),
    }


def _convolution(x: Pass) -> dict[str, PatientGradients]:
    layer = x.layer
    assert isinstance(layer, nn.Conv2d)
    # As the layer itself pads, so that "same", "reflect" and "circular" need no rule of their own.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    inputs = nn.functional.pad(x.inputs.to(x.outputs.dtype), layer._reversed_padding_repeated_twice, mode)
    shape = layer.weight.shape

    def contract(weights: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            _scaled(x, weights), inputs, layer.weight, None, layer.stride, (0, 0), layer.dilation, False, (0, 0),
            layer.groups, (False, True, False),
        )[1]  # fmt: skip

    left = _patches(inputs, layer, x.outputs.shape[2:])
    return {
        "weight": _factored_over_pixels(x, left, x.outputs, layer.groups, shape, contract),
        "bias": Written(x.by_patient(x.outputs.flatten(2).sum(2)).sum(1)),
    }


def _transposed_convolution(x: Pass) -> dict[str, PatientGradients]:
    layer = x.layer
    assert isinstance(layer, nn.ConvTranspose2d)
    # The adjoint of a convolution: patches are those of the output gradients, one at each pixel of the input.
    inputs = x.inputs.to(x.outputs.dtype)
    # (top, bottom), (left, right): rows that no window reaches are left over below and to the right.
    sides = [
        (p, max((n - 1) * s + d * (k - 1) + 1 - m - p, 0))
        for n, m, k, s, p, d in zip(
            inputs.shape[2:], x.outputs.shape[2:], layer.kernel_size, layer.stride, _pair(layer.padding), layer.dilation,
            strict=True,
        )
    ]  # fmt: skip
    outputs = nn.functional.pad(x.outputs, (*sides[1], *sides[0]))
    shape = layer.weight.shape

    def contract(weights: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            _scaled(x, weights), inputs, layer.weight, None, layer.stride, layer.padding, layer.dilation, True,
            layer.output_padding, layer.groups, (False, True, False),
        )[1]  # fmt: skip

    left = _patches(outputs, layer, inputs.shape[2:])
    return {
        "weight": _factored_over_pixels(x, left, inputs, layer.groups, shape, contract),
        "bias": Written(x.by_patient(x.outputs.flatten(2).sum(2)).sum(1)),
    }


def _pair(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)  # which torch allows for convolutions only
    return padding


def _patches(padded: Tensor, layer: nn.Conv2d | nn.ConvTranspose2d, windows: torch.Size) -> Tensor:
    """(N, C, H, W), padded -> (N, G, windows, h w C / G): what the kernel sees at each window, ordered (h, w, channel).

    Channels go last before windows are taken: a row of a patch is then one run of memory, several times faster to copy
    than the single values of `nn.functional.unfold`.
    """
    (height, width), (down, right), (step, stride) = layer.kernel_size, layer.dilation, layer.stride
    nhwc = padded.permute(0, 2, 3, 1).contiguous()
    n, c = len(nhwc), nhwc.shape[3]
    item, row, column, _ = nhwc.stride()
    groups = layer.groups
    view = nhwc.as_strided(
        (n, *windows, height, width, groups, c // groups),
        (item, row * step, column * stride, row * down, column * right, c // groups, 1),
    )
    return view.permute(0, 5, 1, 2, 3, 4, 6).reshape(n, groups, windows.numel(), height * width * c // groups)


def _factored_over_pixels(
    x: Pass, left: Tensor, right: Tensor, groups: int, shape: torch.Size, contract: Callable[[Tensor], Tensor]
) -> Factored:
    """Factors from patches (N, G, T, d) and maps (N, C, H, W); the pixels of a patient's items become its positions."""
    right = x.by_patient(right.reshape(len(right), groups, right.shape[1] // groups, -1))
    left = x.by_patient(left)
    return Factored(left.transpose(1, 2).flatten(2, 3), right.permute(0, 2, 3, 1, 4).flatten(3), shape, contract)


def _scaled(x: Pass, weights: Tensor) -> Tensor:
    items = weights.repeat_interleave(len(x.outputs) // x.patients)
    return x.outputs * items.reshape(-1, *[1] * (x.outputs.dim() - 1))


def _group_norm(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.GroupNorm)
    return _normalised_by_group(x, x.layer.num_groups, x.layer.eps)


def _instance_norm(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return _normalised_by_group(x, x.layer.num_features, x.layer.eps)


def _normalised_by_group(x: Pass, groups: int, eps: float) -> dict[str, PatientGradients]:
    inputs, outputs = (t.reshape(*t.shape[:2], -1) for t in (x.inputs.to(x.outputs.dtype), x.outputs))
    variance, mean = torch.var_mean(inputs.reshape(len(inputs), groups, -1), dim=2, correction=0)
    rate = (variance + eps).rsqrt()
    channels = inputs.shape[1] // groups
    shift = outputs.sum(2)
    # <b, (a - mean) / sd> without writing the normalised input out.
    scale = (torch.linalg.vecdot(outputs, inputs) - shift * mean.repeat_interleave(channels, 1)) * (
        rate.repeat_interleave(channels, 1)
    )
    return {"weight": Written(x.by_patient(scale).sum(1)), "bias": Written(x.by_patient(shift).sum(1))}


def _layer_norm(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.LayerNorm)
    shape = tuple(x.layer.normalized_shape)
    normalised = nn.functional.layer_norm(x.inputs.to(x.outputs.dtype), shape, eps=x.layer.eps)
    return {
        "weight": Written((x.outputs * normalised).reshape(x.patients, -1, *shape).sum(1)),
        "bias": Written(x.outputs.reshape(x.patients, -1, *shape).sum(1)),
    }


def _embedding(x: Pass) -> dict[str, PatientGradients]:
    layer = x.layer
    assert isinstance(layer, nn.Embedding)
    indices = x.inputs.reshape(x.patients, -1)
    outputs = x.outputs.reshape(x.patients, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        outputs = outputs.masked_fill((indices == layer.padding_idx)[..., None], 0.0)
    return {"weight": Looked(indices, outputs, layer.weight.shape)}


RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.Embedding: _embedding,
}
_NORMALISABLE = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def parameters_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are a layer's own, by the names of the rules; behind a parametrisation, the raw ones."""
    own = dict(layer.named_parameters(recurse=False))
    for name, chain in _parametrisations(layer).items():
        for inner, parameter in chain.named_parameters():
            own[name if inner == "original" else f"{name}.{inner}"] = parameter
    return own


def _parametrisations(layer: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    return dict(layer.parametrizations.items()) if parametrize.is_parametrized(layer) else {}  # type: ignore[union-attr, operator]


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer with trainable parameters of its own whose gradients by patient would not be exact.

    Raises:
        UnsupportedLayerError: says which layer and why.
    """

    def refuse(reason: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(f"layer {name or '(root)'!r} ({type(layer).__name__}): {reason}")

    kind = parametrize.type_before_parametrizations(layer)
    if kind not in RULES:
        raise refuse("there is no rule for the gradients of its parameters")
    if layer._forward_hooks:
        raise refuse("a forward hook may change its output unseen")
    unknown = set(parameters_of(layer)) - {"weight", "bias"}
    if unknown:
        raise refuse(f"its parameters {sorted(unknown)} have no rule")
    if getattr(layer, "track_running_stats", False):
        raise refuse("running statistics mix samples")
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        raise refuse("max_norm, scale_grad_by_freq and sparse gradients are not supported")
    if chains := _parametrisations(layer):
        spectral = set(chains) == {"weight"} and [type(p) for p in chains["weight"]] == [_SpectralNorm]
        if not spectral or kind not in _NORMALISABLE:
            raise refuse("of the parametrisations, only spectral_norm of a weight is supported")


def gradients_of(x: Pass) -> dict[str, PatientGradients]:
    """The gradients by patient of a layer's parameters, by the names of `parameters_of`."""
    kind = parametrize.type_before_parametrizations(x.layer)
    found = dict(RULES[kind](x))
    if parametrize.is_parametrized(x.layer, "weight"):
        found["weight"] = _through_spectral_norm(x.layer, found["weight"])  # type: ignore[arg-type]
    return {name: found[name] for name in parameters_of(x.layer)}


def _through_spectral_norm(layer: nn.Module, effective: MatrixFactors) -> SpectrallyNormalised:
    chain = _parametrisations(layer)["weight"]
    norm, raw = chain[0], chain.original
    assert isinstance(norm, _SpectralNorm) and isinstance(raw, Tensor)
    weight = raw.detach()
    # u v^T in the order in which spectral_norm flattens a weight: its dimension `dim` first.
    rows = weight.movedim(norm.dim, 0)
    direction = torch.outer(norm._u, norm._v).reshape(rows.shape).movedim(0, norm.dim)
    sigma = (weight * direction).sum()
    return SpectrallyNormalised(effective, weight / sigma, direction, sigma)
