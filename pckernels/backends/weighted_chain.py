"""Fixed prediction with precisions on a chain, without its steps.

With e_i = pi_i eps_i the steps read e_i <- (1 - rate pi_i) e_i + rate pi_i J^T e_(i-1), i counting from the output, so that
e_k after T steps is c_k(T) delta_k with c_k(t+1) = (1 - rate pi_k) c_k(t) + rate pi_k c_(k-1)(t), c_0 = 1 and pi_out = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound, feedback
from pckernels.backends.learning import learned
from pckernels.backends.results import Frozen, Tensors, energy, outcome, relaxation
from pckernels.call import Call, Outcome, Snapshot
from pckernels.schedule import steps_on


def coefficients(precisions: Tensor, steps: int, rate: float) -> Tensor:
    """(steps + 1, vertices): c_k(t), for precisions in the order of k, the output's first."""
    c = torch.zeros_like(precisions)
    c[0] = 1.0
    rows = [c]
    for _ in range(steps):
        c = torch.cat([c[:1], c[1:] + rate * precisions[1:] * (c[:-1] - c[1:])])
        rows.append(c)
    return torch.stack(rows)


def weighted_sweep(bound: Bound, call: Call) -> Outcome:
    """One backward sweep; errors at every step are its deltas times c_k(t) / pi_k."""
    dynamics, graph = call.dynamics, bound.graph
    assert call.objective is not None
    losses, at_outputs = call.objective({name: bound.mu[name] for name in graph.outputs})
    deltas = _deltas(bound, at_outputs)
    names = list(deltas)
    pi = torch.stack(
        [torch.as_tensor(bound.precisions.get(name, 1.0), dtype=torch.float64, device=losses.device).reshape(()) for name in names]
    )
    c = coefficients(pi, steps_on(graph, dynamics.steps), dynamics.rate) / pi
    states = [_errors(deltas, row) for row in c] if call.record else [_errors(deltas, c[-1])]
    frozen = Frozen(bound, states[-1])
    history: list[Snapshot] | None = [Frozen(bound, state).snapshot(graph) for state in states] if call.record else None
    energies = _energies(bound, losses, deltas, c)
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


def _errors(deltas: Tensors, factors: Tensor) -> Tensors:
    return {name: factor.to(delta.dtype) * delta for (name, delta), factor in zip(deltas.items(), factors, strict=True)}


def _energies(bound: Bound, losses: Tensor, deltas: Tensors, c: Tensor) -> Tensor:
    """(steps + 1,): 1/2 pi_k (c_k / pi_k)^2 ||delta_k||^2 summed over the hidden vertices, and the loss."""
    total = (losses.sum() + bound.log_volume(losses)).repeat(len(c))
    for k, (name, delta) in enumerate(deltas.items()):
        if name not in bound.graph.outputs:
            square = energy(torch.zeros_like(losses), [bound.whitened(name, delta)])
            total = total + c[:, k].to(losses.dtype).square() * square
    return total
