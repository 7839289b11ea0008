"""Relaxed rules and precisions as code: the interpreter against the reference in float64, and the engines as every backend is tested."""

from __future__ import annotations

from functools import lru_cache

import pytest
import test_backends as backends
import torch
from extra_case import assert_as_good, weigh
from test_program import Interpreted, assert_same, interpreted  # noqa: F401
from torch import nn

import pckernels as pck
from pckernels import models
from pckernels.backends import selection

RELAXATIONS: dict[str, dict[str, object]] = {
    "feedback": {"feedback": "learned"},
    "no_derivative": {"derivative": False},
    "both": {"feedback": "random", "derivative": False},
}
STEPPED = [
    pck.Strict(1, 0.1),
    pck.Strict(5, 0.1, momentum=0.5),
    pck.Strict(4, 0.1, sweep="top_down"),
    pck.Strict(4, 0.05, nudge=("centered", 0.3)),
    pck.ErrorOptimization(4, 0.05, momentum=0.5),
    pck.ErrorOptimization(3, 0.05, sweep="red_black"),
    pck.FixedPrediction(4, 0.4, solver="iterate"),
]
SWEPT = [pck.FixedPrediction(3, 0.4), pck.FixedPrediction(40, 1.0), pck.ZeroDivergence()]
NESTED = [pck.FixedPrediction(3, 0.4, solver, order="nested") for solver in ("iterate", "closed_form")]
FEW = [STEPPED[1], STEPPED[5], STEPPED[6], pck.ZeroDivergence()]  # where another model adds instructions, not rules


def ids(value: object) -> str:
    return str(value).replace(" ", "")


@lru_cache
def traced(name: str) -> tuple[models.Case, pck.PCNetwork]:
    """One network a model, so that it is traced once for each family of rules."""
    case = models.build(name)
    return case, pck.PCNetwork(case.module, pck.ZeroDivergence(), loss=case.loss)


RELAXED = [(name, rule, relaxation) for name in ("mlp", "cnn") for rule in STEPPED + SWEPT for relaxation in RELAXATIONS]
RELAXED += [(name, rule, "both") for name in ("rnn", "lstm", "densenet") for rule in FEW]
RELAXED += [("lstm", rule, "feedback") for rule in NESTED]


@pytest.mark.parametrize(("name", "rule", "relaxation"), RELAXED, ids=ids)
def test_relaxed_code_is_the_reference(name: str, rule: pck.rules.Rule, relaxation: str, interpreted: Interpreted) -> None:  # noqa: F811
    case, network = traced(name)
    network.rule, network.precision = pck.Relaxed(rule, **RELAXATIONS[relaxation]), None
    assert_same(network, (case.x,), case.target)
    assert interpreted.runs == 1


PRECISIONS = ["number", "several", "elements", "learned"]


WEIGHED = [("mlp", rule, kind) for rule in STEPPED for kind in PRECISIONS]
WEIGHED += [(name, rule, kind) for name in ("cnn", "lstm", "densenet") for rule in FEW[:3] for kind in ("elements", "learned")]
WEIGHED += [("rnn", NESTED[0], "several")]


@pytest.mark.parametrize(("name", "rule", "kind"), WEIGHED, ids=ids)
def test_weighed_code_is_the_reference(name: str, rule: pck.rules.Rule, kind: str, interpreted: Interpreted) -> None:  # noqa: F811
    case, network = traced(name)
    weigh(network, kind, case.x)
    network.rule = rule
    assert_same(network, (case.x,), case.target)
    assert interpreted.runs == 1


@pytest.mark.parametrize("kind", ["number", "several", "learned"])
@pytest.mark.parametrize("rule", [pck.FixedPrediction(0, 0.4), pck.FixedPrediction(3, 0.4), pck.FixedPrediction(40, 1.0)], ids=ids)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_weighed_sweep_is_the_reference(name: str, rule: pck.rules.Rule, kind: str, interpreted: Interpreted) -> None:  # noqa: F811
    case, network = traced(name)
    weigh(network, kind, case.x)
    for each in (rule, pck.Relaxed(rule, "learned", False)):
        network.rule = each
        assert_same(network, (case.x,), case.target)
    assert interpreted.runs == 2


@pytest.mark.parametrize("pays", [False, True])
def test_the_gram_form_goes_with_what_leaves_it_symmetric(pays: bool, monkeypatch: pytest.MonkeyPatch, interpreted: Interpreted) -> None:  # noqa: F811
    """Feedback by W without f' does; backward weights do not, nor does a precision of the node whose displacement it is."""
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    grams = []

    def chosen(key: selection.Key, size: int) -> object:
        code = selection.compiled(*key, gram=pays)
        grams.append(code.gram_width)
        return code

    monkeypatch.setattr(selection, "cheapest", chosen)
    rule, x, target = pck.Strict(7, 0.2, momentum=0.6), torch.randn(4, 6).double(), torch.randn(4, 3).double()
    for network in (
        pck.PCNetwork(module, pck.Relaxed(rule, derivative=False)),
        pck.PCNetwork(module, rule, precision={"2": 1.5}),
        pck.PCNetwork(module, pck.Relaxed(rule, "learned")),
        pck.PCNetwork(module, rule, precision={"0": 1.5}),
    ):
        assert_same(network, (x,), target)
    assert grams == [5 * pays, 5 * pays, 0, 0] and interpreted.runs == 4


def test_activations_without_a_derivative(interpreted: Interpreted) -> None:  # noqa: F811
    """SiLU too, and one that stands before a product, on a value node itself."""
    x, target = 3 * torch.randn(5, 4).double(), torch.randn(5, 2).double()
    for activation in (nn.LeakyReLU(0.2), nn.Sigmoid(), nn.GELU("tanh"), nn.Hardtanh(-0.5, 0.7), nn.ReLU6(), nn.SiLU()):
        module = nn.Sequential(nn.Linear(4, 9), activation, nn.Linear(9, 9), activation, nn.Linear(9, 2)).double()
        assert_same(pck.PCNetwork(module, pck.Relaxed(pck.Strict(4, 0.1), "learned", False)), (x,), target)
        before = pck.PCNetwork(module, pck.Relaxed(pck.Strict(4, 0.1), derivative=False), value_nodes=["0", "2", "4"])
        assert_same(before, (x,), target)
    assert interpreted.runs == 12


def test_a_symmetric_rule_is_the_rule_bit_for_bit() -> None:
    x, target = torch.randn(5, 4), torch.randn(5, 2)
    module = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    network = pck.PCNetwork(module, pck.Strict(5, 0.1), backend="host")
    plain = backends.run(network, pck.Strict(5, 0.1), "squared_error", x, target)
    relaxed = backends.run(network, pck.Relaxed(pck.Strict(5, 0.1)), "squared_error", x, target)
    assert all(torch.equal(plain[key], relaxed[key]) for key in plain)


def test_a_precision_is_data_of_the_call() -> None:
    """Code is found again whatever the precisions are."""
    x, target = torch.randn(5, 4), torch.randn(5, 2)
    network = pck.PCNetwork(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)), pck.Strict(5, 0.1), precision={"0": 0.5})
    network.trace(x)
    before, energies = selection.compiled.cache_info().misses, []
    for precision in (0.5, 2.0, torch.full((9,), 2.0)):
        network.precision = {"0": precision}
        inference = network.infer(x, target)
        assert inference.backend == "host"
        energies.append(inference.energy)
    assert selection.compiled.cache_info().misses <= before + 2  # with the Gram form, and without
    assert not torch.equal(energies[0], energies[1]) and torch.equal(energies[1], energies[2])


# The engines, in float32


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_the_graph_tier_is_the_reference_in_float64(name: str) -> None:
    case, network = traced(name)
    weigh(network, "learned", case.x)
    network.rule, found = pck.Relaxed(pck.Strict(6, 0.1, momentum=0.5), "learned", False), {}
    for network.backend in ("graph", "reference"):
        found[network.backend] = backends.run(network, network.rule, case.loss, case.x, case.target)
    for key, expected in found["reference"].items():
        torch.testing.assert_close(found["graph"][key], expected, rtol=1e-11, atol=1e-12, msg=key)


ENGINES = ["host", "graph"]
COURSES = [
    pck.Strict(8, 0.1, momentum=0.5),
    pck.ErrorOptimization(8, 0.1),
    pck.FixedPrediction(8, 0.3, solver="iterate"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in ("mlp", "skip", "cnn") for rule in (*COURSES, pck.ZeroDivergence())] + [("lstm", COURSES[0])],
    ids=ids,
)
@pytest.mark.parametrize("backend", ENGINES)
def test_relaxed_rules_in_float32(backend: str, name: str, rule: pck.rules.Rule) -> None:
    assert_as_good(backend, name, pck.Relaxed(rule, "learned", False), 17)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name in ("mlp", "skip", "cnn") for rule in COURSES] + [("lstm", COURSES[1])], ids=ids
)
@pytest.mark.parametrize("kind", ["elements", "learned"])
@pytest.mark.parametrize("backend", ENGINES)
def test_precisions_in_float32(backend: str, name: str, rule: pck.rules.Rule, kind: str) -> None:
    assert_as_good(backend, name, rule, 17, kind)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("backend", ENGINES)
def test_ragged_batches(backend: str, batch: int) -> None:
    for rule in (pck.Strict(64, 0.1), pck.FixedPrediction(5, 0.3)):
        assert_as_good(backend, "mlp10", pck.Relaxed(rule, "learned", False), batch, "learned")
