"""Relaxed predictive coding as numpy loops: backward weights in place of the weights, no f' on the way back, error weights.

The loops of the other oracles run here too: they ask a loop for what comes back through a vertex, for errors and for gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np

from oracle.layers import Array, Conv, Function, Gradients, Hidden, Layer, Linear, LinearSum, ReLU, Sigmoid, Tanh
from oracle.strict import StrictLoop, Trajectory, Vertex

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

    def _errors(self, v: Arrays, mu: Arrays) -> Arrays:
        eps = super()._errors(v, mu)
        return eps | {name: v[name] - _mix(matrix, mu[name]) for name, matrix in self.relaxation.error_weights.items() if name in mu}

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


def zero_divergence(loop: StrictLoop) -> Trajectory:
    """Strict steps at rate 1 on the levelled graph; a vertex at distance d learns from its error after d of them.

    Errors of the hidden vertices and gradients of each as it learns; no values, and no energies.
    """
    level = _levelled(loop)
    v = level._feed_forward()
    velocity = {u.name: np.zeros_like(v[u.name]) for u in level.hidden}
    errors: Arrays = {}
    gradients: Gradients = {}
    for t in range(max(level.distance.values()) + 1):
        eps = level._errors(v, level._predict(v))
        arrived = {u.name for u in level.vertices if level.distance[u.name] == t}
        silent = {name: error if name in arrived else np.zeros_like(error) for name, error in eps.items()}
        for name, gradient in level._learn(v, silent).items():
            gradients[name] = gradients.get(name, 0.0) + gradient
        errors |= {name: eps[name] for name in arrived}
        level._sweep(v, velocity, 1.0, 0.0, "jacobi")
    return Trajectory([], [{name: error for name, error in errors.items() if "@" not in name}], [], gradients)


def _levelled(loop: StrictLoop) -> StrictLoop:
    """The same loop with a chain of identity vertices on every edge that skips a level; edges out of a vertex share it."""
    vertices: list[Vertex] = []
    for u in loop.vertices:
        parents = []
        for parent in u.parents:
            last = parent
            for distance in range(loop.distance.get(parent, 0) - 1, loop.distance[u.name], -1):
                name = f"{parent}@{distance}"
                if all(vertex.name != name for vertex in vertices):
                    vertices.append(Vertex(name, (last,), Function()))
                last = name
            parents.append(last)
        vertices.append(replace(u, parents=tuple(parents)))
    other = copy.copy(loop)
    other.vertices, other.hidden, other.output = vertices, vertices[:-1], vertices[-1]
    other.distance = other._longest_paths()
    return other


def _axis(value: Array) -> int:
    return 1 if value.ndim in (4, 5) else -1


def _rows(value: Array) -> Array:
    moved = np.moveaxis(value, _axis(value), -1)
    return moved.reshape(-1, moved.shape[-1])


def _mix(matrix: Array, mu: Array) -> Array:
    return np.moveaxis(np.moveaxis(mu, _axis(mu), -1) @ matrix.T, -1, _axis(mu))
