"""A network beside its loop: how the oracle tests make them, and hold all that a rule does against the loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from oracle.extended import Expected
from oracle.strict import StrictLoop
from oracle.strict_models import Case

import pckernels as pck


def network_of(case: Case) -> pck.PCNetwork:
    """The case's network, on the reference; a test gives it its rule."""
    options = {"loss": case.loss, "reduction": "sum", "value_nodes": case.value_nodes, "backend": "reference"}
    return pck.PCNetwork(case.module, pck.Strict(0, 0.1), **options)


def subject_of(build: Callable[[type], Case]) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    """The case in extended precision, its network, and the same loop in float64."""
    case = build(np.longdouble)
    return case, network_of(case), build(np.float64).oracle


def assert_follows(case: Case, network: pck.PCNetwork, expected: Expected) -> None:
    """The network under its present rule: the whole trajectory, and what the weights learn at its end."""
    recorded = network.infer(case.x, case.target, record=True)
    assert len(recorded.history) == len(expected.exact.values)
    expected.energies(recorded.energy)
    for t, state in enumerate(recorded.history):
        expected.state(state.values, state.errors, t)
    case.module.zero_grad()
    inference = network.backward(case.x, case.target)
    expected.energies(inference.energy)
    expected.state(inference.values, inference.errors, len(recorded.history) - 1)
    expected.gradients({key: p.grad for key, p in case.module.named_parameters()})
