"""Error optimisation (ePC; Goemaere et al., arXiv 2505.20137): gradient descent of the energy on the errors themselves.

The value of a hidden vertex follows from the errors by a forward pass, v_i = mu_i(v_pa(i)) + eps_i, and the energy is
F(eps) = sum of 1/2 ||eps_i||^2 + loss(mu_out). With delta_i = -dL/dv_i through that pass,

    delta_out = -dloss/dmu_out,   delta_i = sum over children j of (d mu_j / d v_i)^T delta_j,   -dF/deps_i = delta_i - pi_i eps_i.

The errors are the state, so none is a difference of numbers that are nearly equal. An error that has not left 0 is absent.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pckernels.backends.feedforward import Bound, feedback
from pckernels.backends.learning import learned
from pckernels.backends.results import Tensors, Trajectory, diverged, outcome, relaxation
from pckernels.backends.state import Moving
from pckernels.call import Call, Outcome
from pckernels.schedule import steps_on, sweep_groups


class ForwardState(Moving):
    """Errors are what moves; values and predictions follow from them by a forward pass."""

    def value(self, name: str) -> Tensor:
        """v_i = mu_i + eps_i; of an output its prediction."""
        mu = self.locals[name].mu.detach()
        return mu + self.errors[name] if name in self.errors and name not in self.graph.outputs else mu

    def deltas(self) -> Tensors:
        """-dL/dv_i at the present values, from the outputs up, one vertex at a time."""
        found = {name: self.errors[name] for name in self.graph.outputs if name in self.errors}
        for vertex in reversed(self.graph.vertices):
            if vertex.name in found:
                for parent, part in feedback(self.locals[vertex.name], found[vertex.name], self.graph.free_parents(vertex)).items():
                    found[parent] = found[parent] + part if parent in found else part
        return found

    def move(self, names: Iterable[str], rate: float, momentum: float) -> None:
        """Move the errors of a group at once, then let values and predictions follow."""
        deltas = self.deltas()
        moved = [name for name in names if name in deltas]
        for name in moved:
            drive = deltas[name] - self.bound.weighted(name, self.errors[name]) if name in self.errors else deltas[name]
            step = rate * self.velocity(name, drive, momentum)
            self.errors[name] = self.errors[name] + step if name in self.errors else step
        self.follow(moved)

    def follow(self, moved: Iterable[str]) -> None:
        """The forward pass, from the first of the moved errors on."""
        changed = set(moved)
        for vertex in self.graph.vertices:
            parents = self.graph.free_parents(vertex)
            if changed.intersection(parents):
                self.locals[vertex.name] = self.bound.local(vertex, {parent: self.value(parent) for parent in parents})
                changed.add(vertex.name)
        if changed.intersection(self.graph.outputs):
            self.observe()


def optimize_errors(bound: Bound, call: Call) -> Outcome:
    """T steps of the errors; then every vertex learns from its own error and its parents' values."""
    dynamics, graph = call.dynamics, bound.graph
    assert call.objective is not None
    state = ForwardState(bound, call.objective)
    start, trajectory = state.losses, Trajectory(state, call.record)
    groups = sweep_groups(graph, dynamics.sweep)
    for _ in range(steps_on(graph, dynamics.steps)):
        for group in groups:
            state.move(group, dynamics.rate, dynamics.momentum)
        trajectory.add()
    gradients, energies = learned(bound, call, state), trajectory.energies
    plan = f"error optimisation, {dynamics.sweep} sweeps, {trajectory.steps} steps over {len(graph.hidden)} errors{relaxation(dynamics)}"
    return outcome(bound, call, start, state, energies, diverged(energies), gradients, trajectory.history, plan)
