"""A network's options are its own: attributes that are checked when set, and that leave the module as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

OPTIONS = ("rule", "loss", "reduction", "value_nodes", "batch_dim", "backend", "check", "precision", "match")
NAMES = (*OPTIONS, "module", "graph", "_options", "_extra", "_traces", "_latest")  # what a network has attributes of
KINDS: dict[str, Callable[[nn.Module, str], None]] = {
    "module": lambda owner, name: owner.add_module(name, nn.Linear(4, 4)),
    "parameter": lambda owner, name: owner.register_parameter(name, nn.Parameter(torch.randn(4))),
    "buffer": lambda owner, name: owner.register_buffer(name, torch.randn(4)),
}


class Members(nn.Module):
    """(B, 4) -> (B, 3), through a member of each of these names."""

    def __init__(self, kind: str, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            KINDS[kind](self, name)
        self.names, self.head = names, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            member = getattr(self, name)
            x = (member(x) if isinstance(member, nn.Module) else member * x).tanh()
        return self.head(x)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5, 3)


def reloaded(network: pck.PCNetwork) -> pck.PCNetwork:
    stream = io.BytesIO()
    torch.save(network, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[pck.PCNetwork], pck.PCNetwork]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "save": reloaded,
}


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_members_with_the_names_of_a_networks_attributes_stay_and_learn(kind: str) -> None:
    torch.manual_seed(0)
    module, twin, (x, target) = Members(kind, NAMES), Members(kind, tuple(f"a{name}" for name in NAMES)), data()
    twin.load_state_dict(dict(zip(twin.state_dict(), module.state_dict().values(), strict=True)))
    output, keys = module(x), list(module.state_dict())
    network, plain = (pck.PCNetwork(each, pck.Strict(3, 0.1)) for each in (module, twin))
    for each in (network, plain):
        each.backward(x, target)
    assert equal(gradients(module), gradients(twin))
    assert torch.equal(module(x), output) and list(module.state_dict()) == keys == list(network.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in module.named_parameters()]
    for each in (network, plain):
        each.step(x, target, torch.optim.SGD(each.parameters(), 0.1))
    assert not torch.equal(module(x), output) and torch.equal(module(x), twin(x))
    assert network.loss == "squared_error" and network.precision is None and network.module is module


@pytest.mark.parametrize("kind", KINDS)
def test_members_with_the_names_of_a_networks_attributes_are_copied_moved_and_loaded(kind: str) -> None:
    torch.manual_seed(0)
    module = Members(kind, NAMES)
    network = pck.PCNetwork(module, pck.Strict(3, 0.1), reduction="sum")
    others = [copied(network) for copied in COPIES.values()]
    state = {name: value + 1.0 for name, value in network.state_dict().items()}
    for assign, other in zip((False, True, True), others, strict=True):
        other.load_state_dict(state, assign=assign)
        assert other.reduction == "sum" and other.loss == "squared_error" and other.module is not module
        assert all(torch.equal(value, state[name]) for name, value in other.module.state_dict().items())
    network.to(torch.float64)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float64}
    for name in NAMES if kind == "module" else ():
        assert network.get_submodule(name) is module._modules[name]
        assert network.get_parameter(f"{name}.weight") is module._modules[name].weight  # type: ignore[union-attr]
    for name in NAMES if kind == "parameter" else ():
        assert network.get_parameter(name) is module._parameters[name]
    for name in NAMES if kind == "buffer" else ():
        assert network.get_buffer(name) is module._buffers[name]


class Weighted(nn.Module):
    """Squared error with weights, which are parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (self.weight * (output - target).square()).sum(1)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, 2.0, 3.0]) * (output - target).square()).sum(1)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_cross_entropy_as_a_module_is_the_loss_and_nothing_of_the_model() -> None:
    model, (x, _), target = chain(), data(), torch.tensor([0, 1, 2, 1, 0])
    output = model(x)
    network = pck.PCNetwork(model, pck.Strict(3, 0.1), loss=nn.CrossEntropyLoss(reduction="none"))
    assert torch.equal(model(x), output) and len(model) == 3 and torch.equal(network(x), output)
    network.backward(x, target)
    named = pck.PCNetwork(chain(), pck.Strict(3, 0.1), loss="cross_entropy")
    named.backward(x, target)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(gradients(model), gradients(named), strict=True))


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_with_parameters_adds_none_to_the_model(late: bool) -> None:
    """Given to the constructor, or set."""
    model, (x, target), loss = chain(), data(), Weighted()
    network = pck.PCNetwork(model, pck.Strict(3, 0.1), **({} if late else {"loss": loss}))
    network.loss = loss
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(network.state_dict()) == list(model.state_dict()) == names == [name for name, _ in network.named_parameters()]
    plain = pck.PCNetwork(chain(), pck.Strict(3, 0.1), loss=weighted)
    for each in (network, plain):
        each.step(x, target, torch.optim.SGD(each.parameters(), 0.1))
    assert equal(list(network.parameters()), list(plain.parameters())) and loss.weight.grad is None
    network.load_state_dict(plain.state_dict())
    for copied in COPIES.values():
        other = copied(network)
        assert isinstance(other.loss, Weighted) and other.loss is not loss and torch.equal(other.loss.weight, loss.weight)
        other.zero_grad()
        other.backward(x, target)
        plain.zero_grad()
        plain.backward(x, target)
        assert equal(gradients(other), gradients(plain))


def test_a_loss_that_is_a_module_moves_with_the_network() -> None:
    network, (x, target) = pck.PCNetwork(chain(), pck.Strict(3, 0.1), loss=Weighted()), data()
    network.to(torch.float64)
    assert {value.dtype for value in network.loss.state_dict().values()} == {torch.float64}  # type: ignore[union-attr]
    network.backward(x.double(), target.double())


class Scored(nn.Module):
    """A model that keeps its loss among its members, under that name."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(4, 3), Weighted()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_a_loss_that_is_a_member_of_the_model_stays_one() -> None:
    model, (x, target) = Scored(), data()
    network = pck.PCNetwork(model, pck.Strict(3, 0.1), loss=model.loss)
    network.backward(x, target)
    for copied in COPIES.values():
        other = copied(network)
        assert other.loss is other.module.loss and other.loss is not model.loss


def found(network: pck.PCNetwork, x: Tensor, target: Tensor) -> list[Tensor]:
    """What an option can change: gradients, loss and the errors."""
    network.zero_grad()
    inference = network.backward(x, target)
    return [*gradients(network), inference.loss, inference.energy, *inference.errors.values()]


CHANGES: dict[str, Any] = {
    "rule": pck.Strict(5, 0.2),
    "loss": weighted,
    "reduction": "sum",
    "value_nodes": "op",
    "batch_dim": 1,
    "backend": "reference",
    "check": "deferred",
    "precision": {"0": 2.0},
    "match": "torch2pc",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_is_set_between_calls_is_as_if_it_had_been_given(name: str) -> None:
    """Whatever was traced, compiled or cached before."""
    torch.manual_seed(0)
    x, target = torch.randn(4, 4), torch.randn(4, 3)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) if name != "batch_dim" else nn.RNN(4, 3)
    if name == "batch_dim":
        x, target = torch.randn(4, 4, 4), (torch.randn(4, 4, 3), torch.randn(1, 4, 3))
    given = pck.PCNetwork(module, **{"rule": pck.Strict(3, 0.1), name: CHANGES[name]})
    network = pck.PCNetwork(module, pck.Strict(3, 0.1))
    before = found(network, x, target) if name != "batch_dim" else network.trace(x)
    setattr(network, name, CHANGES[name])
    assert equal(found(network, x, target), expected := found(given, x, target))
    assert list(network.graph.children) == list(given.graph.children)
    if name not in ("backend", "check", "batch_dim"):
        assert not equal(before, expected)
    assert network.infer(x, target).backend == given.infer(x, target).backend


def test_a_change_of_value_nodes_is_traced_anew() -> None:
    network, (x, _) = pck.PCNetwork(chain(), pck.Strict(3, 0.1)), data()
    layers = len(network.trace(x).vertices)
    network.value_nodes = names = ["1"]
    names.append("nowhere")
    assert network.value_nodes == ("1",)
    with pytest.raises(RuntimeError, match="no graph before"):
        _ = network.graph
    assert [vertex.name for vertex in network.trace(x).hidden] == ["1"]
    network.value_nodes = "op"
    assert len(network.trace(x).vertices) > layers


def test_options_that_do_not_go_together_are_refused_in_either_order() -> None:
    network = pck.PCNetwork(chain(), pck.Strict(3, 0.1), match="pcx")
    for name, value in (("rule", pck.Incremental(3, 0.1)), ("loss", "cross_entropy"), ("match", "millidge2020")):
        with pytest.raises(ValueError, match="is of a code"):
            setattr(network, name, value)
    assert (network.rule, network.loss, network.match) == (pck.Strict(3, 0.1), "squared_error", "pcx")
    network.match = None
    network.rule = pck.Incremental(3, 0.1)
    with pytest.raises(ValueError, match="is of a code"):
        network.match = "pcx"
    assert network.match is None


def test_the_module_is_not_exchanged() -> None:
    model = chain()
    network = pck.PCNetwork(model, pck.Strict(3, 0.1))
    with pytest.raises(AttributeError, match="module"):
        network.module = nn.Linear(4, 3)  # type: ignore[misc]
    assert network.module is model and len(model) == 3
