"""Measuring gradients: autograd's, those of a rule, and where c_k(T) says the errors must be after T steps.

Everything here works on copies: the caller's parameters, `.grad`, running statistics and random state stay as they are.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .coefficients import coefficients
from .network import Inference, PCNetwork
from .rules import FixedPrediction, Rule

Errors = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; where `wanted` is 0, `found` must be: otherwise infinite."""
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def largest_error(found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None]) -> float:
    """The largest relative error of any tensor; NaN if any is."""
    errors = gradient_errors(found, wanted).values()
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


def gradient_errors(found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Name -> relative error; infinite where only one of the two has a gradient."""
    errors = {}
    for name in wanted:
        a, b = found.get(name), wanted[name]
        if a is None or b is None:
            errors[name] = 0.0 if a is None and b is None else float("inf")
        else:
            errors[name] = relative_error(a, b)
    return errors


def network_of(module: nn.Module, rule: Rule, loss: Any = "squared_error") -> PCNetwork:
    """A network by `rule`, with gradients summed over the batch, on a copy of the module.

    A PCNetwork keeps its own loss, value nodes and batch dimension.
    """
    if isinstance(module, PCNetwork):
        settings = {"loss": module.loss, "value_nodes": module.value_nodes, "batch_dim": module.batch_dim, "backend": module.backend}
        return PCNetwork(copy.deepcopy(module.module), rule=rule, reduction="sum", **settings)
    return PCNetwork(copy.deepcopy(module), rule=rule, loss=loss, reduction="sum")


def rule_gradients(network: PCNetwork, x: Any, target: Any) -> Gradients:
    """Parameter -> what one `backward` of the network writes into `.grad`."""
    args, keywords = arguments(x)
    with same_draws():
        network.zero_grad(set_to_none=True)
        network.backward(*args, target=target, **keywords)
    return gradients(network.module)


def autograd_gradients(module: nn.Module, x: Any, target: Any, loss: Any) -> Gradients:
    """Parameter -> autograd's gradient of the loss summed over the batch."""
    module = copy.deepcopy(module)
    module.zero_grad(set_to_none=True)
    with same_draws(), torch.enable_grad():
        total = summed_loss(module, x, target, loss)
    total.backward()
    return gradients(module)


def summed_loss(module: nn.Module, x: Any, target: Any, loss: Any) -> Tensor:
    """The loss summed over samples, positions and outputs, written from its definition."""
    args, keywords = arguments(x)
    outputs, targets = pytree.tree_leaves(module(*args, **keywords)), pytree.tree_leaves(target)
    return torch.stack([_loss(loss, output, wanted) for output, wanted in zip(outputs, targets, strict=True)]).sum()


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `x` is passed on: a tuple is several arguments, a dict keyword arguments, anything else one argument."""
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def gradients(module: nn.Module) -> Gradients:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def infer(network: PCNetwork, x: Any, target: Any, record: bool = False) -> Inference:
    args, keywords = arguments(x)
    with same_draws():
        return network.infer(*args, target=target, record=record, **keywords)


def recorded_errors(module: nn.Module, x: Any, target: Any, rule: Rule, loss: Any = "squared_error") -> list[Errors]:
    """The error of every vertex at t = 0 .. T."""
    history = infer(network_of(module, rule, loss), x, target, record=True).history
    assert history is not None
    return [snapshot.errors for snapshot in history]


def path_parts(module: nn.Module, x: Any, target: Any, depth: int, loss: Any = "squared_error") -> list[Errors]:
    """For k = 0 .. depth, the part of every delta_i = -dL/dv_i that travels paths of length k.

    At rate 1, c_k(T) is 1 for k <= T and 0 beyond: what arrives in step k is the part of length k.
    """
    states = recorded_errors(module, x, target, FixedPrediction(depth, 1.0, solver="iterate"), loss)
    later = [{name: new[name] - old[name] for name in new} for old, new in pairwise(states)]
    return [states[0], *later]


def mixture(parts: list[Errors], steps: int, rate: float) -> Errors:
    """The errors that theory predicts after T = `steps` steps: c_k(T) times the part of length k, summed over k."""
    c = coefficients(steps, rate, len(parts) - 1)
    return {name: sum_of([c[k] * part[name] for k, part in enumerate(parts)]) for name in parts[0]}


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def depth_of(module: nn.Module, x: Any) -> int:
    """The length of the longest path of the graph that the module makes of x."""
    args, keywords = arguments(x)
    return network_of(module, FixedPrediction(0, 1.0)).trace(*args, **keywords).depth


@contextmanager
def same_draws() -> Iterator[None]:
    """The same random numbers at every use (dropout masks), and the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _loss(loss: Any, output: Tensor, target: Tensor) -> Tensor:
    if loss == "squared_error":
        return 0.5 * (output - target).square().sum()
    if loss == "cross_entropy":
        return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")
    return loss(output, target).sum()
