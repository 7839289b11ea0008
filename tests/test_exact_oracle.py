"""The exact rules on hand-levelled graphs: dense matrices, explicit paths, literal dynamics, and mistakes that must show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import zoo
from oracle import dense, graph
from oracle.compare import assert_all_equal, assert_equal, relative_error
from oracle.graph import Graph, Mistake, Values
from torch import Tensor
from torch.utils import _pytree as pytree

import pckernels as pck

RATES = (0.05, 0.3, 1.0, 1.5)
STEPS = (0, 1, 5, 37, 200)
MISTAKES = {
    "no padding": Mistake(padding=False),
    "shortest distance": Mistake(longest=False),
    "errors a step late": Mistake(error_shift=1),
    "errors a step early": Mistake(error_shift=-1),
    "relaxed inputs in the weight update": Mistake(relaxed_inputs=True),
    "depth - 1 steps": Mistake(steps_short=1),
}
EXACT = {
    "sweep": lambda depth: pck.ZeroDivergence(),
    "literal": lambda depth: pck.ZeroDivergence(solver="iterate"),
    "closed_form": lambda depth: pck.FixedPrediction(depth, 1.0),
    "iterate": lambda depth: pck.FixedPrediction(depth, 1.0, solver="iterate"),
}


def autograd(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def diamond_gradients() -> tuple[Graph, dict[str, Tensor]]:
    module, x, target, oracle = dense.diamond()
    return oracle, autograd(module, 0.5 * ((module(x) - target) ** 2).sum())


def test_literal_zero_divergence_is_backprop_on_a_hand_levelled_graph() -> None:
    oracle, expected = diamond_gradients()
    assert_all_equal(graph.zero_divergence(oracle).gradients, expected, 1e-12)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_shows(mistake: str) -> None:
    oracle, expected = diamond_gradients()
    found = graph.zero_divergence(oracle, MISTAKES[mistake]).gradients
    assert max(relative_error(found.get(name, torch.zeros_like(g)), g) for name, g in expected.items()) > 1e-2


def test_fixed_prediction_needs_depth_steps() -> None:
    oracle, expected = diamond_gradients()
    assert_all_equal(graph.fixed_prediction(oracle, 5, 1.0).gradients, expected, 1e-12)
    short = graph.fixed_prediction(oracle, 4, 1.0).gradients
    assert relative_error(short["a.weight"], expected["a.weight"]) > 1e-2


@pytest.mark.parametrize("rule", EXACT)
def test_the_package_is_backprop_on_the_diamond(rule: str) -> None:
    module, x, target, oracle = dense.diamond()
    _, expected = diamond_gradients()
    inference = pck.PCNetwork(module, rule=EXACT[rule](5), reduction="sum").backward(x, target)
    assert_all_equal({name: p.grad for name, p in module.named_parameters()}, expected, 1e-12)
    assert_all_equal(inference.errors, graph.deltas(oracle), 1e-12)


def test_the_package_is_not_backprop_a_step_short() -> None:
    module, x, target, _ = dense.diamond()
    _, expected = diamond_gradients()
    pck.PCNetwork(module, rule=pck.FixedPrediction(4, 1.0), reduction="sum").backward(x, target)
    assert relative_error(module.a.weight.grad, expected["a.weight"]) > 1e-2


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("steps", STEPS)
def test_errors_equal_dense_matrices_and_the_sum_over_paths(steps: int, rate: float) -> None:
    module, x, target, oracle = dense.diamond()
    iterated, summed = dense.iterate(oracle, steps, rate), dense.by_paths(oracle, steps, rate)
    scale = graph.deltas(oracle)
    allowed = 1e-12 * max_coefficient(5, steps, rate)
    for solver in ("iterate", "closed_form"):
        rule = pck.FixedPrediction(steps, rate, solver=solver)
        errors = pck.PCNetwork(module, rule=rule).infer(x, target).errors
        assert_within(errors, iterated, scale, allowed)
        assert_within(errors, summed, scale, allowed)


def max_coefficient(depth: int, steps: int, rate: float) -> float:
    """max(1, |c_k(t)|) over t <= T and k, from its recurrence."""
    c, largest = [1.0] + [0.0] * depth, 1.0
    for _ in range(steps):
        c = [1.0] + [(1 - rate) * c[k] + rate * c[k - 1] for k in range(1, depth + 1)]
        largest = max(largest, *map(abs, c))
    return largest


def assert_within(found: Values, expected: Values, scale: Values, allowed: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        difference = float((found[name] - value).norm())
        assert difference <= allowed * float(scale[name].norm()), f"{name}: {difference:.2e}"


def test_recorded_errors_and_energies_of_every_step() -> None:
    module, x, target, oracle = dense.diamond()
    expected = graph.fixed_prediction(oracle, 8, 0.3)
    rule = pck.FixedPrediction(8, 0.3, solver="iterate")
    inference = pck.PCNetwork(module, rule=rule).infer(x, target, record=True)
    assert_equal(inference.energy, torch.tensor(expected.energies, dtype=torch.float64), 1e-12, "energy")
    assert len(inference.history) == 9
    for state, errors in zip(inference.history, expected.errors, strict=True):
        assert_all_equal(state.errors, errors, 1e-12)


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_every_exact_rule_is_autograd_on_the_zoo(name: str) -> None:
    example = zoo.build(name)
    torch.manual_seed(1)
    expected = autograd(example.module, example.summed_loss())
    network = pck.PCNetwork(example.module, rule=pck.ZeroDivergence(), loss=example.loss, reduction="sum")
    depth = network.trace(*example.inputs).depth
    for rule in EXACT.values():
        network.rule = rule(depth)
        example.module.zero_grad()
        torch.manual_seed(1)
        network.backward(*example.inputs, target=example.target)
        assert_all_equal({key: p.grad for key, p in example.module.named_parameters()}, expected, 1e-12)


class Odd(nn.Module):
    """A function of (layers, x) that is easy to get wrong."""

    def __init__(self, function: Callable[[Odd, Tensor], object]):
        super().__init__()
        self.function = function
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)

    def start(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))


def assign_in_place(m: Odd, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :2] = 0.5 * h[:, 2:].clone()
    return m.b(h)


def returned_twice(m: Odd, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.b(m.start(x))
    return y, y


def slice_and_tap(m: Odd, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.start(x)
    return h[:, :2], m.b(h)


def square(m: Odd, x: Tensor) -> Tensor:
    h = m.start(x)
    return m.b(h * h)


def stop_gradient(m: Odd, x: Tensor) -> Tensor:
    h = m.start(x)
    return m.b(h * torch.sigmoid(h.detach()))


def dead_fork(m: Odd, x: Tensor) -> Tensor:
    h = m.a(x)
    m.c(h)
    return m.b(torch.relu(h))


def data_mask(m: Odd, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.where(h > 0, h, 0.1 * h) * (h < 1))


def recurrence(m: Odd, x: Tensor) -> Tensor:
    h = m.start(x)
    for _ in range(3):
        h = h + torch.tanh(m.c(h))
    return m.b(h)


def batch_mean(m: Odd, x: Tensor) -> Tensor:
    h = m.start(x)
    return m.b(h - h.mean(0, keepdim=True))


ODD: dict[str, Callable[[Odd, Tensor], object]] = {
    "assigned in place": assign_in_place,
    "returned twice": returned_twice,
    "returned as a slice and used": slice_and_tap,
    "returned beside an input": lambda m, x: (m.b(m.start(x)), x),
    "returned beside None": lambda m, x: (m.b(m.start(x)), None),
    "nested outputs": lambda m, x: {"o": (m.b(m.start(x)), {"z": m.c(x)})},
    "a product with itself": square,
    "a concatenation with itself": lambda m, x: torch.cat([m.b(m.start(x))] * 2, 1),
    "unbound and stacked": lambda m, x: m.b(torch.stack(m.start(x).unbind(1)[::-1], 1)),
    "a skip from the input": lambda m, x: m.b(x + m.start(x)),
    "a weight used twice": lambda m, x: m.b(m.start(x) @ m.a.weight),
    "a layer in a loop": recurrence,
    "a gradient stopped": stop_gradient,
    "a branch that leads nowhere": dead_fork,
    "a mask from the data": data_mask,
    "a quotient": lambda m, x: m.b(m.start(x) / (1 + m.c(x).exp())),
    "samples mixed": batch_mean,
    "the input alone": lambda m, x: m.b(torch.tanh(x)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("value_nodes", ["layer", "op"])
def test_every_exact_rule_is_autograd_on_odd_functions(name: str, value_nodes: str) -> None:
    module, x = Odd(ODD[name]).double(), torch.randn(3, 4).double()
    leaves, structure = pytree.tree_flatten(module(x))
    targets = [torch.randn_like(y) if isinstance(y, Tensor) else y for y in leaves]
    pairs = [(y, t) for y, t in zip(leaves, targets, strict=True) if isinstance(y, Tensor)]
    names, parameters = zip(*module.named_parameters(), strict=True)
    expected = torch.autograd.grad(sum(0.5 * ((y - t) ** 2).sum() for y, t in pairs), parameters, allow_unused=True)
    network = pck.PCNetwork(module, rule=pck.ZeroDivergence(), reduction="sum", value_nodes=value_nodes)
    depth = network.trace(x).depth
    for rule in EXACT.values():
        network.rule = rule(depth)
        module.zero_grad()
        network.backward(x, target=pytree.tree_unflatten(targets, structure))
        for key, parameter, gradient in zip(names, parameters, expected, strict=True):
            assert (parameter.grad is None) == (gradient is None), f"{key}: {parameter.grad} for {gradient}"
            if gradient is not None:
                assert_equal(parameter.grad, gradient, 1e-12, key)
