"""Relaxed predictive coding as numpy loops: backward weights in place of the weights, no f' on the way back, error weights.

The loops of the other oracles run here too: they ask a loop for what comes back through a vertex, for errors and for gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from oracle.layers import Array, Conv, Function, Gradients, Hidden, Layer, Linear, LinearSum, ReLU, Sigmoid, Tanh
from oracle.strict import StrictLoop, Vertex

Arrays = dict[str, Array]


@dataclass
class Relaxation:
    """psi by the weight's name, or None for W; E by the vertex's name. `learned`: which of the two learn."""

    psi: Arrays | None
    derivative: bool
    error_weights: Arrays
    learned: tuple[str, ...]


class RelaxedLoop(StrictLoop):
    def __init__(self, loop: StrictLoop, relaxation: Relaxation):
        super().__init__(loop.clamped, loop.vertices, loop.target, loop.loss)
        self.relaxation = relaxation

    @property
    def theta(self) -> Arrays:
        found = super().theta
        if "feedback" in self.relaxation.learned:
            found |= {f"pc.feedback.{name}": psi for name, psi in (self.relaxation.psi or {}).items()}
        if "error_weights" in self.relaxation.learned:
            found |= {f"pc.error_weights.{name}": matrix for name, matrix in self.relaxation.error_weights.items()}
        return found

    def _to_parents(self, u: Vertex, v: Arrays, g: Array) -> list[Array]:
        parents = [v[p] for p in u.parents]
        inputs = u.function._inputs(parents)
        for layer, x in zip(reversed(u.function.chain), reversed(inputs[:-1]), strict=True):
            g = self._back(layer, x, g)
        return self._split(u.function, parents, g)

    def _back(self, layer: Layer, x: Array, g: Array) -> Array:
        if isinstance(layer, ReLU | Tanh | Sigmoid) and not self.relaxation.derivative:
            return g
        return self._with_psi(layer).feedback(x, g)

    def _with_psi(self, layer: Layer) -> Layer:
        name = layer.weight_name if isinstance(layer, Linear) else f"{layer.name}.weight" if isinstance(layer, Conv) else ""
        if self.relaxation.psi is None or name not in self.relaxation.psi:
            return layer
        other = copy.copy(layer)
        other.weight = self.relaxation.psi[name]
        return other

    def _split(self, function: Function, parents: list[Array], g: Array) -> list[Array]:
        if isinstance(function, LinearSum):
            return [self._with_psi(m).feedback(x, g) for m, x in zip(function.maps, parents, strict=True)]
        if isinstance(function, Hidden) and not self.relaxation.derivative:
            o, c = parents
            return [g * np.tanh(c), g * o]
        return function.split(parents, g)

    def _expected(self, name: str, mu: Arrays) -> Array:
        matrix = self.relaxation.error_weights.get(name)
        return mu[name] if matrix is None else _mix(matrix, mu[name])

    def _errors(self, v: Arrays, mu: Arrays) -> Arrays:
        eps = super()._errors(v, mu)
        return eps | {name: v[name] - self._expected(name, mu) for name in self.relaxation.error_weights if name in mu}

    def _learn(self, v: Arrays, eps: Arrays) -> Gradients:
        gradients = super()._learn(v, eps)
        mu = self._predict(v)
        for key in self.theta:
            if key.startswith("pc.feedback."):
                gradients[key] = gradients[key.removeprefix("pc.feedback.")].copy()
            elif key.startswith("pc.error_weights."):
                name = key.removeprefix("pc.error_weights.")
                gradients[key] = -_rows(eps[name]).T @ _rows(mu[name])
        return gradients


def _axis(value: Array) -> int:
    return 1 if value.ndim in (4, 5) else -1


def _rows(value: Array) -> Array:
    moved = np.moveaxis(value, _axis(value), -1)
    return moved.reshape(-1, moved.shape[-1])


def _mix(matrix: Array, mu: Array) -> Array:
    return np.moveaxis(np.moveaxis(mu, _axis(mu), -1) @ matrix.T, -1, _axis(mu))
