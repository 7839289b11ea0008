"""The sweep in one pass over the connected graph: each vertex learns what it reads by itself, at its own coefficient."""

import copy

import pytest
import torch
from torch import nn

import pckernels as pck
from pckernels.coefficients import coefficients


def gradients(module, rule, x, target, **options):
    clone = copy.deepcopy(module)
    pck.PCNetwork(clone, rule, **options).backward(x, target)
    return {name: p.grad for name, p in clone.named_parameters()}


def assert_same(found, expected):
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm(), name


class SharedConvolution(nn.Module):
    """One convolution at three depths of a chain: its three local updates have three coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Linear(2 * 16, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.norm(self.conv(x)))
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("steps", "rate"), [(9, 1.0), (7, 0.3), (3, 1.5), (2, 0.5), (0, 0.5)])
def test_a_shared_convolution_learns_as_step_by_step(steps, rate):
    module = SharedConvolution().double()
    x, target = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 3).double()
    expected = gradients(module, pck.FixedPrediction(steps, rate, solver="iterate"), x, target)
    assert_same(gradients(module, pck.FixedPrediction(steps, rate), x, target), expected)


def test_a_chain_learns_backprops_gradient_times_its_coefficient():
    module = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())], nn.Linear(4, 2)).double()
    x, target = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    exact = gradients(module, pck.ZeroDivergence(), x, target)
    found = gradients(module, pck.FixedPrediction(5, 0.3), x, target)
    c = coefficients(5, 0.3, 3)
    expected = {name: c[3 - int(name.split(".")[0]) // 2] * value for name, value in exact.items()}
    assert_same(found, expected)


class Identities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.same = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Identity()
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.c(torch.tanh(self.b(self.same(h))) * h)


@pytest.mark.parametrize("rule", [pck.ZeroDivergence(), pck.FixedPrediction(9, 1.0), pck.FixedPrediction(4, 0.4)])
def test_a_value_node_on_an_identity_has_an_error_of_its_own(rule):
    module = Identities().double()
    x, target = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    literal = pck.FixedPrediction(getattr(rule, "steps", 9), getattr(rule, "rate", 1.0), solver="iterate")
    found, expected = (pck.PCNetwork(module, r, value_nodes=["a", "same", "b"]).infer(x, target).errors for r in (rule, literal))
    assert found.keys() == expected.keys() >= {"a", "same", "b", "output"}
    assert_same(found, expected)
