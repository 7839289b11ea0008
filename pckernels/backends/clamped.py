"""Value nodes that are held at given values, and inputs that move: the states of the rules that descend F, with these.

The start is the feed-forward pass with the held values in their places: v_i = value_i where held, v_i = mu_i elsewhere, so a
held entry has its error value_i - mu_i from t = 0 on, and every other error starts at 0. A freed input has no prediction: it moves
by what its children feed back, and by its prior if it has one, -d/dv of precision / 2 ||v - mean||^2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound
from pckernels.backends.forward_state import ForwardState
from pckernels.backends.results import Tensors
from pckernels.backends.results import energy as energy_of
from pckernels.backends.state import Moving, State
from pckernels.call import Call


def starting_state(bound: Bound, call: Call, beta: float = 1.0) -> State:
    """The values of a call at its start."""
    assert call.objective is not None
    return ClampedState(bound, call, beta) if call.clamps else State(bound, call.objective, beta)


def starting_errors(bound: Bound, call: Call) -> ForwardState:
    """The same for a rule that moves the errors."""
    assert call.objective is not None
    return ClampedForwardState(bound, call) if call.clamps else ForwardState(bound, call.objective)


class Clamped(Moving):
    """What both states share: errors at the start, and F with priors."""

    def __init__(self, bound: Bound, call: Call, beta: float = 1.0):
        assert call.objective is not None
        self.clamps = call.clamps
        super().__init__(bound, call.objective, beta)
        self.errors.update({name: held.errors(bound.mu[name]) for name, held in self.clamps.held.items() if name not in self.clamps.freed})
        self.errors.update({name: self.from_mean(name) for name in self.clamps.freed})

    def from_mean(self, name: str) -> Tensor:
        """The error of a freed input: v - mean, and 0 without a prior."""
        prior = self.clamps.freed[name]
        return self.value(name) - prior.mean if prior.precision else torch.zeros_like(self.bound.mu[name])

    def energy(self) -> Tensor:
        """F: half the squared hidden errors times their precisions, those of freed inputs too, and beta times the loss."""
        freed = self.clamps.freed
        predicted = {name: error for name, error in self.errors.items() if name not in self.graph.outputs and name not in freed}
        total = energy_of(self.beta * self.losses, [self.bound.whitened(name, error) for name, error in predicted.items()])
        total = total + self.bound.log_volume(self.losses)
        for name, prior in freed.items():
            total = total + 0.5 * prior.precision * self.errors[name].square().sum(dtype=total.dtype)
        return total


class ClampedState(Clamped, State):
    """Values are what moves, where nothing holds them."""

    def __init__(self, bound: Bound, call: Call, beta: float = 1.0):
        self.displacements: Tensors = {}
        super().__init__(bound, call, beta)
        self.displacements.update({name: self.errors[name] for name in self.clamps.held if name not in self.clamps.freed})

    def value(self, name: str) -> Tensor:
        value = super().value(name)
        return self.clamps.held[name].over(value) if name in self.clamps.held else value

    def own_drive(self, name: str) -> Tensor:
        return -self.clamps.freed[name].precision * self.errors[name] if name in self.clamps.freed else super().own_drive(name)

    def drives(self, names: Iterable[str]) -> Tensors:
        held = self.clamps.held
        return {name: held[name].free_part(drive) if name in held else drive for name, drive in super().drives(names).items()}

    def _error(self, name: str) -> Tensor:
        return self.from_mean(name) if name in self.clamps.freed else super()._error(name)


class ClampedForwardState(Clamped, ForwardState):
    """Errors are what moves, where no value is held: there the error follows from the value, and acts as that of an output does."""

    def __init__(self, bound: Bound, call: Call):
        self.shifts: Tensors = {}  # of freed inputs, from where they started
        super().__init__(bound, call)

    def value(self, name: str) -> Tensor:
        if name in self.clamps.freed:
            value = self.bound.mu[name] + self.shifts[name] if name in self.shifts else self.bound.mu[name]
        else:
            value = super().value(name)
        return self.clamps.held[name].over(value) if name in self.clamps.held else value

    def toward_parents(self, name: str, delta: Tensor | None) -> Tensor | None:
        """-dF/dmu_i: delta_i where the value follows from the prediction, and pi_i (value_i - mu_i) where it is held."""
        if name not in self.clamps.held or name in self.clamps.freed:
            return delta
        error, mask = self.bound.weighted(name, self.errors[name]), self.clamps.held[name].mask
        if mask is None:
            return error
        return torch.where(mask, error, 0.0 if delta is None else delta)

    def drive(self, name: str, delta: Tensor) -> Tensor:
        if name not in self.clamps.freed:
            return super().drive(name, delta)  # 0 where held, since there delta_i is the error itself
        drive = delta - self.clamps.freed[name].precision * self.errors[name]
        return self.clamps.held[name].free_part(drive) if name in self.clamps.held else drive

    def shift(self, name: str, step: Tensor) -> None:
        if name not in self.clamps.freed:
            return super().shift(name, step)
        self.shifts[name] = self.shifts[name] + step if name in self.shifts else step
        self.errors[name] = self.from_mean(name)

    def follow(self, moved: Iterable[str]) -> None:
        super().follow(moved)
        for name, held in self.clamps.held.items():
            if name not in self.clamps.freed:
                difference = held.value - self.locals[name].mu.detach()
                self.errors[name] = difference if held.mask is None else torch.where(held.mask, difference, self.errors[name])
