"""The computation graph: vertices with parents and predictions, their distances, and the graph made level.

A vertex i holds a value node v_i and predicts it as mu_i = f_i(v_pa(i); theta_i). Distances count edges to an output:
`distance` is the longest path, `shortest` the shortest one; an output is at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

Taps = tuple[tuple[Tensor, Tensor], ...]
Predict = Callable[..., tuple[Tensor, Taps]]


@dataclass(frozen=True)
class Vertex:
    """One vertex of a computation graph.

    Attributes:
        name: the submodule's path, `#2` for its second call, `lstm.l0.t3.f` for cells, `add#2` for joins, `output`.
        parents: names of the vertices and float inputs whose values it reads.
        distance: edges on the longest path to an output; 0 for an output.
        shortest: edges on the shortest path to an output.
        parameters: the module's parameters that it learns, as in `named_parameters()`.
        operations: what it computes, in words, for the table.
        shape: of its value, with "B" for the batch.
        time: the time step of a recurrent cell's vertex, or None.
        predict: f_i(*parents, *weights, *constants) -> (mu_i, taps); a tap is the (input, output) of one product with a
            weight, so that the local update of all uses of a weight is one sum of outer products.
        weights: names of the weights that `predict` reads; constants: likewise, the rest (sizes, masks, buffers).
        taps: the (weight, bias or None) names of each tap.
        direct: the weights that `predict` reads outside of those products.
        batch_axis: the axis of its value that is the batch, or None where samples are folded into another axis.
        dtype: of its value; under autocast the prediction is cast to it.
    """

    name: str
    parents: tuple[str, ...]
    predict: Predict = field(repr=False)
    distance: int = 0
    shortest: int = 0
    parameters: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    shape: tuple[Any, ...] = ()
    time: int | None = None
    weights: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    taps: tuple[tuple[str, str | None], ...] = ()
    direct: tuple[str, ...] = ()
    batch_axis: int | None = None
    dtype: torch.dtype | None = None

    @property
    def body(self) -> fx.Graph | None:
        """The operations of `predict`, where it was cut out of a captured graph: what a lowering reads."""
        return getattr(getattr(self.predict, "__self__", None), "graph", None)


@dataclass(frozen=True)
class Derived:
    """A tensor or number that a call computes once from other quantities: a weight expression, a size, a mask, a statistic.

    kind: "weight" (a function of parameters; gradients flow through it), "constant" (no value node enters), or "held" (a
    random draw or a batch statistic, taken in the feed-forward pass and held).
    """

    name: str
    kind: str
    compute: Callable[..., Any] = field(repr=False)
    reads: tuple[str, ...]
    of_shapes: bool = False  # a constant that depends on the shapes of what it reads, not on the numbers


class ComputationGraph:
    """Vertices in topological order, between clamped inputs and outputs.

    Attributes:
        vertices: the hidden and output vertices, parents before children.
        inputs: names of the clamped float inputs.
        outputs: names of the output vertices, in the order of the module's results.
        derived: what a call computes beside the values, by name.
        schedule: names of vertices and derived quantities in the order of the feed-forward pass.
    """

    def __init__(
        self,
        vertices: Sequence[Vertex],
        inputs: Sequence[str],
        outputs: Sequence[str],
        derived: Iterable[Derived] = (),
        schedule: Sequence[str] | None = None,
    ):
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.derived = {item.name: item for item in derived}
        self.vertices = _with_distances(vertices, set(outputs))
        self._by_name = {vertex.name: vertex for vertex in self.vertices}
        self.schedule = tuple(schedule) if schedule is not None else tuple(self._by_name)
        self.children = _children(self.vertices)
        self._level: ComputationGraph | None = None

    def __getitem__(self, name: str) -> Vertex:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self.vertices)

    @property
    def hidden(self) -> list[Vertex]:
        """The vertices whose values are free."""
        outputs = set(self.outputs)
        return [vertex for vertex in self.vertices if vertex.name not in outputs]

    @property
    def depth(self) -> int:
        """The longest distance of any vertex: the steps after which every error has arrived."""
        return max((vertex.distance for vertex in self.vertices), default=0)

    @property
    def is_level(self) -> bool:
        """Whether every edge between free vertices spans exactly one level, so that every path to an output is as long."""
        return all(self._span(vertex, parent) == 1 for vertex in self.vertices for parent in self.free_parents(vertex))

    def free_parents(self, vertex: Vertex) -> list[str]:
        """The parents whose values move: inputs are clamped."""
        return [parent for parent in vertex.parents if parent in self._by_name]

    def _span(self, vertex: Vertex, parent: str) -> int:
        return self[parent].distance - vertex.distance

    def levelled(self) -> ComputationGraph:
        """The same graph with identity vertices on every edge that skips a level (Salvatori et al. 2021, 2103.04689).

        An edge i -> j gets distance(i) - distance(j) - 1 of them; edges out of i share what they can. Edges from clamped
        inputs need none.
        """
        if self._level is None:
            self._level = self._make_level()
        return self._level

    def _make_level(self) -> ComputationGraph:
        pads: dict[str, Vertex] = {}
        vertices: list[Vertex] = []
        for vertex in self.vertices:
            vertices.append(replace(vertex, parents=tuple(self._padded(parent, vertex, pads) for parent in vertex.parents)))
        ordered = _insert_after_parents(vertices, pads.values())
        schedule = _spliced(self.schedule, ordered)
        return ComputationGraph(ordered, self.inputs, self.outputs, self.derived.values(), schedule)

    def _padded(self, parent: str, child: Vertex, pads: dict[str, Vertex]) -> str:
        if parent not in self:
            return parent
        source = self[parent]
        for distance in range(source.distance - 1, child.distance, -1):
            name = f"{source.name}@{distance}"
            if name not in pads:
                pads[name] = Vertex(name, (parent,), _identity, operations=("identity",), shape=source.shape, dtype=source.dtype)
            parent = name
        return parent

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("vertex", "distance", "shape", "parents", "operations", "parameters")]
        rows += [(name, "clamped", "", "", "", "") for name in self.inputs]
        rows += [_row(vertex) for vertex in self.vertices]
        widths = [min(48, max(len(row[k]) for row in rows)) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        summary = f"{len(self.hidden)} value nodes, {len(self.outputs)} output(s), depth {self.depth}"
        return "\n".join([*lines, summary + ("" if self.is_level else ", not level (some edges skip)")])


def feature_axis(dimensions: int) -> int:
    """Where the features of a value with so many dimensions lie: channels of four or five, else the last."""
    return 1 if dimensions in (4, 5) else -1


def _row(vertex: Vertex) -> tuple[str, ...]:
    shape = "x".join(map(str, vertex.shape))
    return (
        vertex.name,
        str(vertex.distance),
        shape,
        _short(vertex.parents),
        " ".join(vertex.operations),
        _short(vertex.parameters),
    )


def _short(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 48 else f"{names[0]}, .. {names[-1]} ({len(names)})"


def _identity(value: Tensor) -> tuple[Tensor, Taps]:
    return value.view_as(value), ()


def _children(vertices: Iterable[Vertex]) -> dict[str, tuple[str, ...]]:
    children: dict[str, list[str]] = {vertex.name: [] for vertex in vertices}
    for vertex in vertices:
        for parent in vertex.parents:
            if parent in children:
                children[parent].append(vertex.name)
    return {name: tuple(names) for name, names in children.items()}


def _with_distances(vertices: Sequence[Vertex], outputs: set[str]) -> tuple[Vertex, ...]:
    children = _children(vertices)
    longest: dict[str, int] = {}
    shortest: dict[str, int] = {}
    for vertex in reversed(vertices):
        name = vertex.name
        if name in outputs:
            longest[name] = shortest[name] = 0
        else:
            longest[name] = 1 + max(longest[child] for child in children[name])
            shortest[name] = 1 + min(shortest[child] for child in children[name])
    return tuple(replace(vertex, distance=longest[vertex.name], shortest=shortest[vertex.name]) for vertex in vertices)


def _insert_after_parents(vertices: Sequence[Vertex], pads: Iterable[Vertex]) -> list[Vertex]:
    waiting: dict[str, Vertex] = {pad.parents[0]: pad for pad in pads}
    ordered: list[Vertex] = []
    for vertex in vertices:
        ordered.append(vertex)
        while ordered[-1].name in waiting:
            ordered.append(waiting.pop(ordered[-1].name))
    return ordered


def _spliced(schedule: Sequence[str], vertices: Sequence[Vertex]) -> list[str]:
    """`schedule` with the vertices that it lacks put right behind their predecessor."""
    followers: dict[str, list[str]] = {}
    known, last = set(schedule), ""
    for vertex in vertices:
        if vertex.name in known:
            last = vertex.name
        else:
            followers.setdefault(last, []).append(vertex.name)
    return [name for item in schedule for name in (item, *followers.get(item, ()))]


@dataclass(frozen=True, eq=False)
class Trace:
    """A graph with what ties it to its module: how a call's arguments and results map to it.

    Attributes:
        graph: the computation graph.
        inputs: for each flattened argument its name in the graph, or None where it is not a tensor.
        parameters, buffers: name in the graph -> name in the module; tensors: name in the graph -> a constant tensor.
        results: where each flattened result comes from: ("vertex", name), ("derived", name) or ("constant", value).
        output_spec: the results' structure.
        updates: buffer -> the derived quantity that it takes after the call.
        batched: whether the graph holds for any batch size.
        output_shapes: of each output vertex; sizes that depend on the batch are symbols.
    """

    graph: ComputationGraph
    inputs: tuple[str | None, ...]
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    results: tuple[tuple[str, Any], ...]
    output_spec: pytree.TreeSpec
    updates: Mapping[str, str]
    batched: bool
    output_shapes: Mapping[str, tuple[Any, ...]]

    def output_shape(self, name: str, batch: int | None) -> tuple[int, ...]:
        """The shape of an output vertex's value for a batch of this size."""
        return tuple(size if isinstance(size, int) else _evaluated(size.node.expr, batch) for size in self.output_shapes[name])


@lru_cache(maxsize=1024)
def _evaluated(expression: Any, batch: int | None) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
