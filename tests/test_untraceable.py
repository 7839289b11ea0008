"""Modules that cannot be traced, or cannot learn, are refused in a sentence; tensors of inference mode do no harm elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

RULE = pck.Strict(2, 0.1)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4), torch.randn(5, 3)


def in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


class Holder(nn.Module):
    """A layer, and a tensor that is a plain member."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.layer, self.tensor = nn.Linear(4, 3), tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.tensor


# TorchScript, lazy layers


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(2, 4))])
def test_torchscript_is_refused_whole_or_in_part_at_once_or_later(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(pck.Unsupported, match=r"The module comes from torch\.jit.*Give the nn\.Module"):
        pck.PCNetwork(make(mlp()), RULE)
    module = mlp()
    network = pck.PCNetwork(module, RULE)
    network.backward(*data())
    grads = [p.grad.clone() for p in module[2].parameters()]
    module[0] = make(module[0])
    for act in (lambda: network.backward(*data()), lambda: pck.PCNetwork(module, RULE)):
        with pytest.raises(pck.Unsupported, match="part '0' comes from torch"):
            act()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module[2].parameters(), grads, strict=True))


def test_a_lazy_layer_is_refused_until_it_has_been_called() -> None:
    module = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 3))
    network = pck.PCNetwork(module, RULE)
    for act in (lambda: network.backward(*data()), lambda: network.trace(data()[0])):
        with pytest.raises(ValueError, match=r"LazyLinear '0' has no parameters.*module\(x\)"):
            act()
    assert all(p.grad is None for p in module.parameters())
    network(data()[0])
    network.backward(*data())
    assert all(p.grad is not None for p in module.parameters())


# Inference mode


@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))])
def test_weights_and_buffers_of_inference_mode_are_refused(make: Callable[[], nn.Module]) -> None:
    module = in_inference_mode(make)
    if any(True for _ in module.buffers()):
        module[1] = nn.Linear(4, 3)  # so that it is the buffer that is refused
    network = pck.PCNetwork(module, RULE)
    for act in (lambda: network.backward(*data()), lambda: in_inference_mode(lambda: network.backward(*data()))):
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode.*copy\.deepcopy"):
            act()
    assert all(p.grad is None for p in module.parameters())
    copied = copy.deepcopy(module)
    pck.PCNetwork(copied, RULE).backward(*data())
    assert all(p.grad is not None for p in copied.parameters())


def test_a_weight_of_inference_mode_is_refused_after_a_trace() -> None:
    module = mlp()
    network = pck.PCNetwork(module, RULE)
    network.backward(*data())
    module[2].weight = in_inference_mode(lambda: nn.Parameter(torch.randn(3, 6)))
    with pytest.raises(ValueError, match=r"'2\.weight' was made under"):
        network.backward(*data())


def test_a_tensor_of_inference_mode_that_forward_reads_is_refused() -> None:
    module = Holder(in_inference_mode(lambda: torch.ones(3)))
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode.*clone it"):
        pck.PCNetwork(module, RULE).backward(*data())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("rule", [RULE, pck.Relaxed(RULE, feedback="random")], ids=["strict", "relaxed"])
def test_a_network_made_and_traced_in_inference_mode_learns_outside_of_it(rule: pck.Strict | pck.Relaxed) -> None:
    module = mlp()

    def make() -> pck.PCNetwork:
        network = pck.PCNetwork(module, rule)
        network.trace(torch.randn(5, 4))
        return network

    network = in_inference_mode(make)
    network.backward(*data())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert not any(p.is_inference() for p in network.parameters())


def test_an_optimizer_that_stepped_in_inference_mode_steps_outside_of_it() -> None:
    module = mlp()
    network, optimizer = pck.PCNetwork(module, RULE), torch.optim.Adam(module.parameters())
    in_inference_mode(lambda: network.step(*data(), optimizer))
    network.step(*data(), optimizer)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_an_input_of_inference_mode_without_a_batch_is_traced() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return self.layer(x * weight)

    module = Mixed()
    x, y = data()
    pck.PCNetwork(module, RULE).backward(x, in_inference_mode(lambda: torch.ones(4)), y)
    assert module.layer.weight.grad.abs().sum() > 0
