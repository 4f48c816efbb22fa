"""Keep the inputs of layers in a forward pass, and prove from autograd's graph that nothing else reached a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fedsynth.dp.bookkeeping.layers import parameters_of
from fedsynth.dp.bookkeeping.passes import UnsupportedLayerError


@dataclass(frozen=True)
class Call:
    """One call of one layer.

    Attributes:
        name: of the layer in the model.
        layer: the layer.
        inputs: its input, without graph.
        version: torch's count of in-place changes of `inputs` at the call.
        source: where the input comes from in autograd's graph; None if nothing before it needs a gradient.
        output: where the output stands in the graph, before any in-place change of it.
        rows: length of the output's dimension 0.
    """

    name: str
    layer: nn.Module
    inputs: Tensor
    version: int
    source: Node | None
    output: GradientEdge
    rows: int


@dataclass
class Tape:
    """The calls of one forward pass, in order."""

    calls: list[Call] = field(default_factory=list)


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[Tape]:
    """Record every call of `layers` while the context is open; no hook is left behind.

    Raises:
        UnsupportedLayerError: at a second call of a layer, whose gradient would be a sum that the rules do not know.
    """
    tape = Tape()
    seen: set[str] = set()

    def record(
        name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        if name in seen:
            raise UnsupportedLayerError(f"layer {name or '(root)'!r} is used twice in one forward pass")
        seen.add(name)
        if not output.requires_grad:
            raise UnsupportedLayerError(f"layer {name or '(root)'!r} was called without gradients")
        inputs = args[0] if args else kwargs["input"]
        source = inputs.grad_fn
        edge = get_gradient_edge(output)
        tape.calls.append(Call(name, layer, inputs.detach(), inputs._version, source, edge, len(output)))

    handles = []
    try:
        for name, layer in layers.items():

            def hook(
                layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor, name: str = name
            ) -> None:
                record(name, layer, args, kwargs, output)

            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def check_rows_are_items(calls: Iterable[Call], items: int) -> None:
    """Refuse a layer whose dimension 0 is not that of items.

    Raises:
        UnsupportedLayerError: names the layer.
    """
    for call in calls:
        if call.rows != items or len(call.inputs) != items:
            raise UnsupportedLayerError(
                f"layer {call.name or '(root)'!r} has {call.rows} rows in dimension 0 where there are {items} items"
            )


def check_unchanged(calls: Iterable[Call]) -> None:
    """Refuse inputs that were overwritten in place after their layer saw them.

    Raises:
        UnsupportedLayerError: names the layer.
    """
    for call in calls:
        if call.inputs._version != call.version:
            raise UnsupportedLayerError(f"the input of layer {call.name or '(root)'!r} was changed in place")


def check_covered(losses: Tensor, calls: list[Call], trained: Mapping[int, str]) -> None:
    """Walk the graph of `losses` and refuse any way to a trained parameter that does not lead through its own layer.

    It depends on the graph alone, never on values.

    Args:
        losses: of the pass.
        calls: every recorded call of the pass.
        trained: names of the trained parameters by their `id`.

    Raises:
        UnsupportedLayerError: names the parameter.
    """
    by_output = {call.output.node: call for call in calls}
    for call in calls:
        own = {id(parameter) for parameter in parameters_of(call.layer).values()}
        stop = {call.source} if call.source is not None else set()
        _refuse_strangers(_reached([call.output.node], {node: [] for node in stop}), trained, own)
    jumps = {node: [call.source] if call.source is not None else [] for node, call in by_output.items()}
    if losses.grad_fn is None:
        raise UnsupportedLayerError("the losses do not depend on the model")
    _refuse_strangers(_reached([losses.grad_fn], jumps), trained, set())


def _reached(start: list[Node], jumps: Mapping[Node, list[Node]]) -> Iterator[Node]:
    """All nodes that `start` leads to; from a node in `jumps`, the walk goes on where that says instead."""
    seen: set[Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in jumps:
            waiting.extend(jumps[node])
            continue
        yield node
        waiting.extend(before for before, _ in node.next_functions if before is not None)


def _refuse_strangers(nodes: Iterable[Node], trained: Mapping[int, str], allowed: set[int]) -> None:
    for node in nodes:
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in trained and id(variable) not in allowed:
            raise UnsupportedLayerError(
                f"parameter {trained[id(variable)]!r} is used outside its own layer, where its gradient is not seen"
            )


def output_gradients(loss: Tensor, calls: list[Call], retain_graph: bool = False) -> list[Tensor | None]:
    """Gradients of the scalar `loss` at the output of each call; None where they do not depend on it.

    Weight gradients are not computed: autograd runs only what leads to the outputs.
    """
    edges = [call.output for call in calls]
    return list(torch.autograd.grad(loss, edges, retain_graph=retain_graph, allow_unused=True))
