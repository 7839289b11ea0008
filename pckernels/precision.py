"""The precision pi of each hidden vertex: what a user may give, and what that means on a graph.

F weighs the squared error of a vertex by its precision: 1/2 pi_i ||eps_i||^2, for a learned one with -1/2 log pi_i for each of its
elements. The loss has weight 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pckernels.arguments import broadcasts_to
from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph, Trace, Vertex
from pckernels.rules import Dynamics

Precision = None | float | str | Mapping[str, float | Tensor | str]
LEARNED = "learned"


def check_precision(precision: Any) -> None:
    """Raise unless `precision` is None, a number, "learned", or a dict from names of vertices to numbers, tensors or "learned"."""
    if isinstance(precision, Mapping):
        for name, value in precision.items():
            if not isinstance(name, str):
                raise TypeError(f"precision takes names of vertices (str); got {type(name).__name__}.")
            _check_value(f"the precision of {name!r}", value, Tensor)
    elif precision is not None:
        _check_value("precision", precision)


def _check_value(what: str, value: Any, *others: type) -> None:
    if isinstance(value, Tensor) and Tensor in others:
        if not value.is_floating_point():
            raise TypeError(f"{what} must be floating point; got {value.dtype}.")
        if not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"{what} must be finite and greater than 0 in every element.")
    elif isinstance(value, str):
        if value != LEARNED:
            raise ValueError(f'{what} must be a number, or "{LEARNED}"; got {value!r}.')
    elif isinstance(value, bool) or not isinstance(value, int | float):
        kinds = 'a number, a tensor or "learned"' if others else 'a number, "learned", or a dict from vertices to such'
        raise TypeError(f"{what} must be {kinds}; got {type(value).__name__}.")
    elif not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} must be finite and greater than 0; got {value}.")


def precisions_on(graph: ComputationGraph, precision: Precision) -> dict[str, float | Tensor | str]:
    """Hidden vertex -> its precision, of those that have another than 1.

    Raises:
        ValueError: a name that is no hidden vertex of the graph, or a tensor that does not broadcast over its values.
    """
    hidden = [vertex.name for vertex in graph.hidden]
    if not isinstance(precision, Mapping):
        return {} if precision is None or precision == 1 else dict.fromkeys(hidden, precision)
    for name, value in precision.items():
        if name not in hidden:
            raise ValueError(_no_vertex(graph, name, hidden))
        if isinstance(value, Tensor):
            _check_shape(graph[name], value)
    return {name: value for name, value in precision.items() if isinstance(value, Tensor) or value != 1}


def _no_vertex(graph: ComputationGraph, name: str, hidden: list[str]) -> str:
    if name in graph.outputs:
        return f"precision: {name!r} is an output, whose loss has weight 1. Scale the loss in place of it."
    close = difflib.get_close_matches(name, hidden, 1)
    hint = f"Did you mean {close[0]!r}?" if close else "print(network.graph) shows them."
    return f"precision: the graph has no hidden vertex {name!r}. {hint}"


def _check_shape(vertex: Vertex, value: Tensor) -> None:
    shape = vertex.shape[1:] if vertex.batch_axis == 0 else None
    if value.numel() == 1:
        return
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"precision: the value of {vertex.name!r} has no shape of its own beside the batch; give it a number.")
    if not broadcasts_to(value, shape):
        raise ValueError(f"precision: the tensor for {vertex.name!r} has shape {tuple(value.shape)}; it must broadcast to {tuple(shape)}.")


def is_learned(precision: Precision) -> bool:
    """Whether any precision is learned."""
    values = precision.values() if isinstance(precision, Mapping) else [precision]
    return any(isinstance(value, str) for value in values)


def check_rule(dynamics: Dynamics, found: Mapping[str, float | Tensor | str]) -> None:
    """Raise where a rule makes no sense with these precisions."""
    if not found:
        return
    if dynamics.learn_on_arrival:
        raise ValueError(
            "ZeroDivergence is a statement about precision 1: a step of rate 1 then ends at the gradient. Use FixedPrediction."
        )
    if dynamics.is_nudged and len(dynamics.nudges) == 1 and is_learned(found):
        raise ValueError(
            "A precision cannot be learned under a one-sided nudge: its -1/2 log pi would be divided by beta. "
            'Use nudge=("centered", beta), or a fixed precision.'
        )
    if dynamics.moves == "errors":
        largest = max((float(torch.as_tensor(value).max()) for value in found.values() if not isinstance(value, str)), default=0.0)
        if not dynamics.rate * largest < 2.0:
            text = "fixed prediction converges where rate * precision lies in (0, 2)"
            raise ValueError(f"{text}; got {dynamics.rate:g} * {largest:g}. Use a smaller rate or precision.")


def check_closed_form(trace: Trace, dynamics: Dynamics, found: Mapping[str, float | Tensor | str]) -> None:
    """Raise where there is no closed form of fixed prediction with these precisions: off a chain, or with one for each element."""
    if not found or not dynamics.closed_form:
        return
    graph, remedy = trace.graph, 'Use solver="iterate".'
    if dynamics.nested or not is_chain(graph):
        raise Unsupported(f"Fixed prediction with precisions has a closed form on chains alone, and this graph is none. {remedy}")
    if any(isinstance(value, Tensor) and value.numel() > 1 for value in found.values()):
        raise Unsupported(f"Fixed prediction has no closed form with a precision for each element. {remedy}")


def is_chain(graph: ComputationGraph) -> bool:
    """Whether every hidden vertex has one child, and every vertex at most one parent that moves."""
    alone = all(len(graph.children[vertex.name]) == 1 for vertex in graph.hidden)
    return alone and all(len(graph.free_parents(vertex)) <= 1 for vertex in graph.vertices)
