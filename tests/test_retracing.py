"""A network does as its module does now: a change that a trace depends on is traced anew, and nothing else is."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.mupc import Scale


class Mode(enum.Enum):
    ADD = 1
    SUBTRACT = 2


class Knobs(nn.Module):
    """Members of every kind that a key sees, all read in forward, and a list, which none sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.LeakyReLU(0.1)
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 3)
        self.scale, self.flag, self.word, self.mode, self.factors = 1.0, False, "tanh", Mode.ADD, (1.0, (1.0,))
        self.function, self.skip, self.listed = torch.sin, None, [1.0]
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = (
            self.drop(self.act(self.norm(self.a(x)))) * self.scale * self.factors[1][0] * self.listed[0]
            + self.offset.sum() / self.offset.shape[0]
        )
        h = torch.relu(h) if self.flag else h
        h = torch.tanh(h) if self.word == "tanh" else torch.sigmoid(h)
        h = h + self.b(h) if self.mode is Mode.ADD else h - self.b(h)
        return self.head(self.function(h) if self.skip is None else self.skip(h))


def setting(name: str, value: object) -> Callable[[Knobs], None]:
    return lambda module: setattr(module, name, value)


def untied(module: Knobs) -> None:
    module.b.weight = nn.Parameter(module.a.weight.detach() + 1)


CHANGES: dict[str, Callable[[Knobs], object]] = {
    "a float": setting("scale", 5.0),
    "a bool": setting("flag", True),
    "a string": setting("word", "sigmoid"),
    "an enum": setting("mode", Mode.SUBTRACT),
    "a tuple in a tuple": setting("factors", (1.0, (3.0,))),
    "a function": setting("function", torch.cos),
    "None to a module": setting("skip", nn.Tanh()),
    "a buffer's shape": setting("offset", torch.ones(2)),
    "a slope": lambda m: setattr(m.act, "negative_slope", 0.9),
    "a submodule": setting("act", nn.Tanh()),
    "a forward hook": lambda m: m.a.register_forward_hook(lambda module, inputs, output: 3 * output),
    "a forward pre-hook": lambda m: m.b.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],)),
    "a bias that is dropped": lambda m: setattr(m.b, "bias", None),
    "muPC": lambda m: pck.mupc(m, seed=1),
    "a parameter that is frozen": lambda m: m.a.weight.requires_grad_(False),
    "a layer that is shared": lambda m: setattr(m, "b", m.a),
    "a tie": lambda m: setattr(m.b, "weight", m.a.weight),
}


def case() -> tuple[Knobs, Tensor, Tensor]:
    torch.manual_seed(0)
    return Knobs().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()


def assert_as_autograd(network: pck.PCNetwork, module: nn.Module, x: Tensor, y: Tensor) -> None:
    module.zero_grad()
    loss = 0.5 * (module(x) - y).square().sum() / len(x)
    loss.backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    assert math.isclose(network.backward(x, y).loss, loss.detach(), rel_tol=1e-12)
    for name, p in module.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_forward_reads_is_seen_at_the_next_call(name: str) -> None:
    module, x, y = case()
    network = pck.PCNetwork(module, pck.ZeroDivergence())
    before = network.infer(x, y).loss
    CHANGES[name](module)
    assert_as_autograd(network, module, x, y)
    assert name == "a parameter that is frozen" or abs(network.infer(x, y).loss - before) > 1e-6, "the change changed nothing"


def test_a_tie_that_is_undone_is_seen() -> None:
    module, x, y = case()
    module.b.weight = module.a.weight
    network = pck.PCNetwork(module, pck.ZeroDivergence())
    network.backward(x, y)
    untied(module)
    assert_as_autograd(network, module, x, y)


def test_which_layer_is_shared_is_seen() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    x, y = torch.randn(2, 5, 4).double()
    module[2] = module[0]
    network = pck.PCNetwork(module, pck.ZeroDivergence())
    network.backward(x, y)
    module[2] = module[1]
    assert_as_autograd(network, module, x, y)


def test_a_hook_that_is_removed_or_changed_is_seen() -> None:
    module, x, y = case()
    hook = Scale(3.0)
    handle = module.a.register_forward_hook(hook)
    network = pck.PCNetwork(module, pck.ZeroDivergence())
    assert_as_autograd(network, module, x, y)
    hook.factor = 5.0
    assert_as_autograd(network, module, x, y)
    handle.remove()
    assert_as_autograd(network, module, x, y)


def test_the_momentum_of_a_norm_is_read_at_each_call() -> None:
    module, x, y = case()
    network = pck.PCNetwork(module, pck.Strict(1, 0.1))
    network.backward(x, y)
    module.norm.momentum = 1.0
    network.backward(x, y)
    torch.testing.assert_close(module.norm.running_mean, module.a(x).mean(0).detach())


def test_dropout_that_is_switched_on_drops() -> None:
    module, x, y = case()
    network = pck.PCNetwork(module, pck.Strict(1, 0.1))
    network.backward(x, y)
    module.drop.p = 1.0
    assert (network.infer(x).values["output"] == network.infer(-x).values["output"]).all()


def test_values_gradients_and_calls_take_no_new_trace() -> None:
    module, x, y = case()
    network, optimizer = pck.PCNetwork(module, pck.Strict(1, 0.1)), torch.optim.Adam(module.parameters())
    network.backward(x, y)
    graph = network.graph
    network.step(x, y, optimizer)
    network(x)
    module.scale = float("1.0")  # equal, and another object
    module.listed[0] = 2.0
    with torch.no_grad():
        module.a.weight.mul_(2.0)
    module.b.weight = nn.Parameter(module.b.weight.detach() + 1)
    network.infer(x[:2], y[:2])
    assert network.graph is graph and len(network._traces) == 1


def test_a_mode_that_comes_back_finds_its_trace() -> None:
    module, x, _ = case()
    network = pck.PCNetwork(module, pck.Strict(1, 0.1))
    first = network.trace(x)
    module.scale = 2.0
    assert network.trace(x) is not first
    module.scale = 1.0
    assert network.trace(x) is first


def test_retrace_sees_what_no_key_does() -> None:
    module, x, y = case()
    network = pck.PCNetwork(module, pck.ZeroDivergence())
    assert_as_autograd(network, module, x, y)
    module.listed[0] = 3.0
    network.retrace()
    with pytest.raises(RuntimeError, match="no graph before its first call"):
        _ = network.graph
    assert_as_autograd(network, module, x, y)


def test_a_number_that_changes_at_every_call_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pckernels.network._TRACES", 2)
    _, x, _ = case()
    network = pck.PCNetwork(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1)), pck.Strict(1, 0.1))
    with pytest.warns(RuntimeWarning, match="buffer"):
        for k in range(3):
            network.module[1].negative_slope = 0.1 + k / 100
            network.trace(x.float())
