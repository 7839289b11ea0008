"""What other codes do otherwise than their equations, under `PCNetwork(match=...)`: as changes to a rule and to a loss.

- "millidge2020" (arXiv 2006.04182): F has no 1/2, so that the rate and the squared error's part in it are twice what is said; errors of one
  step before the last; the way back through a vertex with weights, and gradients, clamped to +-50; gradients doubled, and added twice a
  batch, the second time from what the children send back in place of the errors.
- "torch2pc" (Rosenbaum 2022, arXiv 2106.13082): weights learn from errors one step old. Strict reads them at the values after the last
  step; with fixed predictions that is one step less. A loss that is a mean over the batch is divided by it before inference.
- "pcx" (Pinchetti et al. 2025, arXiv 2407.01163): a nudge beta clamps the output to u + beta (y - u), u its feed-forward value, in place of
  weighing the loss. What is learned is divided by beta where beta is negative, and left as it is where it is positive.
- "whittington2017" (Whittington & Bogacz 2017): the rate is halved, for all samples and for good, after a step in which the energy of
  any sample rose; inference stops after a step, without such a sample, in which 2 F fell by less than 1e-6 * rate / units on average.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pckernels.call import Objective as Pull
from pckernels.losses import Loss
from pckernels.objective import Objective
from pckernels.rules import FixedPrediction, Rule, Strict, require_choice

MATCHES = ("millidge2020", "torch2pc", "pcx", "whittington2017")
CLAMP = 50.0
HALVING = 1e-6  # of its run script; divided there by the number of units that are no inputs


def check_match(match: Any, rule: Rule, loss: Loss, reduction: str = "sum") -> None:
    """Raise unless `match` is None, or the name of a code that has this rule and this loss."""
    if match is None:
        return
    require_choice("match", match, MATCHES)
    known = {"torch2pc": (Strict, FixedPrediction), "millidge2020": (FixedPrediction,)}.get(match, (Strict,))
    if not isinstance(rule, known):
        names = " and ".join(kind.__name__ for kind in known)
        raise ValueError(
            f"match={match!r} is of a code that has {names}, and not {type(rule).__name__}. Use such a rule, or leave match out."
        )
    if match in ("pcx", "whittington2017") and loss != "squared_error":
        raise ValueError(
            f'match={match!r} is of a code whose outputs are clamped to targets. Use loss="squared_error", or leave match out.'
        )
    if match == "millidge2020" and reduction != "sum":
        raise ValueError('match="millidge2020" is of a code that sums gradients over the batch, and clamps the sum. Use reduction="sum".')
    _check_options(match, rule)


def _check_options(match: str, rule: Rule) -> None:
    """The options that the codes do not have."""
    dynamics = rule.dynamics
    if match == "pcx":
        if len(dynamics.nudges) > 1:
            raise ValueError(
                "PCX nudges by +beta and -beta in turn, from one batch to the next. Use nudge=beta, and two networks on one module."
            )
        return
    if dynamics.momentum or dynamics.sweep != "jacobi" or dynamics.tolerance is not None or dynamics.is_nudged or dynamics.nested:
        text = "has no momentum, sweep, tolerance, nudge or order of its own"
        raise ValueError(f"match={match!r} is of a code that {text}. Leave these at their defaults, or leave match out.")
    if match in ("millidge2020", "torch2pc") and dynamics.steps == 0:
        raise ValueError(f"match={match!r} takes at least one step: the errors are those of before the last. Use steps=1 or more.")
    if match == "millidge2020" and not dynamics.rate < 1.0:
        raise ValueError(f"match={match!r} doubles the rate, which must then be below 2; got {dynamics.rate:g}. Use a rate below 1.")


class Matched:
    """A rule, the reduction and the loss as another code has them.

    Attributes:
        rule: with the changes, as data.
        factor: by how much gradients are to be multiplied beside the scale.
        divisor: by what the factor and the weights' own rate divide.
        reported: by what the sum of the losses divides to give `inference.loss`.
    """

    def __init__(self, match: str | None, rule: Rule, reduction: str, size: int | None, loss: Loss):
        self.match = match
        self.rule = rule.dynamics
        self.divisor = (size or 1) if reduction == "mean" else 1
        self.reported: float = self.divisor
        self.factor = 1.0
        self.pull = 1.0
        if match == "millidge2020":
            self._millidge2020(loss)
        elif match == "torch2pc":
            self._torch2pc()
        elif match == "pcx":
            self._pcx()
        elif match == "whittington2017":
            self.rule = replace(self.rule, halving=HALVING)

    def _millidge2020(self, loss: Loss) -> None:
        assert self.rule.steps is not None
        self.rule = replace(self.rule, steps=self.rule.steps - 1, rate=2.0 * self.rule.rate, closed_form=False, clamp=CLAMP)
        self.pull = 2.0 if loss == "squared_error" else 1.0
        self.reported *= self.pull

    def _torch2pc(self) -> None:
        if self.rule.moves == "errors":
            assert self.rule.steps is not None
            self.rule = replace(self.rule, steps=self.rule.steps - 1)
        else:
            self.rule = replace(self.rule, stale_errors=True)
        self.pull, self.divisor, self.reported = 1.0 / self.divisor, 1, 1

    def _pcx(self) -> None:
        (beta,) = self.rule.nudges
        self.rule = replace(self.rule, nudges=(1.0,))
        self.pull, self.factor = beta, 1.0 / beta if beta < 0 else 1.0
        self.reported *= beta**2

    def objective(self, objective: Objective | None) -> Pull | None:
        """The loss as inference sees it."""
        if objective is None or self.pull == 1.0:
            return objective
        return ClampedNudge(objective, self.pull) if self.match == "pcx" else ScaledLoss(objective, self.pull)


class ScaledLoss:
    """A loss times a number."""

    def __init__(self, objective: Objective, scale: float):
        self.objective, self.scale = objective, scale

    def __call__(self, mu: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, errors = self.objective(mu)
        return self.scale * losses, {name: self.scale * error for name, error in errors.items()}


class ClampedNudge:
    """The squared error to u + beta (y - u), where u are the first predictions that it is given: those of the feed-forward pass."""

    def __init__(self, objective: Objective, beta: float):
        self.objective, self.beta = copy.copy(objective), beta
        self.is_clamped = False

    def __call__(self, mu: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.is_clamped:
            self.objective.targets = {name: mu[name] + self.beta * (y - mu[name]) for name, y in self.objective.targets.items()}
            self.is_clamped = True
        return self.objective(mu)
