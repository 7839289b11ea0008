"""The prediction of each vertex as a function cut out of the captured graph, and the graph of vertices that results."""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from pckernels.capture import Captured, is_mark
from pckernels.dependence import Dependence, operation_name
from pckernels.expansion import expand
from pckernels.graph import ComputationGraph, Derived, Trace, Vertex
from pckernels.placement import add_output_vertices, value_node_ends, value_node_names
from pckernels.products import linear

aten = torch.ops.aten


def cut(captured: Captured, value_nodes: str | Sequence[str], live_statistics: bool, argument_names: Sequence[str]) -> Trace:
    """The computation graph of a captured call; placement.py says where `value_nodes` puts the value nodes."""
    expand(captured.graph, live_statistics)
    facts = Dependence(captured)
    ends = value_node_ends(captured, facts, value_nodes)
    outputs = add_output_vertices(captured, facts, ends)
    return _Cutter(captured, facts, ends, outputs, argument_names, value_nodes).trace()


@dataclass
class _Piece:
    """The nodes from a vertex's end back to what it reads."""

    end: fx.Node
    body: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    constants: list[fx.Node] = field(default_factory=list)

    @property
    def reads(self) -> list[fx.Node]:
        return [*self.values, *self.weights, *self.constants]

    @property
    def products(self) -> list[fx.Node]:
        """The products with a weight (and bias) that the piece reads: aten.linear."""
        return [node for node in self.body if node.target is aten.linear.default and set(_operands(node)) <= set(self.weights)]


def _operands(linear: fx.Node) -> list[fx.Node]:
    return [arg for arg in linear.args[1:] if isinstance(arg, fx.Node)]


class _Cutter:
    def __init__(
        self,
        captured: Captured,
        facts: Dependence,
        ends: set[fx.Node],
        outputs: list[fx.Node | None],
        argument_names: Sequence[str],
        value_nodes: str | Sequence[str],
    ):
        self.captured, self.facts, self.outputs, self.ends = captured, facts, outputs, ends
        self.order = {node: k for k, node in enumerate(captured.graph.nodes)}
        self.pieces = self._live_pieces()
        self.ends = set(self.pieces)
        self.names = value_node_names(list(self.pieces), outputs, facts, value_nodes)
        self.inputs = _input_names(captured.inputs, argument_names, set(self.names.values()))
        self.derived: dict[fx.Node, Derived] = {}

    def trace(self) -> Trace:
        vertices = [self._vertex(piece) for piece in self.pieces.values()]
        captured = self.captured
        return Trace(
            updates={name: self._derive(node) for name, node in captured.updates.items()},
            results=tuple(self._result(node, vertex) for node, vertex in zip(captured.outputs, self.outputs, strict=True)),
            graph=self._graph(vertices),
            inputs=tuple(None if node is None else self.inputs[node] for node in captured.inputs),
            parameters={self._key(node): name for node, name in captured.parameters.items()},
            buffers={self._key(node): name for node, name in captured.buffers.items()},
            tensors={self._key(node): tensor for node, tensor in captured.tensors.items()},
            output_spec=captured.output_spec,
            batched=captured.batched,
            output_shapes={self.names[node]: tuple(node.meta["val"].shape) for node in self.outputs if node is not None},
        )

    def _graph(self, vertices: Sequence[Vertex]) -> ComputationGraph:
        read = {parent for vertex in vertices for parent in vertex.parents}
        inputs = [name for name in self.inputs.values() if name in read]
        steps = sorted([*self.ends, *self.derived], key=self.order.__getitem__)
        schedule = [self.names[node] if node in self.ends else self.derived[node].name for node in steps]
        outputs = [self.names[node] for node in self.outputs if node is not None]
        return ComputationGraph(vertices, inputs, outputs, self.derived.values(), schedule)

    def _result(self, result: Any, vertex: fx.Node | None) -> tuple[str, Any]:
        """Where a result comes from: ("vertex", name), ("derived", name) or ("constant", value)."""
        if vertex is not None:
            return "vertex", self.names[vertex]
        return ("derived", self._derive(result)) if isinstance(result, fx.Node) else ("constant", result)

    # Vertices

    def _live_pieces(self) -> dict[fx.Node, _Piece]:
        """The pieces of all vertices that an output depends on, parents first."""
        pieces: dict[fx.Node, _Piece] = {}
        waiting = [node for node in self.outputs if node is not None]
        while waiting:
            node = waiting.pop()
            if node not in pieces:
                pieces[node] = self._piece(node)
                waiting += [parent for parent in pieces[node].values if parent.op != "placeholder"]
        return {node: pieces[node] for node in sorted(pieces, key=self.order.__getitem__)}

    def _piece(self, end: fx.Node) -> _Piece:
        piece = _Piece(end)
        groups = {"body": piece.body, "value": piece.values, "weight": piece.weights, "constant": piece.constants}
        for node, group in self._walk(end, self._group_in_piece):
            groups[group].append(node)
        for nodes in groups.values():
            nodes.sort(key=self.order.__getitem__)
        return piece

    def _walk(self, end: fx.Node, group_of: Callable[[fx.Node], str]) -> list[tuple[fx.Node, str]]:
        """`end` and everything behind it, through the nodes of group "body"; each node once, with its group."""
        found, waiting, seen = [(end, "body")], [end], {end}
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    group = group_of(source)
                    found.append((source, group))
                    if group == "body":
                        waiting.append(source)
        return found

    def _group_in_piece(self, node: fx.Node) -> str:
        if node in self.ends or (node.op == "placeholder" and node in self.facts.values):
            return "value"
        if self.facts.is_weight(node):
            return "weight"
        return "constant" if self.facts.is_constant(node) else "body"

    def _vertex(self, piece: _Piece) -> Vertex:
        shape = tuple(piece.end.meta["val"].shape)
        products = piece.products
        return Vertex(
            name=self.names[piece.end],
            parents=tuple(self._key(parent) for parent in piece.values),
            predict=_compiled(piece.body, piece.reads, piece.end, products),
            parameters=tuple(self._parameters_behind(piece.weights)),
            operations=tuple(operation_name(node) for node in piece.body if not is_mark(node)) or ("identity",),
            shape=tuple(size if isinstance(size, int) else _in_words(size) for size in shape),
            dtype=piece.end.meta["val"].dtype,
            time=_time(piece.end),
            weights=tuple(self._derive(weight) for weight in piece.weights),
            constants=tuple(self._derive(constant) for constant in piece.constants),
            taps=tuple(self._tap(node) for node in products),
            direct=tuple(self._key(weight) for weight in piece.weights if set(weight.users) & set(piece.body) - set(products)),
            batch_axis=_batch_axis(shape),
        )

    def _tap(self, linear: fx.Node) -> tuple[str, str | None]:
        weight, *bias = _operands(linear)
        return self._key(weight), self._key(bias[0]) if bias else None

    def _parameters_behind(self, weights: Iterable[fx.Node]) -> list[str]:
        found = []
        for weight in weights:
            behind = self._walk(weight, lambda node: "body" if self.facts.is_weight(node) else "read")
            found += [self.captured.parameters[node] for node, _ in behind if node in self.captured.parameters]
        return list(dict.fromkeys(found))

    # What a call computes beside the values

    def _key(self, node: fx.Node) -> str:
        """The name of a quantity in the graph; a vertex's name where a vertex stands on the node."""
        if node in self.ends:
            return self.names[node]
        return self.inputs.get(node, f"%{node.name}")

    def _derive(self, node: fx.Node) -> str:
        if node.op != "placeholder" and node not in self.ends and node not in self.derived:
            body: list[fx.Node] = []
            reads: list[fx.Node] = []
            for found, group in self._walk(node, self._group_in_weight if self.facts.is_weight(node) else self._group_in_constant):
                (body if group == "body" else reads).append(found)
            body.sort(key=self.order.__getitem__)
            names = tuple(self._derive(source) for source in reads)
            kind = self._kind(node)
            of_shapes = kind == "constant" and _reads_shapes_alone(body, set(reads))
            self.derived[node] = Derived(self._key(node), kind, _compiled(body, reads, node), names, of_shapes)
        return self._key(node)

    def _kind(self, node: fx.Node) -> str:
        if node in self.facts.held:
            return "held"
        return "weight" if self.facts.is_weight(node) else "constant"

    def _group_in_weight(self, node: fx.Node) -> str:
        # Each operation of a weight expression stands for itself: what several weights share is differentiated once.
        return "read"

    def _group_in_constant(self, node: fx.Node) -> str:
        return "read" if node in self.ends or node.op == "placeholder" or node in self.facts.held else "body"


_OF_SHAPES = {
    getattr(torch.ops.aten, name)
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "sym_size")
}


def _reads_shapes_alone(body: Sequence[fx.Node], reads: Set[fx.Node]) -> bool:
    """Whether all that looks at what the body reads are operations that look at shapes: the zeros that a recurrent layer starts from."""
    return all(getattr(node.target, "overloadpacket", None) in _OF_SHAPES for node in body if reads & set(node.all_input_nodes))


def _input_names(inputs: Sequence[fx.Node | None], argument_names: Sequence[str], taken: set[str]) -> dict[fx.Node, str]:
    named = zip(inputs, argument_names, strict=True)
    return {node: f"input.{name}" if name in taken else name for node, name in named if node is not None}


def _in_words(size: torch.SymInt) -> str:
    expression = size.node.expr
    return str(expression.subs({symbol: sympy.Symbol("B") for symbol in expression.free_symbols}))


def _batch_axis(shape: Sequence[Any]) -> int | None:
    """The axis that is exactly the batch, if there is one."""
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt) and size.node.expr.is_symbol]
    return axes[0] if axes else None


def _time(end: fx.Node) -> int | None:
    return end.args[2] if is_mark(end) and end.args[2] >= 0 else None  # type: ignore[operator,return-value]


def _shapes(node: fx.Node) -> dict[str, Any]:
    """What a lowering must know of a node: its shape, sizes in words where they depend on the batch, and its dtype."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {}
    return {"shape": tuple(size if isinstance(size, int) else _in_words(size) for size in value.shape), "dtype": value.dtype}


def _compiled(
    body: Sequence[fx.Node], reads: Sequence[fx.Node], end: fx.Node, products: Sequence[fx.Node] | None = None
) -> Callable[..., Any]:
    """The body as a Python function of what it reads; with `products`, it returns their (input, output) pairs as well."""
    graph = fx.Graph()
    copies = {source: graph.placeholder(f"{source.name}_") for source in reads}
    for source, copy in copies.items():
        copy.meta = _shapes(source)
    for node in body:
        if is_mark(node):
            copies[node] = copies[node.args[0]]  # type: ignore[index]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = _shapes(node)
    for node in products or ():
        copies[node].target = linear
    if products is None:
        graph.output(copies[end])
    else:
        graph.output((copies[end], tuple((copies[node.args[0]], copies[node]) for node in products)))  # type: ignore[index]
    return fx.GraphModule({}, graph).forward
