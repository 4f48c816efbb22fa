"""Gradients by patient of convolutions and transposed convolutions, by the fastest of three ways.

A convolution's weight gradient is a product of output gradients and patches of the input. With few pixels its norm is a
ghost norm, and the clipped sum is torch's own weight gradient for output gradients times the clip factors. With many
pixels the gradient is written out: by one grouped convolution, each patient a group of its own, or by patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsynth.dp.bookkeeping.gradients import Ghost, MatrixFactors, PatientGradients, Written, as_weight, better_written
from fedsynth.dp.bookkeeping.passes import Pass

# Grouped convolutions are fast on processors where the channels of a group fill vector registers.
_VECTOR = 8


def convolution(x: Pass) -> dict[str, PatientGradients]:
    """Rule of `nn.Conv2d`."""
    layer = x.layer
    assert isinstance(layer, nn.Conv2d)
    inputs, padding = x.inputs.to(x.outputs.dtype), layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        inputs, padding = _padded(layer, inputs), (0, 0)

    def patches() -> Tensor:
        return _patches(_padded(layer, x.inputs.to(x.outputs.dtype)), layer, x.outputs.shape[2:])

    assert not isinstance(padding, str)
    return _rule(x, _Shape(layer, inputs, x.outputs, padding, False, (0, 0)), x.outputs, patches)


def transposed_convolution(x: Pass) -> dict[str, PatientGradients]:
    """Rule of `nn.ConvTranspose2d`: the adjoint of a convolution, so the patches are those of the output gradients."""
    layer = x.layer
    assert isinstance(layer, nn.ConvTranspose2d) and not isinstance(layer.padding, str)
    inputs, padding = x.inputs.to(x.outputs.dtype), layer.padding

    def patches() -> Tensor:
        # One window at each pixel of the input; what no window reaches is left over below and to the right.
        sides = [
            (p, max((n - 1) * s + d * (k - 1) + 1 - m - p, 0))
            for n, m, k, s, p, d in zip(
                inputs.shape[2:], x.outputs.shape[2:], layer.kernel_size, layer.stride, padding, layer.dilation,
                strict=True,
            )
        ]  # fmt: skip
        return _patches(nn.functional.pad(x.outputs, (*sides[1], *sides[0])), layer, inputs.shape[2:])

    # The layer's own output_padding need not be what a call with `output_size` used; the shapes say.
    extra = tuple(
        m - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, k, s, p, d in zip(
            inputs.shape[2:], x.outputs.shape[2:], layer.kernel_size, layer.stride, padding, layer.dilation, strict=True
        )
    )
    return _rule(x, _Shape(layer, inputs, x.outputs, padding, True, extra), inputs, patches)


@dataclass(frozen=True)
class _Shape:
    """A convolution as torch's backward kernel wants it described."""

    layer: nn.Conv2d | nn.ConvTranspose2d
    inputs: Tensor
    outputs: Tensor
    padding: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]

    def weight_gradient(self, inputs: Tensor, outputs: Tensor, patients: int = 1) -> Tensor:
        """The weight's gradient summed over dimension 0, for each of `patients` that stand side by side as channels."""
        layer = self.layer
        # Only the shape of the weight matters here.
        weight = inputs.new_empty(1).expand(patients * layer.weight.shape[0], *layer.weight.shape[1:])
        return torch.ops.aten.convolution_backward(
            outputs, inputs, weight, None, layer.stride, self.padding, layer.dilation, self.transposed,
            self.output_padding, patients * layer.groups, (False, True, False),
        )[1]  # fmt: skip


def _rule(x: Pass, shape: _Shape, maps: Tensor, patches: Callable[[], Tensor]) -> dict[str, PatientGradients]:
    """`maps` (N, C, H, W) are the factor that is not patches; `patches()` is (N, G, H W, d)."""
    return {
        "weight": _weight(x, shape, maps, patches),
        "bias": Written(x.by_patient(x.outputs.flatten(2).sum(2)).sum(1)),
    }


def _weight(x: Pass, shape: _Shape, maps: Tensor, patches: Callable[[], Tensor]) -> MatrixFactors:
    size, groups, items = shape.layer.weight.shape, shape.layer.groups, len(maps) // x.patients
    positions = items * maps[0, 0].numel()
    written = better_written(positions, size[1:].numel(), size[0] // groups)
    if written and maps.device.type == "cpu" and size[0] // groups % _VECTOR == size[1] % _VECTOR == 0:
        inputs, outputs = (x.by_patient(t).transpose(0, 1).flatten(1, 2) for t in (shape.inputs, shape.outputs))
        return Written(shape.weight_gradient(inputs, outputs, x.patients).reshape(x.patients, *size))
    left = x.by_patient(patches()).transpose(1, 2).flatten(2, 3)
    right = x.by_patient(maps.reshape(len(maps), groups, size[0] // groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)
    if written:
        return Written(as_weight(right @ left, size))

    def contract(weights: Tensor) -> Tensor:
        factors = weights.repeat_interleave(items)[:, None, None, None]
        return shape.weight_gradient(shape.inputs, shape.outputs * factors)

    return Ghost(left, right, size, contract)


def _padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """As the layer itself pads, so that "same", "reflect" and "circular" need no rule of their own."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode)


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
