"""Does any sample see another? Tested once, since a library's list of known layers cannot know a model's own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ROWS = 3


class MixedSamplesError(ValueError):
    """One sample's output or loss depends on another sample."""


@dataclass
class Inputs:
    """The arguments of the model's own call, seen while losses were computed."""

    args: tuple[object, ...] | None = None
    kwargs: dict[str, object] | None = None


@contextmanager
def watched(model: nn.Module) -> Iterator[Inputs]:
    """Note with what `model` is called while the context is open."""
    seen = Inputs()

    def note(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.args, seen.kwargs = args, kwargs

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def check_forward(model: nn.Module, seen: Inputs, items: int) -> None:
    """Change one row of a made-up batch and require that the outputs of the others stay what they were.

    The batch has the shapes of what the model was called with and values that do not depend on it (normal values, zeros
    and ones), so the verdict tells nothing about patients. Buffers and random streams are left as they were.

    Args:
        model: the model.
        seen: how it was called.
        items: number of items in that call; tensors with that many rows are taken to have one a sample.

    Raises:
        MixedSamplesError: an output of another row changed, or the model was not called.
    """
    if seen.args is None or seen.kwargs is None:
        raise MixedSamplesError("the losses did not call the model, so it cannot be tested for mixing of samples")
    generator = torch.Generator().manual_seed(0)

    def made_up(value: object) -> tuple[object, object]:
        """The first batch and the one with its last row changed."""
        if not isinstance(value, Tensor) or not value.dim() or len(value) != items:
            return value, value
        shape = (_ROWS, *value.shape[1:])
        if value.is_floating_point():
            first = torch.randn(shape, generator=generator).to(value)
            other = torch.randn(shape[1:], generator=generator).to(value)
        else:
            first, other = value.new_zeros(shape), value.new_ones(shape[1:])
        second = first.clone()
        second[-1] = other
        return first, second

    args = [made_up(value) for value in seen.args]
    kwargs = {name: made_up(value) for name, value in seen.kwargs.items()}
    with _left_as_it_was(model), parametrize.cached(), torch.no_grad():
        first, second = (
            _outputs(model, [pair[i] for pair in args], {name: pair[i] for name, pair in kwargs.items()})
            for i in range(2)
        )
    for before, after in zip(first, second, strict=True):
        if len(before) != _ROWS:
            raise MixedSamplesError(f"an output has {len(before)} rows for {_ROWS} samples")
        # On a processor the same rows give the same bits; elsewhere kernels may add in another order.
        tolerance = 0.0 if before.device.type == "cpu" else 1e-6
        if not torch.allclose(before[:-1], after[:-1], rtol=tolerance, atol=tolerance, equal_nan=True):
            raise MixedSamplesError(
                "changing one sample changes the model's output for others: something mixes samples"
            )


def _outputs(model: nn.Module, args: list[object], kwargs: dict[str, object]) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout mask in both calls
        output = model(*args, **kwargs)
    outputs = list(output.values()) if isinstance(output, dict) else output
    return [
        t for t in (outputs if isinstance(outputs, list | tuple) else [outputs]) if isinstance(t, Tensor) and t.dim()
    ]


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)


def check_rows(gradients: list[Tensor | None]) -> None:
    """Require that gradients of the *first item's* loss at the layers' outputs are 0 in every other row.

    This sees what `check_forward` cannot: losses that mix, and layers whose dimension 0 is not that of items.

    Raises:
        MixedSamplesError: another row has a gradient.
    """
    for gradient in gradients:
        # 0 times an infinite derivative is NaN: a sample's own trouble, not a sign of mixing.
        if gradient is not None and bool(gradient[1:].nan_to_num(nan=0.0).any()):
            raise MixedSamplesError("the loss of one sample depends on another sample's features")
