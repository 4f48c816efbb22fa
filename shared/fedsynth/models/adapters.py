"""Low-rank adapters (LoRA, Hu et al. 2022): a frozen layer plus a narrow pair of layers that trains.

W x becomes W x + B (A x), where A has the shape of the layer but only `rank` outputs and B is linear, or a convolution over
1 x 1 pixels. Both are ordinary layers, so their per-patient gradients are those of any layer. B starts at zero: the
adapted model starts as exactly the public one. Since the sum is again a layer of W's shape, adapters can be merged into
plain weights, which is what is averaged, sent and drawn from.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

State = dict[str, Tensor]

Adaptable = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it.

    Args:
        base: the layer; its parameters stop to train.
        rank: outputs r of the narrow layer.
        generator: of A's first weights, which are normal with variance 1 / fan-in.

    Raises:
        ValueError: a convolution in groups, whose merged weight would be none of its shape; or a parametrised weight,
            which an adapter could not be merged into.
    """

    base: Adaptable
    down: Adaptable
    up: nn.Linear | nn.Conv2d

    def __init__(self, base: Adaptable, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        if parametrize.is_parametrized(base):
            raise ValueError("a layer with a parametrised weight (spectral normalisation) cannot be adapted")
        if not isinstance(base, nn.Linear) and base.groups != 1:
            raise ValueError("a convolution in groups cannot be adapted")
        self.base = base.requires_grad_(False)
        self.down = _narrow(base, rank)
        if isinstance(base, nn.Linear):
            self.up = nn.Linear(rank, base.out_features, bias=False)
        else:
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        with torch.no_grad():
            self.down.weight.normal_(0.0, _fan_in(base) ** -0.5, generator=generator)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returns, plus what the adapter adds."""
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same."""
        up, down = self.up.weight.flatten(1), self.down.weight
        if isinstance(self.base, nn.ConvTranspose2d):  # weights are (in, out, h, w)
            return self.base.weight + torch.einsum("or,irhw->iohw", up, down)
        return self.base.weight + torch.einsum("or,r...->o...", up, down)


def _narrow(base: Adaptable, rank: int) -> Adaptable:
    """A layer without bias of the kind and geometry of `base`, with `rank` outputs and weights of no meaning."""
    layer, shape = copy.deepcopy(base), list(base.weight.shape)
    shape[_output_dim(base)] = rank
    layer.weight = nn.Parameter(base.weight.detach().new_zeros(shape))
    layer.bias = None
    if isinstance(layer, nn.Linear):
        layer.out_features = rank
    else:
        layer.out_channels = rank
    return layer


def _output_dim(layer: Adaptable) -> int:
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def _fan_in(layer: Adaptable) -> float:
    """Inputs that meet in one output; of a transposed convolution, those places of the kernel that fall on it."""
    meet = layer.weight.numel() / layer.weight.shape[_output_dim(layer)]
    return meet / (layer.stride[0] * layer.stride[1]) if isinstance(layer, nn.ConvTranspose2d) else meet


def adapter_size(layer: Adaptable, rank: int) -> int:
    """Number of parameters of an adapter beside `layer`."""
    outputs = layer.weight.shape[_output_dim(layer)]
    return rank * (layer.weight.numel() // outputs + outputs)


def adapt(model: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Put an adapter beside every linear layer and convolution of `model`, and freeze everything else; in place.

    A layer that is no larger than its adapter would be trains itself.

    Args:
        model: the model, in its public state.
        rank: of the adapters, at least 1.
        generator: of their first weights.
    """
    model.requires_grad_(False)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Adaptable)]
    for name, layer in layers:
        if layer.weight.numel() <= adapter_size(layer, rank):
            layer.requires_grad_(True)
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Adapted(layer, rank, generator))


def merged_state(model: nn.Module) -> State:
    """The state of the plain model that computes what `model` with its adapters does (a copy)."""
    state = plain_state(model)
    for name, layer in _adapted(model).items():
        state[f"{name}.weight"] = layer.merged_weight()
    return state


def plain_state(model: nn.Module) -> State:
    """The state of the plain model without what its adapters add (a copy)."""
    adapted = _adapted(model)
    state: State = {}
    for key, tensor in model.state_dict().items():
        owner = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if owner is None:
            state[key] = tensor.detach().clone()
        elif key.startswith(f"{owner}.base."):
            state[f"{owner}.{key.removeprefix(f'{owner}.base.')}"] = tensor.detach().clone()
    return state


def adapter_state(model: nn.Module) -> State:
    """The weights of the adapters alone (a copy); empty for a model without any."""
    return {
        f"{name}.{part}.weight": getattr(layer, part).weight.detach().clone()
        for name, layer in _adapted(model).items()
        for part in ("down", "up")
    }


@torch.no_grad()
def load_adapters(model: nn.Module, state: State) -> None:
    """Set the weights of the adapters of `model` to those that `adapter_state` returned.

    Raises:
        ValueError: `state` is of other adapters.
    """
    expected = adapter_state(model)
    if {name: tensor.shape for name, tensor in expected.items()} != {name: t.shape for name, t in state.items()}:
        raise ValueError("the stored adapters are not those of the model")
    for name, tensor in state.items():
        model.get_parameter(name).copy_(tensor)


def _adapted(model: nn.Module) -> dict[str, Adapted]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapted)}
