"""The other rules that descend F, against numpy loops from their equations: values, errors and energies at every step, and
what the weights learn after each number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from oracle import rules, strict_models
from oracle.extended import Expected, compare_all
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
COURSES = {
    "jacobi": {"sweep": "jacobi", "momentum": 0.0},
    "top_down": {"sweep": "top_down", "momentum": 0.0},
    "momentum_red_black": {"sweep": "red_black", "momentum": 0.6},
}
STEPS, RATE = 5, 0.07


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    return subject_of(BUILDERS[name])


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_error_optimization_equals_the_loop(name: str, course: str) -> None:
    case, network, plain = subject(name)
    for steps in range(STEPS + 1):
        network.rule = pck.ErrorOptimization(steps, RATE, **COURSES[course])
        exact, rough = (rules.error_optimization(loop, steps, RATE, **COURSES[course]) for loop in (case.oracle, plain))
        assert_follows(case, network, Expected(exact, rough))


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_incremental_equals_the_loop(name: str, course: str) -> None:
    """With weights that move by about as much as in training, in every vertex."""
    case, network, plain = subject(name)
    for steps in range(STEPS + 1):
        network.rule = pck.Incremental(steps, RATE, 0.05, **COURSES[course])
        exact, rough = (rules.incremental(loop, steps, RATE, 0.05, **COURSES[course]) for loop in (case.oracle, plain))
        before = copy.deepcopy(case.module.state_dict())
        assert_follows(case, network, Expected(exact[0], rough[0]))
        assert all(torch.equal(value, before[key]) for key, value in case.module.state_dict().items())
        module = copy.deepcopy(case.module)
        options = {"loss": case.loss, "reduction": "sum", "value_nodes": case.value_nodes, "backend": "reference"}
        live = pck.PCNetwork(module, network.rule, **options)
        live._traces = network._traces  # of the same code: to trace is what takes the time
        inference = live.step(case.x, case.target, torch.optim.SGD(module.parameters(), 0.05))
        Expected(exact[0], rough[0]).energies(inference.energy)
        compare_all({key: p.detach() for key, p in module.named_parameters()}, exact[1], rough[1], "weight")


NUDGES = {"positive": (0.3,), "negative": (-0.2,), "centered": (0.25, -0.25)}


@pytest.mark.parametrize("nudge", NUDGES)
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_nudged_inference_equals_the_loop(name: str, course: str, nudge: str) -> None:
    case, network, plain = subject(name)
    betas = NUDGES[nudge]
    for steps in (0, 1, STEPS):
        network.rule = pck.Strict(steps, RATE, **COURSES[course], nudge=betas[0] if len(betas) == 1 else ("centered", betas[0]))
        exact, rough = (rules.nudged(loop, betas, steps, RATE, **COURSES[course]) for loop in (case.oracle, plain))
        assert_follows(case, network, Expected(exact, rough))


def test_the_loop_of_error_optimization_descends_its_own_energy() -> None:
    """The oracle checks itself: its drives are -dF/deps by central differences."""
    rng = np.random.default_rng(0)
    for build in BUILDERS.values():
        loop = build(np.float64).oracle
        eps = {u.name: 0.3 * rng.standard_normal(v.shape) for u in loop.hidden for v in [loop._feed_forward()[u.name]]}
        delta = rules.total_deltas(loop, *rules.follow(loop, eps))
        for u in loop.hidden:
            direction = rng.standard_normal(eps[u.name].shape)
            ends = [eps | {u.name: eps[u.name] + h * direction} for h in (1e-6, -1e-6)]
            high, low = (loop._energy(end, rules.follow(loop, end)[1]) for end in ends)
            assert (high - low) / 2e-6 == pytest.approx(float(((eps[u.name] - delta[u.name]) * direction).sum()), rel=1e-6, abs=1e-7)
