"""The errors of a NodeGraph after T steps of fixed prediction: by path length in one sweep, or by the steps themselves."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .coefficients import coefficients
from .node_graph import NodeGraph
from .nodes import Edge

Errors = dict[Edge, Tensor]  # in PyTorch's sign, dloss/d(output of a node); an edge that is absent has error 0


class PathLengths:
    """c_k(T) by path length, and which lengths need not be told apart.

    The coefficients are cut into runs that are constant to rounding. A component of length k at a node above which it can
    still gain h has coefficients c_k .. c_{k+h}; when these lie in one run, its first length stands for it.
    """

    def __init__(self, c: Sequence[float], tolerance: float) -> None:
        self.c = [0.0 if abs(value) <= tolerance else value for value in c]
        self.first = [0] * len(self.c)
        for k in range(1, len(self.c)):
            start = self.first[k - 1]
            self.first[k] = start if abs(self.c[k] - self.c[start]) <= tolerance else k

    @classmethod
    def after(cls, steps: int, rate: float, longest: int, tolerance: float) -> "PathLengths":
        """The lengths 0 .. longest after `steps` steps. At rate 1 what is within reach has arrived, however long ago."""
        return cls(coefficients(min(steps, longest) if rate == 1.0 else steps, rate, longest), tolerance)

    @property
    def all_one(self) -> bool:
        return self.first[-1] == 0  # c_0 = 1

    def carried(self, length: int, remaining: int) -> int | None:
        """The length to carry in place of `length`; None where its coefficients are 0 from here on."""
        first = self.first[length]
        if self.first[length + remaining] != first:
            return length
        return first if self.c[first] else None

    def mix(self, parts: dict[int, Tensor]) -> Tensor | None:
        """sum_k c_k(T) * the part of length k; None for 0."""
        total = None
        for length, part in parts.items():
            scaled = part * self.c[length]
            total = scaled if total is None else total + scaled
        return total


def closed_form(graph: NodeGraph, seed: Tensor, lengths: PathLengths) -> Errors:
    """The T-step errors from one sweep: delta split by path length, each part weighted with its c_k(T)."""
    arrived: dict[Node, dict[int, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))  # node, length, output
    arrived[graph.root[0]][0][graph.root[1]] = seed
    errors: Errors = {}
    for node in graph.order:
        parts = arrived.pop(node, {})
        for output in graph.relaxing(node):
            error = lengths.mix({length: part[output] for length, part in parts.items() if output in part})
            if error is not None:
                errors[node, output] = error
        for length, part in parts.items():
            for (producer, output), gradient in graph.feedback(node, part):
                carried = lengths.carried(length + graph.cost((producer, output)), graph.remaining[producer])
                if carried is not None:
                    _add(arrived[producer][carried], output, gradient)
    return errors


def iterate(graph: NodeGraph, seed: Tensor, steps: int, rate: float) -> Errors:
    """The T Jacobi steps themselves."""
    errors: Errors = {}
    for _ in range(steps):
        drive = _drive(graph, seed, errors)
        errors = {edge: _moved(errors.get(edge), drive.get(edge), rate) for edge in errors | drive}
    return errors


def _drive(graph: NodeGraph, seed: Tensor, errors: Errors) -> Errors:
    """sum_j J_j^T eps_j at every edge that relaxes. What does not relax passes on what arrives, within the step."""
    drive: Errors = {}
    passing: dict[Node, dict[int, Tensor]] = defaultdict(dict, {graph.root[0]: {graph.root[1]: seed}})
    for node in graph.order:
        held = {output: errors[node, output] for output in graph.relaxing(node) if (node, output) in errors}
        for edge, gradient in graph.feedback(node, passing.pop(node, {}) | held):
            if graph.cost(edge):
                _add(drive, edge, gradient)
            else:
                _add(passing[edge[0]], edge[1], gradient)
    return drive


def _moved(error: Tensor | None, drive: Tensor | None, rate: float) -> Tensor:
    if error is None:
        assert drive is not None
        return rate * drive
    return (1.0 - rate) * error if drive is None else (1.0 - rate) * error + rate * drive


def _add(total: dict[Any, Tensor], key: Any, part: Tensor) -> None:
    # Not in place: what a node returns may be its own argument or a view of it.
    total[key] = total[key] + part if key in total else part
