"""muPC: its factors, what they do to signals, and that a deep network learns at a shallow one's rates."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(torch.relu(x))


def residual(layers: int, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), *(Block(width) for _ in range(layers - 2)), nn.Linear(width, 3))


@pytest.mark.parametrize("connected", [True, False])
def test_predictions_are_scaled_by_width_and_depth(connected: bool, float64: None) -> None:
    module, x = pck.mupc(residual(5), connected, seed=1), torch.randn(6, 8)
    between = 1 / math.sqrt(16 * 5) if connected else 1 / math.sqrt(16)
    expected = x @ module[0].weight.t() / math.sqrt(8)
    for block in module[1:-1]:
        expected = expected + between * (torch.relu(expected) @ block.branch.weight.t())
    assert torch.allclose(module(x), expected @ module[-1].weight.t() / 16, rtol=1e-12)
    weights = torch.cat([p.flatten() for name, p in module.named_parameters() if name.endswith("weight")])
    assert abs(float(weights.detach().mean())) < 0.1 and abs(float(weights.detach().std()) - 1) < 0.1
    assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))


def test_inputs_of_a_convolution_are_channels_times_its_kernel(float64: None) -> None:
    module = pck.mupc(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 2)), False)
    x = torch.randn(2, 2, 6, 6)
    h = nn.functional.conv2d(x, module[0].weight) / math.sqrt(18)
    h = nn.functional.conv2d(torch.tanh(h), module[2].weight) / math.sqrt(12)
    assert torch.allclose(module(x), h.flatten(1) @ module[4].weight.t() / 36, rtol=1e-12)


def test_signals_keep_their_size_at_any_depth() -> None:
    x = torch.randn(64, 8)
    for layers in (4, 64, 256):
        module = pck.mupc(residual(layers, 64), seed=0)
        size = module[:-1](x).square().mean().sqrt().item()
        assert 0.5 < size < 2.5, (layers, size)


def test_it_is_given_once_and_stays_with_copies(float64: None) -> None:
    module, x = pck.mupc(residual(4), seed=3), torch.randn(5, 8)
    before = module(x)
    for other in (pck.mupc(module, seed=3), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), before)
    torch.manual_seed(0)
    first = pck.mupc(residual(4))(x)
    torch.manual_seed(1)
    assert not torch.equal(pck.mupc(residual(4))(x), first)


def test_the_exact_rules_are_exact_through_the_factors(float64: None) -> None:
    module = pck.mupc(residual(4), seed=0)
    pck.testing.assert_exact_gradient(module, torch.randn(5, 8), torch.randn(5, 3), pck.ZeroDivergence(), tolerance=1e-12)


def test_the_host_engine_runs_it() -> None:
    network = pck.PCNetwork(pck.mupc(residual(4)), pck.Strict(4, 0.1))
    assert network.infer(torch.randn(5, 8), torch.randn(5, 3)).backend == "host"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


BAD = [
    (lambda: pck.mupc("mlp"), TypeError, "module must be an nn.Module"),
    (lambda: pck.mupc(residual(3), residual=1), TypeError, "residual must be True or False"),
    (lambda: pck.mupc(residual(3), seed=0.5), TypeError, "seed must be an int or None"),
    (lambda: pck.mupc(nn.Linear(3, 2)), ValueError, "a first, a last and the layers between; this module has 1"),
    (lambda: pck.mupc(Tied()), pck.Unsupported, "Two layers share a weight"),
    (
        lambda: pck.mupc(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3), nn.Linear(3, 2))),
        pck.Unsupported,
        "muPC says nothing of '1.weight_ih_l0'",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_what_it_is_not_for_is_refused_in_a_sentence(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mupc_example", Path(__file__).parents[1] / "examples" / "mupc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_deep_network_learns_at_the_rates_of_a_shallow_one_and_without_muPC_does_not() -> None:  # noqa: N802
    """The example at small size: 32 layers, one epoch on half of the digits, at rates that suit 8 layers."""
    mupc = example()
    (x, y), _, test = mupc.digits()
    data = x[:640], y[:640]
    accuracy = {}
    for name, scaled, learning_rate in (("muPC", True, 0.1), ("standard", False, 0.003)):
        for layers in (8, 32):
            curve, _ = mupc.train(layers, scaled, 0.3, learning_rate, data, test, 1)
            accuracy[name, layers] = curve[-1]
    assert accuracy["muPC", 8] > 0.7 and accuracy["muPC", 32] > 0.7, accuracy
    assert accuracy["standard", 8] > 0.5 and accuracy["standard", 32] < 0.4, accuracy
