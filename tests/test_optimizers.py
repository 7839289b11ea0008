"""What `step` asks of an optimizer: refused in a sentence before anything changes, of this network or of another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

RULES = {"strict": pck.Strict(3, 0.1), "incremental": pck.Incremental(3, 0.1), "zero": pck.ZeroDivergence()}
LEARNED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "precision": ({"rule": pck.Strict(3, 0.1), "precision": "learned"}, ["log_precision.0"]),
    "feedback": ({"rule": pck.Relaxed(pck.Strict(3, 0.1), feedback="learned")}, ["feedback.2.weight"]),
    "error weights": ({"rule": pck.Relaxed(pck.Strict(3, 0.1), error_weights="learned")}, ["error_weights.0"]),
    "incremental": ({"rule": pck.Incremental(3, 0.1), "precision": "learned"}, ["log_precision.0"]),
}


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5, 3)


def with_gradients(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


def state_of(*modules: nn.Module) -> list[Tensor]:
    return [tensor.clone() for module in modules for p in module.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_over_another_model_is_refused(rule: str) -> None:
    module, other = with_gradients(chain()), with_gradients(chain())
    network, optimizer = pck.PCNetwork(module, RULES[rule]), torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    before = state_of(module, other)
    with pytest.raises(ValueError, match=r"holds no parameter of this network. Make it over network.parameters\(\)"):
        network.step(*data(), optimizer)
    assert same(state_of(module, other), before) and not optimizer.state
    optimizer.add_param_group({"params": [module[2].bias]})  # part of a model may learn, beside others
    network.step(*data(), optimizer)


class Closed(torch.optim.SGD):
    """Of somebody who needs a closure too."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Closed])
def test_an_optimizer_that_needs_a_closure_is_refused(rule: str, kind: type[torch.optim.Optimizer]) -> None:
    module = with_gradients(chain())
    before, optimizer = state_of(module), kind(module.parameters(), lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(pck.Unsupported, match=f"{kind.__name__} evaluates a closure.*such as SGD or Adam"):
        pck.PCNetwork(module, RULES[rule]).step(*data(), optimizer)
    assert same(state_of(module), before) and not optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop, torch.optim.Adagrad])
def test_other_optimizers_step_under_a_schedule_and_with_hooks(kind: type[torch.optim.Optimizer]) -> None:
    """Which wrap their step."""
    module = chain()
    optimizer = kind(module.parameters(), lr=0.1)  # type: ignore[call-arg]
    optimizer.register_step_post_hook(lambda *_: None)
    schedule, before = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), copy.deepcopy(module)
    pck.PCNetwork(module, RULES["strict"]).step(*data(), optimizer)
    schedule.step()
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before.parameters(), strict=True))


def test_incremental_leaves_the_gradient_of_its_last_step() -> None:
    module, twin, (x, target) = with_gradients(chain()), chain(), data()
    pck.PCNetwork(module, pck.Incremental(1, 0.1)).step(x, target, torch.optim.SGD(module.parameters(), 0.1))
    pck.PCNetwork(twin, pck.Incremental(1, 0.1, weight_rate=0.1)).backward(x, target)
    pairs = list(zip(module.parameters(), twin.parameters(), strict=True))
    assert all(a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-8) for a, b in pairs)


@pytest.mark.parametrize("name", LEARNED)
def test_an_optimizer_from_before_the_first_trace_lacks_what_is_learned_and_is_refused(name: str) -> None:
    options, extra = LEARNED[name]
    module, (x, target) = with_gradients(chain()), data()
    network = pck.PCNetwork(module, **options)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    before = state_of(module)
    with pytest.raises(ValueError, match=rf"does not hold 'pc\.{extra[0]}', .*Call network\.trace\(x\) before you make the optimizer"):
        network.step(x, target, optimizer)
    assert same(state_of(module), before) and not optimizer.state
    assert all(p.grad is None for p in network.extra_parameters().values())

    start = {key: p.detach().clone() for key, p in network.extra_parameters().items()}
    optimizer.add_param_group({"params": list(network.extra_parameters().values())})  # one of the remedies
    network.step(x, target, optimizer)
    assert list(start) == extra and all(not torch.equal(p, start[key]) for key, p in network.extra_parameters().items())


@pytest.mark.parametrize("name", LEARNED)
def test_after_a_trace_the_parameters_have_all_that_is_learned(name: str) -> None:
    network, (x, target) = pck.PCNetwork(chain(), **LEARNED[name][0]), data()
    network.trace(x)
    optimizer, start = torch.optim.SGD(network.parameters(), 0.1), copy.deepcopy(network.extra_parameters())
    network.step(x, target, optimizer)
    found = network.extra_parameters()
    assert all(not torch.equal(p, start[key]) and p.grad is not None for key, p in found.items())


def test_zero_grad_of_the_network_reaches_what_is_learned_beside_the_module() -> None:
    network, (x, target) = pck.PCNetwork(chain(), pck.Relaxed(pck.Strict(3, 0.1), feedback="learned"), precision="learned"), data()
    network.backward(x, target)
    once = {key: p.grad.clone() for key, p in network.extra_parameters().items()}
    network.zero_grad()
    assert len(once) == 2 and all(p.grad is None for p in network.extra_parameters().values())
    network.backward(x, target)
    network.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in network.extra_parameters().values())
    network.backward(x, target)
    assert all(torch.equal(p.grad, once[key]) for key, p in network.extra_parameters().items())


def test_what_does_not_learn_need_not_be_in_an_optimizer() -> None:
    """Random feedback, what is frozen, the backward weight of a frozen weight, and what another rule has left."""
    module, (x, target) = chain(), data()
    network = pck.PCNetwork(module, pck.Relaxed(pck.Strict(3, 0.1), feedback="random"))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    network.step(x, target, optimizer)
    network.rule = pck.Relaxed(pck.Strict(3, 0.1), feedback="learned")
    with pytest.raises(ValueError, match="does not hold"):
        network.step(x, target, optimizer)
    (psi,) = network.extra_parameters().values()
    psi.requires_grad_(False)
    network.step(x, target, optimizer)
    psi.requires_grad_(True)
    module[2].weight.requires_grad_(False)
    network.step(x, target, optimizer)
    module[2].weight.requires_grad_(True)
    network.rule = pck.Strict(3, 0.1)
    network.step(x, target, optimizer)
