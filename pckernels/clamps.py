"""Which value nodes a call holds at given values, and which of its inputs move: checked here, and data from here on.

Without these, hidden value nodes are free, inputs are clamped, and the target clamps the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from pckernels.arguments import Arguments, broadcasts_to, clamped, is_batched
from pckernels.errors import Unsupported
from pckernels.graph import Trace
from pckernels.rules import Rule, require_number


@dataclass(frozen=True, eq=False)
class Free:
    """How an input is freed: it moves as a value node that nothing predicts, from where the call's argument puts it.

    Args:
        where: bool, broadcast to the input: it moves where this is true and stays as it was given elsewhere; None is everywhere.
        precision: of a Gaussian prior, at least 0: F has precision / 2 * ||input - mean||^2 besides. 0 is no prior.
        mean: of that prior; a number, or a tensor broadcast to the input.
    """

    where: Tensor | None = None
    precision: float = 0.0
    mean: float | Tensor = 0.0

    def __post_init__(self) -> None:
        require_number("precision", self.precision, at_least=0.0)
        if not isinstance(self.mean, Tensor):
            require_number("mean", self.mean)


@dataclass(frozen=True, eq=False)
class Held:
    """Values that a vertex is held at: everywhere, or where `mask` is true."""

    value: Tensor
    mask: Tensor | None = None

    def over(self, free: Tensor) -> Tensor:
        """The held values, and `free` where nothing is held."""
        return self.value if self.mask is None else torch.where(self.mask, self.value, free)

    def errors(self, prediction: Tensor) -> Tensor:
        """value - prediction where held, and 0 elsewhere."""
        difference = self.value - prediction
        return difference if self.mask is None else torch.where(self.mask, difference, 0.0)

    def free_part(self, step: Tensor) -> Tensor:
        """`step`, with 0 where held."""
        return torch.zeros_like(step) if self.mask is None else torch.where(self.mask, 0.0, step)


@dataclass(frozen=True, eq=False)
class Prior:
    """precision / 2 * ||v - mean||^2 in F, of a freed input."""

    precision: float
    mean: float | Tensor


@dataclass(frozen=True, eq=False)
class Clamps:
    """What a call holds and frees, by name. A freed input that moves in part is held, at its argument, elsewhere."""

    held: Mapping[str, Held] = field(default_factory=dict)
    freed: Mapping[str, Prior] = field(default_factory=dict)
    batch_dim: int = 0

    def __bool__(self) -> bool:
        return bool(self.held or self.freed)


@dataclass(frozen=True, eq=False)
class Wish:
    """`clamp=`, `free=` and `target_mask=` as the caller gave them."""

    clamp: Any = None
    free: Any = ()
    target_mask: Any = None

    def __bool__(self) -> bool:
        return _given(self.clamp) or _given(self.free) or self.target_mask is not None

    def clamps(self, traced: Trace, arguments: Arguments, rule: Rule) -> Clamps:
        """What these are on one call's graph.

        Raises:
            TypeError, ValueError: of the wrong type, name, shape, dtype or device.
            Unsupported: the rule does not descend F, or the input cannot be freed.
        """
        if not _given(self.clamp) and not _given(self.free):
            return Clamps()
        wanted = _mapping(self.clamp)
        for name in wanted:  # before the rule: one that took clamps would not take these
            _check_hidden(name, traced)
        _check_rule(rule, bool(wanted))
        held = {name: _held(name, given, traced, arguments) for name, given in wanted.items()}
        freed = {}
        for name, how in _freed(self.free).items():
            x = _input(name, traced, arguments)
            freed[name] = Prior(how.precision, _mean(name, how.mean, x))
            if how.where is not None:
                held[name] = Held(clamped(x), ~_mask(f"free[{name!r}]", how.where, x.shape, x.device))
        return Clamps(held, freed, arguments.batch_dim)


def target_mask(name: str, mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The part of an output whose target counts, checked."""
    return _mask(f"target_mask of {name!r}", mask, shape, device)


def _given(wish: Any) -> bool:
    """Whether it is anything but None or empty; a tensor, which is a mistake, is something."""
    return wish is not None and not (isinstance(wish, Mapping | str | list | tuple | set | frozenset) and not wish)


def _check_rule(rule: Rule, holds: bool) -> None:
    if rule.exact:
        raise Unsupported(
            f"{type(rule).__name__} gives backprop's gradient at the feed-forward pass, where nothing else can be clamped or free. "
            "Use Strict, Incremental or ErrorOptimization."
        )
    if rule.dynamics.has_error_weights:
        raise Unsupported(
            "Under error weights a value is compared with E mu, so that none is at rest in the feed-forward pass, where clamps start from. "
            'Use error_weights="identity", or no clamp and free.'
        )
    if holds and rule.dynamics.is_nudged and len(rule.dynamics.nudges) == 1:
        raise Unsupported(
            "What a nudge to one side learns is divided by beta, and so are the errors of clamped nodes, which do not vanish with beta. "
            'Use nudge=("centered", beta), in which they cancel, or no nudge.'
        )


def _mapping(clamp: Any) -> Mapping[str, Any]:
    if clamp is None:
        return {}
    if not isinstance(clamp, Mapping):
        raise TypeError(f"clamp must be a dict, name of a value node -> tensor or (tensor, mask); got {type(clamp).__name__}.")
    return clamp


def _held(name: str, given: Any, traced: Trace, arguments: Arguments) -> Held:
    value, mask = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(value, Tensor):
        raise TypeError(f"clamp[{name!r}] must be a tensor, or a tuple (tensor, mask); got {_kind(given)}.")
    shape, dtype = vertex_shape(traced, name, arguments.size), traced.graph[name].dtype
    if tuple(value.shape) != shape:
        raise ValueError(f"clamp[{name!r}] must have the value node's shape {shape}; got {tuple(value.shape)}.")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"clamp[{name!r}] must be {dtype} as its value node is; got {value.dtype}. Convert it with .to({dtype}).")
    _check_device(f"clamp[{name!r}]", value, arguments.device)
    return Held(clamped(value), None if mask is None else _mask(f"the mask of clamp[{name!r}]", mask, shape, arguments.device))


def _check_hidden(name: Any, traced: Trace) -> None:
    graph = traced.graph
    if name in graph.outputs:
        raise ValueError(
            f"{name!r} is an output, which its target clamps. Give target=, and target_mask= where only a part of it is known."
        )
    if name in traced.inputs:
        raise ValueError(f"{name!r} is an input, which is clamped already. free= lets it move, in part with pckernels.Free(where=mask).")
    if name not in graph:
        raise ValueError(f"There is no value node {name!r} to clamp; there are {_listed(v.name for v in graph.hidden)}.")


def _freed(free: Any) -> Mapping[str, Free]:
    if not _given(free):
        return {}
    if isinstance(free, str):
        return {free: Free()}
    if isinstance(free, Mapping):
        for name, how in free.items():
            if not isinstance(how, Free):
                raise TypeError(f"free[{name!r}] must be a pckernels.Free; got {type(how).__name__}.")
        return free
    if not isinstance(free, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in free):
        raise TypeError(f"free must be an input's name, several, or a dict, name -> pckernels.Free; got {_kind(free)}.")
    return {name: Free() for name in free}


def _input(name: str, traced: Trace, arguments: Arguments) -> Tensor:
    """The argument that is to move."""
    if name in traced.graph:
        what = "an output, which follows" if name in traced.graph.outputs else "a value node, which is free already"
        raise ValueError(f"{name!r} is {what}; free= is for inputs.")
    if name not in traced.graph.inputs:
        raise ValueError(f"There is no floating-point input {name!r} to free; there is {_listed(traced.graph.inputs)}.")
    x: Tensor = arguments.leaves[traced.inputs.index(name)]
    if not is_batched(x, arguments.batch_dim, arguments.size):
        raise Unsupported(f"The input {name!r} has no batch: it would move for all samples together. Give one for each sample.")
    return x


def _mean(name: str, mean: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(mean, Tensor):
        return mean
    what = f"the mean of free[{name!r}]"
    _check_broadcast(what, mean, tuple(x.shape))
    _check_device(what, mean, x.device)
    if mean.dtype != x.dtype:
        raise TypeError(f"{what} must be {x.dtype} as the input is; got {mean.dtype}. Convert it with .to({x.dtype}).")
    return clamped(mean)


def _mask(what: str, mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must be a bool tensor; got {type(mask).__name__}.")
    if mask.dtype is not torch.bool:
        raise TypeError(f"{what} must be a bool tensor; got {mask.dtype}. Compare with something, as in mask > 0.")
    _check_broadcast(what, mask, tuple(shape))
    _check_device(what, mask, device)
    return clamped(mask)


def _check_broadcast(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not broadcasts_to(tensor, shape):
        raise ValueError(f"{what} must broadcast to shape {shape}; got {tuple(tensor.shape)}.")


def _check_device(what: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{what} is on {tensor.device}, the inputs on {device}. Move one with .to(device).")


def vertex_shape(traced: Trace, name: str, batch: int | None) -> tuple[int, ...]:
    """The shape of a vertex's value for a batch of this size."""
    return tuple(size if isinstance(size, int) else int(sympy.sympify(size, {"B": batch})) for size in traced.graph[name].shape)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:12])) or "none"
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _kind(given: Any) -> str:
    return f"({', '.join(type(part).__name__ for part in given)})" if isinstance(given, tuple) else type(given).__name__
