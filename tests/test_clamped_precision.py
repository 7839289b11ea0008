"""Clamps together with precisions, relaxed rules and match=: each is tested by itself elsewhere, here what they do to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

pytestmark = pytest.mark.usefixtures("float64")
PRECISIONS = {"0": 2.0, "2": 0.5}


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def energy(module: nn.Sequential, values: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    """F, written out."""
    first = values["0"] - module[1](module[0](x))
    second = values["2"] - module[3](module[2](values["0"]))
    hidden = 0.5 * PRECISIONS["0"] * first.square().sum() + 0.5 * PRECISIONS["2"] * second.square().sum()
    return hidden + 0.5 * (target - module[4](values["2"])).square().sum()


@pytest.mark.parametrize("masked", [False, True])
def test_a_held_value_pulls_with_its_precision(network: nn.Sequential, masked: bool) -> None:
    x, target, value = torch.randn(6, 3), torch.randn(6, 2), torch.randn(6, 4)
    mask = torch.rand(6, 4) < 0.5 if masked else torch.ones(6, 4, dtype=torch.bool)
    pcn = pck.PCNetwork(network, pck.Strict(3, 0.1), precision=PRECISIONS, reduction="sum")
    inference = pcn.backward(x, target, clamp={"0": (value, mask) if masked else value})
    with torch.no_grad():
        start = torch.where(mask, value, network[1](network[0](x)))
        values = {"0": start, "2": network[3](network[2](start))}
    expected = [energy(network, values, x, target).detach()]
    for _ in range(3):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
        drives = dict(zip(leaves, torch.autograd.grad(energy(network, leaves, x, target), list(leaves.values())), strict=True))
        values = {name: tensor.detach() - 0.1 * drives[name] for name, tensor in leaves.items()}
        values["0"] = torch.where(mask, value, values["0"])
        expected.append(energy(network, values, x, target).detach())
    torch.testing.assert_close(inference.energy, torch.stack(expected))
    for name, tensor in values.items():
        torch.testing.assert_close(inference.values[name], tensor)
    gradients = torch.autograd.grad(energy(network, values, x, target), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_error_optimisation_ends_where_strict_does(network: nn.Sequential) -> None:
    """Clamps and precisions change the energy, not who its equilibrium is found by."""
    x, target = torch.randn(6, 3), torch.randn(6, 2)
    clamp = {"0": (torch.randn(6, 4), torch.rand(6, 4) < 0.5)}
    found = [
        pck.PCNetwork(network, rule, precision=PRECISIONS).infer(x, target, clamp=clamp).values
        for rule in (pck.Strict(600, 0.1, momentum=0.8), pck.ErrorOptimization(600, 0.1, momentum=0.8))
    ]
    for name in ("0", "2"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-8, atol=1e-9)


def test_what_does_not_go_together_is_refused(network: nn.Sequential) -> None:
    x, target = torch.randn(6, 3), torch.randn(6, 2)
    relaxed = pck.Relaxed(pck.Strict(2, 0.1), error_weights="random")
    with pytest.raises(pck.Unsupported, match="Under error weights a value is compared with E mu"):
        pck.PCNetwork(network, relaxed).infer(x, target, clamp={"0": torch.randn(6, 4)})
    with pytest.raises(pck.Unsupported, match="which has no clamp=, free= or target_mask="):
        pck.PCNetwork(network, pck.Strict(2, 0.1), match="pcx").infer(x, target, clamp={"0": torch.randn(6, 4)})
