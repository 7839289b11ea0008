"""Fixed prediction and zero divergence step by step, as plain numpy loops from their equations.

The loops say what comes back through a vertex, what errors are and what weights learn: those of Strict, of relaxed rules and of
precisions.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from oracle.layers import Array, Function, Gradients
from oracle.strict import StrictLoop, Trajectory, Vertex

Arrays = dict[str, Array]


def fixed_prediction(loop: StrictLoop, steps: int, rate: float) -> Trajectory:
    """eps_i <- eps_i + rate (sum over children of J_j^T pi_j eps_j - pi_i eps_i), with J, mu and inputs of the feed-forward pass."""
    v = loop._feed_forward()
    mu = loop._predict(v)
    eps = loop._errors(v, mu)
    values, errors, energies = [], [], []
    for t in range(steps + 1):
        values.append({u.name: loop._expected(u.name, mu) + eps[u.name] for u in loop.hidden})
        errors.append(dict(eps))
        energies.append(loop._energy(eps, mu))
        if t < steps:
            feedback, pull = loop._feedback(v, eps), loop._weighted(eps)
            eps = eps | {u.name: eps[u.name] + rate * (feedback[u.name] - pull[u.name]) for u in loop.hidden}
    return Trajectory(values, errors, energies, loop._learn(v, eps))


def zero_divergence(loop: StrictLoop) -> Trajectory:
    """Strict steps at rate 1 on the levelled graph; a vertex at distance d learns from its error after d of them.

    What is shown at a step: of vertices that have learned the value and the error that they had then; of the others those of the
    feed-forward pass, and 0. F is of these errors, beside the feed-forward loss.
    """
    level = levelled(loop)
    v = level._feed_forward()
    loss = level.loss[0](v[level.output.name], level.target)
    velocity = {u.name: np.zeros_like(v[u.name]) for u in level.hidden}
    shown, silent = dict(v), {name: np.zeros_like(value) for name, value in v.items()}
    values, errors, energies = [], [], []
    gradients: Gradients = {}
    for t in range(max(level.distance.values()) + 1):
        eps = level._errors(v, level._predict(v))
        arrived = {u.name for u in level.vertices if level.distance[u.name] == t}
        for name, gradient in level._learn(v, {name: eps[name] if name in arrived else silent[name] for name in eps}).items():
            gradients[name] = gradients.get(name, 0.0) + gradient
        shown |= {name: v[name].copy() for name in arrived}
        known = {**(errors[-1] if errors else {u.name: silent[u.name] for u in loop.vertices})}
        errors.append(known | {name: eps[name] for name in arrived if name in known})
        values.append({u.name: shown[u.name] for u in loop.hidden})
        energies.append(loss + sum(0.5 * float((errors[-1][u.name] ** 2).sum()) for u in loop.hidden))
        level._sweep(v, velocity, 1.0, 0.0, "jacobi")
    return Trajectory(values, errors, energies, gradients)


def levelled(loop: StrictLoop) -> StrictLoop:
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
