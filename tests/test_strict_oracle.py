"""Strict predictive coding against a numpy loop written from the equations: values, errors, energies and gradients.

Errors far from the output are tiny, and v - mu loses their leading digits in float64 whoever subtracts. So the truth is
the loop in extended precision, and what is allowed beside 1e-12 of it is a few times what the same loop in float64 is off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from oracle import strict_models
from oracle.strict import StrictLoop, Trajectory
from oracle.strict_models import Case
from torch import Tensor

import pckernels as pck

TOLERANCE, SLACK = 1e-12, 8
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
    """The case in extended precision, its network, and the same loop in float64."""
    case = BUILDERS[name](np.longdouble)
    options = {"loss": case.loss, "reduction": "sum", "value_nodes": case.value_nodes, "backend": "reference"}
    return case, pck.PCNetwork(case.module, pck.Strict(0, 0.1), **options), BUILDERS[name](np.float64).oracle


class Expected:
    """Compares with the extended loop; `plain` is the float64 one."""

    def __init__(self, exact: Trajectory, plain: Trajectory):
        self.exact, self.plain = exact, plain

    def energies(self, found: Tensor) -> None:
        compare(found, np.array(self.exact.energies), np.array(self.plain.energies), "energy")

    def state(self, values: dict[str, Tensor], errors: dict[str, Tensor], t: int) -> None:
        assert set(values) == set(errors) == set(self.exact.errors[t])
        hidden = {name: value for name, value in values.items() if name != "output"}
        compare_all(hidden, self.exact.values[t], self.plain.values[t], f"value at step {t}")
        compare_all(errors, self.exact.errors[t], self.plain.errors[t], f"error at step {t}")

    def gradients(self, found: dict[str, Tensor | None]) -> None:
        compare_all(found, self.exact.gradients, self.plain.gradients, "gradient")


def compare_all(found: dict[str, Tensor | None], exact: dict[str, np.ndarray], plain: dict[str, np.ndarray], what: str) -> None:
    assert set(found) == set(exact)
    for name, tensor in found.items():
        assert tensor is not None, f"{what} of {name} is None"
        compare(tensor, exact[name], plain[name], f"{what} of {name}")


def compare(found: Tensor, exact: np.ndarray, plain: np.ndarray, what: str) -> None:
    assert found.shape == exact.shape, what
    error, size = float(np.linalg.norm(found.numpy() - exact)), float(np.linalg.norm(exact))
    allowed = TOLERANCE * size + SLACK * float(np.linalg.norm(plain - exact))
    assert error <= allowed, f"{what}: off by {error:.2e} of {size:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_values_errors_energies_and_gradients_equal_the_loop(name: str, dynamics: str, steps: int) -> None:
    case, network, plain = subject(name)
    options = DYNAMICS[dynamics]
    expected = Expected(case.oracle.run(steps, 0.07, **options), plain.run(steps, 0.07, **options))
    network.rule = pck.Strict(steps, 0.07, **options)
    recorded = network.infer(case.x, case.target, record=True)
    assert len(recorded.history) == steps + 1
    expected.energies(recorded.energy)
    for t, state in enumerate(recorded.history):
        expected.state(state.values, state.errors, t)
    case.module.zero_grad()
    inference = network.backward(case.x, case.target)
    expected.energies(inference.energy)
    expected.state(inference.values, inference.errors, steps)
    expected.gradients({key: p.grad for key, p in case.module.named_parameters()})


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
