"""Precisions of vertices against numpy loops from F, and what may be asked for."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from oracle import exact, rules, strict_models
from oracle.extended import Expected, compare_all
from oracle.precision import WeightedLoop
from oracle.strict import StrictLoop
from oracle.strict_models import Case, to_numpy
from oracle_case import subject_of
from torch import Tensor, nn

import pckernels as pck

BUILDERS = {"mlp": lambda real: strict_models.mlp(real, "tanh"), "cnn": strict_models.cnn, "resnet": strict_models.resnet}
PRECISIONS = {"number": 1.7, "dict": None, "tensor": None, "learned": "learned", "mixed": None}
STEPS, RATE = 4, 0.07


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    return subject_of(BUILDERS[name])


def precision_of(kind: str, graph: object) -> object:
    """The precision to ask for: another for each vertex."""
    names = [vertex.name for vertex in graph.hidden]
    several = {name: 0.4 + 0.5 * k for k, name in enumerate(names)}
    if kind == "tensor":
        return {name: 0.5 + torch.rand(graph[name].shape[1:], dtype=torch.float64) for name in names[::2]}
    if kind == "mixed":
        return {**several, names[-1]: "learned"}
    return several if kind == "dict" else PRECISIONS[kind]


def weighted_loops(name: str, rule: pck.rules.Rule, kind: str) -> tuple[WeightedLoop, WeightedLoop]:
    case, network, plain = subject(name)
    network.rule, network.precision = pck.Strict(0, 0.1), None
    network.precision = precision_of(kind, network.trace(case.x))
    network.trace(case.x)
    network.rule = rule
    logs = network.extra_parameters()
    for k, log in enumerate(logs.values()):
        log.data.fill_(0.3 - 0.2 * k)
    return tuple(weighted_loop(loop, network, real) for loop, real in ((case.oracle, np.longdouble), (plain, np.float64)))


def weighted_loop(loop: StrictLoop, network: pck.PCNetwork, real: type) -> WeightedLoop:
    asked, hidden = network.precision, [u.name for u in loop.hidden]
    asked = asked if isinstance(asked, dict) else dict.fromkeys(hidden, asked)
    fixed = {
        name: to_numpy(torch.as_tensor(value, dtype=torch.float64), real) for name, value in asked.items() if not isinstance(value, str)
    }
    learned = [name for name, value in asked.items() if isinstance(value, str)]
    return WeightedLoop(loop, fixed, {name: to_numpy(network.extra_parameters()[f"log_precision.{name}"], real) for name in learned})


def gradients(network: pck.PCNetwork) -> dict[str, Tensor]:
    return {key: p.grad for key, p in network.named_parameters() if p.grad is not None}


def assert_follows(name: str, expected: Expected) -> None:
    case, network, _ = subject(name)
    network.zero_grad()
    inference = network.backward(case.x, case.target)
    expected.energies(inference.energy)
    for t, state in enumerate(network.infer(case.x, case.target, record=True).history):
        expected.state(state.values, state.errors, t)
    expected.gradients(gradients(network))


@pytest.fixture(autouse=True)
def own_extras() -> object:
    """Each test starts without the parameters of another."""
    yield
    for name in BUILDERS:
        subject(name)[1]._extra._parameters.clear()


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_strict_with_precisions_equals_the_loop(name: str, kind: str) -> None:
    course = {"momentum": 0.6, "sweep": "red_black"}
    loops = weighted_loops(name, pck.Strict(STEPS, RATE, **course), kind)
    assert_follows(name, Expected(*(loop.run(STEPS, RATE, **course) for loop in loops)))


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_error_optimization_with_precisions_equals_the_loop(name: str, kind: str) -> None:
    loops = weighted_loops(name, pck.ErrorOptimization(STEPS, RATE, 0.5), kind)
    assert_follows(name, Expected(*(rules.error_optimization(loop, STEPS, RATE, 0.5) for loop in loops)))


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_incremental_with_precisions_equals_the_loop(name: str, kind: str) -> None:
    loops = weighted_loops(name, pck.Incremental(STEPS, RATE, 0.02), kind)
    extended, rough = (rules.incremental(loop, STEPS, RATE, 0.02) for loop in loops)
    assert_follows(name, Expected(extended[0], rough[0]))
    case, network, _ = subject(name)
    live = copy.deepcopy(network)
    live.step(case.x, case.target, torch.optim.SGD(live.parameters(), 0.02))
    compare_all({key: p.detach() for key, p in live.named_parameters()}, extended[1], rough[1], "weight")


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_centered_nudging_with_precisions_equals_the_loop(name: str, kind: str) -> None:
    loops = weighted_loops(name, pck.Strict(STEPS, RATE, nudge=("centered", 0.3)), kind)
    assert_follows(name, Expected(*(rules.nudged(loop, (0.3, -0.3), STEPS, RATE) for loop in loops)))


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("solver", ["iterate", "closed_form"])
def test_fixed_prediction_with_precisions_equals_the_loop(name: str, kind: str, solver: str) -> None:
    for steps in (0, 1, STEPS):
        loops = weighted_loops(name, pck.FixedPrediction(steps, 0.3, solver), kind)
        case, network, _ = subject(name)
        if solver == "closed_form" and (name == "resnet" or kind == "tensor"):
            with pytest.raises(pck.Unsupported, match='Use solver="iterate"'):
                network.backward(case.x, case.target)
            return
        assert_follows(name, Expected(*(exact.fixed_prediction(loop, steps, 0.3) for loop in loops)))


def test_relaxed_feedback_and_precisions_go_together() -> None:
    """The closed form on a chain is of any linear way back: it equals the steps."""
    network, x, target = make({"0": 0.5, "2": "learned"})
    found = []
    for solver in ("closed_form", "iterate"):
        network.rule = pck.Relaxed(pck.FixedPrediction(5, 0.4, solver), "learned", False)
        network.zero_grad()
        found.append((network.backward(x, target), gradients(network)))
    (swept, first), (stepped, second) = found
    assert "closed form with precisions, learned feedback, no f'" in swept.plan
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-7) for name in first)
    assert torch.allclose(swept.energy, stepped.energy, rtol=1e-5)


def make(precision: object, rule: pck.rules.Rule | None = None) -> tuple[pck.PCNetwork, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return pck.PCNetwork(module, rule or pck.Strict(4, 0.1), precision=precision), torch.randn(7, 4), torch.randn(7, 3)


def test_precision_one_is_no_precision() -> None:
    found = []
    for precision in (None, 1, 1.0, {}, {"0": 1.0}):
        network, x, target = make(precision)
        inference = network.backward(x, target)
        found.append(gradients(network))
        assert inference.backend == "host" and list(network.state_dict()) == list(network.module.state_dict())
    assert all(torch.equal(other[name], found[0][name]) for other in found for name in found[0])


def test_learned_precisions_are_parameters() -> None:
    network, x, target = make("learned")
    with pytest.raises(RuntimeError, match="Call trace"):
        network.extra_parameters()
    network.trace(x)
    assert {name: p.item() for name, p in network.extra_parameters().items()} == {"log_precision.0": 0.0, "log_precision.2": 0.0}
    network.step(x, target, torch.optim.SGD(network.parameters(), 0.1))
    fresh, _, _ = make("learned")
    fresh.load_state_dict(network.state_dict())
    for other in (fresh, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(torch.equal(p, network.extra_parameters()[name]) for name, p in other.extra_parameters().items())
        assert torch.equal(other.infer(x, target).energy, network.infer(x, target).energy)


def test_a_learned_precision_finds_the_inverse_of_the_mean_squared_error() -> None:
    """At the minimum over log pi, pi is elements / ||eps||^2, whatever the errors are."""
    network, x, target = make("learned", pck.FixedPrediction(9, 0.5))
    network.trace(x)
    logs = list(network.extra_parameters().values())
    for log in logs:
        log.data.fill_(1.0)  # rate * pi stays below 2
    log = logs[0]
    inference = network.backward(x, target)
    pi, error = log.exp().item(), inference.errors["0"]
    assert log.grad.item() == pytest.approx(0.5 * (pi * error.square().sum().item() - error.numel()) / len(x), rel=1e-5)
    assert (log.grad < 0) == (pi < error.numel() / error.square().sum())


def test_auto_takes_the_engine_and_the_plan_says_so() -> None:
    network, x, target = make(2.0)
    inference = network.infer(x, target)
    assert inference.backend == "host" and "strict dynamics with precisions, 4 steps" in inference.plan
    assert network.infer(x).backend == "host"


class TwoChains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.a(x).tanh(), self.c(x).tanh()  # in turns, so that no vertex stands behind its parent
        return self.b(one), self.e(self.d(other).tanh())


@pytest.mark.parametrize("backend", ["reference", "graph"])
def test_each_of_several_chains_counts_from_its_own_output(backend: str) -> None:
    module, x = TwoChains().double(), torch.randn(5, 3).double()
    target, found = (torch.randn(5, 2).double(), torch.randn(5, 2).double()), []
    for solver in ("iterate", "closed_form"):
        network = pck.PCNetwork(module, pck.FixedPrediction(4, 0.3, solver), precision={"a": 1.5, "c": 0.7}, backend=backend)
        network.zero_grad()
        found.append((network.backward(x, target=target), gradients(network)))
    (stepped, first), (swept, second) = found
    assert all(torch.allclose(error, swept.errors[name], rtol=1e-12) for name, error in stepped.errors.items())
    assert all(torch.allclose(first[name], second[name], rtol=1e-12) for name in first)
    assert torch.allclose(stepped.energy, swept.energy, rtol=1e-12)


BAD = [
    (0, ValueError, "precision must be finite and greater than 0; got 0"),
    (float("nan"), ValueError, "finite and greater than 0"),
    ("fixed", ValueError, 'precision must be a number, or "learned"'),
    (True, TypeError, "precision must be a number"),
    (torch.ones(3), TypeError, "precision must be a number"),
    ({"0": -1.0}, ValueError, "the precision of '0' must be finite and greater than 0"),
    ({"0": torch.tensor([1, 2])}, TypeError, "the precision of '0' must be floating point"),
    ({"0": torch.tensor([1.0, 0.0])}, ValueError, "the precision of '0' must be finite and greater than 0 in every element"),
    ({0: 1.0}, TypeError, "names of vertices"),
]


@pytest.mark.parametrize(("precision", "error", "words"), BAD)
def test_bad_precisions_are_refused_at_once(precision, error, words) -> None:
    with pytest.raises(error, match=words):
        make(precision)


BAD_ON_A_GRAPH = [
    ({"output": 2.0}, None, ValueError, "'output' is an output, whose loss has weight 1"),
    ({"fc": 2.0}, None, ValueError, "no hidden vertex 'fc'"),
    ({"0": torch.ones(5)}, None, ValueError, r"has shape \(5,\); it must broadcast to \(6,\)"),
    (2.0, pck.ZeroDivergence(), ValueError, "ZeroDivergence is a statement about precision 1"),
    (3.0, pck.FixedPrediction(3, 0.7), ValueError, r"rate \* precision lies in \(0, 2\)"),
    ("learned", pck.Strict(3, 0.1, nudge=0.2), ValueError, "cannot be learned under a one-sided nudge"),
]


@pytest.mark.parametrize(("precision", "rule", "error", "words"), BAD_ON_A_GRAPH)
def test_precisions_that_do_not_fit_are_refused_in_a_sentence(precision, rule, error, words) -> None:
    network, x, target = make(precision, rule)
    with pytest.raises(error, match=words):
        network.infer(x, target)
