"""The rules that descend F in other ways than Strict, as plain numpy loops from their equations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from oracle.layers import Array
from oracle.strict import StrictLoop, Trajectory

Arrays = dict[str, Array]


def nudged(loop: StrictLoop, betas: Sequence[float], steps: int, rate: float, **options: object) -> Trajectory:
    """Strict on F_beta = hidden energy + beta * loss: the trajectory of the first beta, and the mean of dF_beta/dtheta / beta."""
    loss, error = loop.loss
    runs = []
    for beta in betas:
        pulled = copy.copy(loop)
        pulled.loss = (lambda mu, y, b=beta: b * loss(mu, y)), (lambda mu, y, b=beta: b * error(mu, y))
        runs.append(pulled.run(steps, rate, **options))
    mean = {name: sum(run.gradients[name] / beta for run, beta in zip(runs, betas, strict=True)) / len(betas) for name in runs[0].gradients}
    return replace(runs[0], gradients=mean)


def incremental(
    loop: StrictLoop, steps: int, rate: float, weight_rate: float, momentum: float = 0.0, sweep: str = "jacobi"
) -> tuple[Trajectory, Arrays]:
    """Values and weights from the same old state at every step: the trajectory, with the sum of the gradients; and the last weights."""
    theta = loop.theta
    before = {name: array.copy() for name, array in theta.items()}
    v = loop._feed_forward()
    velocity = {u.name: np.zeros_like(v[u.name]) for u in loop.hidden}
    total = {name: np.zeros_like(array) for name, array in theta.items()}
    values, errors, energies = [], [], []
    for t in range(steps + 1):
        mu = loop._predict(v)
        values.append({u.name: v[u.name].copy() for u in loop.hidden})
        errors.append(loop._errors(v, mu))
        energies.append(loop._energy(errors[-1], mu))
        if t < steps:
            gradients = loop._learn(v, errors[-1])
            loop._sweep(v, velocity, rate, momentum, sweep)
            for name, gradient in gradients.items():
                total[name] += gradient
                theta[name] -= weight_rate * gradient
    after = {name: array.copy() for name, array in theta.items()}
    for name, array in theta.items():
        array[...] = before[name]
    return Trajectory(values, errors, energies, total), after


def error_optimization(loop: StrictLoop, steps: int, rate: float, momentum: float = 0.0, sweep: str = "jacobi") -> Trajectory:
    """eps_i <- eps_i + rate * velocity_i, velocity_i <- momentum * velocity_i - dF/deps_i, with v_i = mu_i + eps_i all the way down."""
    at_start = loop._feed_forward()
    eps = {u.name: np.zeros_like(at_start[u.name]) for u in loop.hidden}
    velocity = dict(eps)
    values, errors, energies = [], [], []
    for t in range(steps + 1):
        v, mu = follow(loop, eps)
        values.append({u.name: v[u.name] for u in loop.hidden})
        errors.append({**eps, loop.output.name: loop.loss[1](mu[loop.output.name], loop.target)})
        energies.append(loop._energy(eps, mu))
        for group in loop._groups(sweep) if t < steps else ():
            delta = total_deltas(loop, *follow(loop, eps))
            velocity |= {name: momentum * velocity[name] - (loop._weighted(eps)[name] - delta[name]) for name in group}
            eps = eps | {name: eps[name] + rate * velocity[name] for name in group}
    return Trajectory(values, errors, energies, loop._learn(v, errors[-1]))


def follow(loop: StrictLoop, eps: Arrays) -> tuple[Arrays, Arrays]:
    """Values and predictions by one forward pass; the output's value is its prediction."""
    v, mu = dict(loop.clamped), {}
    for u in loop.vertices:
        mu[u.name] = u.function.forward([v[p] for p in u.parents])
        v[u.name] = mu[u.name] + eps.get(u.name, 0.0)
    return v, mu


def total_deltas(loop: StrictLoop, v: Arrays, mu: Arrays) -> Arrays:
    """-dloss/dv_i through everything behind i, by the chain rule from the output up."""
    delta = {u.name: np.zeros_like(mu[u.name]) for u in loop.vertices}
    delta[loop.output.name] = loop.loss[1](mu[loop.output.name], loop.target)
    for u in reversed(loop.vertices):
        for parent, g in zip(u.parents, loop._to_parents(u, v, delta[u.name]), strict=True):
            if parent in delta:
                delta[parent] = delta[parent] + g
    return delta
