"""Fixed prediction and zero divergence against numpy loops from their equations: values, errors and energies at every step, and what
the weights learn after each number of steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from oracle import exact, strict_models
from oracle.extended import Expected
from oracle.strict import StrictLoop
from oracle.strict_models import Case

import pckernels as pck

BUILDERS: dict[str, Callable[[type], Case]] = {
    "mlp": lambda real: strict_models.mlp(real, "tanh"),
    "cnn": strict_models.cnn,
    "resnet": strict_models.resnet,
    "lstm": lambda real: strict_models.lstm(real, 2),
}
STEPS = 6


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    """The case in extended precision, its network, and the same loop in float64."""
    case = BUILDERS[name](np.longdouble)
    options = {"loss": case.loss, "reduction": "sum", "value_nodes": case.value_nodes, "backend": "reference"}
    return case, pck.PCNetwork(case.module, pck.Strict(0, 0.1), **options), BUILDERS[name](np.float64).oracle


def assert_follows(name: str, rule: pck.rules.Rule, expected: Expected) -> None:
    case, network, _ = subject(name)
    network.rule = rule
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


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.4])
@pytest.mark.parametrize("solver", ["closed_form", "iterate"])
@pytest.mark.parametrize("name", BUILDERS)
def test_fixed_prediction_equals_the_loop(name: str, solver: str, rate: float) -> None:
    case, _, plain = subject(name)
    for steps in range(STEPS + 1):
        expected = Expected(*(exact.fixed_prediction(loop, steps, rate) for loop in (case.oracle, plain)))
        assert_follows(name, pck.FixedPrediction(steps, rate, solver), expected)


@pytest.mark.parametrize("solver", ["sweep", "iterate"])
@pytest.mark.parametrize("name", BUILDERS)
def test_zero_divergence_equals_the_literal_loop(name: str, solver: str) -> None:
    case, _, plain = subject(name)
    assert_follows(name, pck.ZeroDivergence(solver), Expected(*(exact.zero_divergence(loop) for loop in (case.oracle, plain))))
