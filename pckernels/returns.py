"""The way by which errors come back through a vertex in code, where it is not the transposed Jacobian of its prediction.

As routes.py has it for the reference: a stage is returned through as another of the same shape, a product with its backward weight psi in
place of W, an activation function without its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pckernels.instructions import ABSENT, Activation
from pckernels.program import Kind, Stage
from pckernels.rules import Dynamics


@dataclass(frozen=True)
class Way:
    """How errors come back to values. What weights learn from has nothing to do with it.

    Attributes:
        own_weights: by backward weights, one for each weight; derivative: with f' of activation functions.
    """

    own_weights: bool = False
    derivative: bool = True

    @staticmethod
    def of(dynamics: Dynamics) -> Way:
        return Way(dynamics.feedback != "symmetric", dynamics.derivative)

    @property
    def is_own(self) -> bool:
        """Whether it is another than the transposed Jacobian."""
        return self.own_weights or not self.derivative

    def through(self, stage: Stage, backward_weight: Callable[[int], int]) -> Stage:
        """The stage whose transposed Jacobian errors come back by. backward_weight: place of a weight -> place of its psi."""
        if stage.kind is Kind.ACTIVATION and not self.derivative and stage.p[0] != Activation.AFFINE:
            return replace(stage, p=(int(Activation.AFFINE),), f=(1.0, 0.0))
        if stage.weight != ABSENT and self.own_weights:
            return replace(stage, weight=backward_weight(stage.weight))
        return stage


TRANSPOSED = Way()
