"""The graph tier on a GPU: its steps as CUDA graphs, against the reference on the CPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import test_backends as backends
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="graph tier on a GPU: PyTorch finds no CUDA device")
RULES = [
    pck.Strict(8, 0.05, momentum=0.5),
    pck.Strict(2, 0.1, sweep="red_black"),
    pck.FixedPrediction(8, 0.3, solver="iterate"),
    pck.ZeroDivergence(),
]


def compare(module: nn.Module, rule: pck.rules.Rule, shape: tuple[int, ...], target: tuple[int, ...], batch: int, calls: int = 3) -> None:
    """Each call with other data; the second records, the third replays."""
    exact = pck.PCNetwork(copy.deepcopy(module).double(), rule, backend="reference")
    plain = pck.PCNetwork(copy.deepcopy(module), rule, backend="reference")
    ours = pck.PCNetwork(copy.deepcopy(module).cuda(), rule, backend="graph")
    for call in range(calls):
        torch.manual_seed(call)
        x, y = torch.randn(batch, *shape), torch.randn(batch, *target)
        found = backends.run(ours, rule, "squared_error", x.cuda(), y.cuda())
        expected = backends.run(exact, rule, "squared_error", x.double(), y.double())
        reference = backends.run(plain, rule, "squared_error", x, y)
        backends.assert_no_worse({key: value.cpu() for key, value in found.items()}, reference, expected)


@pytest.fixture(autouse=True)
def forgotten() -> object:
    graph.forget()
    yield
    graph.forget()


@pytest.mark.parametrize("name", backends.KINDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_on_every_model(name: str, rule: pck.rules.Rule) -> None:
    model = backends.MODELS[name]
    torch.manual_seed(1)
    compare(model.build(), rule, model.shape, model.target, 17)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize(
    "rule",
    [pck.Strict(60, 0.1, momentum=0.5, tolerance=1e-2), pck.Incremental(6, 0.1, 0.05, momentum=0.5)],
    ids=lambda rule: type(rule).__name__,
)
def test_samples_that_rest_and_weights_that_move(name: str, rule: pck.rules.Rule) -> None:
    """In float64, where both sides let a sample rest after the same step."""
    model = backends.MODELS[name]
    module = model.build().double()
    ours = pck.PCNetwork(copy.deepcopy(module).cuda(), rule, backend="graph")
    plain = pck.PCNetwork(module, rule, backend="reference")
    for call in range(4):
        torch.manual_seed(call)
        x, y = torch.randn(9, *model.shape).double(), torch.randn(9, *model.target).double()
        found, expected = backends.run(ours, rule, "squared_error", x.cuda(), y.cuda()), backends.run(plain, rule, "squared_error", x, y)
        for key, value in expected.items():
            torch.testing.assert_close(found[key].cpu(), value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn"])
@pytest.mark.parametrize("fused", [True, False])
def test_launches_fused_or_not(name: str, fused: bool) -> None:
    """Cross-entropy too, whose positions are ignored where their class is -100. The plan says which it was."""
    model, rule = backends.MODELS[name], pck.Strict(8, 0.05, momentum=0.5)
    module = model.build()
    exact, plain = (pck.PCNetwork(copy.deepcopy(module).to(dtype), rule, backend="reference") for dtype in (torch.float64, torch.float32))
    ours = pck.PCNetwork(copy.deepcopy(module).cuda(), rule, backend="graph")
    with graph.options(fused=fused):
        for _ in range(3):
            x, y = backends.data(name, 17, "cross_entropy")
            found = backends.run(ours, rule, "cross_entropy", x.cuda(), y.cuda())
            expected = backends.run(exact, rule, "cross_entropy", x.double(), y)
            reference = backends.run(plain, rule, "cross_entropy", x, y)
            backends.assert_no_worse({key: value.cpu() for key, value in found.items()}, reference, expected)
        assert ("fused" in ours.infer(x.cuda(), y.cuda()).plan) == fused


def test_vgg5_which_no_chip_holds() -> None:
    channels = (3, 128, 256, 512, 512)
    blocks = [layer for a, b in pairwise(channels) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.GELU(), nn.MaxPool2d(2))]
    torch.manual_seed(1)
    compare(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2048, 10)), pck.Strict(8, 0.1, momentum=0.5), (3, 32, 32), (10,), 2)


def test_two_runs_are_equal_bit_for_bit() -> None:
    network = pck.PCNetwork(backends.cnn().cuda(), pck.Strict(8, 0.1), backend="graph")
    x, target = (tensor.cuda() for tensor in backends.data("cnn", 33, "squared_error"))
    runs = [backends.run(network, network.rule, "squared_error", x, target) for _ in range(4)]
    assert all(torch.equal(runs[1][key], run[key]) for run in runs[2:] for key in run)


def test_memory_does_not_grow_with_calls_or_steps() -> None:
    x, target = (tensor.cuda() for tensor in backends.data("mlp", 64, "squared_error"))
    used: list[int] = []
    module = backends.mlp(64).cuda()
    for steps in (20, 200):
        graph.forget()
        network = pck.PCNetwork(module, pck.Strict(steps, 0.1), backend="graph")
        for _ in range(6):
            network.backward(x, target)
            used.append(torch.cuda.memory_allocated())
    assert used[5] == used[3] and used[11] == used[9]
    assert used[11] - used[5] < 2**20  # a few more energies


def test_inside_of_a_users_own_graph() -> None:
    """With check="deferred" a call waits for nothing, and joins the recording that goes on."""
    network = pck.PCNetwork(backends.mlp(64).cuda(), pck.Strict(5, 0.1), backend="graph", check="deferred")
    x, target = (tensor.cuda() for tensor in backends.data("mlp", 8, "squared_error"))

    def step() -> Tensor:
        network.zero_grad(set_to_none=False)
        return network.backward(x, target).values["0"]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    x.mul_(2.0)
    recorded.replay()
    found = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    step()
    expected = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
