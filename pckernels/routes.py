"""The way by which errors come back through a vertex, where it is not the transposed Jacobian of its prediction.

A route is the vertex's own function with another derivative: at each product with a weight W that of the same product with
a backward weight psi, and at each activation function, if its derivative is dropped, that of the identity. Both are put in
after the fact: `carried` has the value of one tensor and passes its gradient to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from pckernels.errors import Unsupported
from pckernels.expansion import NORMS, packet_of
from pckernels.graph import ComputationGraph, Derived, Trace, Vertex
from pckernels.products import linear

aten = torch.ops.aten

# Products, with the arguments in which a weight multiplies a value.
_PRODUCTS: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((linear, aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution), (1,)),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), (1,)),
    **dict.fromkeys((aten.mm, aten.matmul, aten.bmm), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.baddbmm), (1, 2)),
}
# What reads a weight element by element: nothing is transported by it.
_GAINS = {aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.layer_norm, aten.group_norm, aten.instance_norm, aten.batch_norm, *NORMS}
_ACTIVATIONS = {
    aten.relu,
    aten.relu6,
    aten.leaky_relu,
    aten.prelu,
    aten._prelu_kernel,
    aten.rrelu,
    aten.elu,
    aten.selu,
    aten.celu,
    aten.gelu,
    aten.silu,
    aten.mish,
    aten.softplus,
    aten.tanh,
    aten.sigmoid,
    aten.log_sigmoid,
    aten.hardtanh,
    aten.hardsigmoid,
    aten.hardswish,
    aten.hardshrink,
    aten.softshrink,
    aten.threshold,
    aten.clamp,
    aten.clamp_min,
    aten.clamp_max,
}
# Weight expressions that are linear and only choose or arrange entries: they mean the same of a backward weight.
_ARRANGEMENTS = {
    aten.slice,
    aten.select,
    aten.narrow,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unbind,
    aten.t,
    aten.transpose,
    aten.permute,
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.squeeze,
    aten.unsqueeze,
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.cat,
    aten.stack,
}


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[None, Tensor]:
        return None, errors[0]


def carried(value: Tensor, carrier: Tensor) -> Tensor:
    """`value`, with the gradient of `carrier`, a tensor of the same shape."""
    return _Carry.apply(value, carrier)


@dataclass(frozen=True)
class Route:
    """`run`(*parents, *weights, *constants, *psi) is the vertex's prediction, with the route's derivative; `weights` are those that
    have a psi, in its order."""

    run: Callable[..., Tensor]
    weights: tuple[str, ...]


@lru_cache(maxsize=4096)
def route_of(vertex: Vertex, free: tuple[str, ...], own_weights: bool, derivative: bool) -> Route | None:
    """The route of a vertex whose parents `free` move; None where it is the vertex's Jacobian as it is.

    Args:
        own_weights: psi in place of W at every product through which a free parent reaches the prediction.
        derivative: whether activation functions keep theirs.

    Raises:
        Unsupported: an operation multiplies by a weight in a way that is not known here.
    """
    body = vertex.body
    if body is None or not free:
        return None
    return _Rewriter(vertex, body, free, own_weights, derivative).route()


class _Rewriter:
    """Copies the body of a vertex with `carried` put in."""

    def __init__(self, vertex: Vertex, body: fx.Graph, free: Iterable[str], own_weights: bool, derivative: bool):
        self.vertex, self.body, self.own_weights, self.derivative = vertex, body, own_weights, derivative
        reads = [node for node in body.nodes if node.op == "placeholder"]
        names = dict(zip(reads, [*vertex.parents, *vertex.weights, *vertex.constants], strict=True))
        self.moving = {node for node, name in names.items() if name in set(free)}
        of_weights = reads[len(vertex.parents) : len(vertex.parents) + len(vertex.weights)]
        self.weights = {node: names[node] for node in of_weights}
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {node: self.graph.placeholder(node.name) for node in reads}
        self.psi: dict[str, fx.Node] = {}

    def route(self) -> Route | None:
        rest = [node for node in self.body.nodes if node.op not in ("placeholder", "output")]
        changed = [self._copy(node) for node in rest]
        if not any(changed):
            return None
        (output,) = [node for node in self.body.nodes if node.op == "output"]
        self.graph.output(self.copies[output.args[0][0]])
        return Route(fx.GraphModule({}, self.graph).forward, tuple(self.psi))

    def _copy(self, node: fx.Node) -> bool:
        """Whether its derivative is another."""
        self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        if not self.moving & set(node.all_input_nodes):
            return False
        self.moving.add(node)
        carrier = self._carrier(node)
        if carrier is not None:
            self.copies[node] = self.graph.call_function(carried, (self.copies[node], carrier))
        return carrier is not None

    def _carrier(self, node: fx.Node) -> fx.Node | None:
        packet = packet_of(node)
        if packet in _ACTIVATIONS:
            return None if self.derivative else self.copies[node.args[0]]  # type: ignore[index]
        read = [k for k, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg in self.weights]
        if not read or not self.own_weights or packet in _GAINS:
            return None
        if packet not in _PRODUCTS:
            raise Unsupported(
                f"{self.vertex.name!r} reads a weight in {packet}, for which there is no backward weight. "
                'Use feedback="symmetric", or another layer.'
            )
        replaced = [k for k in read if k in _PRODUCTS[packet]]
        arguments = [self._psi(self.weights[arg]) if k in replaced else self._copied(arg) for k, arg in enumerate(node.args)]
        return self.graph.call_function(node.target, tuple(arguments), dict(node.kwargs)) if replaced else None  # type: ignore[arg-type]

    def _psi(self, name: str) -> fx.Node:
        if name not in self.psi:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self.psi[name] = self.graph.placeholder(f"psi_{len(self.psi)}")
        return self.psi[name]

    def _copied(self, argument: Any) -> Any:
        return fx.map_arg(argument, self.copies.__getitem__)


def weights_behind(graph: ComputationGraph, weights: Iterable[str]) -> list[str]:
    """The parameters (by name in the graph) that these weights are, or are arrangements of.

    Raises:
        Unsupported: a weight is another function of parameters.
    """
    found: dict[str, None] = {}
    waiting = list(weights)
    while waiting:
        name = waiting.pop(0)
        derived = graph.derived.get(name)
        if derived is None:
            found[name] = None
        elif derived.kind == "weight":
            _require_arrangement(derived)
            waiting += derived.reads
    return list(found)


def _require_arrangement(derived: Derived) -> None:
    body: fx.Graph = derived.compute.__self__.graph  # type: ignore[attr-defined]
    for node in body.nodes:
        packet = packet_of(node)
        if node.op == "call_function" and packet not in _ARRANGEMENTS and "getitem" not in str(packet):
            raise Unsupported(
                f"A weight here is {packet} of parameters, which says nothing of a backward weight: "
                'only slices and rearrangements do. Use feedback="symmetric", or a module without this weight expression.'
            )


@lru_cache(maxsize=64)
def parameters_with_feedback(trace: Trace) -> tuple[str, ...]:
    """The parameters (by name in the graph) through which errors come back to a value that moves."""
    graph = trace.graph
    routes = [route_of(vertex, tuple(graph.free_parents(vertex)), True, True) for vertex in graph.vertices]
    weights: Sequence[str] = [name for route in routes if route is not None for name in route.weights]
    return tuple(dict.fromkeys(name for name in weights_behind(graph, dict.fromkeys(weights)) if name in trace.parameters))
