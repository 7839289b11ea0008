"""muPC: a parametrisation under which deep predictive coding networks train at the rates of shallow ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.errors import Unsupported

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Scale:
    """A forward hook that multiplies what a layer predicts."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factor


def mupc(module: nn.Module, residual: bool = True, seed: int | None = None) -> nn.Module:
    """Give a module the muPC parametrisation, in place: unit weights, and predictions scaled by depth and width.

    Each layer (Linear, Conv), in the order in which they were registered, predicts a (W x + b) in place of W x + b, with W ~ N(0, 1)
    and b = 0 at first, where N is its number of inputs (of a convolution, channels times the kernel's size) and L that of layers:

        first layer  a = 1 / sqrt(N)
        between      a = 1 / sqrt(N L), or 1 / sqrt(N) without residual connections
        last layer   a = 1 / N

    What a unit gets is then of order 1 at any depth, and rates found on a network of a few layers hold for a hundred. The factors are
    forward hooks: the state_dict has the unit weights alone, and is to be loaded into a module that went through `mupc` as well.

    Args:
        module: the layers' order in it is that of the forward pass.
        residual: whether the layers between the first and the last are branches of residual blocks, as in x + W f(x).
        seed: of the weights; None draws from torch's global generator.

    Returns:
        The module itself.

    Raises:
        ValueError: fewer than two layers. TypeError: not a module, or an argument of the wrong type.
        Unsupported: a weight that no such layer holds, or that two of them share.

    Source: Innocenti, Achour & Buckley 2025 (arXiv 2505.13124), whose D is the first layer's N.
    """
    _check(module, residual, seed)
    layers = [layer for layer in module.modules() if isinstance(layer, _LAYERS)]
    _check_layers(module, layers)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for k, layer in enumerate(layers):
        _initialise(layer, generator)
        _scale(layer, _factor(k, len(layers), layer.weight[0].numel(), residual))
    return module


def _factor(k: int, count: int, inputs: int, residual: bool) -> float:
    if k == 0:
        return 1.0 / math.sqrt(inputs)
    if k == count - 1:
        return 1.0 / inputs
    return 1.0 / math.sqrt(inputs * count if residual else inputs)


def _initialise(layer: Any, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        if layer.bias is not None:
            layer.bias.zero_()


def _scale(layer: nn.Module, factor: float) -> None:
    """One factor a layer, however often it is given."""
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(hook, Scale):
            del layer._forward_hooks[key]
    layer.register_forward_hook(Scale(factor))


def _check(module: Any, residual: Any, seed: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}.")
    if not isinstance(residual, bool):
        raise TypeError(f"residual must be True or False; got {type(residual).__name__}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None; got {type(seed).__name__}.")


def _check_layers(module: nn.Module, layers: list[Any]) -> None:
    if len(layers) < 2:
        raise ValueError(f"mupc scales a first, a last and the layers between; this module has {len(layers)} of Linear and Conv.")
    weights = {id(layer.weight) for layer in layers}
    if len(weights) < len(layers):
        raise Unsupported("Two layers share a weight, which would have to be scaled in two ways. Give each its own.")
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in weights:
            raise Unsupported(f"muPC says nothing of {name!r}, which is the weight of neither a Linear nor a Conv. Leave such layers out.")
