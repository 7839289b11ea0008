"""Strict predictive coding against a numpy loop written from the equations: values, errors, energies and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from oracle import strict_models
from oracle.extended import Expected, compare_all
from oracle.strict import StrictLoop
from oracle.strict_models import Case
from oracle_case import assert_follows, subject_of

import pckernels as pck

BUILDERS: dict[str, Callable[[type], Case]] = {
    "mlp_tanh": lambda real: strict_models.mlp(real, "tanh"),
    "mlp_relu": lambda real: strict_models.mlp(real, "relu"),
    "cnn": strict_models.cnn,
    "resnet": strict_models.resnet,
    "lstm_2": lambda real: strict_models.lstm(real, 2),
    "lstm_3": lambda real: strict_models.lstm(real, 3),
}
DYNAMICS = {
    "jacobi": {"sweep": "jacobi", "momentum": 0.0},
    "top_down": {"sweep": "top_down", "momentum": 0.0},
    "red_black": {"sweep": "red_black", "momentum": 0.0},
    "momentum": {"sweep": "jacobi", "momentum": 0.6},
    "momentum_red_black": {"sweep": "red_black", "momentum": 0.6},
}


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    return subject_of(BUILDERS[name])


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_values_errors_energies_and_gradients_equal_the_loop(name: str, dynamics: str, steps: int) -> None:
    case, network, plain = subject(name)
    options = DYNAMICS[dynamics]
    expected = Expected(case.oracle.run(steps, 0.07, **options), plain.run(steps, 0.07, **options))
    network.rule = pck.Strict(steps, 0.07, **options)
    assert len(expected.exact.values) == steps + 1
    assert_follows(case, network, expected)


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.6])
@pytest.mark.parametrize("steps", [0, 2, 7])
@pytest.mark.parametrize("solver", ["iterate", "closed_form"])
@pytest.mark.parametrize("order", ["nested", "global"])
def test_fixed_prediction_of_an_lstm_in_both_orders(order: str, solver: str, steps: int, rate: float) -> None:
    """Nested: the last time step relaxes first, on its own; its final errors then drive the step before."""
    case, network, _ = subject("lstm_3")
    hidden = [vertex.name for vertex in case.oracle.hidden]
    times = [[name for name in hidden if f".t{t}." in name] for t in (2, 1, 0)]
    errors, gradients = case.oracle.fixed_prediction(steps, rate, times if order == "nested" else [hidden])
    network.rule = pck.FixedPrediction(steps, rate, solver=solver, order=order)
    case.module.zero_grad()
    inference = network.backward(case.x, case.target)
    compare_all(inference.errors, errors, errors, "error")
    compare_all({key: p.grad for key, p in case.module.named_parameters()}, gradients, gradients, "gradient")


def test_the_float64_loop_is_itself_within_1e_8() -> None:
    """What float64 costs the loop: beyond that the slack above would hide something."""
    for name in BUILDERS:
        case, _, plain = subject(name)
        exact, rough = case.oracle.run(9, 0.07).gradients, plain.run(9, 0.07).gradients
        assert max(float(np.linalg.norm(rough[key] - g) / np.linalg.norm(g)) for key, g in exact.items()) < 1e-8


def test_the_loop_descends_its_own_energy() -> None:
    """The oracle checks itself: its hand-derived drives and local updates are -dF/dv and dF/dtheta by central differences."""
    rng = np.random.default_rng(0)
    for build in BUILDERS.values():
        oracle = build(np.float64).oracle
        v = oracle._feed_forward()
        v |= {u.name: v[u.name] + 0.3 * rng.standard_normal(v[u.name].shape) for u in oracle.hidden}
        eps = oracle._errors(v, oracle._predict(v))
        feedback = oracle._feedback(v, eps)
        for u in oracle.hidden:
            direction = rng.standard_normal(v[u.name].shape)
            slope = (energy_at(oracle, v, u.name, 1e-6 * direction) - energy_at(oracle, v, u.name, -1e-6 * direction)) / 2e-6
            assert slope == pytest.approx(float(((eps[u.name] - feedback[u.name]) * direction).sum()), rel=1e-6, abs=1e-7)


def energy_at(oracle: StrictLoop, v: dict[str, np.ndarray], name: str, move: np.ndarray) -> float:
    moved = v | {name: v[name] + move}
    mu = oracle._predict(moved)
    return oracle._energy(oracle._errors(moved, mu), mu)
