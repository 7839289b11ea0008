"""No time without the right numbers: what every contender's gradients are held against, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pckernels.benchmarks import eager
from pckernels.benchmarks.cases import Case
from pckernels.network import PCNetwork
from pckernels.rules import FixedPrediction, Rule, ZeroDivergence

Gradients = list[Tensor]


class Disagreement(RuntimeError):
    """A contender computes something else; nothing of its case may be timed."""


@dataclass(frozen=True)
class Oracles:
    """Gradients of the summed loss in float64, in the order of the module's parameters.

    Attributes:
        rule: those of the case's rule. backprop: autograd's.
        source: in words, where the rule's come from.
    """

    rule: Gradients
    backprop: Gradients
    source: str

    def of(self, what: str) -> Gradients:
        """Of "rule" or of "backprop"."""
        return self.rule if what == "rule" else self.backprop


def oracles(case: Case, module: nn.Module, x: Tensor, target: Tensor) -> Oracles:
    """Both, where the module is: on a GPU, float64 is computed by PyTorch's kernels there. Nothing of `module` is changed."""
    exact = copy.deepcopy(module).double()
    x, target = x.detach().double(), target.detach().double()
    backprop = autograd_gradients(exact, x, target)
    if case.oracle == "autograd":
        assert is_backprop(case.rule), case.name
        return Oracles(backprop, backprop, "autograd in float64")
    if case.oracle == "loop":
        assert case.model.loop is not None
        found = eager.LOOPS[case.model.loop](exact, x, target, case.rule.dynamics.steps, case.rule.dynamics.rate)
        return Oracles(found, backprop, "the loop by hand in float64")
    exact.zero_grad(set_to_none=True)
    PCNetwork(exact, case.rule, backend="reference", **case.model.pc).backward(x, target)
    return Oracles(gradients_of(exact), backprop, "the reference in float64")


def is_backprop(rule: Rule) -> bool:
    """Whether a rule's gradient is backprop's: fixed prediction too at rate 1, from as many steps on as the graph is deep."""
    return isinstance(rule, ZeroDivergence) or (isinstance(rule, FixedPrediction) and rule.rate == 1.0)


def autograd_gradients(module: nn.Module, x: Tensor, target: Tensor) -> Gradients:
    """Of half the squared error, summed over everything."""
    module.zero_grad(set_to_none=True)
    (0.5 * (target - module(x)).square().sum()).backward()
    return gradients_of(module)


def gradients_of(module: nn.Module) -> Gradients:
    """Copies of `.grad`; a parameter without one counts as 0."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in module.parameters()]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative distance ||found - wanted|| / ||wanted|| of a parameter; infinite where one is not finite or misshapen."""
    if len(found) != len(wanted):
        return float("inf")
    return max((_relative(a.detach().cpu().double(), b.cpu()) for a, b in zip(found, wanted, strict=True)), default=0.0)


def whole_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The same of all parameters as one vector: for deep networks, whose first layers a few steps hardly reach."""
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return float("inf")
    return _relative(flat(found), flat(wanted))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector, in float64 on the CPU."""
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def measure(case: Case) -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
    """The distance that a case is held to."""
    return whole_distance if case.as_a_whole else distance


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    off, size = float((found - wanted).norm()), float(wanted.norm())
    return off / size if size else (0.0 if off == 0.0 else float("inf"))


def require_agreement(who: str, off: float, limit: float, case_name: str) -> None:
    """Raise Disagreement, in a sentence, unless off <= limit (a NaN is none)."""
    if not off <= limit:
        raise Disagreement(f"{case_name}: {who} is {off:.1e} away from its float64 oracle, more than {limit:.0e}; nothing of it was timed.")
