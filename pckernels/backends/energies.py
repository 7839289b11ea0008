"""The energies that a native run has summed, slot by slot: F at every step, and whether they say that all is well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pckernels.backends.path_lengths import Plan
from pckernels.backends.results import diverged
from pckernels.compiler import Compiled
from pckernels.graph import ComputationGraph

_GOOD = torch.tensor(True)


def trajectory(energies: Tensor, still: Sequence[int]) -> Tensor:
    """(steps + 1,): F at the steps that ran; a loss stays where its prediction does (`still`: its slot)."""
    total = energies.sum(1)
    for slot in still:  # one by one: a list of them would have to travel to the device
        total[1:] += energies[0, slot]
    return total


def verdict(energies: Tensor, still: Sequence[int], may_diverge: bool) -> tuple[Tensor, Callable[[], Tensor | None]]:
    """Whether all is well, and with `may_diverge` a function that tells the steps that are not.

    On the CPU a look at the sums is mostly enough.
    """
    if energies.device.type == "cpu" and _plainly_good(energies.tolist(), still):
        return _GOOD, lambda: None
    total = trajectory(energies, still)
    divergence = diverged(total) if may_diverge else None
    finite = total.isfinite().all()
    return (finite if divergence is None else finite & ~divergence.any()), lambda: divergence


def _plainly_good(rows: list[list[float]], still: Sequence[int]) -> bool:
    """Finite, and never above what divergence takes."""
    moving = sum(rows[0][slot] for slot in still)
    start, *later = map(sum, rows)
    bound = 1e3 * (abs(start) + 1.0)
    return math.isfinite(start) and all(abs(each + moving) <= bound for each in later)


def sweep_energy(plan: Plan, code: Compiled, squares: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """F(t) = loss + 1/2 sum_i c_k(t)^2 ||delta_i||^2, where every vertex has one path length k."""
    total = losses.double().sum().repeat(len(plan.rows))
    for name, square in squares.items():
        for length in code.lengths.get(name, ()):
            c = torch.tensor([row[length] if length < len(row) else 0.0 for row in plan.rows], dtype=torch.float64)
            weight = code.coefficients.get(name, 0.0)
            total = total + (0.5 * c.square() * square if weight else 0.0)
    return total.to(losses.dtype)


def arrival_energy(graph: ComputationGraph, squares: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """F after d updates: the loss, and the errors of the vertices that have learned by then."""
    energies = [losses.double().sum()]
    for distance in range(1, graph.depth + 1):
        arrived = [square for name, square in squares.items() if graph[name].distance == distance]
        energies.append(energies[-1] + 0.5 * sum(arrived))
    return torch.stack(energies).to(losses.dtype)
