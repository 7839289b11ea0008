"""muPC in the numpy loops: the layers of a model scaled by depth and width, each from the formula of its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from oracle.layers import Array, Conv, Gradients, Layer, Linear
from oracle.strict import StrictLoop


class Scaled(Layer):
    """a f(x)."""

    def __init__(self, layer: Layer, factor: Array):
        self.layer, self.factor = layer, factor

    def forward(self, x: Array) -> Array:
        return self.factor * self.layer.forward(x)

    def feedback(self, x: Array, g: Array) -> Array:
        return self.layer.feedback(x, self.factor * g)

    def learn(self, x: Array, g: Array) -> Gradients:
        return self.layer.learn(x, self.factor * g)

    def parameters(self) -> Gradients:
        return self.layer.parameters()


def scaled(loop: StrictLoop, parameters: Mapping[str, Array], residual: bool) -> StrictLoop:
    """The loop with these parameters, and 1 / sqrt(N) at its first layer, 1 / N at its last, and 1 / sqrt(N L) or 1 / sqrt(N) between."""
    loop = copy.deepcopy(loop)
    functions = [u.function for u in loop.vertices]
    layers = [layer for function in functions for layer in function.chain if isinstance(layer, Linear | Conv)]
    for function in functions:
        function.chain = tuple(_scaled(layer, layers, parameters, residual) for layer in function.chain)
    return loop


def _scaled(layer: Layer, layers: list[Layer], parameters: Mapping[str, Array], residual: bool) -> Layer:
    if layer not in layers:
        return layer
    name = layer.weight_name.removesuffix(".weight") if isinstance(layer, Linear) else layer.name
    layer.weight = parameters[f"{name}.weight"]
    layer.bias = parameters.get(f"{name}.bias")
    inputs, place = layer.weight[0].size, layers.index(layer)
    one = layer.weight.dtype.type(1)
    if place == 0:
        return Scaled(layer, one / np.sqrt(one * inputs))
    if place == len(layers) - 1:
        return Scaled(layer, one / inputs)
    return Scaled(layer, one / np.sqrt(one * inputs * (len(layers) if residual else 1)))
