"""Precisions in native runs: what a call brings into the code for each weighed node, and what they mean for its results.

The code of steps multiplies a node's error by pi. That of a sweep, whose stored errors are the deltas, multiplies it by c_k(T).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from pckernels.backends.feedforward import precisions_of
from pckernels.backends.weighted_chain import coefficients_on
from pckernels.call import Call
from pckernels.schedule import steps_on


class Weighing:
    """The precisions of one call. counts: elements of each node's value, over the whole batch."""

    def __init__(self, call: Call, counts: Mapping[str, int]):
        self.call, self.graph, self.counts = call, call.trace.graph, counts
        self.logs = call.extra.log_precisions
        self.precisions = precisions_of(call.extra, call.tensors)
        self.is_sweep = call.dynamics.closed_form

    @cached_property
    def coefficients(self) -> dict[str, Tensor]:
        """Of a sweep: node -> c_k(t) at t = 0 .. T."""
        dynamics = self.call.dynamics
        device = next(iter(self.call.tensors.values())).device
        return coefficients_on(self.graph, self.precisions, steps_on(self.graph, dynamics.steps), dynamics.rate, device)

    def factor(self, name: str) -> float | Tensor:
        """What the code multiplies the error of a weighed node by; a tensor broadcasts over a sample."""
        return self.coefficients[name][-1] if self.is_sweep else self.precisions[name]

    def error(self, name: str, stored: Tensor) -> Tensor:
        """A hidden node's error, from what the code has stored."""
        if not self.is_sweep:
            return stored
        return (self.coefficients[name][-1] / self.precisions.get(name, 1.0)).to(stored.dtype) * stored

    @cached_property
    def log_volumes(self) -> dict[str, Tensor]:
        """Node -> -1/2 log pi for each element of its value, where pi is learned: its part in F besides the error's."""
        return {name: -0.5 * self.counts[name] * self.call.tensors[key].detach().double() for name, key in self.logs.items()}

    def energy_of_sweep(self, squares: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """F(t) = loss + 1/2 sum_i c_k(t)^2 / pi_i ||delta_i||^2."""
        total = sum(self.log_volumes.values(), losses.double().sum()).repeat(len(next(iter(self.coefficients.values()))))
        for name, square in squares.items():
            total = total + 0.5 * self.coefficients[name].square() / self.precisions.get(name, 1.0) * square
        return total.to(losses.dtype)

    def halves(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Node -> 1/2 pi_i ||eps_i||^2 after the last step, from the sums of the code: those, or of a sweep ||delta_i||^2."""
        if not self.is_sweep:
            return dict(sums)
        return {name: 0.5 * self.coefficients[name][-1].square() / self.precisions[name] * square for name, square in sums.items()}

    def gradients(self, halves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """dF/dlog pi_i = 1/2 pi_i ||eps_i||^2 - 1/2 elements, times the call's factor, where it is wanted."""
        wanted = {name: key for name, key in self.logs.items() if self.call.tensors[key].requires_grad}
        parts = {key: (halves[name] - 0.5 * self.counts[name]) * self.call.factor for name, key in wanted.items()}
        return {key: part.to(self.call.tensors[key].dtype) for key, part in parts.items()}
