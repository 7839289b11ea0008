"""Fixed prediction and zero divergence against numpy loops from their equations: values, errors and energies at every step, and what
the weights learn after each number of steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from oracle import exact, strict_models
from oracle.extended import Expected
from oracle.strict import StrictLoop
from oracle.strict_models import Case
from oracle_case import assert_follows, subject_of

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
    return subject_of(BUILDERS[name])


def follows(name: str, rule: pck.rules.Rule, expected: Expected) -> None:
    case, network, _ = subject(name)
    network.rule = rule
    assert_follows(case, network, expected)


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.4])
@pytest.mark.parametrize("solver", ["closed_form", "iterate"])
@pytest.mark.parametrize("name", BUILDERS)
def test_fixed_prediction_equals_the_loop(name: str, solver: str, rate: float) -> None:
    case, _, plain = subject(name)
    for steps in range(STEPS + 1):
        expected = Expected(*(exact.fixed_prediction(loop, steps, rate) for loop in (case.oracle, plain)))
        follows(name, pck.FixedPrediction(steps, rate, solver), expected)


@pytest.mark.parametrize("solver", ["sweep", "iterate"])
@pytest.mark.parametrize("name", BUILDERS)
def test_zero_divergence_equals_the_literal_loop(name: str, solver: str) -> None:
    case, _, plain = subject(name)
    follows(name, pck.ZeroDivergence(solver), Expected(*(exact.zero_divergence(loop) for loop in (case.oracle, plain))))
