"""The graph in which some inputs move: each is a value node without parents, whose prediction is where it starts."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from pckernels.graph import ComputationGraph, Taps, Trace, Vertex


@lru_cache(maxsize=64)
def with_free_inputs(trace: Trace, names: frozenset[str], batch_axis: int) -> Trace:
    """The trace with these inputs as value nodes of the same names. What a call derives from a float input depends on its shape
    alone, or is held from the feed-forward pass, so nothing else changes."""
    graph = trace.graph
    roots = [Vertex(name, (), _start, operations=("free",), constants=(name,), batch_axis=batch_axis) for name in sorted(names)]
    inputs = [name for name in graph.inputs if name not in names]
    schedule = [*sorted(names), *graph.schedule]
    return replace(trace, graph=ComputationGraph([*roots, *graph.vertices], inputs, graph.outputs, graph.derived.values(), schedule))


def _start(argument: Tensor) -> tuple[Tensor, Taps]:
    return argument, ()
