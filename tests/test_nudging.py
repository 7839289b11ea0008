"""Nudging: how far what is learned at equilibrium is from backprop's gradient, and what an inference shows of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pckernels as pck

BETAS = (0.05, 0.025, 0.0125)
MOMENTUM, STEPS, STILL = 0.7, 180, 1e-11


@cache
def case() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return module, torch.randn(5, 4).double(), torch.randint(3, (5,))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def backprop(loss: str) -> Tensor:
    module, x, _ = case()
    module.zero_grad()
    pull(loss, module(x)).backward()
    return flat(module)


def pull(loss: str, output: Tensor) -> Tensor:
    if loss == "cross_entropy":
        return F.cross_entropy(output, target(loss), reduction="sum")
    return 0.5 * (output - target(loss)).square().sum()


def target(loss: str) -> Tensor:
    classes = case()[2]
    return classes if loss == "cross_entropy" else F.one_hot(classes, 3).double()


@cache
def learned(loss: str, nudge: object, steps: int = STEPS) -> tuple[Tensor, pck.Inference]:
    module, x, _ = case()
    module.zero_grad()
    rule = pck.Strict(steps, 0.5, momentum=MOMENTUM, nudge=nudge)
    inference = pck.PCNetwork(module, rule, loss=loss, reduction="sum").backward(x, target(loss))
    return flat(module), inference


def largest_slope(inference: pck.Inference, loss: str, beta: float) -> float:
    """The largest |dF_beta/dv|, by autograd through F_beta as a function of the values."""
    module, x, _ = case()
    v = [value.clone().requires_grad_() for name, value in inference.values.items() if name != "output"]
    predictions = [torch.tanh(module[2 * k](parent)) for k, parent in enumerate([x, *v[:-1]])]
    hidden = sum(0.5 * (a - mu).square().sum() for a, mu in zip(v, predictions, strict=True))
    energy = hidden + beta * pull(loss, module[6](v[-1]))
    assert torch.allclose(inference.energy[-1], energy, rtol=1e-12)
    return max(float(slope.abs().max()) for slope in torch.autograd.grad(energy, v))


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_the_bias_falls_with_beta_and_centered_with_its_square(loss: str) -> None:
    exact = backprop(loss)
    bias: dict[str, list[float]] = {"positive": [], "negative": [], "centered": []}
    for beta in BETAS:
        for kind, nudge in (("positive", beta), ("negative", -beta), ("centered", ("centered", beta))):
            gradient, inference = learned(loss, nudge)
            assert largest_slope(inference, loss, -beta if kind == "negative" else beta) < STILL
            bias[kind].append(float((gradient - exact).norm() / exact.norm()))
    for kind, factor, tolerance in (("positive", 2.0, 0.3), ("negative", 2.0, 0.3), ("centered", 4.0, 0.4)):
        falls = [a / b for a, b in zip(bias[kind][:-1], bias[kind][1:], strict=True)]
        assert all(abs(fall - factor) < tolerance for fall in falls), (kind, bias[kind], falls)
    assert bias["centered"][0] < 0.2 * bias["positive"][0]


def test_a_nudge_of_1_is_strict_bit_for_bit() -> None:
    (plain, one), (nudged, other) = (learned("squared_error", nudge, 7) for nudge in (None, 1))
    assert torch.equal(plain, nudged) and torch.equal(one.energy, other.energy)
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)


def test_centered_is_the_mean_of_both_signs_and_shows_the_positive_one() -> None:
    (up, positive), (down, _), (mean, centered) = (learned("cross_entropy", nudge, 7) for nudge in (0.3, -0.3, ("centered", 0.3)))
    assert torch.allclose(mean, 0.5 * (up + down), rtol=1e-12, atol=1e-15)
    assert torch.equal(centered.energy, positive.energy) and torch.equal(centered.loss, positive.loss)
    for name in positive.values:
        assert torch.equal(centered.values[name], positive.values[name])
        assert torch.equal(centered.errors[name], positive.errors[name])
    assert "+0.3 and -0.3" in centered.plan and "nudged by +0.3," in positive.plan


def test_what_an_inference_shows_is_of_the_nudged_energy() -> None:
    module, x, _ = case()
    y = target("squared_error")
    _, inference = learned("squared_error", 0.3, 7)
    output = module(x).detach()
    loss = 0.5 * (y - output).square().sum()
    assert torch.allclose(inference.loss, loss, rtol=1e-12)  # the loss itself
    assert torch.allclose(inference.energy[0], 0.3 * loss, rtol=1e-12)  # at the start there is nothing else
    assert torch.allclose(inference.errors["output"], 0.3 * (y - inference.values["output"]), rtol=1e-12)
    start = pck.PCNetwork(module, pck.Strict(0, 0.1, nudge=0.3)).infer(x, y)
    assert torch.allclose(start.values["output"], output, rtol=1e-12)  # no target is clamped


def test_an_energy_without_a_floor_is_noticed_on_either_side() -> None:
    """Pushed away from a squared error by more than the hidden energy holds, the values run off; at +beta they do not."""
    module, x, _ = case()
    y = target("squared_error")
    linear = nn.Sequential(module[0], module[2], module[4], module[6])
    for nudge in (-3.0, ("centered", 3.0)):
        for parameter in linear.parameters():
            parameter.grad = None
        with pytest.raises(pck.InferenceDiverged, match="or a nudge nearer to 0"):
            pck.PCNetwork(linear, pck.Strict(200, 0.3, nudge=nudge)).backward(x, y)
        assert all(parameter.grad is None for parameter in linear.parameters())
    assert bool(pck.PCNetwork(linear, pck.Strict(200, 0.1, nudge=3.0)).backward(x, y).energy.isfinite().all())
