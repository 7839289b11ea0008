"""The local update of the reference backend: d F / d theta_i = -(d mu_i / d theta_i)^T eps_i, summed over vertices.

Backward weights learn what their weights do (the same product of errors and inputs, transposed where they are used), error
weights by dF/dE_i = -eps_i mu_i^T. Where a vertex has a precision, pi_i eps_i stands for eps_i throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pckernels.backends.feedforward import Bound, Local, Place, vjp
from pckernels.call import Call, Extra
from pckernels.graph import feature_axis
from pckernels.products import outer_products, stacked


class LocalUpdates:
    """Collects what every vertex contributes to its weights, from its own error and its own inputs alone.

    A product x W^T learns by the outer product of its error and its input; those of all vertices that share W are summed
    in one product at the end. Everything else learns by the vertex's own vector-Jacobian product.
    """

    def __init__(self, bound: Bound, factor: float | Tensor):
        self.bound = bound
        self.factor = -1.0 * factor
        self.sums: dict[str, Tensor] = {}
        self.outer: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def wanted(self, local: Local) -> list[Place]:
        """What the vertex must be differentiated for, in order to learn."""
        taps = [edge if self._learns(names) else None for names, (_, edge) in self._taps(local)]
        return [*taps, *local.direct]

    def add(self, local: Local, results: list[Tensor | None], coefficient: float = 1.0) -> None:
        """Take the vector-Jacobian products of `wanted` with the vertex's error, times `coefficient`."""
        taps = self._taps(local)
        for ((weight, bias), (x, _)), error in zip(taps, results[: len(taps)], strict=True):
            if error is not None:
                self._add_product(weight, bias, x, error * coefficient if coefficient != 1.0 else error)
        for name, result in zip(local.vertex.direct, results[len(taps) :], strict=True):
            if result is not None:
                _accumulate(self.sums, name, result * coefficient if coefficient != 1.0 else result)

    def learn(self, local: Local, error: Tensor, coefficient: float = 1.0) -> None:
        """Let one vertex learn from its error eps_i, times `coefficient`."""
        error = self.bound.weighted(local.vertex.name, error)
        self.add(local, vjp(local, error, self.wanted(local)), coefficient)
        key = self.bound.extra.error_weights.get(local.vertex.name)
        if key in self.bound.learning:
            _accumulate(self.sums, key, coefficient * _outer(error, local.mu.detach()))

    def learn_precisions(self, errors: Mapping[str, Tensor], coefficient: float = 1.0) -> None:
        """Let log pi learn by dF/dlog pi_i = 1/2 pi_i ||eps_i||^2 - 1/2 elements of v_i; an error that is absent is 0."""
        for name, key in self.bound.extra.log_precisions.items():
            if key in self.bound.learning:
                mu = self.bound.mu[name]
                square = self.bound.whitened(name, errors[name]).square().sum() if name in errors else mu.new_zeros(())
                _accumulate(self.sums, key, coefficient * 0.5 * (mu.numel() - square).to(self.bound.tensors[key].dtype))

    def gradients(self, others: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter in the graph -> the sum of its local updates, times -factor: the sign of ordinary PyTorch gradients.

        others: what has been summed elsewhere, times -factor, by weight.
        """
        found = dict(others or {})
        for name, total in self.sums.items():
            _accumulate(found, name, total * self.factor)
        joined: dict[object, Tensor] = {}
        for uses in self._products_by_error():
            errors = stacked(uses.errors)
            for name in uses.biases:
                _accumulate(found, name, errors.sum(0) * self.factor)
            for name in uses.weights:
                inputs = _joined_once([x for _, x in self.outer[name]], joined)
                _accumulate(found, name, outer_products(errors, inputs, self.factor))
        return self._with_backward_weights(self._with_zeros(self._through_weight_expressions(found)))

    def _products_by_error(self) -> list[_Uses]:
        """The weights and biases with the same errors together, as a gate's are: each list of errors is joined once, and let go."""
        uses: dict[object, _Uses] = {}
        for name, pairs in self.outer.items():
            errors = [error for error, _ in pairs]
            uses.setdefault(_identity(errors), _Uses(errors)).weights.append(name)
        for name, errors in self.rows.items():
            uses.setdefault(_identity(errors), _Uses(errors)).biases.append(name)
        return list(uses.values())

    def _with_zeros(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        # A parameter of the graph whose error has not arrived learns nothing, and says so, as loss.backward() would.
        for name in self.bound.learning:
            if name not in found:
                found[name] = torch.zeros_like(self.bound.tensors[name])
        return found

    def _with_backward_weights(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_backward_weights(self.bound.extra, self.bound.learning, found)

    def _taps(self, local: Local) -> list[tuple[tuple[str, str | None], tuple[Tensor, GradientEdge | None]]]:
        return list(zip(local.vertex.taps, local.taps, strict=True))

    def _learns(self, names: tuple[str, str | None]) -> bool:
        return any(name is not None and self.bound.weights[name].requires_grad for name in names)

    def _add_product(self, weight: str, bias: str | None, x: Tensor, error: Tensor) -> None:
        rows = error.reshape(-1, error.shape[-1])
        if self.bound.weights[weight].requires_grad:
            self.outer.setdefault(weight, []).append((rows, x.reshape(-1, x.shape[-1])))
        if bias is not None and self.bound.weights[bias].requires_grad:
            self.rows.setdefault(bias, []).append(rows)

    def _through_weight_expressions(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What reached functions of parameters (a slice of a weight, a normalised weight), brought to the parameters."""
        sources = self.bound.sources
        cast = {name: _like(total, self.bound.weights[name]) if name in self.bound.weights else total for name, total in found.items()}
        direct = {name: total for name, total in cast.items() if name not in self.bound.graph.derived}
        behind = [name for name in cast if name not in direct and sources[name].requires_grad]
        parameters = {name: p for name, p in sources.items() if name not in self.bound.graph.derived and p.requires_grad}
        if behind and parameters:
            totals = torch.autograd.grad(
                [sources[name] for name in behind], list(parameters.values()), [cast[n] for n in behind], allow_unused=True
            )
            for name, total in zip(parameters, totals, strict=True):
                if total is not None:
                    _accumulate(direct, name, total)
        return direct


def with_backward_weights(extra: Extra, learning: Sequence[str], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What parameters learn, and what their backward weights do, of those that learn: the same."""
    return found | {key: found[name] for name, key in extra.feedback.items() if key in learning}


class Learnt(Protocol):
    """A state that weights may learn from: predictions, and their errors."""

    @property
    def locals(self) -> dict[str, Local]: ...

    @property
    def errors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Lesson:
    """Predictions, and errors that need not be of the same moment."""

    locals: dict[str, Local]
    errors: dict[str, Tensor]


def learned(bound: Bound, call: Call, *states: Learnt, coefficients: Sequence[float] = (1.0,)) -> dict[str, Tensor]:
    """What all vertices learn from these states, each times its coefficient, by parameter; nothing where a call does not learn."""
    if not call.learn:
        return {}
    updates = LocalUpdates(bound, call.factor)
    for state, coefficient in zip(states, coefficients, strict=True):
        for name, error in state.errors.items():
            updates.learn(state.locals[name], error, coefficient)
        updates.learn_precisions(state.errors, coefficient)
    return updates.gradients()


@dataclass
class _Uses:
    """Weights and biases whose products have the same errors."""

    errors: list[Tensor]
    weights: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)


def _identity(parts: list[Tensor]) -> object:
    return tuple((part.data_ptr(), part.shape, part.stride()) for part in parts)


def _joined_once(parts: list[Tensor], known: dict[object, Tensor]) -> Tensor:
    # Gates share their inputs.
    key = _identity(parts)
    if key not in known:
        known[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return known[key]


def _accumulate(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value


def _outer(error: Tensor, mu: Tensor) -> Tensor:
    """The sum over samples (and positions) of error mu^T: (features, features)."""
    axis = feature_axis(mu.dim())
    rows = [tensor.movedim(axis, -1).flatten(0, -2) for tensor in (error, mu)]
    return rows[0].t() @ rows[1]


def _like(value: Tensor, weight: Tensor) -> Tensor:
    return value.to(weight.dtype).reshape(weight.shape) if value.dtype != weight.dtype or value.shape != weight.shape else value
