"""Incremental predictive coding: its limits against theory, `step` against a loop by autograd, and what failing leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from test_rules_contract import Skip, assert_equal_states, gradients, learned
from torch import Tensor, nn
from torch.nn import functional as F

import pckernels as pck

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda module: torch.optim.Adam(module.parameters(), 0.01),
}


class Tied(nn.Module):
    """The decoder's weight is a function of the encoder's, which a step must compute anew."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias, self.gain = nn.Linear(5, 4), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4, 1))

    def code(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def decode(self, code: Tensor) -> Tensor:
        return F.linear(code, (self.gain * self.encoder.weight).T, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.code(x))


@pytest.fixture
def tied(float64: None) -> tuple[Tied, Tensor, Tensor]:
    return Tied(), torch.randn(3, 5), torch.randn(3, 5)


@pytest.fixture
def skip(float64: None) -> tuple[Skip, Tensor, Tensor]:
    return Skip(), torch.randn(4, 5), torch.randn(4, 3)


def by_autograd(module: Tied, x: Tensor, target: Tensor, steps: int, rate: float, update: Callable[[], None]) -> list[float]:
    """F as one function of the value and the parameters: `update` moves the parameters by dF/dtheta / B in their `.grad`."""
    v = module.code(x).detach()
    energies = []
    for t in range(steps + 1):
        module.zero_grad()
        v = v.detach().requires_grad_()
        energy = 0.5 * (v - module.code(x)).square().sum() + 0.5 * (target - module.decode(v)).square().sum()
        energies.append(float(energy.detach()))
        if t < steps:
            energy.backward()
            v = v - rate * v.grad
            for parameter in module.parameters():
                parameter.grad /= len(x)
            update()
    return energies


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_moves_by_the_optimizer_at_every_step(tied, name: str) -> None:
    module, x, target = tied
    twin = copy.deepcopy(module)
    network, optimizer, other = pck.PCNetwork(module, pck.Incremental(6, 0.2)), OPTIMIZERS[name](module), OPTIMIZERS[name](twin)
    for _ in range(2):
        inference = network.step(x, target, optimizer)
        expected = by_autograd(twin, x, target, 6, 0.2, other.step)
        assert torch.allclose(inference.energy, torch.tensor(expected), rtol=1e-11)
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


def test_backward_adds_the_sum_of_the_gradients_and_moves_nothing(tied) -> None:
    module, x, target = tied
    twin, total = copy.deepcopy(module), {}

    def descend() -> None:
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                total[name] = total.get(name, 0.0) + parameter.grad
                parameter -= 0.3 * parameter.grad

    expected = by_autograd(twin, x, target, 5, 0.2, descend)
    before = copy.deepcopy(module.state_dict())
    for scale in (1.0, 8.0):  # a loss scale is in what is learned, not in how the weights move
        found = learned(module, pck.Incremental(5, 0.2, 0.3), x, target, scale)
        assert found.keys() == total.keys()
        assert all(torch.allclose(found[name], scale * value, rtol=1e-11) for name, value in total.items())
    assert torch.allclose(pck.PCNetwork(module, pck.Incremental(5, 0.2, 0.3)).infer(x, target).energy, torch.tensor(expected), rtol=1e-11)
    assert_equal_states(module.state_dict(), before)


def test_one_step_moves_the_output_alone_by_backprop_s_gradient(skip) -> None:
    module, x, target = skip
    (0.5 * (module(x) - target).square().sum() / 4).backward()
    exact, before = gradients(module), copy.deepcopy(module.state_dict())
    found = learned(module, pck.Incremental(1, 0.3, 0.1), x, target)
    pck.PCNetwork(module, pck.Incremental(1, 0.3)).step(x, target, torch.optim.SGD(module.parameters(), 0.5))
    for name, value in found.items():
        if name.startswith("head"):
            assert (value - exact[name]).norm() <= 1e-12 * exact[name].norm()
            assert torch.allclose(module.get_parameter(name), before[name] - 0.5 * exact[name], rtol=1e-12)
        else:
            assert exact[name].any() and not value.any()
            assert torch.equal(module.get_parameter(name), before[name])


def test_slow_weights_learn_the_sum_of_what_strict_would(skip) -> None:
    module, x, target = skip
    strict = [learned(module, pck.Strict(t, 0.2), x, target) for t in range(8)]
    summed = {name: sum(each[name] for each in strict) for name in strict[0]}
    size = sum(float(value.square().sum()) for value in summed.values()) ** 0.5
    distances = []
    for weight_rate in (1e-2, 1e-3, 1e-4):
        found = learned(module, pck.Incremental(8, 0.2, weight_rate), x, target)
        distances.append(sum(float((found[name] - value).square().sum()) for name, value in summed.items()) ** 0.5 / size)
    assert distances[0] < 0.1
    assert all(abs(a / b - 10.0) < 0.5 for a, b in pairwise(distances)), distances
    still = learned(module, pck.Incremental(8, 0.2, 0.0), x, target)
    assert all(torch.allclose(still[name], value, rtol=1e-12, atol=1e-15) for name, value in summed.items())


def test_mean_and_sum_are_one_where_the_weight_rate_makes_up_for_it(skip) -> None:
    module, x, target = skip
    mean = learned(module, pck.Incremental(4, 0.2, 0.4), x, target, reduction="mean")
    summed = learned(module, pck.Incremental(4, 0.2, 0.1), x, target, reduction="sum")
    assert all(torch.allclose(4 * mean[name], summed[name], rtol=1e-12) for name in summed)


def test_after_a_step_grad_is_that_of_the_last_of_its_steps(skip) -> None:
    module, x, target = skip
    twin = copy.deepcopy(module)
    pck.PCNetwork(module, pck.Incremental(3, 0.2)).step(x, target, torch.optim.SGD(module.parameters(), 0.1))
    long, short = (learned(twin, pck.Incremental(steps, 0.2, 0.1), x, target) for steps in (3, 2))
    for name, value in gradients(module).items():
        assert torch.allclose(value, long[name] - short[name], rtol=1e-9, atol=1e-14)


class Failure(Exception):
    pass


def fail_at(count: int) -> Callable[..., None]:
    """Something that raises when it is called for the count-th time."""
    calls = []

    def call(*_: object) -> None:
        calls.append(None)
        if len(calls) == count:
            raise Failure

    return call


def hook(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module.head.bias.register_hook(fail_at(3))


def after_the_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_post_hook(fail_at(3))


FAILURES = {"a hook": hook, "after a step": after_the_optimizer}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("failure", [*FAILURES, "the loss", "divergence"])
def test_whatever_is_raised_in_a_step_nothing_has_moved(skip, failure: str, name: str, warm: bool) -> None:
    """After three of its steps have moved everything; `warm`: the optimizer has a state, and there are gradients."""
    module, x, target = skip
    optimizer, break_loss = OPTIMIZERS[name](module), fail_at(4 if failure == "the loss" else -1)
    if warm:
        pck.PCNetwork(module, pck.ZeroDivergence()).step(x, target, optimizer)
    module.unused.weight.grad = torch.ones_like(module.unused.weight)
    FAILURES.get(failure, lambda *_: None)(module, optimizer)

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        break_loss()
        return 0.5 * (output - wanted).square().sum(1)

    network = pck.PCNetwork(module, pck.Incremental(30, 40.0 if failure == "divergence" else 0.2), loss=loss)
    objects = [parameter.grad for parameter in module.parameters()]
    before = gradients(module), copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(pck.InferenceDiverged if failure == "divergence" else Failure):
        network.step(x, target, optimizer)
    assert_equal_states(gradients(module), before[0])
    assert_equal_states(dict(module.state_dict()), dict(before[1]))
    assert_equal_states(optimizer.state_dict(), before[2])
    assert all(parameter.grad is grad for parameter, grad in zip(module.parameters(), objects, strict=True))


def test_divergence_names_both_remedies(skip) -> None:
    module, x, target = skip
    with pytest.raises(pck.InferenceDiverged, match=r"a smaller rate than 0\.1, or smaller steps of the weights"):
        pck.PCNetwork(module, pck.Incremental(80, 0.1, 50.0)).backward(x, target)
    assert not gradients(module)


def test_without_a_weight_rate_only_step_has_something_to_move_by(skip) -> None:
    module, x, target = skip
    network = pck.PCNetwork(module, pck.Incremental(3, 0.1))
    for call in (network.backward, network.infer):
        with pytest.raises(ValueError, match=r"has no weight_rate to move them by. Give it one, or call step\(x, target, optimizer\)"):
            call(x, target)
    assert torch.equal(network.infer(x).values["output"], module(x))
    assert "by the optimizer" in network.step(x, target, torch.optim.SGD(module.parameters(), 0.1)).plan


def test_step_needs_to_know_at_once_whether_all_is_well(skip) -> None:
    module, x, target = skip
    network = pck.PCNetwork(module, pck.Incremental(3, 0.1, 0.1), check="deferred")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(pck.Unsupported, match='Use check="sync", or backward'):
        network.step(x, target, torch.optim.SGD(module.parameters(), 0.1))
    assert_equal_states(dict(module.state_dict()), dict(before))
    network.backward(x, target)
    assert gradients(module)["head.weight"].any()
