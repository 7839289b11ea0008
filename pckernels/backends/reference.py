"""The reference backend: the equations of predictive coding, in plain PyTorch. The specification of every other backend.

A vertex i has a value v_i, a prediction mu_i = f_i(v_pa(i); theta_i) and an error eps_i = v_i - mu_i. From the feed-forward
start every hidden error is 0, but where a call holds a value (clamped.py). Errors that have not yet left 0 are absent from the
dictionaries below: that skips exactly what the light cone proves to be zero, and a prediction is computed anew only when a
parent has moved, which hoists the predictions whose parents are all clamped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pckernels.backends.clamped import starting_state
from pckernels.backends.closed_form import sweep
from pckernels.backends.error_optimization import optimize_errors
from pckernels.backends.feedforward import Bound
from pckernels.backends.halving import HalvedRate
from pckernels.backends.incremental import descend_together
from pckernels.backends.learning import Learnt, Lesson, LocalUpdates, learned
from pckernels.backends.published_code import learned_twice, sent
from pckernels.backends.results import (
    Frozen,
    Tensors,
    Trajectory,
    bound_updates,
    diverged,
    energy,
    feed_forward_outcome,
    outcome,
    relaxation,
    together,
)
from pckernels.backends.state import State
from pckernels.backends.weighted_chain import weighted_sweep
from pckernels.call import Call, Outcome, Snapshot
from pckernels.errors import Unsupported
from pckernels.freeing import with_free_inputs
from pckernels.graph import ComputationGraph
from pckernels.schedule import error_groups, steps_on, sweep_groups


def run(call: Call) -> Outcome:
    """Relax, then learn: the whole of one inference."""
    if call.clamps.freed:
        call = replace(call, trace=with_free_inputs(call.trace, frozenset(call.clamps.freed), call.clamps.batch_dim))
    dynamics, graph = call.dynamics, call.trace.graph
    if call.objective is None:
        bound = Bound(graph, call)
        return feed_forward_outcome(bound.mu, bound_updates(bound, call))
    with torch.enable_grad():
        if dynamics.moves == "values":
            if dynamics.learn_on_arrival:
                return _arrive(Bound(graph.levelled(), call), call)
            relax = descend_together if dynamics.learn_at_each_step else _relax_values
            return relax(Bound(graph, call), call)
        if dynamics.moves == "free_errors":
            return optimize_errors(Bound(graph, call), call)
        if dynamics.closed_form:
            return weighted_sweep(Bound(graph, call), call) if call.extra.weighs_errors else sweep(call)
        return _relax_errors(Bound(graph, call), call)


def _relax_values(bound: Bound, call: Call) -> Outcome:
    """Gradient descent of F on the values, once for each nudge; then weights learn from the fresh errors of all."""
    nudges = call.dynamics.nudges
    phases = [_descend(bound, call, beta) for beta in nudges]
    gradients = learned(bound, call, *[phase.taught for phase in phases], coefficients=[1.0 / (beta * len(nudges)) for beta in nudges])
    return replace(together([phase.outcome(call) for phase in phases]), gradients=gradients)


@dataclass(frozen=True)
class _Phase:
    """One relaxation: its losses at the start, its last state, its course, and what weights learn from."""

    start: Tensor
    state: State
    trajectory: Trajectory
    taught: Learnt

    def outcome(self, call: Call) -> Outcome:
        dynamics, bound, energies = call.dynamics, self.state.bound, self.trajectory.energies
        nudged = f"nudged by {' and '.join(f'{beta:+g}' for beta in dynamics.nudges)}, " if dynamics.is_nudged else ""
        course = f"{dynamics.sweep} sweeps, {self.trajectory.steps} steps over {len(bound.graph.hidden)} value nodes"
        plan = f"strict dynamics, {nudged}{course}{relaxation(dynamics)}"
        return outcome(bound, call, self.start, self.state, energies, diverged(energies), {}, self.trajectory.history, plan)


def _descend(bound: Bound, call: Call, beta: float) -> _Phase:
    """T steps of the values; predictions and Jacobians follow at every step."""
    dynamics, graph = call.dynamics, bound.graph
    assert call.objective is not None
    state = starting_state(bound, call, beta)
    start, trajectory = state.losses, Trajectory(state, call.record)
    groups = sweep_groups(graph, dynamics.sweep)
    resting = Resting(graph, dynamics.tolerance, start) if dynamics.tolerance is not None else None
    rate = HalvedRate(state, dynamics.rate, dynamics.halving) if dynamics.halving is not None else None
    errors = state.errors
    for _ in range(steps_on(graph, dynamics.steps)):
        errors = dict(state.errors) if dynamics.stale_errors else errors
        size = rate.rate if rate else dynamics.rate
        moves = [state.move(group, size, dynamics.momentum, resting.mask if resting else None) for group in groups]
        trajectory.add()
        if (resting and resting.after(moves)) or (rate and rate.after()):
            break
    return _Phase(start, state, trajectory, Lesson(state.locals, errors))


class Resting:
    """Which samples still move: a sample rests after the first step in which none of its entries moved by more than the tolerance."""

    def __init__(self, graph: ComputationGraph, tolerance: float, losses: Tensor):
        folded = [vertex.name for vertex in graph.hidden if vertex.batch_axis is None]
        if folded:
            raise Unsupported(
                f"tolerance= stops each sample by itself, but {folded[0]!r} folds samples into another axis. Leave tolerance out."
            )
        self.axes = {vertex.name: vertex.batch_axis or 0 for vertex in graph.hidden}
        self.tolerance = tolerance
        self.moving = torch.ones_like(losses, dtype=torch.bool)

    def mask(self, name: str, step: Tensor) -> Tensor:
        """The step with 0 for the samples that rest."""
        shape = [-1 if axis == self.axes[name] else 1 for axis in range(step.dim())]
        return torch.where(self.moving.view(shape), step, 0.0)

    def after(self, moves: Iterable[Tensors]) -> bool:
        """Let samples rest after a step; True when all do."""
        moved = torch.zeros_like(self.moving)
        for group in moves:
            for name, step in group.items():
                rows = step.movedim(self.axes[name], 0).flatten(1) if step.dim() > 1 else step[:, None]
                moved |= (rows.abs() > self.tolerance).any(1)
        self.moving &= moved
        return not bool(self.moving.any())


def _arrive(bound: Bound, call: Call) -> Outcome:
    """Strict dynamics at rate 1 on the levelled graph; a vertex at distance d learns after d updates, from its fresh error."""
    assert call.objective is not None
    state = State(bound, call.objective)
    start = state.losses
    graph, original = bound.graph, call.trace.graph
    updates = LocalUpdates(bound, call.factor)
    arrived: Tensors = {}
    values: Tensors = {}
    energies: list[Tensor] = []
    history: list[Snapshot] | None = [] if call.record else None
    for step in range(graph.depth + 1):
        if step > 0:
            state.move([vertex.name for vertex in graph.hidden], call.dynamics.rate, 0.0)
        for vertex in graph.vertices:
            if vertex.distance == step and vertex.name in state.errors:
                arrived[vertex.name], values[vertex.name] = state.errors[vertex.name], state.value(vertex.name)
                if call.learn:
                    updates.learn(state.locals[vertex.name], state.errors[vertex.name])
        energies.append(energy(start, [error for name, error in arrived.items() if name in original and name not in graph.outputs]))
        if history is not None:
            history.append(Frozen(bound, dict(arrived), dict(values)).snapshot(original))
    plan = (
        f"literal zero-divergence dynamics, {graph.depth} steps, {len(graph) - len(original)} identity vertices{relaxation(call.dynamics)}"
    )
    gradients = updates.gradients() if call.learn else {}
    return outcome(bound, call, start, Frozen(bound, arrived, values), torch.stack(energies), None, gradients, history, plan)


def _step(frozen: Frozen, names: list[str], rate: float, clamp: float | None = None) -> None:
    """eps_i <- (1 - rate pi_i) eps_i + rate * sum over children of J_j^T pi_j eps_j, all at once."""
    bound, errors = frozen.bound, frozen.errors
    new = {name: (1.0 - rate * bound.precisions.get(name, 1.0)) * errors[name] for name in names if name in errors}
    for child in dict.fromkeys(child for name in names for child in bound.graph.children[name] if child in errors):
        for name, part in sent(bound.locals[child], bound.weighted(child, errors[child]), names, clamp).items():
            new[name] = new[name] + rate * part if name in new else rate * part
    errors.update(new)


def _relax_errors(bound: Bound, call: Call) -> Outcome:
    dynamics, graph = call.dynamics, bound.graph
    assert call.objective is not None
    losses, errors = call.objective({name: bound.mu[name] for name in graph.outputs})
    frozen = Frozen(bound, errors | bound.unrest())
    errors = frozen.errors
    steps = steps_on(graph, dynamics.steps)
    squares = [losses.sum() + bound.log_volume(losses) for _ in range(steps + 1)]
    squares[0] = energy(squares[0], [bound.whitened(name, error) for name, error in bound.unrest().items()])
    states: list[Tensors] = [dict(errors) for _ in range(steps + 1)]
    for group in error_groups(graph, dynamics):
        for t in range(1, steps + 1):
            _step(frozen, group, dynamics.rate, dynamics.clamp)
            squares[t] = energy(squares[t], [bound.whitened(name, frozen.errors[name]) for name in group if name in frozen.errors])
            if call.record:
                states[t].update({name: frozen.errors[name] for name in group if name in frozen.errors})
    gradients = learned(bound, call, frozen) if dynamics.clamp is None else learned_twice(bound, call, frozen.errors)
    history = [Frozen(bound, state).snapshot(graph) for state in states] if call.record else None
    order = "one time step after the other, " if dynamics.nested else ""
    plan = f"fixed prediction, {order}{steps} steps over {len(graph.hidden)} value nodes{relaxation(dynamics)}"
    return outcome(bound, call, losses, frozen, torch.stack(squares), None, gradients, history, plan)
