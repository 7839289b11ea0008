"""The autograd graph behind a loss, as the computation graph of fixed prediction: order, path lengths, feedback."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import Node

from .errors import Unsupported
from .nodes import OPAQUE, Edge, gradient_edge, is_leaf, is_view, kind, output_count, under_view, vjp


class NodeGraph:
    """Every autograd node as a vertex: its prediction is its forward output, its local Jacobian its own vjp.

    Entering a node from a consumer adds 1 to a path's length. It adds 0 if the node is a view, the `.grad` of a leaf, an
    output, or lies between the loss and an output. Views are free wherever they stand: under an output that is a view,
    the tensor that it views is at distance 0.

    Args:
        loss: where feedback starts.
        outputs: the tensors at distance 0; none means the loss itself.
        inputs: the leaves that learn; None means all of them.

    Attributes:
        root: the edge of the loss.

    Raises:
        ValueError: an output does not lead to the loss.
    """

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor] = (), inputs: Sequence[Tensor] | None = None) -> None:
        self.root = gradient_edge(loss)
        self._producers = _consumers_first(self.root[0])
        self._outputs = {_under_views(edge) for edge in self._edges_of(outputs) or [self.root]}
        self._wanted = None if inputs is None else {id(tensor) for tensor in inputs}

    @cached_property
    def order(self) -> list[Node]:
        """The nodes between the loss and the leaves that learn, consumers before producers."""
        needed = self._leading_to(lambda edge: _is_wanted(edge[0], self._wanted))
        return [node for node in self._producers if node in needed]

    @cached_property
    def remaining(self) -> dict[Node, int]:
        """For each node of `order`, the most length that a path can still gain above it."""
        remaining: dict[Node, int] = {}
        for node in reversed(self.order):
            above = [self.cost(edge) + remaining[edge[0]] for edge in self._producers[node] if edge[0] in remaining]
            remaining[node] = max(above, default=0)
        return remaining

    @property
    def depth(self) -> int:
        """The length of the longest path from the loss."""
        return self.remaining.get(self.root[0], 0)

    @property
    def leaves(self) -> list[Tensor]:
        """Every leaf tensor behind the loss."""
        return [node.variable for node in self._producers if is_leaf(node)]  # type: ignore[attr-defined]

    def cost(self, edge: Edge) -> int:
        """1 where `edge` enters a vertex whose error relaxes, 0 where feedback arrives within the step."""
        node, _ = edge
        return 0 if edge in self._outputs or node in self._between or is_leaf(node) or is_view(node) else 1

    def relaxing(self, node: Node) -> list[int]:
        """Those outputs of `node` that hold an error which moves from step to step."""
        return [output for output in range(output_count(node)) if self.cost((node, output))]

    def feedback(self, node: Node, errors: Mapping[int, Tensor]) -> Iterator[tuple[Edge, Tensor]]:
        """J^T errors of one node, where `errors` is by output: (edge, gradient) for each producer above which errors relax."""
        if not errors or not self.remaining[node]:
            return
        gradients = vjp(node, [errors.get(output) for output in range(output_count(node))])
        for edge, gradient in zip(self._producers[node], gradients, strict=True):
            if gradient is not None and edge[0] in self.remaining:
                yield edge, gradient

    def require_walkable(self) -> None:
        """Raise Unsupported where feedback must pass a node that only the engine may differentiate."""
        for node in self.order:
            if self.remaining[node] and kind(node) in OPAQUE:
                raise Unsupported(f"Errors cannot relax through {node.name()}: {OPAQUE[kind(node)]}. rate=1.0 with steps=None works.")

    @cached_property
    def _between(self) -> set[Node]:
        return self._leading_to(self._outputs.__contains__)

    def _edges_of(self, outputs: Sequence[Tensor]) -> list[Edge]:
        edges = [gradient_edge(tensor) for tensor in outputs]
        read = {edge for edges in self._producers.values() for edge in edges} | {self.root} if edges else set()
        for position, edge in enumerate(edges):
            if edge not in read:
                raise ValueError(f"output tensor {position} does not lead to the loss; pass the tensor the loss was computed from.")
        return edges

    def _leading_to(self, target: Callable[[Edge], bool]) -> set[Node]:
        """The nodes from which an edge that meets `target` is reached, by one edge or more."""
        found: set[Node] = set()
        for node in reversed(self._producers):
            if any(target(edge) or edge[0] in found for edge in self._producers[node]):
                found.add(node)
        return found


def _consumers_first(root: Node) -> dict[Node, Sequence[Edge]]:
    """Every node behind `root` with the edges it has read, each node after all of its consumers."""
    edges: dict[Node, Sequence[Edge]] = {}  # also keeps the nodes' Python objects alive, so that they stay the same ones
    finished: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in edges:
            edges[node] = node.next_functions  # type: ignore[assignment]
            stack += [producer for producer, _ in edges[node] if producer is not None and producer not in edges]
        else:
            finished[stack.pop()] = None
    return {node: edges[node] for node in reversed(finished)}


def _under_views(edge: Edge) -> Edge:
    while is_view(edge[0]):
        edge = under_view(*edge)
    return edge


def _is_wanted(node: Node | None, wanted: set[int] | None) -> bool:
    if node is None or not is_leaf(node):
        return False
    return wanted is None or id(node.variable) in wanted  # type: ignore[attr-defined]
