"""A rate that is halved when it was too large, and an inference that stops when it does no more (Whittington & Bogacz 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from pckernels.backends.state import State
from pckernels.errors import Unsupported


class HalvedRate:
    """The rate of the steps to come. One sample whose energy rises halves it for all."""

    def __init__(self, state: State, rate: float, least: float):
        folded = [vertex.name for vertex in state.graph.vertices if vertex.batch_axis is None]
        if folded:
            raise Unsupported(f"The rate is halved by the energy of each sample, but {folded[0]!r} folds samples into another axis.")
        self.state, self.rate = state, rate
        samples = max(1, state.losses.numel())
        self.least = least / (sum(state.bound.mu[vertex.name].numel() for vertex in state.graph.vertices) / samples or 1.0)
        self.energies = self._energies()

    def after(self) -> bool:
        """Look at a step; whether it was the last."""
        energies, before = self._energies(), self.energies
        self.energies = energies
        if bool((energies > before).any()):
            self.rate /= 2.0
            return False
        return bool(2.0 * (before - energies).mean() < self.least * self.rate)

    def _energies(self) -> Tensor:
        """(B,): F of each sample, without what does not move."""
        total = self.state.losses
        for vertex in self.state.graph.hidden:
            if vertex.name in self.state.errors:
                error = self.state.bound.whitened(vertex.name, self.state.errors[vertex.name])
                rows = error.movedim(vertex.batch_axis or 0, 0).reshape(total.numel(), -1)
                total = total + 0.5 * rows.square().sum(1, dtype=total.dtype)
        return torch.as_tensor(total)
