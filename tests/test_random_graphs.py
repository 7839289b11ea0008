"""Random modules: skips, joins of every kind, shared weights, several inputs, taps, slices; the package against an interpreter.

A case is one rule with its steps and rate (or one batch size) on one module, compared in every number that it returns.
"""

from __future__ import annotations

from functools import cached_property

import pytest
import torch
from hypothesis import given, settings
from oracle import graph
from oracle.compare import assert_all_equal_up_to_cancellation, assert_equal
from oracle.graph import Graph, Trajectory
from oracle.random_modules import Description, RandomModule, descriptions, interpret, pack, random_inputs, unpack
from torch import Tensor

import pckernels as pck

MODULES = 60
TOLERANCE = 1e-10
LOST_BY_STRICT = 4096  # units of rounding: the interpreter subtracts predictions from values, and norms amplify what that loses
cases = 0

STRICT = [
    {"steps": 4, "rate": 0.03},
    {"steps": 1, "rate": 0.2},
    {"steps": 3, "rate": 0.03, "momentum": 0.5},
    {"steps": 3, "rate": 0.03, "sweep": "top_down"},
    {"steps": 2, "rate": 0.03, "sweep": "red_black", "momentum": 0.3},
]
FIXED = [(0, 0.5), (3, 0.3), (11, 1.5), (2, 1.0)]


class Subject:
    """A random module with its inputs and targets, its oracle, and autograd's gradients."""

    def __init__(self, description: Description, batch: int, seed: int = 0):
        torch.manual_seed(seed)
        self.description = description
        self.module = RandomModule(description).double()
        self.feed(batch, seed)

    def feed(self, batch: int, seed: int) -> None:
        self.inputs = random_inputs(self.description, batch, seed)
        outputs = unpack(self.module(*self.inputs))
        self.targets = [torch.randn_like(y) for y in outputs]
        self.oracle: Graph = interpret(self.module, self.inputs, self.targets)
        self.loss = sum(0.5 * ((y - t) ** 2).sum() for y, t in zip(outputs, self.targets, strict=True))

    def autograd(self) -> dict[str, Tensor]:
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.loss, parameters, retain_graph=True), strict=True))

    @cached_property
    def network(self) -> pck.PCNetwork:
        """One for all rules, so that the module is traced once for each family of rules."""
        return pck.PCNetwork(self.module, rule=pck.ZeroDivergence(), reduction="sum", backend="reference")

    def backward(self, rule: pck.rules.Rule) -> tuple[pck.Inference, dict[str, Tensor]]:
        global cases
        cases += 1
        self.module.zero_grad()
        target = pack(self.targets, self.description.container)
        self.network.rule = rule
        inference = self.network.backward(*self.inputs, target=target)
        return inference, {name: p.grad for name, p in self.module.named_parameters()}


@settings(max_examples=MODULES)
@given(descriptions())
def check(description: Description) -> None:
    subject = Subject(description, batch=3)
    check_graph(subject)
    for options in STRICT:
        found = subject.backward(pck.Strict(**options))
        assert_trajectory(*found, graph.strict(subject.oracle, **options), LOST_BY_STRICT)
    for steps, rate in FIXED:
        expected = graph.fixed_prediction(subject.oracle, steps, rate)
        for solver in ("iterate", "closed_form"):
            found = subject.backward(pck.FixedPrediction(steps, rate, solver=solver))
            transient = max(1.0, 2 * rate - 1) ** steps  # errors overshoot this far before they decay
            assert_trajectory(*found, expected, int(16 * transient))
    for solver in ("sweep", "iterate"):
        _, gradients = subject.backward(pck.ZeroDivergence(solver=solver))
        assert_all_equal_up_to_cancellation(gradients, subject.autograd(), TOLERANCE)
        assert_all_equal_up_to_cancellation(gradients, graph.zero_divergence(subject.oracle).gradients, TOLERANCE)
    subject.feed(batch=1, seed=5)
    _, gradients = subject.backward(pck.FixedPrediction(max(subject.oracle.distances().values()), 1.0, solver="iterate"))
    assert_all_equal_up_to_cancellation(gradients, subject.autograd(), TOLERANCE)


def test_random_modules_equal_the_interpreter_and_autograd() -> None:
    check()
    print(f"{cases} cases")
    assert cases >= 500


def check_graph(subject: Subject) -> None:
    """The same number of vertices, at the same distances."""
    found = subject.network.trace(*subject.inputs)
    expected = sorted(subject.oracle.distances().values())
    assert sorted(vertex.distance for vertex in found.vertices) == expected, f"{found}\n{subject.oracle.distances()}"


def assert_trajectory(inference: pck.Inference, gradients: dict[str, Tensor], expected: Trajectory, units: int = 16) -> None:
    energies = torch.tensor(expected.energies, dtype=torch.float64)
    assert_equal(inference.energy, energies, TOLERANCE, "energy")
    assert float(inference.loss) == pytest.approx(expected.energies[0], rel=1e-12)
    assert_same_sizes(inference.errors, expected.errors[-1])
    assert_all_equal_up_to_cancellation(gradients, expected.gradients, TOLERANCE, units)


def assert_same_sizes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names differ between the package and the interpreter: compare the vertices' error norms in order of size."""
    sizes = [sorted(float(e.norm()) for e in errors.values()) for errors in (found, expected)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-9, abs=1e-14 * max(1.0, *sizes[1]))
