"""The clipped sum of a chunk of patients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsynth.dp.bookkeeping.capture import (
    check_covered,
    check_rows_are_items,
    check_unchanged,
    output_gradients,
    recorded,
)
from fedsynth.dp.bookkeeping.gradients import PatientGradients
from fedsynth.dp.bookkeeping.layers import check_layer, gradients_of, parameters_of
from fedsynth.dp.bookkeeping.mixing import check_rows
from fedsynth.dp.bookkeeping.passes import Pass, UnsupportedLayerError

# Added to a norm before the clip is divided by it, as Opacus does.
_STABILITY = 1e-6


class Bookkeeper:
    """Computes clipped sums of per-patient gradients of `model` with respect to `parameters`."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Find the layer of every parameter.

        Raises:
            UnsupportedLayerError: a parameter has no layer, two layers, or one without an exact rule.
        """
        self._model = model
        self._parameters = list(parameters)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted = {id(parameter) for parameter in parameters}
        if not wanted <= set(names):
            raise UnsupportedLayerError("the optimiser has parameters that the model has not")
        self._trained = {key: names[key] for key in wanted}
        self._layers: dict[str, nn.Module] = {}
        owner: dict[int, str] = {}
        for name, layer in _layers(model):
            own = {id(parameter) for parameter in parameters_of(layer).values()} & wanted
            if not own:
                continue
            check_layer(name, layer)
            for key in own:
                if key in owner:
                    raise UnsupportedLayerError(f"parameter {names[key]!r} is shared by {owner[key]!r} and {name!r}")
                owner[key] = name
            self._layers[name] = layer
        missing = sorted(self._trained[key] for key in wanted - set(owner))
        if missing:
            raise UnsupportedLayerError(f"parameters {missing} belong to no layer with a rule")

    def clipped_sums(
        self, losses: Callable[[], Tensor], patients: int, clip: float, check_mixing: bool = False
    ) -> tuple[list[Tensor], int]:
        """Sums over patients of the clipped gradients, one for each parameter, in its shape; and the number of losses.

        A patient's gradient is that of the mean of its losses; it is multiplied by ``min(1, clip / (norm + 1e-6))``. One
        that is not finite counts as 0.

        Args:
            losses: computes (patients * k,) losses with the model, the k items of a patient being neighbours.
            patients: at least 1.
            clip: bound of a patient's Euclidean norm over all parameters.
            check_mixing: test, at the price of one more backward pass, that the first item's loss uses its row only.

        Raises:
            UnsupportedLayerError: the way in which the losses use the model has no exact gradient by patient.
            MixedSamplesError: a loss depends on another sample.
            ValueError: the losses cannot be split evenly over the patients.
        """
        with torch.enable_grad(), recorded(self._layers) as tape:
            found = losses()
        items, remainder = divmod(len(found), patients)
        if remainder or not items:
            raise ValueError(f"{len(found)} losses cannot be split evenly over {patients} patients")
        calls = tape.calls
        check_covered(found, calls, self._trained)
        check_rows_are_items(calls, len(found))
        if check_mixing and len(found) > 1:
            check_rows(output_gradients(found[0], calls, retain_graph=True))
        gradients = output_gradients(found.sum() / items, calls)
        with torch.no_grad(), torch.autocast(found.device.type, enabled=False):
            passes = []
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    continue
                # Norms and sums in at least float32, from the same values: what is added is what was measured.
                outputs = gradient if gradient.dtype == torch.float64 else gradient.float()
                passes.append(Pass(call.layer, call.inputs, outputs, patients))
            check_unchanged(calls)
            return self._sum(passes, clip), len(found)

    def _sum(self, passes: list[Pass], clip: float) -> list[Tensor]:
        sums: dict[int, Tensor] = {}
        gradients = self._gradients(passes)
        if gradients:
            norms = torch.stack([g.norms() for _, g in gradients]).norm(dim=0)
            finite = norms.isfinite()
            if not bool(finite.all()):
                # 0 times infinity is NaN, so patients without a finite gradient are left out, not weighted by 0.
                gradients = self._gradients([_only(x, finite) for x in passes]) if bool(finite.any()) else []
                norms = norms[finite]
            factors = (clip / (norms + _STABILITY)).clamp(max=1.0)
            sums = {key: g.weighted_sum(factors) for key, g in gradients}
        return [
            sums[id(p)].to(p.dtype) if id(p) in sums else torch.zeros_like(p, requires_grad=False)
            for p in self._parameters
        ]

    def _gradients(self, passes: list[Pass]) -> list[tuple[int, PatientGradients]]:
        return [
            (id(parameters_of(x.layer)[name]), gradient)
            for x in passes
            for name, gradient in gradients_of(x).items()
            if id(parameters_of(x.layer)[name]) in self._trained
        ]


def _only(x: Pass, patients: Tensor) -> Pass:
    items = patients.repeat_interleave(len(x.outputs) // x.patients)
    return Pass(x.layer, x.inputs[items], x.outputs[items], int(patients.sum()))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may own parameters; what is inside a parametrisation belongs to the parametrised layer."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):
            yield name, module


@contextmanager
def weights_of_one_step(model: nn.Module) -> Iterator[None]:
    """Fix parametrised weights for as long as the context is open, computed once at its start.

    Spectral normalisation advances its power iteration at every use. Its vectors must not tell how many chunks, or
    whether any patient, a step had: they advance once a step.
    """
    with parametrize.cached():
        for module in model.modules():
            if parametrize.is_parametrized(module):
                for name in module.parametrizations:  # type: ignore[union-attr]
                    getattr(module, name)
        yield
