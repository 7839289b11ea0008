"""Measuring gradients: autograd's, those of a rule, and where c_k(T) says the errors must be after T steps."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .autograd import backward
from .coefficients import coefficients
from .graph import ComputationGraph
from .network import Inference, PCNetwork
from .rules import FixedPrediction, Rule

Errors = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


class Probe:
    """A copy of a module, with data, on which rules are tried one after another and which is traced only once.

    Args:
        module: any module, or a PCNetwork, which keeps its loss, value nodes and batch dimension.
        x: the input; a tuple is several arguments of forward, a dict keyword arguments.
        loss: of a plain module.

    The caller's module, its `.grad`, running statistics and random state are never changed, and no trial sees what
    another has left.
    """

    def __init__(self, module: nn.Module, x: Any, target: Any, loss: Any = "squared_error") -> None:
        self.network = _network(module, loss)
        self.target, self.loss = target, self.network.loss
        self.args, self.keywords = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        self._state = copy.deepcopy(self.network.state_dict())

    def graph(self) -> ComputationGraph:
        """The computation graph that the module makes of x."""
        with self._trial():
            return self.network.trace(*self.args, **self.keywords)

    def gradients(self, rule: Rule) -> Gradients:
        """Parameter -> what one `backward` by the rule writes into `.grad`, summed over the batch."""
        with self._trial(rule):
            self.network.backward(*self.args, target=self.target, **self.keywords)
            return self._collected()

    def autograd_gradients(self) -> Gradients:
        """Parameter -> what `loss.backward()` writes into `.grad`."""
        with self._trial(), torch.enable_grad():
            self._summed_loss().backward()
            return self._collected()

    def live_gradients(self) -> Gradients:
        """Parameter -> what `pckernels.backward(loss)` writes into `.grad`."""
        with self._trial(), torch.enable_grad():
            backward(self._summed_loss())
            return self._collected()

    def errors(self, rule: Rule) -> list[Errors]:
        """The error of every vertex at t = 0 .. T."""
        with self._trial(rule):
            inference: Inference = self.network.infer(*self.args, target=self.target, record=True, **self.keywords)
        assert inference.history is not None
        return [snapshot.errors for snapshot in inference.history]

    def path_parts(self) -> list[Errors]:
        """For k = 0 .. depth, the part of every delta_i = -dL/dv_i that travels paths of length k.

        At rate 1, c_k(T) is 1 for k <= T and 0 beyond: what arrives in step k is the part of length k.
        """
        states = self.errors(FixedPrediction(self.graph().depth, 1.0, solver="iterate"))
        return [states[0], *({name: new[name] - old[name] for name in new} for old, new in pairwise(states))]

    def _summed_loss(self) -> Tensor:
        return self.summed_loss_of(self.network)

    def summed_loss_of(self, module: nn.Module) -> Tensor:
        """The loss summed over samples, positions and outputs, written from its definition, with another module in place of this one."""
        outputs, targets = pytree.tree_leaves(module(*self.args, **self.keywords)), pytree.tree_leaves(self.target)
        return sum_of([_loss(self.loss, output, wanted) for output, wanted in zip(outputs, targets, strict=True)])

    def _collected(self) -> Gradients:
        return {name: parameter.grad for name, parameter in self.network.named_parameters()}

    @contextmanager
    def _trial(self, rule: Rule | None = None) -> Iterator[None]:
        # the same dropout masks in every trial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network.rule = rule or self.network.rule
            self.network.zero_grad(set_to_none=True)
            yield
            self.network.load_state_dict(self._state)


def mixture(parts: list[Errors], steps: int, rate: float) -> Errors:
    """The errors that theory predicts after T = `steps` steps: c_k(T) times the part of length k, summed over k."""
    c = coefficients(steps, rate, len(parts) - 1)
    return {name: sum_of([c[k] * part[name] for k, part in enumerate(parts)]) for name in parts[0]}


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; where `wanted` is 0, `found` must be: otherwise infinite."""
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


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


def largest_error(found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None]) -> float:
    """The largest relative error of any tensor; NaN if any is."""
    errors = gradient_errors(found, wanted).values()
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


def _network(module: nn.Module, loss: Any) -> PCNetwork:
    rule = FixedPrediction(0, 1.0)
    if not isinstance(module, PCNetwork):
        return PCNetwork(copy.deepcopy(module), rule=rule, loss=loss, reduction="sum")
    network = copy.deepcopy(module)
    network.rule, network.reduction = rule, "sum"
    return network


def _loss(loss: Any, output: Tensor, target: Tensor) -> Tensor:
    if loss == "squared_error":
        return 0.5 * (output - target).square().sum()
    if loss == "cross_entropy":
        return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")
    return loss(output, target).sum()
