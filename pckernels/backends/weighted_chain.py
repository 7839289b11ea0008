"""Fixed prediction with precisions on a chain, without its steps.

With e_i = pi_i eps_i the steps read e_i <- (1 - rate pi_i) e_i + rate pi_i J^T e_(i-1), i counting from the output, so that
e_k after T steps is c_k(T) delta_k with c_k(t+1) = (1 - rate pi_k) c_k(t) + rate pi_k c_(k-1)(t), c_0 = 1 and pi_out = 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound, feedback
from pckernels.backends.learning import learned
from pckernels.backends.results import Frozen, Tensors, energy, outcome, relaxation
from pckernels.call import Call, Outcome, Snapshot
from pckernels.graph import ComputationGraph
from pckernels.schedule import steps_on


def coefficients_on(
    graph: ComputationGraph, precisions: Mapping[str, float | Tensor], steps: int, rate: float, device: torch.device
) -> dict[str, Tensor]:
    """Vertex of a graph of chains -> its c_k(t) at t = 0 .. steps, in float64; `precisions`: one number for each vertex that has one."""
    names = [vertex.name for vertex in graph.vertices]
    place = {name: k for k, name in enumerate(names)}
    pi = torch.stack([_number(precisions.get(name, 1.0), device) for name in names])
    is_output = torch.tensor([name in graph.outputs for name in names], device=device)
    child = torch.tensor([place[graph.children[name][0]] if graph.children[name] else place[name] for name in names], device=device)
    c, pace = is_output.double(), rate * pi
    rows = [c]
    for _ in range(steps):
        c = torch.where(is_output, c, c + pace * (c[child] - c))
        rows.append(c)
    return dict(zip(names, torch.stack(rows, 1), strict=True))


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def weighted_sweep(bound: Bound, call: Call) -> Outcome:
    """One backward sweep; errors at every step are its deltas times c_k(t) / pi_k."""
    dynamics, graph = call.dynamics, bound.graph
    assert call.objective is not None
    losses, at_outputs = call.objective({name: bound.mu[name] for name in graph.outputs})
    deltas = _deltas(bound, at_outputs)
    steps = steps_on(graph, dynamics.steps)
    c = coefficients_on(graph, bound.precisions, steps, dynamics.rate, losses.device)
    factors = {name: c[name] / bound.precisions.get(name, 1.0) for name in deltas}
    states = [_errors(deltas, factors, t) for t in (range(steps + 1) if call.record else [steps])]
    frozen = Frozen(bound, states[-1])
    history: list[Snapshot] | None = [Frozen(bound, state).snapshot(graph) for state in states] if call.record else None
    energies = _energies(bound, losses, deltas, factors)
    plan = (
        f"fixed prediction in closed form with precisions{relaxation(dynamics)}: one backward sweep over a chain of {len(graph)} vertices"
    )
    return outcome(bound, call, losses, frozen, energies, None, learned(bound, call, frozen), history, plan)


def _deltas(bound: Bound, at_outputs: Tensors) -> Tensors:
    """What backprop would give, from the output up; as far as it reaches."""
    found = dict(at_outputs)
    for vertex in reversed(bound.graph.vertices):
        if vertex.name in found:
            found.update(feedback(bound.locals[vertex.name], found[vertex.name], bound.graph.free_parents(vertex)))
    return found


def _errors(deltas: Tensors, factors: Tensors, t: int) -> Tensors:
    return {name: factors[name][t].to(delta.dtype) * delta for name, delta in deltas.items()}


def _energies(bound: Bound, losses: Tensor, deltas: Tensors, factors: Tensors) -> Tensor:
    """(steps + 1,): 1/2 pi_k (c_k / pi_k)^2 ||delta_k||^2 summed over the hidden vertices, and the loss."""
    total = (losses.sum() + bound.log_volume(losses)).repeat(len(next(iter(factors.values()))))
    for name, delta in deltas.items():
        if name not in bound.graph.outputs:
            square = energy(torch.zeros_like(losses), [bound.whitened(name, delta)])
            total = total + factors[name].to(losses.dtype).square() * square
    return total
