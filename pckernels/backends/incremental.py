"""Incremental predictive coding (iPC; Salvatori et al., arXiv 2212.00720): values and weights descend F together at every step.

One step, with everything on the right from the state before it (with a sweep of several groups, the values' from the state
before their group):

    v_i <- v_i - rate dF/dv_i,   theta_i <- theta_i - weight_rate dF/dtheta_i.

The weights that move are a copy, unless the call has an optimizer, which moves the module's own. No prediction that reads
weights is hoisted, and no light cone holds: a shared weight may move before a vertex's own error arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pckernels.backends.clamped import starting_state
from pckernels.backends.feedforward import Bound
from pckernels.backends.learning import learned
from pckernels.backends.results import Tensors, Trajectory, diverged, outcome, relaxation
from pckernels.backends.state import State
from pckernels.call import Call, Outcome
from pckernels.schedule import steps_on, sweep_groups


class Weights:
    """The weights of a call on their way."""

    def __init__(self, bound: Bound, call: Call):
        self.bound, self.call = bound, call
        self.tensors: Mapping[str, Tensor] = call.tensors
        moving = bound.learning if call.update is None else ()  # an optimizer moves the module's own, and needs no sum
        self.totals: Tensors = {name: torch.zeros_like(call.tensors[name]) for name in moving}
        self.readers = [vertex.name for vertex in bound.graph.vertices if vertex.weights or vertex.name in call.extra.error_weights]

    def gradients(self, state: State) -> Tensors:
        """dF/dtheta, summed over the batch, of every parameter that learns."""
        return learned(self.bound, replace(self.call, learn=True, factor=1.0), state)

    def move(self, gradients: Tensors) -> None:
        """One step of the weights; what vertices read from now on are the new ones."""
        if self.call.update is not None:
            parameters = [self.call.tensors[name] for name in gradients]
            self.call.update(parameters, [gradient * self.call.factor for gradient in gradients.values()])
        else:
            self._move_copy(gradients)
        self.bound.read(self.tensors)

    def _move_copy(self, gradients: Tensors) -> None:
        rate = self.call.dynamics.weight_rate
        assert rate is not None
        moved = {name: self.tensors[name].detach() - rate / self.call.divisor * gradient for name, gradient in gradients.items()}
        self.tensors = {**self.tensors, **{name: tensor.requires_grad_() for name, tensor in moved.items()}}
        for name, gradient in gradients.items():
            self.totals[name] = self.totals[name] + gradient

    def learnt(self) -> Tensors:
        """What is to be added to `.grad`: the sum over the steps. An optimizer has had it already."""
        return {} if not self.call.learn else {name: total * self.call.factor for name, total in self.totals.items()}


def descend_together(bound: Bound, call: Call) -> Outcome:
    """T steps of the values and the weights."""
    dynamics, graph = call.dynamics, bound.graph
    state, weights = starting_state(bound, call), Weights(bound, call)
    start, trajectory = state.losses, Trajectory(state, call.record)
    groups = sweep_groups(graph, dynamics.sweep)
    for _ in range(steps_on(graph, dynamics.steps)):
        gradients = weights.gradients(state)
        moves: Tensors = {}
        for group in groups:
            state.refresh(moves)
            moves = state.advance(group, dynamics.rate, dynamics.momentum)
        weights.move(gradients)
        state.refresh(moves, weights.readers)
        trajectory.add()
    energies = trajectory.energies
    who = "a copy of the weights" if call.update is None else "the weights, by the optimizer,"
    course = f"{dynamics.sweep} sweeps, {trajectory.steps} steps of {len(graph.hidden)} value nodes and {who} together"
    plan = f"incremental, {course}{relaxation(dynamics)}"
    return outcome(bound, call, start, state, energies, diverged(energies), weights.learnt(), trajectory.history, plan)
