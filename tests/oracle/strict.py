"""Strict predictive coding as a plain numpy loop: values, errors and energies at every step, then local gradients.

The loop runs in the precision of its inputs. It subtracts predictions from values, as the equations do, and small errors
lose digits by that: numpy's longdouble says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oracle.layers import Array, Function, Gradients, accumulate

Loss = tuple[Callable[[Array, Array], float], Callable[[Array, Array], Array]]


@dataclass(frozen=True)
class Vertex:
    name: str
    parents: tuple[str, ...]
    function: Function


@dataclass
class Trajectory:
    """State at t = 0 .. T (hidden vertices; errors also of "output"), and dF/dtheta of the last state."""

    values: list[dict[str, Array]]
    errors: list[dict[str, Array]]
    energies: list[float]
    gradients: Gradients


def squared_error() -> Loss:
    return (lambda mu, target: 0.5 * float(((mu - target) ** 2).sum())), (lambda mu, target: target - mu)


def cross_entropy() -> Loss:
    """Softmax cross-entropy on logits, classes last, integer targets; the error is onehot - softmax."""

    def log_softmax(mu: Array) -> Array:
        shifted = mu - mu.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def loss(mu: Array, target: Array) -> float:
        return -float(np.take_along_axis(log_softmax(mu), target[..., None], -1).sum())

    def error(mu: Array, target: Array) -> Array:
        return np.eye(mu.shape[-1])[target] - np.exp(log_softmax(mu))

    return loss, error


class StrictLoop:
    """The last vertex is the output: it holds no free value, its error is -d loss / d mu."""

    def __init__(self, inputs: dict[str, Array], vertices: Sequence[Vertex], target: Array, loss: Loss):
        self.clamped, self.vertices, self.target, self.loss = inputs, list(vertices), target, loss
        self.hidden, self.output = self.vertices[:-1], self.vertices[-1]
        self.distance = self._longest_paths()

    def run(self, steps: int, rate: float, momentum: float = 0.0, sweep: str = "jacobi") -> Trajectory:
        v = self._feed_forward()
        velocity = {u.name: np.zeros_like(v[u.name]) for u in self.hidden}
        values, errors, energies = [], [], []
        for t in range(steps + 1):
            mu = self._predict(v)
            eps = self._errors(v, mu)
            values.append({u.name: v[u.name].copy() for u in self.hidden})
            errors.append(eps)
            energies.append(self._energy(eps, mu))
            if t < steps:
                self._sweep(v, velocity, rate, momentum, sweep)
        return Trajectory(values, errors, energies, self._learn(v, errors[-1]))

    def fixed_prediction(self, steps: int, rate: float, groups: Sequence[Sequence[str]]) -> tuple[dict[str, Array], Gradients]:
        """Errors relax over the feed-forward pass, `steps` times in one group before the next starts; then weights learn."""
        v = self._feed_forward()
        eps = self._errors(v, self._predict(v))
        for group in groups:
            for _ in range(steps):
                feedback = self._feedback(v, eps)
                eps |= {name: eps[name] + rate * (feedback[name] - self._weighted(eps)[name]) for name in group}
        return eps, self._learn(v, eps)

    def _sweep(self, v: dict[str, Array], velocity: dict[str, Array], rate: float, momentum: float, sweep: str) -> None:
        for group in self._groups(sweep):
            eps = self._errors(v, self._predict(v))
            feedback, pull = self._feedback(v, eps), self._weighted(eps)
            for name in group:
                velocity[name] = momentum * velocity[name] - pull[name] + feedback[name]
            for name in group:
                v[name] = v[name] + rate * velocity[name]

    def _groups(self, sweep: str) -> list[list[str]]:
        names = [u.name for u in self.hidden]
        if sweep == "jacobi":
            return [names]
        if sweep == "top_down":
            return [[n for n in names if self.distance[n] == d] for d in range(1, max(self.distance.values()) + 1)]
        return [[n for n in names if self.distance[n] % 2 == parity] for parity in (1, 0)]

    def _feed_forward(self) -> dict[str, Array]:
        v = dict(self.clamped)
        for u in self.vertices:
            v[u.name] = u.function.forward([v[p] for p in u.parents])
        return v

    def _predict(self, v: dict[str, Array]) -> dict[str, Array]:
        return {u.name: u.function.forward([v[p] for p in u.parents]) for u in self.vertices}

    def _errors(self, v: dict[str, Array], mu: dict[str, Array]) -> dict[str, Array]:
        eps = {u.name: v[u.name] - mu[u.name] for u in self.hidden}
        eps[self.output.name] = self.loss[1](mu[self.output.name], self.target)
        return eps

    def _expected(self, name: str, mu: dict[str, Array]) -> Array:
        """What a value is compared with."""
        return mu[name]

    def _weighted(self, eps: dict[str, Array]) -> dict[str, Array]:
        """pi_i eps_i."""
        return eps

    def _energy(self, eps: dict[str, Array], mu: dict[str, Array]) -> float:
        pulls = self._weighted(eps)
        hidden = sum(0.5 * float((eps[u.name] * pulls[u.name]).sum()) for u in self.hidden)
        return hidden + self.loss[0](mu[self.output.name], self.target)

    def _feedback(self, v: dict[str, Array], eps: dict[str, Array]) -> dict[str, Array]:
        """sum over children j of (d mu_j / d v_i)^T pi_j eps_j, for every vertex i."""
        total = {u.name: np.zeros_like(eps[u.name]) for u in self.hidden}
        eps = self._weighted(eps)
        for child in self.vertices:
            for parent, g in zip(child.parents, self._to_parents(child, v, eps[child.name]), strict=True):
                if parent in total:
                    total[parent] = total[parent] + g
        return total

    def _to_parents(self, u: Vertex, v: dict[str, Array], g: Array) -> list[Array]:
        """(d mu / d parent)^T g for every parent."""
        return u.function.pull_back([v[p] for p in u.parents], g)[0]

    @property
    def theta(self) -> dict[str, Array]:
        """What learns, by name; what is written into these arrays is what the loop computes with."""
        return {name: array for u in self.vertices for name, array in u.function.parameters().items()}

    def _learn(self, v: dict[str, Array], eps: dict[str, Array]) -> Gradients:
        gradients: Gradients = {}
        eps = self._weighted(eps)
        for u in self.vertices:
            _, mine = u.function.pull_back([v[p] for p in u.parents], eps[u.name])
            accumulate(gradients, {name: -g for name, g in mine.items()})
        return gradients

    def _longest_paths(self) -> dict[str, int]:
        distance = {u.name: 0 for u in self.vertices}
        for child in reversed(self.vertices):
            for parent in child.parents:
                if parent in distance:
                    distance[parent] = max(distance[parent], distance[child.name] + 1)
        return distance
