"""Incremental in the graph tier, where weights move at every step: it is the reference, on a copy of the weights and with an optimizer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backends import MODELS, assert_as_good, data, networks
from test_graph_tier import found, recording  # noqa: F401
from test_program import interpret
from torch import Tensor, nn

import pckernels as pck
from pckernels import dispatch
from pckernels.backends import native, selection

RULES = [
    pck.Incremental(5, 0.1, 0.05),
    pck.Incremental(5, 0.1, 0.05, momentum=0.5),
    pck.Incremental(4, 0.1, 0.05, sweep="top_down"),
    pck.Incremental(4, 0.1, 0.05, momentum=0.3, sweep="red_black"),
]
LOWERED = ["mlp", "skip", "cnn", "residual", "rnn"]


def assert_equal(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert set(ours) == set(reference)
    for key, expected in reference.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-10, atol=1e-12, msg=key)


def assert_same_calls(name: str, rule: pck.rules.Rule, batch: int, loss: str = "squared_error", reduction: str = "mean") -> None:
    network = networks(name)[0]
    x, target = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data(name, batch, loss))
    options: dict[str, Any] = {"loss": loss, "reduction": reduction}
    ours, reference = (
        found(pck.PCNetwork(network.module, rule, backend=backend, **options), x, target) for backend in ("graph", "reference")
    )
    assert_equal(ours, reference)


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name in LOWERED for rule in RULES[:: 3 if name == "rnn" else 1]], ids=str)
def test_it_is_the_reference(name: str, rule: pck.rules.Rule) -> None:
    assert_same_calls(name, rule, 5)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
def test_few_steps_and_samples(steps: int, batch: int) -> None:
    assert_same_calls("mlp", pck.Incremental(steps, 0.1, 0.05), batch)


def test_the_weights_move_by_the_reduced_gradient() -> None:
    assert_same_calls("mlp", RULES[0], 5, "cross_entropy", "sum")
    assert_same_calls("cnn", RULES[1], 5, "cross_entropy")


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn"])
def test_in_float32_it_is_as_good_as_the_reference(name: str) -> None:
    for rule in (pck.Incremental(8, 0.1, 0.05, momentum=0.5), pck.Incremental(2, 0.1, 0.05)):
        assert_as_good("graph", name, rule, 17)


def test_a_copy_moves_and_frozen_parameters_do_not() -> None:
    module = MODELS["mlp"].build().double()
    module[2].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    x, target = (tensor.double() for tensor in data("mlp", 5, "squared_error"))
    ours, reference = (pck.PCNetwork(module, RULES[1], backend=backend) for backend in ("graph", "reference"))
    expected = found(reference, x, target)
    assert "gradient of module.2.weight" not in expected
    assert_equal(found(ours, x, target), expected)
    one, other = (network.infer(x, target) for network in (ours, reference))
    torch.testing.assert_close(one.energy, other.energy)
    assert one.plan.startswith("incremental, values and a copy of the weights together")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Shared(nn.Module):
    """One layer twice, without a bias in between, and one that reads an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.other, self.head = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.again(torch.relu(self.first(x))))
        return self.head(torch.tanh(self.again(h) + self.other(y) * h))


@pytest.mark.parametrize("rule", RULES[1:3], ids=str)
def test_shared_weights_and_several_inputs(rule: pck.rules.Rule) -> None:
    module, inputs, target = Shared().double(), (torch.randn(4, 5).double(), torch.randn(4, 4).double()), torch.randn(4, 3).double()
    results = []
    for backend in ("graph", "reference"):
        network = pck.PCNetwork(module, rule, backend=backend)
        network.zero_grad()
        inference = network.backward(*inputs, target=target, scale=3.0)
        results.append({name: p.grad.clone() for name, p in network.named_parameters()} | inference.values | {"F": inference.energy})
    assert_equal(*results)


# With an optimizer

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda module: torch.optim.Adam(module.parameters(), 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_an_optimizer_moves_the_parameters(model: str, name: str) -> None:
    x, target = (tensor.double() for tensor in data(model, 5, "squared_error"))
    modules, results = [copy.deepcopy(networks(model)[0].module) for _ in range(2)], []
    for module, backend in zip(modules, ("graph", "reference"), strict=True):
        network, optimizer = pck.PCNetwork(module, pck.Incremental(4, 0.1), backend=backend), OPTIMIZERS[name](module)
        calls: list[Tensor] = []
        module[0].bias.register_hook(calls.append)
        for scale in (1.0, torch.tensor(2.0)):
            inference = network.step(x, target, optimizer, scale=scale)
            assert "the weights, by the optimizer, together" in inference.plan
        assert len(calls) == 2 * 4  # as many as optimizer steps
        results.append(
            dict(module.state_dict()) | {f"grad {key}": p.grad for key, p in module.named_parameters()} | {"F": inference.energy}
        )
    assert_equal(*results)


def test_what_raises_leaves_everything_as_it_was() -> None:
    module = MODELS["mlp"].build()
    optimizer = OPTIMIZERS["adam"](module)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(pck.InferenceDiverged, match="a smaller rate than 40, or smaller steps of the weights"):
        pck.PCNetwork(module, pck.Incremental(60, 40.0), backend="graph").step(*data("mlp", 3, "squared_error"), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()) and not optimizer.state


# Replaying, and what the instructions mean


def test_replayed_steps_are_the_steps(recording: list) -> None:  # noqa: F811
    """The parameters move between calls, and a call of another reduction is recorded by itself."""
    module, rule = MODELS["mlp"].build().double(), pck.Incremental(6, 0.1, 0.05, momentum=0.5)
    network, plain = (pck.PCNetwork(module, rule, backend=backend) for backend in ("graph", "reference"))
    for reduction in ("mean", "sum"):
        network.reduction = plain.reduction = reduction
        for call in range(4):
            torch.manual_seed(call)
            x, target = torch.randn(5, 7).double(), torch.randn(5, 3).double()
            assert_equal(found(network, x, target), found(plain, x, target))
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.01)
    assert sum(bool(recorded.launches) for recorded in recording) == 2
    network.step(x, target, OPTIMIZERS["sgd"](module))  # an optimizer is nobody's to record
    assert sum(bool(recorded.launches) for recorded in recording) == 2


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_instructions_mean_this(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    backend = dispatch.Backend(dispatch.Support(True, ""), selection.refusal, lambda call: native.run(call, interpret))
    monkeypatch.setitem(dispatch._BACKENDS, "graph", backend)
    assert_same_calls(name, RULES[3], 4)


# Refusals


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(index)))


def refused(module: nn.Module, x: Tensor, target: Tensor, backend: str, text: str) -> None:
    with pytest.raises(pck.Unsupported, match=re.escape(text)):
        pck.PCNetwork(module, RULES[0], backend=backend).backward(x, target)


def test_what_lies_outside_of_the_steps_is_refused() -> None:
    refused(MODELS["lstm"].build(), *data("lstm", 3, "squared_error"), "graph", "a weight is a function of parameters")
    index, target = torch.tensor([0, 3]), torch.randn(2, 3)
    module = Embedded()
    refused(module, index, target, "graph", "vertex 'table' has no stages here, and its weights move")
    module.table.weight.requires_grad_(False)
    ours, reference = (found(pck.PCNetwork(module, RULES[0], backend=backend), index, target) for backend in ("graph", "reference"))
    torch.testing.assert_close(ours["energy"], reference["energy"])


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (pck.Relaxed(RULES[0], "learned"), {}),
        (pck.Relaxed(RULES[0], derivative=False), {}),
        (RULES[0], {"precision": {"0": 2.0}}),
        (RULES[0], {"precision": "learned"}),
    ],
    ids=str,
)
def test_what_else_would_move_is_refused(rule: pck.rules.Rule, options: dict[str, Any]) -> None:
    module = MODELS["mlp"].build()
    with pytest.raises(
        pck.Unsupported, match="a relaxed rule or a precision, where weights move at every step, is for the reference alone"
    ):
        pck.PCNetwork(module, rule, backend="graph", **options).backward(*data("mlp", 3, "squared_error"))


def test_engines_refuse_and_name_who_does_not() -> None:
    refused(MODELS["mlp"].build(), *data("mlp", 3, "squared_error"), "host", 'which backend="graph" does, and the reference')
