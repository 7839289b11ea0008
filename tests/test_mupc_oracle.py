"""Rules on networks under muPC, against numpy loops whose layers are scaled by the formulas: every step, and what the weights learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from oracle import exact, rules, strict_models
from oracle.extended import Expected
from oracle.mupc import scaled
from oracle.strict import StrictLoop, Trajectory
from oracle.strict_models import Case, parameters
from oracle_case import assert_follows, network_of

import pckernels as pck

BUILDERS: dict[str, tuple[Callable[[type], Case], bool]] = {
    "mlp": (lambda real: strict_models.mlp(real, "tanh"), False),
    "cnn": (strict_models.cnn, False),
    "resnet": (strict_models.resnet, True),
}
STEPS, RATE = 6, 0.2
RULES: dict[str, tuple[pck.rules.Rule, Callable[[StrictLoop], Trajectory]]] = {
    "strict": (pck.Strict(STEPS, RATE, 0.5, "red_black"), lambda loop: loop.run(STEPS, RATE, 0.5, "red_black")),
    "error_optimization": (pck.ErrorOptimization(STEPS, RATE), lambda loop: rules.error_optimization(loop, STEPS, RATE)),
    "incremental": (pck.Incremental(STEPS, RATE, 0.5), lambda loop: rules.incremental(loop, STEPS, RATE, 0.5)[0]),
    "fixed_prediction": (pck.FixedPrediction(STEPS, RATE), lambda loop: exact.fixed_prediction(loop, STEPS, RATE)),
    "zero_divergence": (pck.ZeroDivergence("iterate"), exact.zero_divergence),
}


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop, StrictLoop]:
    """The case under muPC, its network, and its loops in extended precision and in float64."""
    build, residual = BUILDERS[name]
    case = build(np.longdouble)
    pck.mupc(case.module, residual, seed=0)
    loops = (scaled(build(real).oracle, parameters(case.module, real), residual) for real in (np.longdouble, np.float64))
    return case, network_of(case), *loops


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_rule_under_mupc_equals_the_loop(name: str, rule: str) -> None:
    case, network, *loops = subject(name)
    network.rule, run = RULES[rule]
    expected = Expected(*(run(loop) for loop in loops))
    assert_follows(case, network, expected)
