"""Relaxed rules against numpy loops from their equations, and what their parameters are to a network."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from oracle import exact, rules, strict_models
from oracle.extended import Expected, compare_all
from oracle.relaxed import Relaxation, RelaxedLoop
from oracle.strict import StrictLoop
from oracle.strict_models import Case, to_numpy
from oracle_case import subject_of
from torch import Tensor, nn

import pckernels as pck

BUILDERS = {
    "mlp": lambda real: strict_models.mlp(real, "tanh"),
    "cnn": strict_models.cnn,
    "resnet": strict_models.resnet,
    "lstm": lambda real: strict_models.lstm(real, 2),
}
RELAXATIONS: dict[str, dict[str, object]] = {
    "feedback": {"feedback": "learned"},
    "no_derivative": {"derivative": False},
    "error_weights": {"error_weights": "learned"},
    "all_learned": {"feedback": "learned", "derivative": False, "error_weights": "learned"},
    "all_random": {"feedback": "random", "derivative": False, "error_weights": "random"},
}
WITHOUT_ERROR_WEIGHTS = [name for name, options in RELAXATIONS.items() if "error_weights" not in options]
STEPS, RATE, WEIGHT_RATE = 4, 0.07, 1e-4


@cache
def subject(name: str) -> tuple[Case, pck.PCNetwork, StrictLoop]:
    return subject_of(BUILDERS[name])


def relaxed_loops(name: str, rule: pck.rules.Rule, relaxation: str) -> tuple[RelaxedLoop, RelaxedLoop]:
    """The network takes the relaxed rule; the loops, in extended precision and in float64, take its parameters."""
    case, network, plain = subject(name)
    network.rule = pck.Relaxed(rule, **RELAXATIONS[relaxation])
    network.trace(case.x)
    return relaxed_loop(case.oracle, network, np.longdouble), relaxed_loop(plain, network, np.float64)


def relaxed_loop(loop: StrictLoop, network: pck.PCNetwork, real: type) -> RelaxedLoop:
    options = network.rule
    extra = {key: to_numpy(p, real) for key, p in network.extra_parameters().items()}
    psi = {key.removeprefix("feedback."): value for key, value in extra.items() if key.startswith("feedback.")}
    mixing = {key.removeprefix("error_weights."): value for key, value in extra.items() if key.startswith("error_weights.")}
    learned = tuple(kind for kind in ("feedback", "error_weights") if getattr(options, kind) == "learned")
    return RelaxedLoop(
        loop,
        Relaxation(
            psi if options.feedback != "symmetric" else None,
            options.derivative,
            mixing if options.error_weights != "identity" else {},
            learned,
        ),
    )


def gradients(network: pck.PCNetwork) -> dict[str, Tensor]:
    return {key: p.grad for key, p in network.named_parameters() if p.grad is not None}


def assert_follows(name: str, expected: Expected) -> None:
    case, network, _ = subject(name)
    network.zero_grad()
    inference = network.backward(case.x, case.target)
    expected.energies(inference.energy)
    history = network.infer(case.x, case.target, record=True).history
    assert len(history) == len(expected.exact.values)
    for t, state in enumerate(history):
        expected.state(state.values, state.errors, t)
    expected.state(inference.values, inference.errors, len(history) - 1)
    expected.gradients(gradients(network))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_strict_equals_the_loop(name: str, relaxation: str) -> None:
    for course in ({}, {"momentum": 0.6, "sweep": "red_black"}):
        loops = relaxed_loops(name, pck.Strict(STEPS, RATE, **course), relaxation)
        assert_follows(name, Expected(*(loop.run(STEPS, RATE, **course) for loop in loops)))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_relaxed_nudging_equals_the_loop(name: str, relaxation: str) -> None:
    loops = relaxed_loops(name, pck.Strict(STEPS, RATE, nudge=("centered", 0.3)), relaxation)
    assert_follows(name, Expected(*(rules.nudged(loop, (0.3, -0.3), STEPS, RATE) for loop in loops)))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_incremental_equals_the_loop(name: str, relaxation: str) -> None:
    course = {"momentum": 0.6, "sweep": "red_black"}
    loops = relaxed_loops(name, pck.Incremental(STEPS, RATE, WEIGHT_RATE, **course), relaxation)
    extended, rough = (rules.incremental(loop, STEPS, RATE, WEIGHT_RATE, **course) for loop in loops)
    assert_follows(name, Expected(extended[0], rough[0]))
    case, network, _ = subject(name)
    live = copy.deepcopy(network)
    live.step(case.x, case.target, torch.optim.SGD(live.parameters(), WEIGHT_RATE))
    moved = {key: p.detach() for key, p in live.named_parameters() if key in extended[1]}
    compare_all(moved, extended[1], rough[1], "weight")


@pytest.mark.parametrize("relaxation", WITHOUT_ERROR_WEIGHTS)
@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_error_optimization_equals_the_loop(name: str, relaxation: str) -> None:
    loops = relaxed_loops(name, pck.ErrorOptimization(STEPS, RATE, 0.5), relaxation)
    assert_follows(name, Expected(*(rules.error_optimization(loop, STEPS, RATE, 0.5) for loop in loops)))


@pytest.mark.parametrize("solver", ["closed_form", "iterate"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_fixed_prediction_equals_the_loop(name: str, relaxation: str, solver: str) -> None:
    for steps in (1, STEPS):
        loops = relaxed_loops(name, pck.FixedPrediction(steps, 0.3, solver), relaxation)
        assert_follows(name, Expected(*(exact.fixed_prediction(loop, steps, 0.3) for loop in loops)))


@pytest.mark.parametrize("solver", ["sweep", "iterate"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_zero_divergence_equals_the_literal_loop(name: str, relaxation: str, solver: str) -> None:
    loops = relaxed_loops(name, pck.ZeroDivergence(solver), relaxation)
    mixed = "error_weights" in RELAXATIONS[relaxation]
    rounding = 4 * 2.0**-52 if mixed else 0.0  # v - E mu of numbers near 1: a gate that has no effect moves by its error and back
    assert_follows(name, Expected(*(exact.zero_divergence(loop) for loop in loops), rounding))
    case, network, _ = subject(name)
    assert ("literal" in network.infer(case.x, case.target).plan) == (solver == "iterate" or mixed)


RULES = [
    pck.Strict(4, 0.1, momentum=0.5),
    pck.Strict(4, 0.1, nudge=("centered", 0.2)),
    pck.FixedPrediction(4, 0.3),
    pck.FixedPrediction(4, 0.3, "iterate"),
    pck.ZeroDivergence(),
    pck.ZeroDivergence("iterate"),
    pck.Incremental(4, 0.1, 0.05),
    pck.ErrorOptimization(4, 0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_relaxed_by_nothing_is_the_rule_bit_for_bit(rule: pck.rules.Rule) -> None:
    found = []
    for own in (rule, pck.Relaxed(rule)):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        network = pck.PCNetwork(module, own)
        inference = network.backward(torch.randn(3, 4), torch.randn(3, 2))
        assert list(network.state_dict()) == list(module.state_dict()) and not network.extra_parameters()
        found.append((gradients(network), inference))
    (first, one), (second, other) = found
    assert one.backend == other.backend and one.plan == other.plan
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(one.errors[name], other.errors[name]) for name in one.errors)
    assert torch.equal(one.energy, other.energy)


# What the parameters are to a network


def make(relaxation: str = "all_learned", rule: pck.rules.Rule | None = None) -> tuple[pck.PCNetwork, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    network = pck.PCNetwork(module, pck.Relaxed(rule or pck.Strict(4, 0.1), **RELAXATIONS[relaxation]))
    return network, torch.randn(7, 4), torch.randn(7, 3)


EXTRA = ["feedback.2.weight", "feedback.4.weight", "error_weights.0", "error_weights.2"]


def test_they_are_parameters_of_the_network_and_not_of_the_module() -> None:
    network, x, _ = make()
    with pytest.raises(RuntimeError, match="Call trace"):
        network.extra_parameters()
    own = list(network.state_dict())
    network.trace(x)
    assert list(network.extra_parameters()) == EXTRA
    assert set(network.state_dict()) == {*own, *(f"pc.{name}" for name in EXTRA)}
    assert list(network.module.state_dict()) == own
    assert {name for name, _ in network.named_parameters()} == set(own) | {f"pc.{name}" for name in EXTRA}
    assert {p.dtype for p in network.to(torch.float64).extra_parameters().values()} == {torch.float64}


def test_their_start_depends_on_their_name_alone_and_is_of_the_weights_size() -> None:
    (first, x, _), (second, _, _) = make(), make()
    first.trace(x)
    torch.manual_seed(99)
    second.trace(x)
    assert all(torch.equal(first.extra_parameters()[name], second.extra_parameters()[name]) for name in EXTRA)
    wide = pck.PCNetwork(nn.Sequential(nn.Linear(3, 300), nn.Tanh(), nn.Linear(300, 200)), first.rule)
    wide.trace(torch.randn(2, 3))
    psi, mixing = wide.extra_parameters().values()
    assert psi.square().mean().sqrt().item() == pytest.approx(wide.module[2].weight.square().mean().sqrt().item(), rel=0.02)
    assert mixing.square().mean().sqrt().item() == pytest.approx(300**-0.5, rel=0.02)


def test_optimizers_save_load_copy_and_pickle() -> None:
    network, x, target = make()
    network.trace(x)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.step(x, target, optimizer)
    assert all(not torch.equal(before[name], p) for name, p in network.named_parameters())
    fresh, _, _ = make()
    fresh.load_state_dict(network.state_dict())  # before its first trace
    others = [fresh, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    network.backward(x, target)
    for other in others:
        other.zero_grad()
        other.backward(x, target)
        assert all(torch.equal(p, dict(network.named_parameters())[name]) for name, p in other.named_parameters())
    network.zero_grad()
    network.backward(x, target)
    for other in others:
        assert all(torch.equal(p.grad, dict(network.named_parameters())[name].grad) for name, p in other.named_parameters())
    assert copy.deepcopy(network).extra_parameters()["error_weights.0"] is not network.extra_parameters()["error_weights.0"]


def test_a_state_dict_must_fit() -> None:
    network, x, _ = make()
    network.trace(x)
    state = network.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*pc\.error_weights\.0"):
        network.load_state_dict({key: value for key, value in state.items() if key != "pc.error_weights.0"})
    symmetric, _, _ = make("no_derivative")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pc\.feedback\.2\.weight"):
        symmetric.load_state_dict(state)
    other, _, _ = make()
    other.load_state_dict({**state, "pc.feedback.2.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"pc.feedback.2.weight has shape \(2, 2\), and must have \(5, 6\)"):
        other.trace(x)


def test_what_is_random_or_frozen_stays() -> None:
    network, x, target = make("all_random")
    network.backward(x, target)
    assert all(not p.requires_grad and p.grad is None for p in network.extra_parameters().values())
    network.rule = pck.Relaxed(network.rule.rule, feedback="learned")
    network.zero_grad()
    network.module[4].weight.requires_grad_(False)  # its backward weight learns what it learns: nothing
    network.backward(x, target)
    psi = network.extra_parameters()
    assert torch.equal(psi["feedback.2.weight"].grad, network.module[2].weight.grad)
    assert psi["feedback.2.weight"].grad.data_ptr() != network.module[2].weight.grad.data_ptr()
    assert psi["feedback.4.weight"].grad is None
    psi["feedback.2.weight"].requires_grad_(False)
    network.zero_grad()
    network.backward(x, target)
    assert psi["feedback.2.weight"].grad is None


def test_two_calls_add_and_the_scale_multiplies() -> None:
    network, x, target = make()
    network.backward(x, target)
    once = {name: grad.clone() for name, grad in gradients(network).items()}
    network.backward(x, target, scale=3.0)
    assert all(torch.allclose(grad, 4 * once[name], rtol=1e-5) for name, grad in gradients(network).items())


def test_divergence_changes_nothing() -> None:
    for rule in (pck.Strict(80, 30.0), pck.Incremental(80, 30.0, 0.1)):
        network, x, target = make(rule=rule)
        network.trace(x)
        optimizer = torch.optim.Adam(network.parameters())
        state = copy.deepcopy(network.state_dict())
        for call in (lambda: network.backward(x, target), lambda: network.step(x, target, optimizer)):  # noqa: B023
            with pytest.raises(pck.InferenceDiverged):
                call()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


def test_it_runs_on_the_reference_and_the_plan_says_why_and_how() -> None:
    network, x, target = make()
    inference = network.infer(x, target)
    assert inference.backend == "reference" and "learned feedback, no f' on the way back, learned error weights" in inference.plan
    assert "not host: a rule with error weights" in inference.plan
    network.backend = "host"
    with pytest.raises(pck.Unsupported, match="compares values with mixtures of predictions"):
        network.infer(x, target)
    assert network.infer(x).backend == "host"


@pytest.mark.parametrize("relaxation", WITHOUT_ERROR_WEIGHTS)
def test_without_error_weights_auto_takes_the_engine_and_the_plan_says_how(relaxation: str) -> None:
    for rule, words in ((pck.Strict(4, 0.1), "strict dynamics"), (pck.ZeroDivergence(), "zero divergence")):
        network, x, target = make(relaxation, rule)
        inference = network.infer(x, target)
        how = "learned feedback" if relaxation == "feedback" else "no f' on the way back"
        assert inference.backend == "host" and f"{words}, {how}" in inference.plan


def test_learned_feedback_with_decay_comes_to_be_the_weights() -> None:
    """Both learn the same product and forget at the same rate, so their difference only decays (Kolen & Pollack 1994)."""
    network, x, target = make("feedback", pck.ZeroDivergence())
    network.trace(x)
    psi, weight = network.extra_parameters()["feedback.4.weight"], network.module[4].weight
    before = (psi - weight).norm().item()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1)
    for _ in range(50):
        network.step(x, target, optimizer)
    assert (psi - weight).norm().item() == pytest.approx(before * 0.99**50, rel=1e-3)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Member(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pc = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pc(torch.tanh(self.first(x)))


def test_what_there_is_no_backward_weight_for_is_refused() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(pck.Unsupported, match="of parameters, which says nothing of a backward weight"):
        pck.PCNetwork(Scaled(), pck.Relaxed(pck.Strict(2, 0.1), "learned")).trace(x)
    with pytest.raises(ValueError, match="member named 'pc'"):
        pck.PCNetwork(Member(), pck.Relaxed(pck.Strict(2, 0.1), "learned")).trace(x)
    flat = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Tanh())
    with pytest.raises(pck.Unsupported, match="no axis of features to mix"):
        pck.PCNetwork(flat, pck.Relaxed(pck.Strict(2, 0.1), error_weights="learned"), value_nodes="op").trace(x)


BAD = [
    (lambda: pck.Relaxed(0.1), TypeError, "Relaxed takes another rule"),
    (lambda: pck.Relaxed(pck.Relaxed(pck.Strict(2, 0.1))), TypeError, "Relaxed takes another rule"),
    (lambda: pck.Relaxed(pck.Strict(2, 0.1), feedback="none"), ValueError, "feedback must be one of 'symmetric'"),
    (lambda: pck.Relaxed(pck.Strict(2, 0.1), derivative=1), TypeError, "derivative must be True or False"),
    (lambda: pck.Relaxed(pck.Strict(2, 0.1), error_weights=True), TypeError, "error_weights must be a str"),
    (lambda: pck.Relaxed(pck.ErrorOptimization(2, 0.1), error_weights="random"), ValueError, "ErrorOptimization compares none"),
    (lambda: pck.Strict(2, 0.1, feedback="random"), TypeError, "feedback= is an option of Relaxed, not of Strict"),
]


@pytest.mark.parametrize(("make_rule", "error", "words"), BAD)
def test_bad_combinations_are_refused_in_a_sentence(make_rule, error, words) -> None:
    with pytest.raises(error, match=words):
        make_rule()


def test_fixed_prediction_forgets_the_error_weights() -> None:
    """Its errors converge to the same from any start, so error weights leave what the weights learn, at convergence, as it was."""
    network, x, target = make("error_weights", pck.FixedPrediction(90, 0.5))
    network.module.double(), network._extra.double()
    network.backward(x.double(), target.double())
    found = {name: grad.clone() for name, grad in gradients(network).items()}
    network.rule = pck.ZeroDivergence()
    network.zero_grad()
    network.backward(x.double(), target.double())
    for name, p in network.module.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-10, atol=1e-14), name
