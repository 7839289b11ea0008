"""Predictive coding with a precision for each hidden vertex, as numpy loops: F = sum of 1/2 pi_i ||eps_i||^2 - 1/2 log pi_i + loss."""

from __future__ import annotations

import numpy as np

from oracle.layers import Array, Gradients
from oracle.strict import StrictLoop

Arrays = dict[str, Array]


class WeightedLoop(StrictLoop):
    """`fixed`: pi by vertex; `logs`: log pi by vertex, which learns and has its part in F."""

    def __init__(self, loop: StrictLoop, fixed: Arrays, logs: Arrays):
        super().__init__(loop.clamped, loop.vertices, loop.target, loop.loss)
        self.fixed, self.logs = fixed, logs

    @property
    def theta(self) -> Arrays:
        return super().theta | {f"pc.log_precision.{name}": value for name, value in self.logs.items()}

    def _pi(self, name: str) -> Array:
        return np.exp(self.logs[name]) if name in self.logs else self.fixed.get(name, 1.0)

    def _weighted(self, eps: Arrays) -> Arrays:
        return {name: self._pi(name) * error for name, error in eps.items()}

    def _energy(self, eps: Arrays, mu: Arrays) -> float:
        return super()._energy(eps, mu) - sum(0.5 * float(log) * eps[name].size for name, log in self.logs.items())

    def _learn(self, v: Arrays, eps: Arrays) -> Gradients:
        own = {f"pc.log_precision.{name}": 0.5 * (self._pi(name) * (eps[name] ** 2).sum() - eps[name].size) for name in self.logs}
        return super()._learn(v, eps) | {key: np.asarray(value) for key, value in own.items()}
