"""Strict's loop with value nodes that are held, inputs that are free, and targets that are known in part; plain numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from oracle.layers import Array, Function, Gradients
from oracle.strict import Loss, StrictLoop, Trajectory, Vertex

Arrays = dict[str, Array]
Held = tuple[Array, Array]  # values, and where they hold
Freed = tuple[float, Array]  # precision and mean of a prior


class Root(Function):
    """A vertex without parents, which starts at a constant."""

    def __init__(self, start: Array):
        super().__init__()
        self.start = start

    def forward(self, parents: Sequence[Array]) -> Array:
        return self.start

    def pull_back(self, parents: Sequence[Array], g: Array) -> tuple[list[Array], Gradients]:
        return [], {}


def partial_loss(loss: Loss, known: Array) -> Loss:
    """Over the known entries alone: the others are taken for as predicted."""
    return (lambda mu, y: loss[0](np.where(known, mu, y), y)), (lambda mu, y: np.where(known, loss[1](mu, y), 0.0))


class ClampedLoop(StrictLoop):
    """`loop` with clamps; `name` is what the package calls its input "x"."""

    def __init__(self, loop: StrictLoop, name: str, held: Mapping[str, Held], freed: Freed | None = None, known: Array | None = None):
        vertices = [replace(u, parents=tuple(name if p == "x" else p for p in u.parents)) for u in loop.vertices]
        x, self.held, self.prior, self.free = loop.clamped["x"], held, freed, name if freed else None
        roots = [Vertex(name, (), Root(x))] if freed else []
        loss = loop.loss if known is None else partial_loss(loop.loss, known)
        super().__init__({} if freed else {name: x}, [*roots, *vertices], loop.target, loss)

    def _feed_forward(self) -> Arrays:
        v = dict(self.clamped)
        for u in self.vertices:
            v[u.name] = self._holding(u.name, u.function.forward([v[p] for p in u.parents]))
        return v

    def _holding(self, name: str, value: Array) -> Array:
        return np.where(self.held[name][1], self.held[name][0], value) if name in self.held else value

    def _precision(self, name: str) -> float:
        return self.prior[0] if self.prior and name == self.free else 1.0

    def _errors(self, v: Arrays, mu: Arrays) -> Arrays:
        eps = super()._errors(v, mu)
        if self.free:
            eps[self.free] = v[self.free] - self.prior[1] if self.prior[0] else np.zeros_like(v[self.free])
        return eps

    def _energy(self, eps: Arrays, mu: Arrays) -> float:
        squares = [0.5 * self._precision(u.name) * float((eps[u.name] ** 2).sum()) for u in self.hidden]
        return sum(squares) + self.loss[0](mu[self.output.name], self.target)

    def _sweep(self, v: Arrays, velocity: Arrays, rate: float, momentum: float, sweep: str) -> None:
        for group in self._groups(sweep):
            eps = self._errors(v, self._predict(v))
            feedback = self._feedback(v, eps)
            for name in group:
                drive = feedback[name] - self._precision(name) * eps[name]
                drive = np.where(self.held[name][1], 0.0, drive) if name in self.held else drive
                velocity[name] = momentum * velocity[name] + drive
            for name in group:
                v[name] = v[name] + rate * velocity[name]

    # Error optimisation: the state of a free input is its value, of every other hidden vertex its error where nothing is held.

    def optimize_errors(self, steps: int, rate: float, momentum: float, sweep: str) -> Trajectory:
        state = {u.name: np.zeros_like(self._feed_forward()[u.name]) for u in self.hidden}
        velocity = dict(state)
        values, errors, energies = [], [], []
        for t in range(steps + 1):
            v, mu = self.follow(state)
            eps = self._errors(v, mu)
            values.append({u.name: v[u.name] for u in self.hidden})
            errors.append(eps)
            energies.append(self._energy(eps, mu))
            for group in self._groups(sweep) if t < steps else ():
                drive = self.drives(state)
                velocity |= {name: momentum * velocity[name] + drive[name] for name in group}
                state = state | {name: state[name] + rate * velocity[name] for name in group}
        return Trajectory(values, errors, energies, self._learn(v, errors[-1]))

    def follow(self, state: Arrays) -> tuple[Arrays, Arrays]:
        v, mu = dict(self.clamped), {}
        for u in self.vertices:
            mu[u.name] = u.function.forward([v[p] for p in u.parents])
            v[u.name] = self._holding(u.name, mu[u.name] + state.get(u.name, 0.0))
        return v, mu

    def drives(self, state: Arrays) -> Arrays:
        """-dF/dstate, from the outputs up: a held entry pulls on its prediction, and nothing passes through it."""
        v, mu = self.follow(state)
        eps = self._errors(v, mu)
        total = {u.name: np.zeros_like(mu[u.name]) for u in self.vertices}
        total[self.output.name] = eps[self.output.name]
        found = {}
        for u in reversed(self.vertices):
            on = self.held[u.name][1] if u.name in self.held else np.zeros(1, dtype=bool)
            pull = np.where(on, eps[u.name], total[u.name])
            found[u.name] = np.where(on, 0.0, total[u.name] - self._precision(u.name) * eps[u.name])
            for parent, g in zip(u.parents, u.function.pull_back([v[p] for p in u.parents], pull)[0], strict=True):
                if parent in total:
                    total[parent] = total[parent] + g
        return found
