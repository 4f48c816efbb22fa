"""One rule a layer type: from a layer's input and its output gradients to the gradients of its parameters by patient.

Inputs and output gradients have one row an item in dimension 0; the k items of a patient are neighbours and are one unit:
they enter a patient's gradient as more positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fedsynth.dp.bookkeeping.convolutions import convolution, transposed_convolution
from fedsynth.dp.bookkeeping.gradients import (
    Ghost,
    Looked,
    MatrixFactors,
    PatientGradients,
    SpectrallyNormalised,
    Written,
    better_written,
)
from fedsynth.dp.bookkeeping.passes import Pass, UnsupportedLayerError
from fedsynth.models.layers import Scale

# Gradients of the parameters "weight" and "bias" of a layer, as far as it has them.
Rule = Callable[[Pass], Mapping[str, PatientGradients]]


def _linear(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.Linear)
    left, right = (
        x.by_patient(t).reshape(x.patients, -1, t.shape[-1]) for t in (x.inputs.to(x.outputs.dtype), x.outputs)
    )
    weight: PatientGradients
    if better_written(left.shape[1], left.shape[2], right.shape[2]):
        weight = Written(right.transpose(1, 2) @ left)
    else:
        weight = Ghost(left[:, None], right.transpose(1, 2)[:, None], x.layer.weight.shape)
    return {"weight": weight, "bias": Written(right.sum(1))}


def _group_norm(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.GroupNorm)
    return _normalised_by_group(x, x.layer.num_groups, x.layer.eps)


def _instance_norm(x: Pass) -> dict[str, PatientGradients]:
    assert isinstance(x.layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return _normalised_by_group(x, x.layer.num_features, x.layer.eps)


def _normalised_by_group(x: Pass, groups: int, eps: float) -> dict[str, PatientGradients]:
    n, channels = x.inputs.shape[:2]
    inputs, outputs = (t.to(x.outputs.dtype).reshape(n, channels, -1).contiguous() for t in (x.inputs, x.outputs))
    pixels = inputs.shape[2]
    _, mean, rate = torch.native_group_norm(inputs, None, None, n, channels, pixels, groups, eps)
    # Torch's own kernel sums over items. With the items as further channels of a single one, there is nothing to sum.
    _, scale, shift = torch.ops.aten.native_group_norm_backward(
        outputs.reshape(1, -1, pixels), inputs.reshape(1, -1, pixels), mean.reshape(1, -1), rate.reshape(1, -1),
        mean.new_ones(n * channels), 1, n * channels, pixels, n * groups, (False, True, True),
    )  # fmt: skip
    return {
        "weight": Written(x.by_patient(scale.reshape(n, channels)).sum(1)),
        "bias": Written(x.by_patient(shift.reshape(n, channels)).sum(1)),
    }


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


def _scale(x: Pass) -> dict[str, PatientGradients]:
    products = x.inputs.to(x.outputs.dtype) * x.outputs
    return {"weight": Written(products.reshape(x.patients, -1).sum(1, keepdim=True))}


RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.Embedding: _embedding,
    Scale: _scale,
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
