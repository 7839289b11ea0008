"""Where relaxation ends, on deep chains: the analytic energy of linear ones, and one equilibrium for Strict and ErrorOptimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from oracle.compare import assert_all_equal
from torch import Tensor, nn

import pckernels as pck

MOMENTUM, STEPS, STILL = 0.9, 540, 1e-11
ACTIVATIONS: dict[str, type[nn.Module]] = {"linear": nn.Identity, "tanh": nn.Tanh}


class Chain:
    """A chain of `depth` linear layers of width 4 with nearly orthogonal weights, so that signals live to its end."""

    def __init__(self, activation: str, depth: int):
        torch.manual_seed(depth)
        self.linears = [nn.Linear(4, 4).double() for _ in range(depth)]
        for linear in self.linears:
            nn.init.orthogonal_(linear.weight, 0.9)
        self.activate: Callable[[Tensor], Tensor] = torch.tanh if activation == "tanh" else lambda z: z
        self.module = nn.Sequential(*[part for linear in self.linears for part in (linear, ACTIVATIONS[activation]())][:-1])
        self.x, self.target = torch.randn(2, 4).double(), torch.randn(2, 4).double()

    def counts(self, strict: pck.Inference, free: pck.Inference) -> tuple[int, int]:
        """The steps after which |gradient| stays below STILL, which both must have reached."""
        found = []
        for slopes in (self.slopes_of_values(strict), self.slopes_of_errors(free)):
            assert slopes[0] > 1e-3 and slopes[-1] < STILL
            found.append(int((slopes >= STILL).nonzero().max()) + 1)
        return found[0], found[1]

    def relax(self, rule: pck.Strict | pck.ErrorOptimization) -> pck.Inference:
        return pck.PCNetwork(self.module, rule).infer(self.x, self.target, record=True)

    def slopes_of_values(self, inference: pck.Inference) -> Tensor:
        """(T + 1,): the largest |dF/dv| at each step, by autograd through F as a function of the values."""
        v = stacked(inference, "values")
        predictions = [self.activate(linear(parent)) for linear, parent in zip(self.linears[:-1], [self.x, *v[:-1]], strict=True)]
        return largest_slope(v, squares(a - mu for a, mu in zip(v, predictions, strict=True)) + self.loss(v[-1]))

    def slopes_of_errors(self, inference: pck.Inference) -> Tensor:
        """(T + 1,): the largest |dF/deps| at each step, by autograd through F as a function of the errors."""
        eps, v = stacked(inference, "errors"), self.x
        for linear, error in zip(self.linears[:-1], eps, strict=True):
            v = self.activate(linear(v)) + error
        return largest_slope(eps, squares(eps) + self.loss(v))

    def loss(self, last: Tensor) -> Tensor:
        return squares([self.target - self.linears[-1](last)])


def stacked(inference: pck.Inference, what: str) -> list[Tensor]:
    """Of each hidden vertex, all steps in front of the batch: (T + 1, B, 4)."""
    names = [name for name in inference.values if name != "output"]
    return [torch.stack([getattr(moment, what)[name] for moment in inference.history]).requires_grad_() for name in names]


def squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([0.5 * tensor.square().sum() for tensor in tensors]).sum()


def largest_slope(variables: list[Tensor], energy: Tensor) -> Tensor:
    return torch.stack([slope.abs().amax((1, 2)) for slope in torch.autograd.grad(energy, variables)]).amax(0)


@cache
def relaxed(activation: str, depth: int) -> tuple[Chain, pck.Inference, pck.Inference]:
    chain = Chain(activation, depth)
    strict = chain.relax(pck.Strict(STEPS, 0.3, momentum=MOMENTUM))
    return chain, strict, chain.relax(pck.ErrorOptimization(STEPS, 1.0 / depth, momentum=MOMENTUM))


@pytest.mark.parametrize("depth", [5, 10, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strict_and_error_optimization_reach_the_same_equilibrium(activation: str, depth: int, show: Callable[[str], None]) -> None:
    chain, strict, free = relaxed(activation, depth)
    counts = chain.counts(strict, free)
    text = f"{activation} chain of depth {depth}, momentum {MOMENTUM}: |gradient| < {STILL:g} after"
    show(f"{text} {counts[0]} steps of Strict, {counts[1]} of ErrorOptimization")
    assert_all_equal(free.values, strict.values, 1e-8)
    assert_all_equal(free.errors, strict.errors, 1e-8)


@pytest.mark.parametrize(("activation", "rate", "fraction"), [("linear", 0.2, 10), ("tanh", 0.2, 2)])
def test_without_momentum_error_optimization_needs_a_fraction_of_the_steps(
    activation: str, rate: float, fraction: int, show: Callable[[str], None]
) -> None:
    """With momentum 0.9 the time of the momentum itself, 44 steps for each factor of 10, is what both take."""
    chain = Chain(activation, 10)
    counts = chain.counts(chain.relax(pck.Strict(600, 0.45)), chain.relax(pck.ErrorOptimization(400, rate)))
    show(f"{activation} chain of depth 10, no momentum: |gradient| < {STILL:g} after {counts[0]} and {counts[1]} steps")
    assert counts[1] * fraction < counts[0]


@pytest.mark.parametrize("depth", [5, 10, 20])
def test_linear_chains_reach_the_analytic_equilibrium_energy(depth: int) -> None:
    """Integrating the errors out of a linear chain leaves a Gaussian output: F* = 1/2 r^T S^-1 r, with r the feed-forward residual
    and S = sum over layers l of P_l P_l^T, P_l the product of the weights behind l."""
    chain, strict, free = relaxed("linear", depth)
    with torch.no_grad():
        behind, covariance = torch.eye(4).double(), torch.eye(4).double()
        for linear in reversed(chain.linears[1:]):
            behind = behind @ linear.weight
            covariance = covariance + behind @ behind.T
        residual = chain.target - chain.module(chain.x)
        expected = 0.5 * (residual * torch.linalg.solve(covariance, residual.T).T).sum()
        assert strict.energy[0] / expected > 2  # from where it starts there is something to descend
    for inference in (strict, free):
        assert abs(inference.energy[-1] / expected - 1) < 1e-12


def test_the_first_step_of_error_optimization_is_rate_times_the_gradient() -> None:
    chain = Chain("tanh", 5)
    inference = chain.relax(pck.ErrorOptimization(1, 1e-3))
    values, v = [], chain.x
    for linear in chain.linears[:-1]:
        v = chain.activate(linear(v))
        v.retain_grad()
        values.append(v)
    chain.loss(v).backward()
    for error, value in zip(list(inference.errors.values())[:-1], values, strict=True):
        assert torch.allclose(error, -1e-3 * value.grad, rtol=1e-12, atol=0.0)
