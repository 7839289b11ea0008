"""Error optimisation (ePC; Goemaere et al., arXiv 2505.20137): gradient descent of the energy on the errors themselves.

The value of a hidden vertex follows from the errors by a forward pass, v_i = mu_i(v_pa(i)) + eps_i, and the energy is
F(eps) = sum of 1/2 ||eps_i||^2 + loss(mu_out). With delta_i = -dL/dv_i through that pass,

    delta_out = -dloss/dmu_out,   delta_i = sum over children j of (d mu_j / d v_i)^T delta_j,   -dF/deps_i = delta_i - pi_i eps_i.

The errors are the state, so none is a difference of numbers that are nearly equal. An error that has not left 0 is absent.
"""

from __future__ import annotations

from pckernels.backends.clamped import starting_errors
from pckernels.backends.feedforward import Bound
from pckernels.backends.learning import learned
from pckernels.backends.results import Trajectory, diverged, outcome, relaxation
from pckernels.call import Call, Outcome
from pckernels.schedule import steps_on, sweep_groups


def optimize_errors(bound: Bound, call: Call) -> Outcome:
    """T steps of the errors; then every vertex learns from its own error and its parents' values."""
    dynamics, graph = call.dynamics, bound.graph
    state = starting_errors(bound, call)
    start, trajectory = state.losses, Trajectory(state, call.record)
    groups = sweep_groups(graph, dynamics.sweep)
    for _ in range(steps_on(graph, dynamics.steps)):
        for group in groups:
            state.move(group, dynamics.rate, dynamics.momentum)
        trajectory.add()
    gradients, energies = learned(bound, call, state), trajectory.energies
    plan = f"error optimisation, {dynamics.sweep} sweeps, {trajectory.steps} steps over {len(graph.hidden)} errors{relaxation(dynamics)}"
    return outcome(bound, call, start, state, energies, diverged(energies), gradients, trajectory.history, plan)
