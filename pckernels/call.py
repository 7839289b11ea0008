"""What goes into a backend and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pckernels.clamps import Clamps
from pckernels.graph import Trace
from pckernels.rules import Dynamics

# Predictions of the output vertices -> loss of each sample (B,), and each output's error -dL/dmu with L summed over the batch.
Objective = Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]

# Parameters and their gradients, times the call's factor -> both have been given to an optimizer. The list of gradients is used up.
Update = Callable[[list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class Extra:
    """What a call reads beside the module's own: names of tensors of the call.

    Attributes:
        feedback: parameter -> its backward weight, of the same shape.
        error_weights: hidden vertex -> its matrix E over features.
        log_precisions: hidden vertex -> log pi, where it is learned.
        precisions: hidden vertex -> pi itself, where it is fixed and not 1: a number, or a tensor that broadcasts over a sample.
    """

    feedback: Mapping[str, str] = field(default_factory=dict)
    error_weights: Mapping[str, str] = field(default_factory=dict)
    log_precisions: Mapping[str, str] = field(default_factory=dict)
    precisions: Mapping[str, float | Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.feedback.values(), *self.error_weights.values(), *self.log_precisions.values()]

    @property
    def weighs_errors(self) -> bool:
        """Whether a precision is not 1, or learned."""
        return bool(self.precisions or self.log_precisions)


@dataclass(frozen=True)
class Call:
    """One inference: a traced graph bound to live tensors.

    Attributes:
        trace: the graph and its ties to the module.
        tensors: every parameter, buffer, constant and argument by its name in the graph.
        objective: the loss, or None where there is no target: then values are those of the feed-forward pass.
        dynamics: the rule, as data.
        learn: whether the local updates are wanted.
        record: whether values and errors are kept at every step.
        factor: what the local updates are multiplied by: reduction and loss scale.
        size: B, or None where no input has a batch.
        divisor: the reduction's part in the factor: B for the mean, 1 for the sum.
        update: moves live parameters by their gradients, where a rule that learns at each step has an optimizer.
        extra: backward weights, error weights and precisions, where the network has them.
        clamps: the value nodes that are held, and the inputs that move.
        memo: what a backend finds out about the call before it runs it.
    """

    trace: Trace
    tensors: Mapping[str, Tensor]
    objective: Objective | None
    dynamics: Dynamics
    learn: bool
    record: bool
    factor: float | Tensor
    size: int | None = None
    divisor: int = 1
    update: Update | None = None
    extra: Extra = field(default_factory=Extra)
    clamps: Clamps = field(default_factory=Clamps)
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass
class Snapshot:
    """Values and errors of every vertex at one step."""

    values: dict[str, Tensor]
    errors: dict[str, Tensor]


@dataclass
class Outcome:
    """What an inference found. Callables are evaluated when they are first asked for.

    Attributes:
        losses: (B,), the feed-forward loss of each sample.
        gradients: parameter in the graph -> dF/dtheta times the call's factor.
        updates: buffer -> its value after the call.
        values, errors: vertex -> tensor, after the last step.
        energy: (steps + 1,), batch sums of F.
        history: with record, the state at t = 0 .. T.
        good: on the device, whether everything is finite and nothing diverged.
        complaint: in words, what is wrong where `good` is False.
        plan: what ran, and why.
    """

    losses: Tensor | None
    values: Callable[[], dict[str, Tensor]]
    errors: Callable[[], dict[str, Tensor]]
    energy: Callable[[], Tensor]
    good: Tensor
    complaint: Callable[[], str]
    plan: str
    gradients: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)
    history: list[Snapshot] | None = None
