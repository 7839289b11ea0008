"""Energies, and what a backend hands back: shared by the solvers of the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound
from pckernels.call import Call, Outcome, Snapshot
from pckernels.graph import ComputationGraph
from pckernels.rules import Dynamics

Tensors = dict[str, Tensor]


class Relaxed(Protocol):
    """A state of values and errors. An error that never left zero may be absent."""

    errors: Tensors

    def value(self, name: str) -> Tensor: ...


def energy(losses: Tensor, errors: Iterable[Tensor]) -> Tensor:
    """F = sum of 1/2 ||eps_i||^2 over hidden vertices (errors times the root of their precision), plus the loss, over the whole batch."""
    total = losses.sum()
    for error in errors:
        total = total + 0.5 * error.square().sum(dtype=losses.dtype)
    return total


def full_errors(bound: Bound, errors: Mapping[str, Tensor]) -> Tensors:
    """Every vertex's error, with zeros where it has not left zero."""
    return {v.name: errors[v.name] if v.name in errors else torch.zeros_like(bound.mu[v.name]) for v in bound.graph.vertices}


class Frozen:
    """Errors over the predictions of the feed-forward pass; `values`: those that are known otherwise."""

    def __init__(self, bound: Bound, errors: Tensors, values: Tensors | None = None):
        self.bound, self.locals, self.errors, self.values = bound, bound.locals, errors, values or {}

    def value(self, name: str) -> Tensor:
        """v_i = E_i mu_i + eps_i; of an output its prediction."""
        mu = self.bound.mu[name]
        if name in self.values or name not in self.errors or name in self.bound.graph.outputs:
            return self.values.get(name, mu)
        return self.bound.expected(name, mu) + self.errors[name]

    def snapshot(self, graph: ComputationGraph) -> Snapshot:
        """Values and errors of a graph's vertices."""
        names = [vertex.name for vertex in graph.vertices]
        errors = full_errors(self.bound, self.errors)
        return Snapshot({name: self.value(name) for name in names}, {name: errors[name] for name in names})


class Descent(Relaxed, Protocol):
    """A state that descends the energy."""

    def energy(self) -> Tensor: ...

    def snapshot(self) -> Snapshot: ...


class Trajectory:
    """Energies, and with `record` whole states, at t = 0 .. T."""

    def __init__(self, state: Descent, record: bool):
        self.state = state
        self._energies: list[Tensor] = []
        self.history: list[Snapshot] | None = [] if record else None
        self.add()

    def add(self) -> None:
        """Take down the present state."""
        self._energies.append(self.state.energy())
        if self.history is not None:
            self.history.append(self.state.snapshot())

    @property
    def steps(self) -> int:
        """How many have been taken down after the start."""
        return len(self._energies) - 1

    @property
    def energies(self) -> Tensor:
        """(steps + 1,)."""
        return torch.stack(self._energies)


class Lazy:
    """A value computed when it is first asked for."""

    def __init__(self, compute: Callable[[], object]):
        self.compute: Callable[[], object] | None = compute

    def __call__(self):  # type: ignore[no-untyped-def]
        if self.compute is not None:
            self.value, self.compute = self.compute(), None
        return self.value


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """On the device, whether every entry is finite."""
    flags = [tensor.isfinite().all() for tensor in tensors]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def feed_forward_outcome(mu: Mapping[str, Tensor], updates: Tensors) -> Outcome:
    """What a call without a target found: values that are predictions."""
    return Outcome(
        losses=None,
        values=lambda: dict(mu),
        errors=lambda: {name: torch.zeros_like(value) for name, value in mu.items()},
        energy=lambda: torch.zeros(1),
        good=all_finite(mu.values()),
        complaint=lambda: "The feed-forward pass is not finite. Look for NaN or infinity in the inputs and the parameters.",
        plan="feed-forward pass, no target",
        updates=updates,
    )


def outcome(
    bound: Bound,
    call: Call,
    losses: Tensor,
    state: Relaxed,
    energies: Tensor,
    divergence: Tensor | None,
    gradients: Tensors,
    history: list[Snapshot] | None,
    plan: str,
) -> Outcome:
    good = energies.isfinite().all() if divergence is None else energies.isfinite().all() & ~divergence.any()
    return Outcome(
        losses=losses,
        values=lambda: {vertex.name: state.value(vertex.name) for vertex in call.trace.graph.vertices},
        errors=lambda: {name: error for name, error in full_errors(bound, state.errors).items() if name in call.trace.graph},
        energy=lambda: energies,
        good=good,
        complaint=partial(complaint, bound.mu, call.dynamics, energies, state.errors, divergence),
        plan=plan,
        gradients=gradients,
        updates=bound_updates(bound, call),
        history=history,
    )


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Of several relaxations from one start: the first one's course, what all have learned, and good if all are."""
    gradients = dict(outcomes[0].gradients)
    for outcome in outcomes[1:]:
        for name, gradient in outcome.gradients.items():
            gradients[name] = gradients[name] + gradient
    good = torch.stack([outcome.good for outcome in outcomes]).all()

    def complain() -> str:
        return next(outcome for outcome in outcomes if not bool(outcome.good)).complaint()

    return replace(outcomes[0], gradients=gradients, good=good, complaint=complain)


def relaxation(dynamics: Dynamics) -> str:
    """In words, what a rule relaxes of backprop's constraints."""
    feedback = f", {dynamics.feedback} feedback" if dynamics.feedback != "symmetric" else ""
    derivative = "" if dynamics.derivative else ", no f' on the way back"
    literal = " (so no closed form)" if dynamics.moves == "errors" or dynamics.learn_on_arrival else ""
    mixed = f", {dynamics.error_weights} error weights{literal}" if dynamics.has_error_weights else ""
    return feedback + derivative + mixed


def bound_updates(bound: Bound, call: Call) -> Tensors:
    """Buffers that the feed-forward pass moves, as BatchNorm's running statistics."""
    return {name: bound.environment[key] for name, key in call.trace.updates.items()}  # type: ignore[misc]


def diverged(energies: Tensor) -> Tensor:
    """(steps + 1,), where |F| > 1e3 (|F_0| + 1) after growing for 10 steps."""
    size = energies.abs()
    growing = torch.zeros_like(size, dtype=torch.bool)
    if len(size) > 10:
        grew = (size[1:] > size[:-1]).unfold(0, 10, 1).all(1)
        growing[10:] = grew
    return growing & (size > 1e3 * (size[0] + 1.0))


def complaint(
    mu: Mapping[str, Tensor], dynamics: Dynamics, energies: Tensor, errors: Mapping[str, Tensor], divergence: Tensor | None
) -> str:
    """In words: which step, which vertex, and what to do."""
    infinite = next((name for name, value in mu.items() if not value.isfinite().all()), None)
    if infinite is not None:
        where = f"The feed-forward prediction of {infinite!r} is not finite."
        return f"{where} Look for NaN or infinity in the inputs and parameters, or for a value node on a mask of -inf (value_nodes)."
    bad = ~energies.isfinite() if divergence is None else ~energies.isfinite() | divergence
    step = int(bad.nonzero()[0]) if bad.any() else len(energies) - 1
    sizes = {name: float(error.abs().max()) for name, error in errors.items() if error.numel()}
    worst = max(sizes, key=lambda name: float("inf") if sizes[name] != sizes[name] else sizes[name], default="output")
    if step == 0:
        where = f"The energy is not finite in the feed-forward pass (at {worst!r})."
        return f"{where} Look for NaN or infinity in the inputs, targets and parameters."
    other = ", or a nudge nearer to 0" if dynamics.is_nudged else ", or smaller steps of the weights" if dynamics.learn_at_each_step else ""
    remedy = f"a smaller rate than {dynamics.rate:g}{other}"
    return f"Inference diverged at step {step}, the largest error at {worst!r}. Use {remedy}."
