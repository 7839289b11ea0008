"""Locality in space: what a vertex's weight gradient and next value depend on, from a random state away from equilibrium.

Each value node in turn is moved. A gradient may change with v_i and v_pa(i) alone; the next value with v_i, the parents,
the children and the children's other parents alone. What may change must, and the rest must stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import pckernels as pck
from pckernels import dispatch
from pckernels.backends import reference
from pckernels.backends.feedforward import Bound
from pckernels.backends.forward_state import ForwardState
from pckernels.backends.learning import LocalUpdates
from pckernels.backends.state import State
from pckernels.call import Call
from pckernels.graph import ComputationGraph

Values = dict[str, Tensor]


class Skip(nn.Module):
    """Skips over one and over several layers, into a sum and into products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.d, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        b = torch.tanh(self.b(a))
        c = torch.sigmoid(self.c(b))
        return self.out(torch.tanh(self.d(a + b * c)) * b)


class StatefulLSTM(nn.Module):
    """Its initial state is an input: at zero a cell would be deaf to its first forget gate."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return self.head(self.lstm(x, (h, c))[1][0][-1])


def chain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = [module for width in (5, 4, 6, 3) for module in (nn.LazyLinear(width), nn.Tanh())]
    net, x = nn.Sequential(*layers, nn.LazyLinear(2)), torch.randn(3, 4)
    net(x)
    return net, (x,)


def skip() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Skip(), (torch.randn(3, 3),)


def lstm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return StatefulLSTM(), (torch.randn(2, 3, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4))


class Lab:
    """One call of a network, held still: values are placed at will, then one step is taken or one vertex learns."""

    def __init__(self, call: Call):
        assert call.objective is not None
        self.graph: ComputationGraph = call.trace.graph
        self.objective, self.bound = call.objective, Bound(self.graph, call)
        self.hidden = [vertex.name for vertex in self.graph.hidden]
        self.values: Values = {name: mu + torch.randn_like(mu) for name, mu in self.bound.mu.items() if name in self.hidden}

    def state(self, values: Values) -> State:
        state = State(self.bound, self.objective)
        state.place(values)
        return state

    def gradients(self, values: Values) -> dict[str, Values]:
        """For every vertex, its own contribution to dF/dtheta; of weights that are not its own, 0."""
        return contributions(self, self.state(values))

    def next_values(self, values: Values) -> Values:
        """The value of every hidden vertex after one Jacobi step."""
        state = self.state(values)
        state.move(self.hidden, 0.1, 0.0)
        return {name: state.value(name) for name in self.hidden}

    def moved(self, name: str) -> Values:
        return self.values | {name: self.values[name] + torch.randn_like(self.values[name])}

    def blanket(self, name: str) -> set[str]:
        """v_i, its parents, children, and the children's other parents."""
        children = self.graph.children[name]
        family = {name, *self.graph[name].parents, *children, *(p for child in children for p in self.graph[child].parents)}
        return family & set(self.hidden)


def contributions(lab: Lab, state: State | ForwardState) -> dict[str, Values]:
    found = {}
    for vertex in lab.graph.vertices:
        updates = LocalUpdates(lab.bound, 1.0)
        updates.learn(state.locals[vertex.name], state.errors[vertex.name])
        found[vertex.name] = updates.gradients()
    return found


@pytest.fixture(params=[chain, skip, lstm], ids=lambda build: build.__name__)
def lab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, float64: None) -> Lab:
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]] = request.param
    module, inputs = build()
    calls: list[Call] = []

    def run(call: Call) -> object:
        calls.append(call)
        return reference.run(call)

    monkeypatch.setattr(dispatch, "choose", lambda name, call: ("reference", run, ""))
    pck.PCNetwork(module, rule=pck.Strict(1, 0.1)).infer(*inputs, target=torch.randn(len(inputs[0]), 2))
    return Lab(calls[0])


def test_a_weight_gradient_depends_on_its_vertex_and_parents_alone(lab: Lab) -> None:
    before = {name: {p: g for p, g in mine.items() if g.any()} for name, mine in lab.gradients(lab.values).items()}
    assert sum(bool(mine) for mine in before.values()) >= 5
    for moved in lab.hidden:
        after = lab.gradients(lab.moved(moved))
        for name, gradients in before.items():
            inside = moved == name or moved in lab.graph[name].parents
            for parameter, gradient in gradients.items():
                stayed = torch.equal(gradient, after[name][parameter])
                assert stayed != inside, f"{parameter} of {name} {'ignores' if inside else 'feels'} {moved}"


def test_weights_of_error_optimization_learn_from_their_own_error_alone(lab: Lab) -> None:
    """Its inference is not local, what its weights learn is: of the errors, each vertex reads its own."""
    state = ForwardState(lab.bound, lab.objective)
    state.errors.update({name: torch.randn_like(lab.bound.mu[name]) for name in lab.hidden})
    state.follow(lab.hidden)
    before = contributions(lab, state)
    for moved in lab.hidden:
        error = state.errors[moved]
        state.errors[moved] = error + torch.randn_like(error)
        after = contributions(lab, state)
        state.errors[moved] = error
        for name, gradients in before.items():
            assert all(torch.equal(g, after[name][p]) != (name == moved) for p, g in gradients.items() if g.any()), (name, moved)


def test_a_next_value_depends_on_its_markov_blanket_alone(lab: Lab) -> None:
    before = lab.next_values(lab.values)
    for moved in lab.hidden:
        after = lab.next_values(lab.moved(moved))
        for name in lab.hidden:
            inside = moved in lab.blanket(name)
            assert torch.equal(before[name], after[name]) != inside, f"{name} {'ignores' if inside else 'feels'} {moved}"


def test_the_graphs_leave_something_outside(lab: Lab) -> None:
    """Otherwise the two tests above would say nothing."""
    assert all(lab.blanket(name) < set(lab.hidden) for name in lab.hidden[:1] + lab.hidden[-1:])
