"""Assertions about gradients, for the tests of your own models.

Both work on copies: nothing of the given module, not even `.grad` or a running statistic, is changed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .coefficients import largest
from .measure import Probe, gradient_errors, mixture, sum_of
from .rules import FixedPrediction, Rule

BOUND = 1e-12  # of the error after T steps, relative to m * ||delta_i||, in float64

Row = tuple[str, float, float]  # name, what was measured, what is allowed


def assert_exact_gradient(module: nn.Module, x: Any, target: Any, rule: Rule, tolerance: float, *, loss: Any = "squared_error") -> None:
    """Assert that the gradient of every parameter by `rule` is autograd's, of the same loss summed over the batch.

    Args:
        module: any module, or a PCNetwork, which keeps its own loss and value nodes (its own rule is set aside).
        x: the input; a tuple is several arguments of forward, a dict keyword arguments.
        target: what the output is compared with, by the loss.
        rule: FixedPrediction with enough steps, ZeroDivergence, or any other rule.
        tolerance: of the relative error ||a - b|| / ||b|| of each parameter's gradient.
        loss: "squared_error", "cross_entropy" or f(output, target) -> (B,), for a plain module.

    Raises:
        AssertionError: some gradient is not; the message holds a table of every parameter's relative error.
        ValueError, TypeError, Unsupported: as PCNetwork raises them.
    """
    probe = Probe(module, x, target, loss)
    errors = gradient_errors(probe.gradients(rule), probe.autograd_gradients())
    _require([(name, error, tolerance) for name, error in errors.items()], "parameter", f"The gradients of {rule} are not autograd's")


def assert_converges(module: nn.Module, x: Any, target: Any, rate: float, steps: int, *, loss: Any = "squared_error") -> None:
    """Assert that `steps` literal steps of fixed prediction leave every error where theory puts it.

    Theory: the sum over path lengths k of c_k(T) times the part of delta_i that travels paths of length k; on a chain,
    c_k(T) * delta_i. Allowed is 1e-12 * m * ||delta_i|| in float64, where m = max(1, max |c_k(t)|, t <= T), and as many
    units of rounding in other dtypes.

    Args:
        module, x, target, loss: as for `assert_exact_gradient`.
        rate: in (0, 2).

    Raises:
        AssertionError: some vertex is elsewhere; the message holds a table of every vertex.
        ValueError, TypeError, Unsupported: as PCNetwork and FixedPrediction raise them.
    """
    rows = convergence_rows(Probe(module, x, target, loss), rate, steps)
    _require(rows, "vertex", f"After {steps} steps at rate {rate:g}, errors are not where c_k({steps}) puts them")


def convergence_rows(probe: Probe, rate: float, steps: int) -> list[Row]:
    """For each vertex ||eps_i(T) - predicted|| / ||delta_i||, and what is allowed."""
    rule = FixedPrediction(steps, rate, solver="iterate")
    parts = probe.path_parts()
    found = probe.errors(rule)[-1]
    predicted = mixture(parts, steps, rate)
    growth = largest(steps, rate, len(parts) - 1)
    return [_row(name, found[name], predicted[name], sum_of([part[name] for part in parts]), growth) for name in found]


def bound(dtype: torch.dtype) -> float:
    """1e-12 in float64, and the same number of units of rounding in any other dtype."""
    return BOUND * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def dtype_of(*values: Any) -> torch.dtype:
    """The coarsest floating-point dtype among the tensors."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _row(name: str, found: Tensor, predicted: Tensor, delta: Tensor, growth: float) -> Row:
    distance, size = float((found - predicted).norm()), float(delta.norm())
    if size == 0.0:
        return name, (0.0 if distance == 0.0 else float("inf")), 0.0
    return name, distance / size, bound(found.dtype) * growth


def _require(rows: Iterable[Row], kind: str, sentence: str) -> None:
    rows = list(rows)
    if all(error <= allowed for _, error, allowed in rows):
        return
    width = max(len(kind), *(len(name) for name, _, _ in rows))
    lines = [f"{kind:<{width}}  relative error   allowed"]
    lines += [f"{name:<{width}}  {error:14.3e}  {allowed:8.1e}{'' if error <= allowed else '  <-'}" for name, error, allowed in rows]
    raise AssertionError("\n".join([f"{sentence}:", *lines]))
